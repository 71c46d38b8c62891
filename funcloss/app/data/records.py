"""What a data set is asked for with, and what a reader gives of one of its splits."""

import contextlib
import os
import resource
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

from funcloss.app.data.streaming import Stream
from funcloss.errors import DataError


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
    note: str = ""  # what readers of the results must know


def ordered(names: Iterable[str]) -> tuple[str, ...]:
    """Return names in order, by value where all are whole numbers.

    Example:
        >>> ordered(["10", "9"]), ordered(["b", "a", "10"])
        (('9', '10'), ('10', 'a', 'b'))
    """
    names = list(names)
    whole = all(name.removeprefix("-").isdecimal() and name.isascii() for name in names)
    return tuple(sorted(names, key=(lambda name: (int(name), name)) if whole else None))


def usable_memory() -> int:
    """Return the bytes of memory of this machine, or what a container or a limit leaves of it."""
    found = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    with contextlib.suppress(OSError, ValueError):  # there is none, or it says max
        found.append(int(Path("/sys/fs/cgroup/memory.max").read_text()))
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    return min(found + [limit] * (limit != resource.RLIM_INFINITY))


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
