"""A folder of images: its splits, its classes, their files, and what is skipped."""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from funcloss._files import reading
from funcloss.app.data.images import IMAGES
from funcloss.app.data.pictures import Pictures, read_pictures
from funcloss.app.data.records import InputSchema, LoadOptions, RawSplit, ordered
from funcloss.errors import DataError

_NAMES = {
    "train": ("train", "training"),
    "validation": ("val", "valid", "validation"),
    "test": ("test", "testing"),
}
_SPLITS = {name: split for split, names in _NAMES.items() for name in names}
_LEFT_BEHIND = ("__MACOSX", "@eaDir")  # by systems that pack and share folders


def read_folder(
    folder: Path, options: LoadOptions, schema: InputSchema | None = None
) -> dict[str, RawSplit]:
    """Read a folder of class folders of images, or of such folders ``train``, ``test``.

    Args:
        folder: Holds a folder per class, named as it; or, in any case, ``train`` (``training``) and
            perhaps ``validation`` (``val``, ``valid``) and ``test`` (``testing``), each of which
            does. Hidden files and folders are skipped, and links to folders within a class.
        options: Size, and whether to stream.
        schema: Of the model that the images are brought to the size and channels of.

    Returns:
        The splits that are there, by name, with a note of the files skipped.

    Raises:
        ConfigError: the images have several sizes and none was asked for.
        DataError: the folders are no splits or classes, there are no images, or some cannot be
            read.
    """
    skipped: Counter[str] = Counter()
    groups = _folders(folder, skipped)
    if splits := _split_folders(folder, groups):
        found = {
            split: _class_files(place, _folders(place, skipped), skipped)
            for split, place in splits.items()
        }
    else:
        found = {"train": _class_files(folder, groups, skipped)}
    classes = {split: ordered(files) for split, files in found.items()}
    pictures = {split: _of_files(files, classes[split]) for split, files in found.items()}
    read = {
        split: replace(raw, files=tuple(pictures[split].items))
        for split, raw in read_pictures(pictures, classes, options, schema).items()
    }
    return read | {"train": replace(read["train"], notes=_notes(folder, skipped))}


def files_in(folder: Path, suffixes: Collection[str], skipped: Counter[str]) -> list[Path]:
    """Return the files of some kinds in a folder and those beneath, in the order of their names.

    Args:
        folder: A folder. Hidden files and folders in it are skipped, and links to folders,
            which may lead back to it.
        suffixes: Of the files, in lower case.
        skipped: Counts the others, by kind; it is changed.

    Raises:
        DataError: a folder cannot be read.
    """
    found, todo = [], [folder]
    while todo:
        place = todo.pop()
        with reading(place):
            entries = list(place.iterdir())
        for entry in entries:
            if _is_hidden(entry):
                skipped["hidden"] += 1
            elif (wanted := entry.name.lower().endswith(tuple(suffixes))) and entry.is_file():
                found.append(entry)
            elif entry.is_dir():
                if entry.is_symlink():
                    skipped["links to folders"] += 1
                else:
                    todo.append(entry)
            elif wanted:
                skipped["broken links or no regular files"] += 1
            else:
                skipped[entry.suffix.lower() or "without suffix"] += 1
    return sorted(found)


def _is_hidden(path: Path) -> bool:
    return path.name.startswith(".") or path.name in _LEFT_BEHIND


def _folders(folder: Path, skipped: Counter[str]) -> list[Path]:
    """Return the folders in a folder, in the order of their names; count what else is there."""
    found = []
    with reading(folder):
        entries = sorted(folder.iterdir())
    for entry in entries:
        if _is_hidden(entry):
            skipped["hidden"] += 1
        elif not entry.is_dir():
            skipped["outside the class folders"] += 1
        elif entry.is_symlink() and folder.resolve().is_relative_to(entry.resolve()):
            raise DataError(f"{entry} is a link to a folder that it is in: remove it")
        else:
            found.append(entry)
    return found


def _split_folders(folder: Path, groups: Sequence[Path]) -> dict[str, Path]:
    """Return the folders of splits by the split, none if these are folders of classes.

    Raises:
        DataError: some are and some are not, there is no training split, or a split twice.
    """
    named = [g for g in groups if g.name.lower() in _SPLITS]
    others = [g.name for g in groups if g not in named]
    if not named or (others and not any(_inner(g) for g in named)):
        return {}  # a class may be called train, and holds images
    names = _listed(g.name for g in named)
    if others:
        raise DataError(
            f"{folder} has folders of splits ({names}) beside others ({_listed(others)}): leave "
            "only splits there, or only classes"
        )
    found = {_SPLITS[g.name.lower()]: g for g in named}
    if len(found) < len(named):
        raise DataError(f"{folder} has two folders of one split: {names}")
    if "train" not in found:
        raise DataError(
            f"{folder} has folders of splits ({names}) and none is train: add it, or give the "
            "path of one of them"
        )
    return found


def _class_files(
    folder: Path, groups: Sequence[Path], skipped: Counter[str]
) -> dict[str, list[Path]]:
    """Return the image files of each class folder."""
    _check_depth(folder, groups)
    found = {group.name: files_in(group, IMAGES, skipped) for group in groups}
    for name, files in found.items():
        if not files:
            raise DataError(
                f"{folder / name}: the folder of a class has no image: {', '.join(IMAGES)}"
            )
    if not found:
        raise DataError(
            f"{folder} holds no class folders: put the images of each class into a folder of its "
            "name"
        )
    return found


def _check_depth(folder: Path, groups: Sequence[Path]) -> None:
    """Raise ``DataError`` if class folders hold folders that look like classes themselves."""
    first: dict[str, str] = {}  # by name of an inner folder, that which holds it
    shared: dict[tuple[str, str], list[str]] = {}
    for group in groups:
        inner = _inner(group)
        if len(groups) == 1 and len(inner) > 1:
            raise DataError(
                f"{folder} holds one folder, {group.name}, with the folders {_listed(inner)}: if "
                f"these are the classes, give {group}"
            )
        for name in inner:
            other = first.setdefault(name, group.name)
            if other != group.name:
                shared.setdefault((other, group.name), []).append(name)
    for (one, other), names in shared.items():
        if len(names) > 1:
            raise DataError(
                f"{folder}: {one} and {other} both hold the folders {_listed(names)}: if these are "
                "the classes, call the folders above train, validation and test, or give one of "
                "them; if not, move the images up into the folder of their class"
            )


def _inner(group: Path) -> list[str]:
    with reading(group):
        entries = (p for p in group.iterdir() if p.suffix.lower() not in IMAGES)  # without a stat
        return sorted(p.name for p in entries if p.is_dir() and not _is_hidden(p))


def _of_files(groups: Mapping[str, Sequence[Path]], classes: tuple[str, ...]) -> Pictures:
    counts = torch.tensor([len(groups[name]) for name in classes])
    labels = torch.arange(len(classes)).repeat_interleave(counts)
    return Pictures([str(file) for name in classes for file in groups[name]], labels)


def _notes(folder: Path, skipped: Counter[str]) -> tuple[str, ...]:
    counted = ", ".join(f"{n:,} {kind}" for kind, n in skipped.most_common())
    return (f"{folder.name}: skipped what is no image of a class: {counted}",) * bool(counted)


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:6]) + (" ..." if len(names) > 6 else "")
