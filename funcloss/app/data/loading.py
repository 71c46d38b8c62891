"""Somebody's own data: a folder of images, arrays, a table, or what a function returns."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset as TorchDataset
from torch.utils.data import IterableDataset

from funcloss.app.addresses import imported, is_address
from funcloss.app.config import did_you_mean
from funcloss.app.data.arrays import as_inputs, as_labels, check_finite, read_arrays
from funcloss.app.data.dataset import Dataset, Examples
from funcloss.app.data.images import read_folder
from funcloss.app.data.parts import make_dataset
from funcloss.app.data.raw import Raw
from funcloss.app.data.streaming import Stream, item_shape
from funcloss.app.data.table import read_table
from funcloss.errors import ConfigError, DataError, FunclossError

_ARRAYS = (".npz", ".safetensors")
TABLES = (".csv", ".tsv", ".txt")
_FORMS = (
    "a folder of class folders, .npz, .safetensors, .csv (.tsv, .txt), or module:function that "
    "returns data"
)


class Known(NamedTuple):
    """What a model that is there already knows of its data."""

    classes: tuple[str, ...]
    columns: tuple[str, ...] = ()
    image_shape: tuple[int, ...] = ()  # channels, height, width; empty: it takes no images


class How(NamedTuple):
    """How to read somebody's data and to part it."""

    target: str = ""  # the column of the classes, of a table
    ignore: tuple[str, ...] = ()  # columns to leave out
    validation: str = ""  # where the validation part is, if not in the data itself
    test: str = ""
    val_fraction: float = 0.1
    test_fraction: float = 0.1
    image_size: int = 0
    stream: str = "auto"
    workers: int = 2


def load_own(
    address: str, how: How, *, refused: Mapping[str, str], known: Known | None = None
) -> Dataset:
    """Load data named by its path or as ``module:function``.

    Args:
        address: Where it is.
        how: How to read and to part it.
        refused: Code that must not be imported, each with the file that names it.
        known: The model that it is for, where it was trained on other data: what comes in one part
            is its test set, all of it.

    Returns:
        The data set on the CPU, its parts those that it brings or those that are cut.

    Raises:
        ConfigError: the request does not fit the data, or its code is refused.
        DataError: the data cannot be read, or cannot be learnt from.
    """
    parts = _read(address, how, known, refused)
    if isinstance(parts, Dataset):
        if how.validation or how.test:
            raise ConfigError(f"{address} has parts of its own: name no validation or test part")
        return parts
    for part, place in (("validation", how.validation), ("test", how.test)):
        if place and part in parts:
            raise ConfigError(f"{address} brings a {part} part: leave out {part}_dataset")
        if place:
            parts[part] = _one_part(place, part, how, parts["train"], refused)
    if known is not None:
        parts.setdefault("test", parts["train"])
    name = short_name(address)
    classes = parts["train"].classes if known is None else known.classes
    _check_classes(name, classes, len(parts["train"].labels) if known is None else None)
    _check_alike(name, parts)
    examples = {
        part: _examples(name if known else f"{name}, {part}", raw, classes)
        for part, raw in parts.items()
    }
    scale = () if parts["train"].as_they_are else None
    return make_dataset(
        name,
        classes,
        examples["train"],
        examples.get("test"),
        validation=examples.get("validation"),
        mean=scale,
        std=scale,
        val_fraction=how.val_fraction if known is None else 0.0,
        test_fraction=how.test_fraction,
        columns=parts["train"].columns,
    )


def _one_part(address: str, part: str, how: How, train: Raw, refused: Mapping[str, str]) -> Raw:
    known = Known(train.classes, train.columns, _image_shape(train))
    found = _read(address, how, known, refused)
    if isinstance(found, Dataset) or len(found) > 1:
        raise ConfigError(f"{part}_dataset {address} has parts of its own: name one part")
    return found["train"]


def short_name(address: str) -> str:
    """Return what data is called in reports: the name of its file or folder, or its function.

    Example:
        >>> short_name("/data/pets"), short_name("rows/loans.csv"), short_name("/a/mine.py:load")
        ('pets', 'loans', 'mine:load')
    """
    if is_address(address):
        place, _, function = address.rpartition(":")
        return f"{Path(place).stem if place.endswith('.py') else place}:{function}"
    return Path(address).stem if Path(address).suffix in (*_ARRAYS, *TABLES) else Path(address).name


