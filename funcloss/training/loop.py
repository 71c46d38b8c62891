"""The loop: batches in a seeded order through the step, an epoch at a time."""

import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from funcloss.keys import fold_in
from funcloss.training.step import TrainState
from funcloss.typing import Metrics

IndexedStep = Callable[[TrainState, Tensor], tuple[TrainState, Metrics]]


class Progress(NamedTuple):
    """What is known every ``log_every`` steps."""

    step: int  # steps done since the beginning of the training
    examples: int  # examples seen since the beginning of the training
    loss: float  # mean over the steps since the last report
    images_per_second: float


class Epoch(NamedTuple):
    """What a pass over the training set, or the part of it before a stop, came to."""

    number: int  # from 1
    finished: bool  # False when the loop was told to stop within it
    state: TrainState
    step: int
    examples: int  # seen since the beginning of the training
    loss: float  # mean over the steps of this call in the epoch; NaN without a step
    seconds: float  # of training, reports included


def fit(
    state: TrainState,
    step_on: IndexedStep,
    n: int,
    *,
    epochs: int,
    batch_size: int,
    log_every: int = 50,
    on_progress: Callable[[Progress], None] = lambda progress: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Iterator[Epoch]:
    """Train from ``state`` to the end of epoch ``epochs``, and yield after each epoch.

    Where to begin follows from ``state.step`` alone, and the order of an epoch from its number and
    ``state.key``: a training that is taken up from any state goes on as if it had never stopped.
    The last partial batch of an epoch is left out.

    Args:
        state: Where to begin.
        step_on: ``(state, index) -> (state, metrics)``, the step on the examples at an index,
            ``(batch,)`` int64 on the device of the state; compiled or not. Say
            ``lambda state, index: train_step(state, take(dataset, examples, index), hyper)``.
        n: Number of training examples.
        epochs: Number of the last epoch.
        batch_size: Examples a step.
        log_every: Steps between two reports; between them nothing is read from the device.
        on_progress: Called with each report.
        should_stop: Asked after every step; True ends the loop, with an unfinished epoch.

    Yields:
        Each epoch, with the state after it.

    Raises:
        ValueError: there are fewer examples than a batch needs.
    """
    per_epoch = n // batch_size
    if per_epoch == 0:
        raise ValueError(f"fit: a batch of {batch_size} needs as many examples, got {n}")
    step = int(state.step)
    while step < epochs * per_epoch:
        epoch, position = divmod(step, per_epoch)
        order = epoch_order(state.key, epoch, n).to(state.key.device)
        began = reported = time.perf_counter()
        losses: list[Tensor] = []
        total, counted, stopped = 0.0, 0, False
        while position < per_epoch and not stopped:
            index = order[position * batch_size : (position + 1) * batch_size]
            state, metrics = step_on(state, index)
            losses.append(metrics["loss"])
            position, step = position + 1, step + 1
            stopped = should_stop()
            if step % log_every == 0 or position == per_epoch or stopped:
                recent = float(torch.stack(losses).double().sum())  # waits for the device
                now = time.perf_counter()
                rate = len(losses) * batch_size / max(now - reported, 1e-9)
                on_progress(Progress(step, step * batch_size, recent / len(losses), rate))
                total, counted = total + recent, counted + len(losses)
                losses, reported = [], now
        yield Epoch(
            number=epoch + 1,
            finished=position == per_epoch,
            state=state,
            step=step,
            examples=step * batch_size,
            loss=total / counted,
            seconds=time.perf_counter() - began,
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
