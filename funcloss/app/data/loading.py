"""Loading a data set: a published one, a folder of images, arrays, a table, or code's."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset as TorchDataset
from torch.utils.data import IterableDataset

from funcloss.app.addresses import imported, is_address
from funcloss.app.config import did_you_mean, names_own
from funcloss.app.data.arrays import (
    as_amounts,
    as_inputs,
    as_labels,
    check_amount,
    check_finite,
    read_arrays,
)
from funcloss.app.data.dataset import Dataset, Examples, fingerprint
from funcloss.app.data.folders import read_folder
from funcloss.app.data.names import DATASETS, TORCHVISION
from funcloss.app.data.published import read_published, read_torchvision, torchvision_name
from funcloss.app.data.records import InputSchema, LoadOptions, RawSplit, Rows, enough_memory
from funcloss.app.data.splits import long_tailed, make_dataset
from funcloss.app.data.streaming import Stream, classes_of, item_shape, values_of
from funcloss.app.data.table import is_table, read_table
from funcloss.errors import ConfigError, DataError, FunclossError

_ARRAYS = (".npz", ".safetensors")
_FORMS = (
    "a folder of class folders, .npz, .safetensors, a table (.csv, .tsv, .txt, .data, .gz of them, "
    ".parquet), or module:function that returns data"
)
_SPLITS = ("train", "validation", "test")


def load_dataset(
    dataset: str | LoadOptions,
    *,
    schema: InputSchema | None = None,
    refused_code: Mapping[str, str] = MappingProxyType({}),
) -> Dataset:
    """Load a data set: a published one, or your own.

    Args:
        dataset: Which one, perhaps with options: ``mnist``, ``fashion-mnist``, ``kmnist``,
            ``cifar10``, ``mnist-sample``, or ``auto``: MNIST if it can be had, else its sample,
            with the reason in the data set's ``note``; ``torchvision:NAME``, with arguments as in
            ``torchvision:EMNIST?split=letters``; or your own: a folder of class folders of images,
            an ``.npz`` or ``.safetensors`` file of ``images`` and ``labels``, a CSV table, or
            ``module:function`` that returns the tensors or a ``torch.utils.data.Dataset``.
        schema: The classes and columns of a model, where other data is to be evaluated by it: data
            in one split is then all test set. Data sets with a short name do not look at it.
        refused_code: Code that must not be imported, each with the file that names it.

    Returns:
        The data set on the CPU.

    Raises:
        ConfigError: there is no data set of that name, the request does not fit it, its code is
            refused, or it cannot be made so long-tailed.
        DataError: it cannot be had; the message says what was tried and the fixes.
    """
    options = LoadOptions(dataset) if isinstance(dataset, str) else dataset
    name = options.dataset
    if name in ("auto", *DATASETS):
        with enough_memory(name):
            loaded = _load_published(options)
    elif names_own(name):
        with enough_memory(name):
            loaded = load_own(options, refused=refused_code, schema=schema)
    else:
        there = ", ".join(("auto", *DATASETS))
        guess = did_you_mean(name, ("auto", *DATASETS))
        raise ConfigError(
            f"no data set {name!r}{guess}; there are {there}, {TORCHVISION}NAME, and paths of your "
            "own"
        )
    loaded = loaded if options.imbalance == 1.0 else long_tailed(loaded, options.imbalance)
    return replace(loaded, fingerprint=fingerprint(loaded))


def _load_published(options: LoadOptions) -> Dataset:
    default = LoadOptions(options.dataset)
    _refuse_amounts(options)
    own = ("target", "ignore", "validation_dataset", "test_dataset", "test_fraction")
    own += ("drop_unlabelled", "class_order")
    given = [option for option in own if getattr(options, option) != getattr(default, option)]
    given += ["stream"] if options.stream == "on" else []
    if given:
        raise ConfigError(
            f"{', '.join(given)} {'is' if len(given) == 1 else 'are'} for data of your own, and "
            f"{options.dataset} comes as it is published"
        )
    name, splits, note = read_published(options)
    return make_dataset(
        name, splits, scale=DATASETS[name].scale, val_fraction=options.val_fraction, note=note
    )


def _refuse_amounts(options: LoadOptions) -> None:
    if options.amounts:
        raise ConfigError(
            f"cost names {options.amounts[0]!r}, which is no number, and the cost of each example "
            f"comes from a table, a file of arrays or module:function: {options.dataset} has none"
        )


def load_own(
    options: LoadOptions, *, refused: Mapping[str, str], schema: InputSchema | None = None
) -> Dataset:
    """Load data named by its path, as ``module:function`` or as ``torchvision:NAME``.

    Arguments, errors and the data set are as for :func:`load_dataset`, but for the long tail.
    """
    address = options.dataset
    splits = _read(address, options, schema, refused)
    places = {"validation": options.validation_dataset, "test": options.test_dataset}
    if isinstance(splits, Dataset):
        if any(places.values()):
            raise ConfigError(f"{address} has splits of its own: name no validation or test data")
        for split, examples in splits.splits.items():
            for name in options.amounts:
                check_amount(f"{address}, {split}", name, examples.amounts)
        return splits
    for split, place in places.items():
        if place and split in splits:
            raise ConfigError(f"{address} brings a {split} split: leave out {split}_dataset")
        if place:
            splits[split] = _one_split(place, split, options, splits["train"], refused)
    if schema is not None:
        splits.setdefault("test", splits["train"])
    name = torchvision_name(address) if address.startswith(TORCHVISION) else short_name(address)
    own = splits["train"].classes
    classes = _in_order(name, own, options.class_order) if schema is None else schema.classes
    _check_classes(name, classes, len(splits["train"].labels) if schema is None else None)
    return make_dataset(
        name,
        {
            split: _relabelled(name if schema else f"{name}, {split}", raw, classes)
            for split, raw in splits.items()
        },
        val_fraction=options.val_fraction if schema is None else 0.0,
        test_fraction=options.test_fraction,
    )


def _one_split(
    address: str, split: str, options: LoadOptions, train: RawSplit, refused: Mapping[str, str]
) -> RawSplit:
    shape = () if isinstance(train.inputs, Rows) else item_shape(train.inputs)
    images = () if train.unscaled or len(shape) != 3 else (shape[2], *shape[:2])
    schema = InputSchema(train.classes, train.columns, images)
    found = _read(address, options, schema, refused)
    if isinstance(found, Dataset) or len(found) > 1:
        raise ConfigError(f"{split}_dataset {address} has splits of its own: name one split")
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
    name = Path(address).name
    if is_table(name):
        return Path(name.removesuffix(".gz")).stem
    return Path(name).stem if Path(name).suffix in _ARRAYS else name


def _read(
    address: str, options: LoadOptions, schema: InputSchema | None, refused: Mapping[str, str]
) -> dict[str, RawSplit] | Dataset:
    torchvision = address.startswith(TORCHVISION)
    if is_address(address) and not torchvision:
        return _from_code(address, options, refused)
    path = Path(address).expanduser()
    suffix = path.suffix.lower()
    if not torchvision and not path.exists():
        raise DataError(f"there is no {path}: a data set is {_FORMS}")
    pictures = torchvision or path.is_dir()
    if pictures or not is_table(path):
        own = ("target", "ignore", "drop_unlabelled")
        if given := [name for name in own if getattr(options, name)]:
            raise ConfigError(f"{' and '.join(given)}: for a table, and {address} is none")
    if options.stream == "on" and not pictures:
        raise ConfigError(f"stream on is for a folder of images, and {path} is none: it is held")
    if not (pictures or path.is_file()):
        raise DataError(f"{path} is no regular file: a data set is {_FORMS}")
    if pictures:
        _refuse_amounts(options)
    if torchvision:
        return read_torchvision(address, options, schema)
    if pictures:
        return read_folder(path, options, schema)
    if suffix in _ARRAYS:
        return read_arrays(path, options.amounts)
    if is_table(path):
        columns = options.columns if schema is None else schema.columns
        table = read_table(
            path,
            target=options.target,
            ignore=() if columns else options.ignore,
            columns=columns,
            amounts=options.amounts,
            drop_unlabelled=options.drop_unlabelled,
        )
        return {"train": table}
    raise DataError(f"{path} is of no form that can be read: a data set is {_FORMS}")


def _from_code(
    address: str, options: LoadOptions, refused: Mapping[str, str]
) -> dict[str, RawSplit] | Dataset:
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
        return {"train": _split(address, data, None, options)}
    classes = data.get("classes")
    names = None if classes is None else tuple(map(str, classes))
    for name in data:
        if name not in (*_SPLITS, "classes"):
            guess = did_you_mean(str(name), (*_SPLITS, "classes"))
            raise DataError(
                f"{address}() may return train, validation, test and classes; got {name!r}{guess}"
            )
    if "train" not in data:
        raise DataError(f"{address}() must return train, or the data itself")
    return {
        name: _split(f"{address}, {name}", split, names, options)
        for name, split in data.items()
        if name != "classes"
    }


def _split(what: str, data: Any, classes: tuple[str, ...] | None, options: LoadOptions) -> RawSplit:
    if isinstance(data, IterableDataset):
        raise DataError(
            f"{what}: an IterableDataset has no order to shuffle: return a Dataset with __len__ "
            "and __getitem__"
        )
    if isinstance(data, TorchDataset):
        own = {n: v for n in options.amounts if (v := values_of(data, n)) is not None}
        raw = _streamed(what, data, classes, options.workers)
        return replace(raw, amounts=_amounts_of(what, own, options, len(raw.labels)))
    if isinstance(data, Examples):
        data = (data.inputs, data.labels, data.amounts)
    parts = len(data) if isinstance(data, Sequence) else 0
    if parts != 2 and not (parts == 3 and isinstance(data[2], Mapping)):
        raise DataError(
            f"{what} must be (inputs, labels), a torch.utils.data.Dataset, or a dict of them by "
            f"split; got {type(data).__name__}"
        )
    inputs, labels = data[:2]
    given = data[2] if parts == 3 else {}
    for name, value in (("inputs", inputs), ("labels", labels)):
        if not isinstance(value, Tensor | np.ndarray):
            kind = type(value).__name__
            raise DataError(f"{what}: the {name} must be a tensor or an array, got {kind}")
        if not value.ndim:
            raise DataError(f"{what}: the {name} must begin with the examples, got a single number")
    if len(inputs) != len(labels):
        raise DataError(f"{what}: {len(inputs):,} inputs but {len(labels):,} labels")
    amounts = _amounts_of(what, given, options, len(labels))
    if isinstance(inputs, np.ndarray) and inputs.dtype.kind not in "buif":
        raise DataError(f"{what}: the inputs must be numbers, got {inputs.dtype}")
    tensor = torch.as_tensor(inputs).detach()
    if tensor.layout is not torch.strided:
        raise DataError(f"{what}: the inputs must be dense, got {tensor.layout}: .to_dense()")
    found, names = as_labels(f"{what}: labels", labels, classes)
    if tensor.dtype == torch.uint8 and tensor.dim() in (3, 4):
        return RawSplit(as_inputs(f"{what}: images", tensor), found, names, amounts=amounts)
    tensor = tensor.float() if tensor.dtype == torch.float64 else tensor
    check_finite(f"{what}: the inputs", tensor)
    return RawSplit(tensor, found, names, unscaled=True, amounts=amounts)


def _amounts_of(
    what: str, given: Mapping[str, Any], options: LoadOptions, n: int
) -> dict[str, Tensor]:
    """Return the amounts that are asked for, of those that code gives."""
    found = {}
    for name in options.amounts:
        check_amount(what, name, given)
        found[name] = as_amounts(f"{what}: {name}", given[name])
        if len(found[name]) != n:
            raise DataError(f"{what}: {len(found[name]):,} values of {name} but {n:,} labels")
    return found


def _streamed(
    what: str, data: TorchDataset[Any], classes: tuple[str, ...] | None, workers: int
) -> RawSplit:
    if not hasattr(data, "__len__") or not len(data):  # pyright: ignore[reportArgumentType]
        raise DataError(f"{what}: no examples, or a Dataset without __len__")
    try:
        inputs, label = data[0]
        label = _first_name(what, torch.as_tensor(label)[None])
        first = inputs
        while not isinstance(first, Tensor | np.ndarray):
            if not isinstance(first, Mapping | tuple | list) or not first:
                raise TypeError(f"the inputs are a {type(first).__name__}")
            first = next(iter(first.values())) if isinstance(first, Mapping) else first[0]
    except (Exception, SystemExit) as error:
        raise DataError(
            f"{what}: an item must be (inputs, label), the inputs one tensor, or a tuple or dict "
            f"of tensors; reading the first: {type(error).__name__}: {error}"
        ) from error
    stream = Stream(data, torch.arange(len(data)), tuple(first.shape), workers)  # pyright: ignore[reportArgumentType]
    own = classes_of(data) if classes is None else classes
    names = None if own is None else tuple(map(str, own))
    every = stream.labels()
    labels, names = as_labels(f"{what}: labels", every, names)
    strings = isinstance(every, np.ndarray) and every.dtype.kind in "US"
    if not strings and (told := _first_name(what, every[:1])) != label:
        raise DataError(
            f"{what}: the label of the first item is {label}, but the targets or labels of the "
            f"Dataset begin with {told}: let them be the same"
        )
    return RawSplit(stream, labels, names, unscaled=True)


def _first_name(what: str, labels: np.ndarray | Tensor) -> str:
    found, names = as_labels(f"{what}: labels", labels, None)
    return names[int(found[0])]


def _relabelled(what: str, raw: RawSplit, classes: tuple[str, ...]) -> RawSplit:
    """Return a split with its labels counted as ``classes`` are."""
    if raw.classes == classes:
        return raw
    place_of = {name: i for i, name in enumerate(classes)}
    seen = set(raw.labels.unique().tolist())
    unknown = [n for i, n in enumerate(raw.classes) if i in seen and n not in place_of]
    if unknown:
        raise DataError(
            f"{what}: unknown class {unknown[0]!r}; the classes are "
            f"{', '.join(classes[:8])}{' ...' if len(classes) > 8 else ''}"
        )
    place = torch.tensor([place_of.get(name, -1) for name in raw.classes])
    return replace(raw, labels=place[raw.labels], classes=classes)


def _in_order(name: str, classes: tuple[str, ...], order: tuple[str, ...]) -> tuple[str, ...]:
    """Return classes in the order that was asked for, if one was."""
    if not order:
        return classes
    if sorted(order) != sorted(classes):
        raise ConfigError(
            f"class_order must name every class of {name} once: {', '.join(classes[:8])}"
            f"{' ...' if len(classes) > 8 else ''}; got {', '.join(order)}"
        )
    return order


def _check_classes(name: str, classes: tuple[str, ...], n: int | None) -> None:
    """Raise unless these are two or more classes, in ``n`` examples to learn them from."""
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
