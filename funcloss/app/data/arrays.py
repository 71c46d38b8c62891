"""Arrays in one file: ``.npz`` and ``.safetensors`` with ``images`` and ``labels``."""

import contextlib
import json
import zipfile
import zlib
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from funcloss._files import reading
from funcloss.app.config import did_you_mean
from funcloss.app.data.records import RawSplit, ordered, physical_memory
from funcloss.errors import ConfigError, DataError

# name of a split, and what the names of its arrays may begin with
_PREFIXES = {"train": ("", "train_"), "validation": ("validation_", "val_"), "test": ("test_",)}
_CHANNELS = (1, 3, 4)
_LARGEST = 1e15  # cost of an example
_HELD = 0.5  # of the machine's memory may go into the arrays of a file


def read_arrays(path: Path, amounts: Sequence[str] = ()) -> dict[str, RawSplit]:
    """Read a file of arrays: ``images`` and ``labels``, perhaps ``classes``, in several splits.

    Images are ``(n, height, width)`` or ``(n, height, width, channels)``, or features
    ``(n, features)``; labels are integers or, in ``.npz``, strings. A file may hold
    ``train_images``, ``validation_images`` (``val_images``), ``test_images`` and so on instead.

    Args:
        path: An ``.npz`` or ``.safetensors`` file; no pickle in it is ever loaded.
        amounts: Names of further arrays, ``(n,)``, with a cost of each example; before them goes
            what goes before ``labels``.

    Returns:
        The splits that are there, by name.

    Raises:
        ConfigError: there is no array of such a name.
        DataError: the file cannot be read, or its arrays are not of these forms.
    """
    with reading(path), contextlib.ExitStack() as opened:
        read = _from_npz if path.suffix.lower() == ".npz" else _from_safetensors
        return _splits(path, *read(path, opened), amounts)


Reader = Callable[[str], np.ndarray | Tensor]


def _from_npz(path: Path, opened: contextlib.ExitStack) -> tuple[list[str], Reader]:
    broken = (zipfile.BadZipFile, ValueError, EOFError, NotImplementedError, OverflowError)
    with reading(path, kind="an .npz file", broken=broken):
        with zipfile.ZipFile(path) as archive:
            size = sum(member.file_size for member in archive.infolist())
        if size > _HELD * physical_memory():
            raise DataError(
                f"{path} unpacks to {size / 2**30:.1f} GiB, which this machine cannot hold: use a "
                "folder of images, or module:function that returns a torch.utils.data.Dataset"
            )
        file = opened.enter_context(np.load(path, allow_pickle=False))

    def read(name: str) -> np.ndarray:
        try:
            found = file[name]
        except (*broken, zlib.error, MemoryError, RuntimeError) as error:  # one with a password
            if "pickle" in str(error):
                raise DataError(
                    f"{path}: {name} holds Python objects, which only a pickle could bring: save "
                    f"it as numbers, or as np.array({name}, dtype=str)"
                ) from None
            raise DataError(f"{path}: {name} cannot be read: {error}") from None
        if not isinstance(found, np.ndarray):
            raise DataError(f"{path}: {name} is not an array")
        return found

    return list(file.files), read


def _from_safetensors(path: Path, opened: contextlib.ExitStack) -> tuple[list[str], Reader]:
    with (
        reading(path, kind="a .safetensors file", broken=(SafetensorError,)),
        safe_open(path, framework="pt") as file,
    ):
        names, header = list(file.keys()), file.metadata() or {}
    try:
        named = list(map(str, json.loads(header["classes"]))) if "classes" in header else None
    except (ValueError, TypeError, RecursionError):
        raise DataError(
            f"{path}: classes in its header must be a JSON list of names, got "
            f"{header['classes'][:40]!r}"
        ) from None

    def read(name: str) -> np.ndarray | Tensor:
        if name == "classes":
            return np.array(named, dtype=str)
        with safe_open(path, framework="pt") as file:
            return file.get_tensor(name)

    return names + ["classes"] * (named is not None), read


def _splits(
    path: Path, names: list[str], read: Reader, amounts: Sequence[str]
) -> dict[str, RawSplit]:
    classes = None
    if "classes" in names:
        classes = tuple(map(str, np.asarray(read("classes")).reshape(-1).tolist()))
    found = {}
    for split, prefixes in _PREFIXES.items():
        prefix = next((p for p in prefixes if f"{p}images" in names), None)
        if prefix is None:
            continue
        if f"{prefix}labels" not in names:
            raise DataError(f"{path} has {prefix}images but no {prefix}labels")
        inputs = as_inputs(f"{path}: {prefix}images", read(f"{prefix}images"))
        labels, own = as_labels(f"{path}: {prefix}labels", read(f"{prefix}labels"), classes)
        for name in amounts:
            check_amount(f"{path}", f"{prefix}{name}", names)
        each = {n: as_amounts(f"{path}: {prefix}{n}", read(f"{prefix}{n}")) for n in amounts}
        found[split] = RawSplit(inputs, labels, own, amounts=each)
    if "train" not in found:
        raise DataError(
            f"{path} must hold images and labels, or train_images and train_labels; it holds "
            f"{', '.join(names[:12]) or 'nothing'}"
        )
    return found


