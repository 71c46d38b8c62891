"""The ledger of a training: what each class's part of its steps did to each class's held-out loss.

The change of class ``k``'s held-out mean loss by one step is the sum over the parts of the step,
``int_0^1 <grad L_k(params + t u), u_r> dt``, by Simpson's rule. Added up over the steps of a
training, the entries of class ``k`` are what its loss really changed by. They tell how a training
went, not how another would have gone.

References:
    Lan, Liu, Zhou and Yosinski, "LCA: loss change allocation for neural network training", 2019
    (by parameter). Pruthi, Liu, Kale and Sundararajan, "Estimating training data influence by
    tracing gradient descent", 2020 (by example, to first order).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from funcloss.audit.data import GroupBy, groups_of
from funcloss.audit.held_out import HeldOut, Point, make_held_out
from funcloss.audit.inner import grams, layers_of, total_of
from funcloss.audit.loss import LossSpec, as_spec
from funcloss.audit.parts import Groups, class_parts, groups_in
from funcloss.audit.result import Impact
from funcloss.audit.sampling import Sampling, Waiting
from funcloss.audit.step import OWN_ROWS, SplitStep, impact_along, split_step
from funcloss.errors import AuditError
from funcloss.keys import example_keys, keyed_randomness
from funcloss.objectives import make_forward
from funcloss.objectives.supervised import Criterion, Forward
from funcloss.optim import Optimizer, Schedule
from funcloss.training import TrainState
from funcloss.typing import Batch, Grads, Hyper, LossFn, Params

_CLOSES = 0.005  # of a step: steps that go to and fro leave less than each of them
STATISTICS = "statistics"  # what batch normalisation keeps beside the parameters


class Ledger(NamedTuple):
    """The sums over the steps so far, a tree of tensors: to be kept and resumed with the state.

    Rows of a matrix are the held-out classes ``k``, columns the parts of the steps: the classes,
    ``weight decay``, ``history`` (what the optimiser remembers of steps before the ledger), and
    ``statistics`` (batch normalisation's).
    """

    raised: Float[Tensor, "classes parts"]  # sum of the entries above 0, float64 on the CPU
    lowered: Float[Tensor, "classes parts"]  # sum of those below 0
    variance: Float[Tensor, "classes parts"]  # of the entries of ``net``; 0 where all are measured
    variance_of_sum: Float[Tensor, " classes"]  # of the sums of its rows
    begin: Float[Tensor, " classes"]  # L_k before the first step
    now: Float[Tensor, " classes"]  # L_k after the last, or when it was last measured
    memory: Params  # the optimiser's, in one row for each part
    steps: Int[Tensor, ""]
    sampling: Sampling | None = None  # of steps; None: each is measured
    layers: dict[str, Tensor] = {}  # ``net`` without statistics, by layer, if that was asked for

    @property
    def net(self) -> Float[Tensor, "classes parts"]:
        """What each part changed each class's mean loss by."""
        return self.raised + self.lowered

    @property
    def standard_error(self) -> Float[Tensor, "classes parts"]:
        """Of ``net``, by the jackknife over the steps measured; 0 where all are."""
        return self.variance.sqrt()

    @property
    def residual(self) -> float:
        """How far the parts are from adding up to the changes of the losses, relative to these."""
        changed = self.now - self.begin
        known = changed.isfinite()
        apart = (self.net.sum(1) - changed)[known].norm()
        return float(apart / changed[known].norm().clamp(min=1e-300))

    def due_to(self, class_weights: Float[Tensor, " classes"]) -> Float[Tensor, "classes classes"]:
        """Return the part of each class's column that its weight beyond 1 made, ``(w - 1) / w``.

        It is of the path that was taken: a training at weight 1 would have taken another.
        """
        weights = class_weights.to(self.net)
        return self.net[:, : len(weights)] * (1.0 - 1.0 / weights)


def ledger_from(tensors: Mapping[str, Tensor], device: torch.device | str) -> Ledger:
    """Return a ledger from its tensors by path, what is remembered of gradients on a device.

    Raises:
        KeyError: one is missing.
    """
    tree: dict[str, Any] = {}
    for path, tensor in tensors.items():
        *above, last = path.split("/")
        inner = tree
        for name in above:
            inner = inner.setdefault(name, {})
        inner[last] = tensor.to(device) if "memory" in above else tensor.cpu()
    missing = [n for n in Ledger._fields if n not in (*tree, "memory", *Ledger._field_defaults)]
    if missing:
        raise KeyError(missing[0])
    if "sampling" in tree:
        waiting = Waiting(**{"memory": {}, **tree["sampling"]["waiting"]})
        tree["sampling"] = Sampling(**{**tree["sampling"], "waiting": waiting})
    return Ledger(**{"memory": {}, **tree})


class Taken(NamedTuple):
    """A step of a training, as a ledger takes it in."""

    before: Point
    after: Point
    split: SplitStep
    gradients: Grads  # of the classes, side by side, unclipped; empty: not asked for


class LedgerKeeper(NamedTuple):
    """An init/update pair, as an optimiser is one."""

    init: Callable[[TrainState], Ledger]
    # (ledger, state before the step, batch, hyper, state after it) -> ledger
    update: Callable[[Ledger, TrainState, Batch, Hyper, TrainState], Ledger]
    parts: tuple[str, ...]  # names of the columns


def make_ledger(
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
) -> LedgerKeeper:
    """Return what keeps the ledger of a training by the pure step, beside it.

    Each class's part of the gradient comes from the graph of the batch's own forward pass, under
    the step's own dropout masks, exact with batch normalisation; each part has its own memory in
    the optimiser. An update costs a backward pass for each class in the batch, and three passes
    over the held-out examples in evaluation mode, more where the step is so long that Simpson's
    rule does not close within 0.5 %. :func:`make_sampled_ledger` measures some of the steps.

    Args:
        model: In the mode that it is trained in; it is not touched.
        criterion: What the training minimises of predictions, as for ``supervised``.
        optimizer: What takes the steps.
        held_out: Examples that the losses are of, as a batch or several.
        loss: Of one held-out example, at weight 1; class weights of a loss are left out.
        classes: Names of the classes.
        schedule: Factor on the learning rate by number of the step.
        clip_norm: Largest norm of the gradient; 0 clips nothing.
        group_by: From a batch to the group of each example, in place of its label.
        by_layer: Whether the sums are kept for each layer too.

    Returns:
        The pair; ``init`` takes the state that the ledger begins at.

    Raises:
        AuditError: the optimiser's step cannot be split, or the held-out examples not be audited.

    Example:
        >>> from funcloss import losses, models, optim
        >>> from funcloss.objectives import mean_of, supervised
        >>> from funcloss.training import init_state, make_train_step
        >>> _ = torch.manual_seed(0)
        >>> model, optimizer = models.linear((1, 2, 2), 2), optim.sgd(momentum=0.9)
        >>> criterion = mean_of(losses.cross_entropy)
        >>> batch = Batch(torch.rand(6, 1, 2, 2), torch.tensor([0, 1, 0, 1, 0, 1]))
        >>> keeper = make_ledger(
        ...     model, criterion, optimizer, batch, losses.cross_entropy, classes=("a", "b"))
        >>> train_step = make_train_step(supervised(model, criterion), optimizer)
        >>> state, hyper = init_state(model, optimizer), {"learning_rate": torch.tensor(0.1)}
        >>> ledger = keeper.init(state)
        >>> for _ in range(3):
        ...     after, _ = train_step(state, batch, hyper)
        ...     ledger, state = keeper.update(ledger, state, batch, hyper, after), after
        >>> keeper.parts, ledger.residual < 1e-3
        (('a', 'b', 'weight decay', 'history', 'statistics'), True)
    """
    course = make_course(
        model, criterion, optimizer, held_out, loss, classes=classes, schedule=schedule,
        clip_norm=clip_norm, group_by=group_by,
    )  # fmt: skip
    return exact_keeper(course, by_layer=by_layer)


def exact_keeper(course: "Course", *, by_layer: bool = False) -> LedgerKeeper:
    """Return what keeps the ledger of a course of training, as :func:`make_ledger`."""
    held, take = course.held, course.take

    @torch.no_grad()
    def init(state: TrainState) -> Ledger:
        return begun(held, point_of(state), by_layer=by_layer)

    @torch.no_grad()
    def update(
        ledger: Ledger, state: TrainState, batch: Batch, hyper: Hyper, after: TrainState
    ) -> Ledger:
        return with_step(ledger, held, take(state, batch, hyper, after, True))

    return LedgerKeeper(init, update, course.parts)


def begun(held: HeldOut, point: Point, *, more: int = 0, by_layer: bool = False) -> Ledger:
    """Return a ledger without a step, whose gradients have ``more`` parts than the classes'."""
    begin, _ = held.losses(point)
    none = begin.new_zeros(len(begin), len(begin) + more + len(OWN_ROWS) + 1)
    steps = torch.zeros((), dtype=torch.int64)
    layers = {name: none[:, :-1] for name in layers_of(point.params)} if by_layer else {}
    return Ledger(none, none, none, none[:, 0], begin, begin, {}, steps, layers=layers)


def with_step(ledger: Ledger, held: HeldOut, taken: Taken) -> Ledger:
    """Return a ledger with one more step, measured in full."""
    moves, memory = taken.split.split(taken.gradients, ledger.memory or None)
    impact, now, products = measured(held, taken, moves)
    matrix = torch.cat([impact.matrix, (now - impact.after)[:, None]], 1)
    return ledger._replace(
        raised=ledger.raised + matrix.clamp(min=0.0),
        lowered=ledger.lowered + matrix.clamp(max=0.0),
        now=now,
        memory=memory,
        steps=ledger.steps + 1,
        layers=with_layers(ledger.layers, products(moves)) if ledger.layers else {},
    )


def with_layers(layers: dict[str, Tensor], more: Tensor) -> dict[str, Tensor]:
    """Return the sums of each layer with more of them, ``(layers, classes, parts)``."""
    return {name: held + of for (name, held), of in zip(layers.items(), more, strict=True)}


def measured(
    held: HeldOut, taken: Taken, moves: Params, *, closes: float = _CLOSES
) -> tuple[Impact, Tensor, Callable[[Params], Tensor]]:
    """Measure the impact of moves that add up to a step.

    Returns:
        The impact of the moves, one a column; the losses after the step, with the buffers that it
        leaves; and from moves to their impact by the same gradients, layer by layer.
    """
    before, after = taken.before, taken.after
    there = Point(after.params, before.buffers)
    (first, count), (last, _) = map(held.losses, (before, there))
    kept = all(torch.equal(b, after.buffers[name]) for name, b in before.buffers.items())
    now = last if kept else held.losses(after)[0]

    def products(left: Callable[[range], Grads], moves: Params) -> Tensor:
        sums = grams(left(held.classes), moves, layers_of(moves))
        return torch.where(count[:, None] > 0, sums / count[:, None], torch.nan)

    impact, left = impact_along(
        before.params,
        {name: after.params[name] - p for name, p in before.params.items()},
        lambda at: lambda block: held.gradients(Point(at, before.buffers)),
        lambda left: products(left, moves).sum(0),
        first,
        last,
        [held.classes],
        closes=closes,
        end=after.params,
    )
    return impact, now, lambda moves: products(left, moves)


def point_of(state: TrainState) -> Point:
    """Return where a training is."""
    return Point(state.params, state.buffers)


# (state, batch, hyper, state after the step, whether the classes' gradients are asked for) -> Taken
Taking = Callable[[TrainState, Batch, Hyper, TrainState, bool], Taken]


class Course(NamedTuple):
    """How a training by the pure step goes, and the losses that its ledger is of."""

    held: HeldOut
    forward: Forward
    criterion: Criterion
    take: Taking
    parts: tuple[str, ...]  # names of the columns of its ledger


def make_course(
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
) -> Course:
    """Return what all that keeps a ledger of a training looks at; args as :func:`make_ledger`."""
    names = tuple(map(str, classes))
    held = make_held_out(model, held_out, as_spec(loss), names, group_by)
    forward = make_forward(model)

    def take(
        state: TrainState, batch: Batch, hyper: Hyper, after: TrainState, by_class: bool
    ) -> Taken:
        groups = groups_in(groups_of(batch, group_by), len(names) + 1)
        rows = len(names) if by_class else 0
        gradient, parts = _gradients(forward, criterion, state, batch, hyper, groups, rows)
        rate = hyper["learning_rate"]
        rate = rate if schedule is None else rate * schedule(state.step)
        split, why_not = split_step(
            optimizer, state.opt_state, state.params, gradient, rate, clip_norm
        )
        if split is None:
            raise AuditError(f"ledger: {why_not}")
        return Taken(point_of(state), point_of(after), split, parts)

    return Course(held, forward, criterion, take, (*names, *OWN_ROWS, STATISTICS))


def _gradients(
    forward: Forward,
    criterion: Criterion,
    state: TrainState,
    batch: Batch,
    hyper: Hyper,
    groups: Groups,
    classes: int,
) -> tuple[Grads, Grads]:
    """Return a batch's gradient, and each class's part of it, side by side; of none, nothing."""
    leaves = {name: p.detach().requires_grad_() for name, p in state.params.items()}
    keys = example_keys(state.key, state.step, len(batch.targets))
    with torch.enable_grad():
        with keyed_randomness(keys):
            predictions, _ = forward(leaves, state.buffers, batch.inputs)
        scalar = criterion(predictions, batch, hyper)
    if not classes:
        found = torch.autograd.grad(scalar, [*leaves.values()], allow_unused=True)
        pairs = zip(leaves.items(), found, strict=True)
        return {n: torch.zeros_like(p) if g is None else g for (n, p), g in pairs}, {}
    (cotangents,) = torch.autograd.grad(scalar, predictions, retain_graph=True)
    rows = {name: p.new_zeros(classes, *p.shape) for name, p in state.params.items()}
    wanted = [group for group in groups.counts if group >= 0]
    parts = class_parts(predictions, cotangents, groups, [*leaves.values()], wanted)
    for group, of_group in parts.items():
        for row, part in zip(rows.values(), of_group, strict=True):
            if part is not None:
                row[group] = part
    return total_of(rows), rows
