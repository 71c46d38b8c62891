"""What a data set is asked for with, and what a reader gives of one of its splits."""

import contextlib
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from funcloss._files import is_number
from funcloss.app.data.streaming import Stream
from funcloss.errors import DataError

Frame = Any  # a pandas.DataFrame, whose methods' types no checker can tell
Cells = Any  # a pandas.Series


MISSING, OTHERS = "(missing)", "(others)"  # categories


@dataclass(frozen=True)
class Column:
    """How a column of a table becomes features."""

    name: str
    kind: str  # "number", "date" or "category"
    median: float = 0.0  # of a number or a date, in days since 1970: stands for missing ones
    flagged: bool = False  # one more feature says where it is missing
    format: str = ""  # of a date
    levels: tuple[str, ...] = ()  # the categories that have a feature each
    pooled: bool = False  # one more feature stands for all others, unknown ones among them

    @property
    def features(self) -> tuple[str, ...]:
        """Names of the features that it becomes.

        Example:
            >>> Column("job", "category", levels=("cook", "pilot"), pooled=True).features
            ('job=cook', 'job=pilot', 'job=(others)')
        """
        if self.kind == "category":
            others = (OTHERS,) if self.pooled else ()
            return tuple(f"{self.name}={level}" for level in (*self.levels, *others))
        return (self.name, f"{self.name} {MISSING}") if self.flagged else (self.name,)


@dataclass(frozen=True, eq=False)
class Rows:
    """The rows of a table before their columns have become features."""

    path: Path
    # Text, or numbers where the file has types; NA where a cell is missing. Its index numbers the
    # rows in the file, from 0.
    frame: Frame
    separator: str = ""  # of the cells, in a text file

    def __len__(self) -> int:
        """Return how many there are."""
        return len(self.frame)

    def number(self, i: int) -> int:
        """Return the number of a row in its file, from 1."""
        return int(self.frame.index[i]) + 1


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
    drop_unlabelled: bool = False  # leave out rows without a class
    class_order: tuple[str, ...] = ()  # of all classes; empty: by value, or by alphabet
    columns: tuple[Column, ...] = ()  # of a table; empty: all that are nothing else
    amounts: tuple[str, ...] = ()  # columns, or arrays of a file, with a cost of each example


@dataclass(frozen=True)
class InputSchema:
    """What a trained model knows of its data."""

    classes: tuple[str, ...]
    columns: tuple[Column, ...] = ()
    image_shape: tuple[int, ...] = ()  # channels, height, width; empty: it takes no images


@dataclass(frozen=True, eq=False)
class RawSplit:
    """One split of a data set as it was read."""

    inputs: Tensor | Stream | Rows
    labels: Int[Tensor, " n"]
    classes: tuple[str, ...]  # names, in the order of these labels
    columns: tuple[Column, ...] = ()  # of a table
    unscaled: bool = False  # the inputs are what a model takes
    amounts: dict[str, Float[Tensor, " n"]] = field(default_factory=dict)  # by name, float64
    notes: tuple[str, ...] = ()  # what was done in reading
    rows: Int[Tensor, " n"] | None = None  # in the file, from 1; None: all, in their order
    files: tuple[str, ...] = ()  # of each example, where it has one of its own


def ordered(names: Iterable[str]) -> tuple[str, ...]:
    """Return names in order, by value where all are numbers.

    Example:
        >>> ordered(["10.0", "9.5"]), ordered(["b", "a", "10"])
        (('9.5', '10.0'), ('10', 'a', 'b'))
    """
    names = list(names)
    numbers = all(is_number(name) and math.isfinite(float(name)) for name in names)
    return tuple(sorted(names, key=(lambda name: (float(name), name)) if numbers else None))


@contextlib.contextmanager
def enough_memory(name: str) -> Iterator[None]:
    """Turn running out of memory into one error that says what to do.

    Args:
        name: Of the data set.

    Raises:
        DataError: the memory of the machine or of its GPU is not enough.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not _is_out_of_memory(error):
            raise
        raise DataError(
            f"{name} does not fit into memory: use a smaller image_size, stream on, or less data"
        ) from None


def _is_out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