def as_inputs(what: str, array: np.ndarray | Tensor) -> Tensor:
    """Return images ``(n, height, width, channels)`` or features ``(n, features)``, as kept.

    uint8 images stay so, all else becomes float32; ``what`` names the array in errors. Raises
    ``DataError`` for another form, and for NaN and infinities.
    """
    if isinstance(array, np.ndarray):
        if array.dtype.kind not in "buif":
            raise DataError(f"{what} must be numbers, got {array.dtype}")
        kept = np.uint8 if array.dtype == np.uint8 else np.float32
        array = torch.from_numpy(array.astype(kept, copy=False))
    array = array if array.dtype == torch.uint8 else array.float()
    if array.dim() == 3:
        array = array[..., None]
    if array.dim() not in (2, 4):
        raise DataError(
            f"{what} must be (n, height, width), (n, height, width, channels) or (n, features), "
            f"got {tuple(array.shape)}"
        )
    if array.dim() == 4 and array.shape[-1] not in _CHANNELS:
        first = array.shape[1] in _CHANNELS
        way = (
            ": its channels come first, np.moveaxis(images, 1, -1) puts them last" if first else ""
        )
        raise DataError(f"{what} must have 1, 3 or 4 channels, last; got {tuple(array.shape)}{way}")
    if array.dim() == 2 and array.dtype == torch.uint8:
        array = array.float()
    check_finite(what, array)
    return array


def check_amount(what: str, name: str, known: Collection[str]) -> None:
    """Raise ``ConfigError`` unless data has the amounts that a cost names."""
    if name not in known:
        has = f"; it has {', '.join([*known][:12])}" if known else ""
        raise ConfigError(
            f"{what} has no {name!r}, which cost names{did_you_mean(name, known)}{has}"
        )


def as_amounts(what: str, array: Any) -> Tensor:
    """Return costs of examples, ``(n,)`` in float64; ``what`` names them in errors.

    Raises ``DataError`` for another form, and for what is negative or not finite.
    """
    array = array.detach().cpu().double() if isinstance(array, Tensor) else array
    array = np.asarray(array)
    array = array[:, 0] if array.ndim == 2 and array.shape[1] == 1 else array
    if array.ndim != 1 or array.dtype.kind not in "buif":
        raise DataError(
            f"{what} must be one number per example, (n,); got {array.dtype} {array.shape}"
        )
    values = torch.from_numpy(array.astype(np.float64))
    wrong = ~((values >= 0) & (values <= _LARGEST))
    if wrong.any():
        at = int(wrong.nonzero()[0])
        raise DataError(
            f"{what} must be finite and at least 0, as costs of single examples are; got "
            f"{values[at]:g} in example {at}"
        )
    return values


def check_finite(what: str, array: Tensor) -> None:
    """Raise ``DataError`` if an example of an array has NaN or an infinity in it."""
    for start in range(0, len(array), 4096):
        finite = array[start : start + 4096].isfinite()
        if not bool(finite.all()):
            row = start + int(finite[..., None].flatten(1).all(1).logical_not().nonzero()[0])
            raise DataError(f"{what} has a value that is not finite, in example {row}")


def as_labels(
    what: str, array: np.ndarray | Tensor, classes: tuple[str, ...] | None
) -> tuple[Tensor, tuple[str, ...]]:
    """Return labels that count from 0, and the names that they stand for.

    The array holds whole numbers or strings, shape ``(n,)`` or ``(n, 1)``; without ``classes`` the
    distinct labels are the names. Raises ``DataError`` if they are neither, or out of range.
    """
    if isinstance(array, Tensor):
        array = (array.float() if array.is_floating_point() else array).detach().cpu().numpy()
    array = array[:, 0] if array.ndim == 2 and array.shape[1] == 1 else array
    if array.ndim != 1:
        raise DataError(f"{what} must have shape (n,), one label per example; got {array.shape}")
    if array.dtype.kind == "f" and np.isfinite(array).all() and (array == array.round()).all():
        array = array.astype(np.int64)
    if array.dtype.kind not in "biuUS":
        raise DataError(f"{what} must be whole numbers or strings, got {array.dtype}")
    strings = array.dtype.kind in "US"
    if array.dtype.kind == "S":
        try:
            array = np.char.decode(array, "utf-8")
        except UnicodeDecodeError:
            raise DataError(f"{what} must be text in UTF-8: save them as dtype=str") from None
    if classes is not None and not strings:
        if len(array) and not 0 <= array.min() <= array.max() < len(classes):
            raise DataError(
                f"{what} must be in 0..{len(classes) - 1}, as there are {len(classes)} classes; "
                f"got {array.min()}..{array.max()}"
            )
        return torch.from_numpy(array.astype(np.int64)), classes
    distinct, inverse = np.unique(array.astype(str) if strings else array, return_inverse=True)
    named = [str(int(name)) if array.dtype.kind == "b" else str(name) for name in distinct]
    names = ordered(named) if classes is None else classes
    if unknown := [name for name in named if name not in set(names)]:
        raise DataError(f"{what}: {unknown[0]!r} is not among its classes")
    place_of = {name: i for i, name in enumerate(names)}
    place = torch.tensor([place_of[name] for name in named], dtype=torch.int64)
    return place[torch.from_numpy(inverse.reshape(-1))], names
