"""The loop: batches in a seeded order through the step, an epoch at a time."""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import torch
from jaxtyping import Int
from torch import Tensor

from funcloss.keys import fold_in
from funcloss.typing import Metrics


class Counted(Protocol):
    """What the loop needs of a state, of one training or of many side by side."""

    @property
    def step(self) -> Tensor:
        """Steps done, an int64 scalar."""
        ...

    @property
    def key(self) -> Tensor:
        """The key of the training, an int64 scalar."""
        ...


State = TypeVar("State", bound=Counted)
Drawn = TypeVar("Drawn")


@dataclass(frozen=True)
class Progress:
    """What is known every ``log_every`` steps."""

    step: int  # steps done since the beginning of the training
    examples: int  # examples seen since the beginning of the training
    steps: int  # since the last report
    loss: float  # mean over these
    seconds: float  # of these
    images_per_second: float  # over these


@dataclass(frozen=True)
class Epoch(Generic[State]):
    """What a pass over the training set, or the part of it before a stop, came to."""

    number: int  # from 1
    finished: bool  # False when the loop was told to stop within it
    state: State
    step: int  # steps done since the beginning of the training
    examples: int  # examples seen since the beginning of the training
    loss: float  # mean over the steps of the epoch that this call made


def fit(
    state: State,
    step_on: Callable[[State, Drawn], tuple[State, Metrics]],
    n: int,
    *,
    iter_batches: Callable[[Iterable[Tensor]], Iterator[Drawn]] = iter,
    epochs: int,
    batch_size: int,
    log_every: int = 50,
    on_progress: Callable[[Progress], None] = lambda progress: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Iterator[Epoch[State]]:
    """Train from ``state`` to the end of epoch ``epochs``, and yield after each epoch.

    Where to begin follows from ``state.step`` alone, and the order of an epoch from its number and
    ``state.key``: a training that is taken up from any state goes on as if it had never stopped.
    The last partial batch of an epoch is left out.

    Args:
        state: Where to begin.
        step_on: ``(state, drawn) -> (state, metrics)``, the step on what ``iter_batches`` gives;
            compiled or not. Say ``lambda state, batch: train_step(state, batch, hyper)``.
        n: Number of training examples.
        iter_batches: From the indices of the steps of an epoch, each ``(batch,)`` int64 on the
            device of the state, to what each step takes, ``lambda indices:
            data.iter_batches(dataset, examples, indices)`` of :mod:`funcloss.app.data` say, which
            may read ahead; ``iter``: the index.
        epochs: Number of the last epoch.
        batch_size: Examples a step.
        log_every: Steps between two reports; between them nothing is read from the device.
        on_progress: Called with each report.
        should_stop: Asked after every step; True ends the loop, with an unfinished epoch.

    Yields:
        Each epoch, with the state after it.

    Raises:
        ValueError: there are fewer examples than a batch needs, or a number is not positive.
    """
    if batch_size < 1 or log_every < 1:
        raise ValueError(
            f"fit: batch_size and log_every must be at least 1, got {batch_size} and {log_every}"
        )
    per_epoch = n // batch_size
    if per_epoch == 0:
        raise ValueError(f"fit: a batch of {batch_size} needs as many examples, got {n}")
    step = int(state.step)
    while step < epochs * per_epoch:
        epoch, position = divmod(step, per_epoch)
        order = epoch_order(state.key, epoch, n).to(state.key.device)
        reported = time.perf_counter()
        losses: list[Tensor] = []
        total, counted, stopped = 0.0, 0, False
        for drawn in iter_batches(order.split(batch_size)[position:per_epoch]):
            state, metrics = step_on(state, drawn)
            losses.append(metrics["loss"])
            position, step = position + 1, step + 1
            stopped = should_stop()
            if step % log_every == 0 or position == per_epoch or stopped:
                recent = float(torch.stack(losses).cpu().double().sum())  # waits for the device
                now = time.perf_counter()
                on_progress(
                    Progress(
                        step=step,
                        examples=step * batch_size,
                        steps=len(losses),
                        loss=recent / len(losses),
                        seconds=now - reported,
                        images_per_second=len(losses) * batch_size / max(now - reported, 1e-9),
                    )
                )
                total, counted = total + recent, counted + len(losses)
                losses, reported = [], time.perf_counter()
            if stopped:
                break
        yield Epoch(
            number=epoch + 1,
            finished=position == per_epoch,
            state=state,
            step=step,
            examples=step * batch_size,
            loss=total / counted,
        )
        if stopped:
            return


def epoch_order(key: Int[Tensor, ""], epoch: int, n: int) -> Int[Tensor, " n"]:
    """Return the order of the examples in an epoch, a permutation that hangs on key and number.

    Args:
        key: The key of the training.
        epoch: Number of the epoch, from 0.
        n: Number of examples.

    Returns:
        Indices, on the CPU, so that every device sees the same order.

    Example:
        >>> from funcloss.keys import make_key
        >>> sorted(epoch_order(make_key(0), 0, 5).tolist())
        [0, 1, 2, 3, 4]
    """
    # A step's keys fold its number into the key; this counter is one that no step reaches.
    seed = int(fold_in(key.cpu(), torch.tensor(2**32 - 1 - epoch)))
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))