def _read(
    address: str, how: How, known: Known | None, refused: Mapping[str, str]
) -> dict[str, Raw] | Dataset:
    if is_address(address):
        return _from_code(address, how.workers, refused)
    path = Path(address).expanduser()
    if not path.exists():
        raise DataError(f"there is no {path}: a data set is {_FORMS}")
    suffix = path.suffix.lower()
    if (how.target or how.ignore) and (path.is_dir() or suffix not in TABLES):
        raise ConfigError(f"target and ignore are for a CSV table, and {path} is none")
    if how.stream == "on" and not path.is_dir():
        raise ConfigError(f"stream on is for a folder of images, and {path} is none: it is held")
    if path.is_dir():
        return read_folder(
            path,
            image_size=how.image_size,
            image_shape=() if known is None else known.image_shape,
            stream=how.stream,
            workers=how.workers,
        )
    if suffix in _ARRAYS:
        return read_arrays(path)
    if suffix in TABLES:
        columns = () if known is None else known.columns
        ignore = () if columns else how.ignore
        return {"train": read_table(path, target=how.target, ignore=ignore, columns=columns)}
    raise DataError(f"{path} is of no form that can be read: a data set is {_FORMS}")


def _from_code(address: str, workers: int, refused: Mapping[str, str]) -> dict[str, Raw] | Dataset:
    """Call the function of an address and take what it returns as data."""
    try:
        function = imported(address, what="data", refused=refused)
    except ConfigError as error:
        if not os.path.exists(address):
            raise
        raise ConfigError(f"{error}; the path of that name is written {address}/") from error
    if not callable(function):
        raise ConfigError(f"{address} must be a function that returns data, got {function!r:.60}")
    try:
        data = function()
    except FunclossError:
        raise
    except (Exception, SystemExit) as error:
        raise DataError(f"{address}() raised {type(error).__name__}: {error}") from error
    if isinstance(data, Dataset):
        return data
    if not isinstance(data, Mapping):
        return {"train": _part(address, data, None, workers)}
    classes = data.get("classes")
    names = None if classes is None else tuple(map(str, classes))
    for name in data:
        if name not in ("train", "validation", "test", "classes"):
            guess = did_you_mean(str(name), ("train", "validation", "test", "classes"))
            raise DataError(
                f"{address}() may return train, validation, test and classes; got {name!r}{guess}"
            )
    if "train" not in data:
        raise DataError(f"{address}() must return train, or the data itself")
    return {
        name: _part(f"{address}, {name}", part, names, workers)
        for name, part in data.items()
        if name != "classes"
    }


def _part(what: str, data: Any, classes: tuple[str, ...] | None, workers: int) -> Raw:
    if isinstance(data, IterableDataset):
        raise DataError(
            f"{what}: an IterableDataset has no order to shuffle: return a Dataset with __len__ "
            "and __getitem__"
        )
    if isinstance(data, TorchDataset):
        return _streamed(what, data, classes, workers)
    if not isinstance(data, Sequence) or len(data) != 2:
        raise DataError(
            f"{what} must be (inputs, labels), a torch.utils.data.Dataset, or a dict of them by "
            f"part; got {type(data).__name__}"
        )
    inputs, labels = data
    for name, value in (("inputs", inputs), ("labels", labels)):
        if not isinstance(value, Tensor | np.ndarray):
            kind = type(value).__name__
            raise DataError(f"{what}: the {name} must be a tensor or an array, got {kind}")
        if not value.ndim:
            raise DataError(f"{what}: the {name} must begin with the examples, got one number")
    if len(inputs) != len(labels):
        raise DataError(f"{what}: {len(inputs):,} inputs but {len(labels):,} labels")
    if isinstance(inputs, np.ndarray) and inputs.dtype.kind not in "buif":
        raise DataError(f"{what}: the inputs must be numbers, got {inputs.dtype}")
    tensor = torch.as_tensor(inputs).detach()
    if tensor.layout is not torch.strided:
        raise DataError(f"{what}: the inputs must be dense, got {tensor.layout}: .to_dense()")
    found, names = as_labels(f"{what}: labels", labels, classes)
    if tensor.dtype == torch.uint8 and tensor.dim() in (3, 4):
        return Raw(as_inputs(f"{what}: images", tensor), found, names)
    tensor = tensor.float() if tensor.dtype == torch.float64 else tensor
    check_finite(f"{what}: the inputs", tensor)
    return Raw(tensor, found, names, as_they_are=True)


