"""Arrays in one file: ``.npz`` and ``.safetensors`` with ``images`` and ``labels``, or x and y."""

import contextlib
import json
import math
import zipfile
import zlib
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from funcloss._files import reading, usable_memory
from funcloss.app.config import did_you_mean
from funcloss.app.data.records import RawSplit, ordered
from funcloss.errors import ConfigError, DataError

_WORDS = (("images", "labels"), ("x", "y"))  # what inputs and labels may be called, in any case
_FORMS = {  # how a split may be named beside it
    "train": ("{}", "train_{}", "{}_train"),
    "validation": ("validation_{}", "val_{}", "{}_validation", "{}_val", "{}_valid"),
    "test": ("test_{}", "{}_test"),
}
_CHANNELS = (1, 3, 4)
_BROKEN = (  # what reading a damaged, packed or encrypted archive raises
    *(zipfile.BadZipFile, zlib.error, ValueError, EOFError, NotImplementedError, RuntimeError),
    OverflowError,
)
_WHOLE = 2.0**53  # up to here a float tells one whole number from the next
_LARGEST = 1e15  # cost of an example
_HELD = 0.5  # of the machine's memory may go into the arrays of a file


def read_arrays(path: Path, amounts: Sequence[str] = ()) -> dict[str, RawSplit]:
    """Read a file of arrays: ``images`` and ``labels``, perhaps ``classes``, in several splits.

    Images are ``(n, height, width)`` or ``(n, height, width, channels)``, or features
    ``(n, features)``; labels are integers, one-hot rows or, in ``.npz``, strings. A file may hold
    ``train_images``, ``validation_images`` (``val_images``), ``test_images`` and so on instead; or
    Keras' ``x_train``, ``y_train``, ``x_test``, ``y_test``; or ``X`` and ``y``.

    Args:
        path: An ``.npz`` or ``.safetensors`` file; no pickle in it is ever loaded.
        amounts: Names of further arrays, ``(n,)``, with a cost of each example; they name a split
            as the labels do.

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
    with reading(path, kind="an .npz file", broken=_BROKEN):
        archive = opened.enter_context(zipfile.ZipFile(path))
    size = sum(member.file_size for member in archive.infolist())
    if size > _HELD * usable_memory():
        raise DataError(
            f"{path} unpacks to {size / 2**30:.1f} GiB, which this machine cannot hold: use a "
            "folder of images, or module:function that returns a torch.utils.data.Dataset"
        )
    members = {m.filename.removesuffix(".npy"): m for m in archive.infolist()}

    def read(name: str) -> np.ndarray:
        try:
            with archive.open(members[name]) as file:
                _check_header(f"{path}: {name}", file, members[name].file_size)
            with archive.open(members[name]) as file:
                return np.lib.format.read_array(file, allow_pickle=False)
        except _BROKEN as error:
            raise DataError(f"{path}: {name} cannot be read: {error}") from None

    return list(members), read


def _check_header(what: str, file: IO[bytes], size: int) -> None:
    """Raise unless an array in NumPy's format is as long as it says, before any room is made."""
    version = np.lib.format.read_magic(file)
    if version not in _HEADERS:
        raise ValueError(f"NumPy's format {version} is not one of numbers and strings")
    shape, _, dtype = _HEADERS[version](file)
    if dtype.hasobject:
        name = what.rpartition(": ")[2]
        raise DataError(
            f"{what} holds Python objects, which only a pickle could bring: save it as numbers, "
            f"or as np.array({name}, dtype=str)"
        )
    if math.prod(shape) * dtype.itemsize != size - file.tell():
        raise ValueError(f"{size - file.tell():,} bytes where its header says {shape} of {dtype}")


_HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


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
        with (
            reading(path, kind="of tensors that torch has", broken=(SafetensorError,)),
            safe_open(path, framework="pt") as file,
        ):
            return file.get_tensor(name)

    return names + ["classes"] * (named is not None), read


def _splits(
    path: Path, names: list[str], read: Reader, amounts: Sequence[str]
) -> dict[str, RawSplit]:
    classes = None
    if "classes" in names:
        classes = tuple(map(str, np.asarray(read("classes")).reshape(-1).tolist()))
    own = {name.lower(): name for name in reversed(names)}
    found = {}
    for split, forms in _FORMS.items():
        pairs = ((form, *words) for words in _WORDS for form in forms)
        form, x, y = next((p for p in pairs if p[0].format(p[1]) in own), ("", "", ""))
        if not form:
            continue
        x, y = own[form.format(x)], form.format(y)
        if y not in own:
            raise DataError(f"{path} has {x} but no {y}")
        inputs = as_inputs(f"{path}: {x}", read(x))
        labels, known = as_labels(f"{path}: {own[y]}", read(own[y]), classes)
        for name in amounts:
            check_amount(f"{path}", form.format(name), names)
        places = {name: form.format(name) for name in amounts}
        each = {name: as_amounts(f"{path}: {at}", read(at)) for name, at in places.items()}
        found[split] = RawSplit(inputs, labels, known, amounts=each)
    if "train" not in found:
        raise DataError(
            f"{path} must hold images and labels, train_images and train_labels, x_train and "
            f"y_train, or X and y; it holds {', '.join(names[:12]) or 'nothing'}"
        )
    return found


def as_inputs(what: str, array: np.ndarray | Tensor) -> Tensor:
    """Return images ``(n, height, width, channels)`` or features ``(n, features)``, as kept.

    uint8 images stay so, features of more digits than float32 has become float64, all else
    float32; ``what`` names the array in errors. Raises ``DataError`` for another form, and for NaN
    and infinities.
    """
    if isinstance(array, np.ndarray):
        if array.dtype.kind not in "buif":
            raise DataError(f"{what} must be numbers, got {array.dtype}")
        wide = array.ndim == 2 and array.dtype.kind != "b" and array.dtype.itemsize >= 4
        kept = np.float64 if wide and array.dtype != np.float32 else np.float32
        kept = np.uint8 if array.dtype == np.uint8 else kept
        array = torch.from_numpy(array.astype(kept, copy=False))
    elif array.dtype != torch.uint8:
        wide = array.dim() == 2 and array.element_size() >= 4 and array.dtype != torch.float32
        array = array.double() if wide else array.float()
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

    The array holds whole numbers or strings, shape ``(n,)`` or ``(n, 1)``, or one-hot rows,
    ``(n, classes)``; without ``classes`` the distinct labels are the names, of rows all columns.
    Raises ``DataError`` if they are neither, or out of range.
    """
    if isinstance(array, Tensor):
        array = (array.float() if array.is_floating_point() else array).detach().cpu().numpy()
    array = array[:, 0] if array.ndim == 2 and array.shape[1] == 1 else array
    if array.ndim == 2 and array.shape[1] > 1 and _is_one_hot(array):
        names = tuple(map(str, range(array.shape[1]))) if classes is None else classes
        if len(names) != array.shape[1]:
            raise DataError(
                f"{what} are one-hot of {array.shape[1]} classes, and there are {len(names)} names"
            )
        return torch.from_numpy(array.argmax(1)), names
    if array.ndim != 1:
        raise DataError(
            f"{what} must have shape (n,), one label per example, or one-hot rows, (n, classes); "
            f"got {array.shape}"
        )
    whole = array.dtype.kind == "f" and (abs(array) < _WHOLE).all()
    if whole and (array == array.round()).all():
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


def _is_one_hot(array: np.ndarray) -> bool:
    if array.dtype.kind not in "buif":
        return False
    ones = array == 1
    return bool((ones | (array == 0)).all() and (ones.sum(1) == 1).all())
