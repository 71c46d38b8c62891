"""The ledger of a training by some of its steps, drawn at random: unbiased, with its errors.

One step of each block of steps is measured and stands for the block. Of the step's gradient, the
optimiser's memory makes an effect at every later step, with the weight ``r^t`` after ``t`` of them:
it is measured at one, drawn with that probability. The held-out losses there are of a random
sample of each class. So the expected value of each entry is that of the ledger of all steps.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from funcloss.audit.data import GroupBy
from funcloss.audit.held_out import HeldOut, Point
from funcloss.audit.ledger import (
    Course,
    Ledger,
    Taken,
    begun,
    make_course,
    measured,
    point_of,
    with_layers,
)
from funcloss.audit.loss import LossSpec
from funcloss.audit.sampling import (
    Sampling,
    Waiting,
    drawn,
    geometric,
    in_block,
    no_sample,
    variances,
    with_sample,
)
from funcloss.audit.step import OWN_ROWS, SplitStep
from funcloss.objectives.supervised import Criterion
from funcloss.optim import Optimizer, Schedule
from funcloss.training import TrainState
from funcloss.typing import Batch, Hyper, LossFn, Params

_PER_CLASS = 5  # held-out examples of a class that a step is measured on: more steps tell more
_CLOSES = 0.1  # of a step: far below the errors of the sample
_BLOCK, _BEFORE, _DELAY, _HELD_OUT = range(4)  # what random numbers are drawn for


class SampledKeeper(NamedTuple):
    """As :class:`LedgerKeeper`, for a ledger by some of the steps."""

    init: Callable[[TrainState], Ledger]
    # (ledger, state before, batch, hyper, state after, length of the next block) -> ledger
    update: Callable[[Ledger, TrainState, Batch, Hyper, TrainState, int], Ledger]
    # (ledger, state) -> ledger with the losses there, on all held-out examples
    judge: Callable[[Ledger, TrainState], Ledger]
    parts: tuple[str, ...]  # names of the columns


def make_sampled_ledger(
    model: nn.Module,
    criterion: Criterion,
    optimizer: Optimizer,
    held_out: Batch | Sequence[Batch],
    loss: LossFn | LossSpec,
    *,
    classes: Sequence[str],
    schedule: Schedule | None = None,
    clip_norm: float = 0.0,
    group_by: GroupBy | None = None,
    by_layer: bool = False,
    per_class: int = _PER_CLASS,
    seed: int = 0,
) -> SampledKeeper:
    """Return what keeps the ledger of a training by a sample of its steps.

    ``E[net] = sum_t M_t``, the entries of :func:`make_ledger`; their ``standard_error`` is by the
    jackknife over the steps that were measured. Of ``raised`` and ``lowered`` the sum alone is
    unbiased.

    A ledger that has measured every step so far may be handed on: from there its steps are drawn.

    Args:
        model: As for :func:`make_ledger`, and all that follow.
        criterion: What the training minimises of predictions.
        optimizer: What takes the steps.
        held_out: Examples that the losses are of.
        loss: Of one held-out example, at weight 1.
        classes: Names of the classes.
        schedule: Factor on the learning rate by number of the step.
        clip_norm: Largest norm of the gradient.
        group_by: From a batch to the group of each example.
        by_layer: Whether the sums are kept for each layer too.
        per_class: Held-out examples of each class that a step is measured on, drawn for each.
        seed: Of what is drawn.

    Returns:
        The keeper; ``update`` is called at every step, with the length of the next block of steps,
        one of which is measured.

    Raises:
        AuditError: as :func:`make_ledger`.

    Example:
        >>> from funcloss import losses, models, optim
        >>> from funcloss.objectives import mean_of, supervised
        >>> from funcloss.training import init_state, make_train_step
        >>> _ = torch.manual_seed(0)
        >>> model, optimizer = models.linear((1, 2, 2), 2), optim.sgd(momentum=0.5)
        >>> criterion = mean_of(losses.cross_entropy)
        >>> batch = Batch(torch.rand(6, 1, 2, 2), torch.tensor([0, 1, 0, 1, 0, 1]))
        >>> keeper = make_sampled_ledger(
        ...     model, criterion, optimizer, batch, losses.cross_entropy, classes=("a", "b"))
        >>> train_step = make_train_step(supervised(model, criterion), optimizer)
        >>> state, hyper = init_state(model, optimizer), {"learning_rate": torch.tensor(0.1)}
        >>> ledger = keeper.init(state)
        >>> for _ in range(40):
        ...     after, _ = train_step(state, batch, hyper)
        ...     ledger, state = keeper.update(ledger, state, batch, hyper, after, 4), after
        >>> ledger.sampling.samples > 5, ledger.standard_error.shape
        (tensor(True), torch.Size([2, 5]))
    """
    course = make_course(
        model, criterion, optimizer, held_out, loss, classes=classes, schedule=schedule,
        clip_norm=clip_norm, group_by=group_by,
    )  # fmt: skip
    return sampled_keeper(course, by_layer=by_layer, per_class=per_class, seed=seed)


def sampled_keeper(
    course: Course, *, by_layer: bool = False, per_class: int = _PER_CLASS, seed: int = 0
) -> SampledKeeper:
    """Return what keeps the ledger of a course of training, as :func:`make_sampled_ledger`."""
    held, take = course.held, course.take

    def init(state: TrainState) -> Ledger:
        return begun(held, point_of(state), by_layer=by_layer)

    def update(
        ledger: Ledger,
        state: TrainState,
        batch: Batch,
        hyper: Hyper,
        after: TrainState,
        every: int,
    ) -> Ledger:
        return with_perhaps(
            ledger,
            held,
            lambda by_class: take(state, batch, hyper, after, by_class),
            every,
            per_class=per_class,
            seed=seed,
        )

    def judge(ledger: Ledger, state: TrainState) -> Ledger:
        return judged(ledger, held, point_of(state))

    return SampledKeeper(
        torch.no_grad()(init),
        torch.no_grad()(update),
        torch.no_grad()(judge),
        course.parts,
    )


def judged(ledger: Ledger, held: HeldOut, point: Point) -> Ledger:
    """Return a ledger with the losses where the training is."""
    return ledger._replace(now=held.losses(point)[0])


def with_perhaps(
    ledger: Ledger,
    held: HeldOut,
    take: Callable[[bool], Taken],
    every: int,
    *,
    per_class: int = _PER_CLASS,
    seed: int = 0,
) -> Ledger:
    """Return a ledger after one more step, which is measured if it is drawn.

    Args:
        ledger: Of the steps before.
        held: The held-out losses.
        take: Makes the record of the step, with the classes' gradients if it gets True; called if
            it is needed.
        every: Length of the next block of steps.
        per_class: Held-out examples of each class that are drawn.
        seed: Of what is drawn.
    """
    step, sampling, taken = int(ledger.steps), ledger.sampling, None
    if sampling is None:
        taken = take(False)
        before = _of_steps_before(ledger, taken.split, drawn(seed, step, _BEFORE))
        sampling = no_sample(ledger.steps, torch.zeros_like(ledger.raised), before)
    sampling = in_block(sampling, step, every, drawn(seed, step, _BLOCK))
    effects: list[_Effect] = []
    if step == int(sampling.chosen):
        taken = take(True)
        delay = geometric(taken.split.keeps, drawn(seed, step, _DELAY))
        memory = {
            name: torch.zeros_like(m) for name, m in _all_history(ledger, taken.split).items()
        }
        moves, memory = taken.split.rows(taken.gradients, memory)
        scale = float(sampling.every) / (1.0 - taken.split.keeps)
        if delay:
            scale /= taken.split.keeps  # the memory itself has the weight r^0 at the next step
            now = Waiting.of(step + delay, scale, float(sampling.every), memory)
            sampling = sampling._replace(waiting=sampling.waiting.and_(now))
        else:
            effects.append(_Effect(moves, scale, float(sampling.every)))
    due, waiting = sampling.waiting.at(step)
    effects += [
        _Effect(memory, scale, length, remembered=True) for memory, scale, length in due.each()
    ]
    if effects:
        taken = taken or take(False)
        generator = drawn(seed, step, _HELD_OUT)
        estimates = _estimates(sampling, held.sample(per_class, generator), taken, effects, step)
        layers, found = ledger.layers, []
        for by_layer, statistics in estimates:
            found.append(torch.cat([by_layer.sum(0), statistics], 1))
            sampling = with_sample(sampling, found[-1])
            layers = with_layers(layers, by_layer) if layers else layers
        variance, of_sum = variances(sampling._replace(waiting=waiting))
        ledger = ledger._replace(
            raised=ledger.raised + sum(e.clamp(min=0.0) for e in found),
            lowered=ledger.lowered + sum(e.clamp(max=0.0) for e in found),
            variance=variance,
            variance_of_sum=of_sum,
            layers=layers,
        )
    sampling = sampling._replace(waiting=waiting)
    return ledger._replace(memory={}, steps=ledger.steps + 1, sampling=sampling)


def asks(ledger: Ledger, every: int, *, seed: int = 0) -> tuple[bool, bool]:
    """Return whether :func:`with_perhaps` will take the next step, and its classes' gradients."""
    step, sampling = int(ledger.steps), ledger.sampling
    begins = sampling is None
    if sampling is None:
        sampling = no_sample(ledger.steps, torch.zeros_like(ledger.raised), Waiting.none())
    sampling = in_block(sampling, step, every, drawn(seed, step, _BLOCK))
    chosen = step == int(sampling.chosen)
    return begins or chosen or bool((sampling.waiting.due == step).any()), chosen


