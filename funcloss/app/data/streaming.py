"""Inputs that are too large to hold: read when they are needed, ahead of the steps."""

import dataclasses
import signal
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor
from torch.utils._pytree import tree_map
from torch.utils.data import DataLoader, Dataset, Subset

from funcloss.errors import DataError


@dataclasses.dataclass(frozen=True)
class Stream:
    """Inputs that are read when they are needed, in place of a tensor of them."""

    source: Dataset[Any]  # map-style; its items are (inputs, label)
    positions: Int[Tensor, " n"]  # of the items in ``source``, on the CPU
    shape: tuple[int, ...]  # of one item, the first tensor of it if there are several
    workers: int = 0  # processes that read ahead

    def __len__(self) -> int:
        """Return how many there are."""
        return len(self.positions)

    def some(self, index: Int[Tensor, " some"]) -> "Stream":
        """Return those at ``index``, still to be read."""
        return dataclasses.replace(self, positions=self.positions[index.cpu()])

    def batches(self, indices: Sequence[Tensor], *, pinned: bool = False) -> Iterator[Any]:
        """Yield the inputs of one batch after another, read ahead.

        Args:
            indices: Of each batch, shape ``(batch,)``.
            pinned: Into memory that a GPU can copy from by itself.

        Returns:
            The inputs of each batch, in order: a tensor, or a tuple or dict of tensors.

        Raises:
            DataError: an item cannot be read.
        """
        places = [self.positions[index.cpu()].tolist() for index in indices]
        return (_as_inputs(inputs) for inputs, _ in self._read(places, pinned=pinned))

    def labels(self) -> Tensor | np.ndarray:
        """Return the label of each item: what the source has of them, else by reading all.

        Raises:
            DataError: an item cannot be read, or has no label.
        """
        for name in ("targets", "labels"):
            known = values_of(self.source, name)
            if known is not None:
                return known[self.positions]
        places = torch.arange(len(self.source)).split(256)  # pyright: ignore[reportArgumentType]
        every = [torch.as_tensor(labels) for _, labels in self._read([p.tolist() for p in places])]
        return torch.cat(every)[self.positions]

    def _read(self, places: list[list[int]], *, pinned: bool = False) -> Iterator[Any]:
        """Read the items at one list of places after another."""
        loader = DataLoader(
            self.source,
            batch_sampler=places,
            num_workers=self.workers if len(places) > 1 else 0,
            pin_memory=pinned,
            generator=torch.Generator().manual_seed(0),  # not torch's own, which is the user's
            worker_init_fn=_begin_worker,
        )
        batches = iter(loader)
        try:
            for _ in places:
                yield next(batches)
        except StopIteration:
            raise DataError("reading the data ended early, by a StopIteration") from None
        except Exception as error:  # the reading is the user's code, in a process of its own
            raise _in_one_line(error) from error
        finally:
            # Left to the garbage collector, the processes outlive an error, or end with a noise.
            getattr(batches, "_shutdown_workers", lambda: None)()


def values_of(source: Dataset[Any], name: str) -> Tensor | np.ndarray | None:
    """Return the values that a data set has of each of its items, a subset those of its indices.

    Args:
        source: A data set, or a ``Subset`` of one, such as ``random_split`` makes.
        name: Of the attribute.

    Returns:
        The values, None if there are none or not one per item.

    Example:
        >>> from torch.utils.data import Subset, TensorDataset
        >>> whole = TensorDataset(torch.zeros(3))
        >>> whole.targets = [7, 8, 9]
        >>> values_of(Subset(whole, [2, 0]), "targets")
        array([9, 7])
    """
    known = getattr(source, name, None)
    if known is None and isinstance(source, Subset):
        whole = values_of(source.dataset, name)
        return None if whole is None else whole[np.asarray(source.indices)]
    if known is None or callable(known) or len(known) != len(source):  # pyright: ignore[reportArgumentType]
        return None
    try:
        return known if isinstance(known, Tensor) else np.asarray(known)
    except ValueError:  # of several lengths
        return None


def classes_of(source: Dataset[Any]) -> Any:
    """Return the class names that a data set has, a subset those of the whole; else None."""
    own = getattr(source, "classes", None)
    return classes_of(source.dataset) if own is None and isinstance(source, Subset) else own


def last_line(error: Exception) -> str:
    """Return the last line of what an error says, else its kind."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def item_shape(inputs: Tensor | Stream) -> tuple[int, ...]:
    """Return the shape of one input."""
    return inputs.shape if isinstance(inputs, Stream) else tuple(inputs.shape[1:])


def _begin_worker(number: int) -> None:
    """Leave signals to the training: it stops at the end of a step, and ends its workers itself."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for number in (signal.SIGTERM, signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE):
        signal.signal(number, signal.SIG_DFL)  # torch's handlers print a line, and a NUL after it
    torch.set_num_threads(1)


def _as_inputs(inputs: Any) -> Any:
    """Return what a model takes: the loader makes a list of a tuple."""
    inputs = tuple(inputs) if isinstance(inputs, list) else inputs
    return tree_map(lambda x: x.float() if x.dtype == torch.float64 else x, inputs)


def _in_one_line(error: Exception) -> DataError:
    """Return the last line of a worker process's traceback, which is the error itself."""
    last = last_line(error)
    said = last.partition("DataError: ")[2] or last
    if isinstance(error, DataError):
        return DataError(said)
    gone = "exited unexpectedly" in str(error) or "killed by signal" in str(error)
    if gone or isinstance(error, ConnectionError | EOFError):
        return DataError(f"a process that reads the data ended: {last}; try workers 0")
    kind = "" if len(str(error).strip().splitlines()) > 1 else f"{type(error).__name__}: "
    return DataError(f"reading the data raised {kind}{said}")
