"""The loop: batches in a seeded order through the step, an epoch at a time."""

import functools
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import torch
from jaxtyping import Int, Num
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
    order: Callable[[Tensor, int], Tensor] | None = None,
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
        n: Number of training examples that an epoch goes through.
        iter_batches: From the indices of the steps of an epoch, each ``(batch,)`` int64 on the
            device of the state, to what each step takes, ``lambda indices:
            data.iter_batches(dataset, examples, indices)`` of :mod:`funcloss.app.data` say, which
            may read ahead; ``iter``: the index.
        order: From the key of the state and the number of an epoch, from 0, to the indices of its
            examples, ``(n,)``; None: :func:`epoch_order`.
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
    order = order or functools.partial(epoch_order, n=n)
    step = int(state.step)
    while step < epochs * per_epoch:
        epoch, position = divmod(step, per_epoch)
        indices = order(state.key, epoch).to(state.key.device)
        reported = time.perf_counter()
        losses: list[Tensor] = []
        total, counted, stopped = 0.0, 0, False
        for drawn in iter_batches(indices.split(batch_size)[position:per_epoch]):
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
    return torch.randperm(n, generator=_generator_of(key, epoch))


def oversampled_counts(counts: Num[Tensor, " classes"], power: float) -> Int[Tensor, " classes"]:
    """Return how often an oversampled epoch draws each class, ``n_c * (max(n) / n_c) ** power``.

    So the classes occur in proportion to ``n_c ** (1 - power)``, as they weigh under class weights
    in proportion to ``n_c ** -power``.

    Args:
        counts: Examples of each class, ``n_c``, shape ``(classes,)``.
        power: 0: as often as there are examples; 1: all that have one as often as the largest.

    Returns:
        Numbers of draws, rounded, at least ``counts``, on the CPU.

    Example:
        >>> oversampled_counts(torch.tensor([100, 25, 0]), 0.5)
        tensor([100,  50,   0])
    """
    n = counts.cpu().double()
    draws = n * (n.max() / n.clamp(min=1.0)) ** power
    return draws.round().long()


def oversampled_order(
    key: Int[Tensor, ""], epoch: int, labels: Int[Tensor, " n"], power: float
) -> Int[Tensor, " draws"]:
    """Return the order of the examples in an epoch in which rarer classes are repeated.

    Each example of a class comes equally often, or once more: which do is drawn afresh in each
    epoch. Like :func:`epoch_order` it depends on key and number alone.

    Args:
        key: The key of the training.
        epoch: Number of the epoch, from 0.
        labels: Class of each example.
        power: As for :func:`oversampled_counts`.

    Returns:
        Indices, on the CPU, as many as the sum of :func:`oversampled_counts`.

    Example:
        >>> from funcloss.keys import make_key
        >>> order = oversampled_order(make_key(0), 0, torch.tensor([0, 0, 0, 0, 1]), 1.0)
        >>> order.bincount()
        tensor([1, 1, 1, 1, 4])
    """
    generator, labels = _generator_of(key, epoch), labels.cpu()
    counts = labels.bincount()
    draws = oversampled_counts(counts, power)
    shuffled = torch.randperm(len(labels), generator=generator)
    members = shuffled[labels[shuffled].argsort(stable=True)]  # class by class
    of_member = labels[members]
    place = torch.arange(len(labels)) - (counts.cumsum(0) - counts)[of_member]  # in its class
    held = counts.clamp(min=1)
    repeats = (draws // held)[of_member] + (place < (draws % held)[of_member])
    drawn = members.repeat_interleave(repeats)
    return drawn[torch.randperm(len(drawn), generator=generator)]


def _generator_of(key: Tensor, epoch: int) -> torch.Generator:
    # A step's keys fold its number into the key; this counter is one that no step reaches.
    seed = int(fold_in(key.cpu(), torch.tensor(2**32 - 1 - epoch)))
    return torch.Generator().manual_seed(seed)