class _Effect(NamedTuple):
    """What a measured step does at a step, and what it stands for."""

    moves: Params  # in rows; or the memory that makes them
    scale: float  # of them
    every: float  # the length of its block; 0: of none
    remembered: bool = False


def _estimates(
    sampling: Sampling, held: HeldOut, taken: Taken, effects: Sequence[_Effect], step: int
) -> list[tuple[Tensor, Tensor]]:
    """Return what each effect at a step is an estimate of, by layer, and that of the statistics.

    What decay and batch normalisation do at a step beside the gradient comes with each effect; the
    expected length of the blocks of those that meet at a step is ``1 - r^n`` after ``n`` steps.
    """
    whole = {name: (taken.after.params[name] - p)[None] for name, p in taken.before.params.items()}
    impact, now, products = measured(held, taken, whole, closes=_CLOSES)
    reached = 1.0 - taken.split.keeps ** (step - int(sampling.since) + 1)
    found = []
    for effect in effects:
        own = effect.every / reached
        moves = taken.split.remembered(effect.moves) if effect.remembered else effect.moves
        matrix = effect.scale * products(moves)
        if taken.split.decay and own:
            decay = products({name: move[None] for name, move in taken.split.decay.items()})
            matrix[..., -len(OWN_ROWS)] += own * decay[..., 0]
        found.append((matrix, own * (now - impact.after)[:, None]))
    return found


def _of_steps_before(ledger: Ledger, split: SplitStep, generator: torch.Generator) -> Waiting:
    """Return what waits of the memory of all steps before the first that may be drawn."""
    memory = ledger.memory or _all_history(ledger, split)
    if not split.keeps or not any(bool(m.any()) for m in memory.values()):
        return Waiting.none()
    due = int(ledger.steps) + geometric(split.keeps, generator)
    return Waiting.of(due, 1.0 / (1.0 - split.keeps), 0.0, memory)


def _all_history(ledger: Ledger, split: SplitStep) -> Params:
    return split.all_history(ledger.raised.shape[1] - len(OWN_ROWS) - 1)