def _streamed(
    what: str, data: TorchDataset[Any], classes: tuple[str, ...] | None, workers: int
) -> Raw:
    if not hasattr(data, "__len__") or not len(data):  # pyright: ignore[reportArgumentType]
        raise DataError(f"{what}: no examples, or a Dataset without __len__")
    try:
        inputs, label = data[0]
        labelled = torch.as_tensor(label)
        first = inputs
        while not isinstance(first, Tensor | np.ndarray):
            if not isinstance(first, Mapping | tuple | list) or not first:
                raise TypeError(f"the inputs are a {type(first).__name__}")
            first = next(iter(first.values())) if isinstance(first, Mapping) else first[0]
        if labelled.dim() or labelled.is_floating_point():
            raise TypeError(f"the label of an item must be a whole number, got {label!r:.40}")
    except (Exception, SystemExit) as error:
        raise DataError(
            f"{what}: an item must be (inputs, label), the inputs one tensor, or a tuple or dict "
            f"of tensors; reading the first: {type(error).__name__}: {error}"
        ) from error
    stream = Stream(data, torch.arange(len(data)), tuple(first.shape), workers)  # pyright: ignore[reportArgumentType]
    own = getattr(data, "classes", None) if classes is None else classes
    names = None if own is None else tuple(map(str, own))
    every = stream.labels()
    whole = isinstance(every, Tensor) or every.dtype.kind in "iu"
    if whole and int(every[0]) != int(labelled):
        raise DataError(
            f"{what}: the label of the first item is {int(labelled)}, but the targets or labels of "
            f"the Dataset begin with {int(every[0])}: let them be the same"
        )
    labels, names = as_labels(f"{what}: labels", every, names)
    return Raw(stream, labels, names, as_they_are=True)


def _examples(what: str, raw: Raw, classes: tuple[str, ...]) -> Examples:
    """Return a part with its labels counted as ``classes`` are."""
    if raw.classes == classes:
        return Examples(raw.inputs, raw.labels)
    place_of = {name: i for i, name in enumerate(classes)}
    seen = set(raw.labels.unique().tolist())
    unknown = [n for i, n in enumerate(raw.classes) if i in seen and n not in place_of]
    if unknown:
        raise DataError(
            f"{what}: class {unknown[0]!r} is not among those to tell apart, "
            f"{', '.join(classes[:8])}{' ...' if len(classes) > 8 else ''}"
        )
    place = torch.tensor([place_of.get(name, -1) for name in raw.classes])
    return Examples(raw.inputs, place[raw.labels])


def _check_classes(name: str, classes: tuple[str, ...], n: int | None) -> None:
    """Raise unless these are classes to tell apart, in ``n`` examples to learn them from."""
    if len(classes) < 2:
        only = f"one class, {classes[0]!r}" if classes else "no class"
        raise DataError(f"{name} has {only}: there is nothing to tell apart")
    if n is not None and len(classes) > max(n / 2, 2):
        raise DataError(
            f"{name} has {len(classes):,} classes in {n:,} examples, most of which occur once: is "
            f"the target a number to predict, such as {classes[0]}? funcloss-train tells classes "
            "apart"
        )
    for label in classes:
        if not label.strip() or not label.isprintable():
            raise DataError(f"{name} has a class named {label!r}, which cannot be printed")
    if len(set(classes)) != len(classes):
        raise DataError(f"{name} has a class twice: {', '.join(classes[:8])}")


def _check_alike(name: str, parts: dict[str, Raw]) -> None:
    forms = {part: _form(raw.inputs) for part, raw in parts.items()}
    for part, form in forms.items():
        if form != forms["train"]:
            raise DataError(
                f"{name}: the {part} part has inputs of {form}, the training part {forms['train']}"
            )


def _image_shape(raw: Raw) -> tuple[int, ...]:
    shape = item_shape(raw.inputs)
    return () if raw.as_they_are or len(shape) != 3 else (shape[2], *shape[:2])


def _form(inputs: Tensor | Stream) -> str:
    streamed = isinstance(inputs, Stream)
    kind = "streamed" if streamed else str(inputs.dtype).removeprefix("torch.")
    return f"shape {item_shape(inputs)}, {kind}"
