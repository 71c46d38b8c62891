"""What a reader of somebody's own data gives: inputs, labels, and the names that they stand for."""

import os
from collections.abc import Iterable
from typing import NamedTuple

from jaxtyping import Int
from torch import Tensor

from funcloss.app.data.streaming import Stream


class Raw(NamedTuple):
    """One part of a data set as it was read."""

    inputs: Tensor | Stream
    labels: Int[Tensor, " n"]
    classes: tuple[str, ...]  # names, in the order of these labels
    columns: tuple[str, ...] = ()  # names of the features of a table
    as_they_are: bool = False  # the inputs are what a model takes: nothing is to be scaled


def ordered(names: Iterable[str]) -> tuple[str, ...]:
    """Return names in order, by value where all are whole numbers.

    Example:
        >>> ordered(["10", "9"]), ordered(["b", "a", "10"])
        (('9', '10'), ('10', 'a', 'b'))
    """
    names = list(names)
    whole = all(name.removeprefix("-").isdecimal() and name.isascii() for name in names)
    return tuple(sorted(names, key=(lambda name: (int(name), name)) if whole else None))


def physical_memory() -> int:
    """Return the bytes of memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
