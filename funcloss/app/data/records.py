"""What a data set is asked for with, and what a reader gives of one of its splits."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from jaxtyping import Float, Int
from torch import Tensor

from funcloss._files import physical_memory as physical_memory
from funcloss.app.data.streaming import Stream


@dataclass(frozen=True)
class LoadOptions:
    """Which data set to load, how to read it and how to split it; most names are those of options.

    Of a published data set only ``data_dir``, ``val_fraction`` and ``imbalance`` may be given.
    """

    dataset: str  # a name, torchvision:NAME, a path, or module:function
    data_dir: str = ""  # of published ones; empty: $FUNCLOSS_DATA_DIR, else the user's cache folder
    target: str = ""  # the column of the classes, of a table
    ignore: tuple[str, ...] = ()  # columns to leave out
    validation_dataset: str = ""  # where the validation split is, if not in the data itself
    test_dataset: str = ""
    val_fraction: float = 0.1  # of each class of the training set, where validation is cut from it
    test_fraction: float = 0.1
    imbalance: float = 1.0  # largest over smallest class of what is left to train on
    image_size: int = 0  # height and width that images of several sizes are brought to
    stream: str = "auto"  # "on": read images as they are needed; auto: if they fill the memory
    workers: int = 2  # processes that read ahead
    columns: tuple[str, ...] = ()  # the features of a table; empty: all that are nothing else
    amounts: tuple[str, ...] = ()  # columns, or arrays of a file, with a cost of each example


@dataclass(frozen=True)
class InputSchema:
    """What a trained model knows of its data."""

    classes: tuple[str, ...]
    columns: tuple[str, ...] = ()
    image_shape: tuple[int, ...] = ()  # channels, height, width; empty: it takes no images


@dataclass(frozen=True, eq=False)
class RawSplit:
    """One split of a data set as it was read."""

    inputs: Tensor | Stream
    labels: Int[Tensor, " n"]
    classes: tuple[str, ...]  # names, in the order of these labels
    columns: tuple[str, ...] = ()  # names of the features of a table
    unscaled: bool = False  # the inputs are what a model takes
    amounts: dict[str, Float[Tensor, " n"]] = field(default_factory=dict)  # by name, float64


def ordered(names: Iterable[str]) -> tuple[str, ...]:
    """Return names in order, by value where all are whole numbers.

    Example:
        >>> ordered(["10", "9"]), ordered(["b", "a", "10"])
        (('9', '10'), ('10', 'a', 'b'))
    """
    names = list(names)
    whole = all(name.removeprefix("-").isdecimal() and name.isascii() for name in names)
    return tuple(sorted(names, key=(lambda name: (int(name), name)) if whole else None))
