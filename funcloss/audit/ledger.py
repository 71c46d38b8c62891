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

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from funcloss.audit.data import GroupBy, MakeBatches, groups_of, reiterable
from funcloss.audit.gradients import AuditContext
from funcloss.audit.inner import grams, layers_of, total_of
from funcloss.audit.loss import LossSpec, as_spec
from funcloss.audit.measure import AuditSettings, prepare, probe_of
from funcloss.audit.parts import Groups, class_parts, groups_in
from funcloss.audit.state import make_model_state
from funcloss.audit.step import (
    OWN_ROWS,
    class_losses,
    impact_along,
    loss_gradients,
    split_step,
)
from funcloss.errors import AuditError
from funcloss.keys import example_keys, keyed_randomness
from funcloss.objectives import make_forward
from funcloss.objectives.skeleton import skeleton_of
from funcloss.objectives.supervised import Criterion, Forward
from funcloss.optim import Optimizer, Schedule
from funcloss.training import TrainState
from funcloss.typing import Batch, Grads, Hyper, LossFn, Params

_BATCH = 256  # held-out examples at a time
_CLOSES = 0.01  # of a step: steps that go to and fro leave less than each of them
STATISTICS = "statistics"  # what batch normalisation keeps beside the parameters


class Ledger(NamedTuple):
    """The sums over the steps so far, a tree of tensors: to be kept and resumed with the state.

    Rows of a matrix are the held-out classes ``k``, columns the parts of the steps: the classes,
    ``weight decay``, ``history`` (what the optimiser remembers of steps before the ledger), and
    ``statistics`` (batch normalisation's).
    """

    raised: Float[Tensor, "classes parts"]  # sum of the entries above 0, float64 on the CPU
    lowered: Float[Tensor, "classes parts"]  # sum of those below 0
    begin: Float[Tensor, " classes"]  # L_k before the first step
    now: Float[Tensor, " classes"]  # L_k after the last
    memory: Params  # the optimiser's, in one row for each part
    steps: Int[Tensor, ""]

    @property
    def net(self) -> Float[Tensor, "classes parts"]:
        """What each part changed each class's mean loss by."""
        return self.raised + self.lowered

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
) -> LedgerKeeper:
    """Return what keeps the ledger of a training by the pure step, beside it.

    Each class's part of the gradient comes from the graph of the batch's own forward pass, under
    the step's own dropout masks, exact with batch normalisation; each part has its own memory in
    the optimiser. An update costs a backward pass for each class in the batch, and three passes
    over the held-out examples in evaluation mode, more where the step is so long that Simpson's
    rule does not close within 1 %.

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
    names = tuple(map(str, classes))
    parts = (*names, *OWN_ROWS, STATISTICS)
    forward = make_forward(model)
    judged = _judged(model, held_out, as_spec(loss), names, group_by)

    @torch.no_grad()
    def init(state: TrainState) -> Ledger:
        begin, _ = judged.losses(state)
        none = torch.zeros(len(names), len(parts), dtype=torch.float64)
        return Ledger(none, none, begin, begin, {}, torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def update(
        ledger: Ledger, state: TrainState, batch: Batch, hyper: Hyper, after: TrainState
    ) -> Ledger:
        groups = groups_in(groups_of(batch, group_by), len(names) + 1)
        gradients = _parts_of_gradient(forward, criterion, state, batch, hyper, groups, len(names))
        rate = hyper["learning_rate"]
        rate = rate if schedule is None else rate * schedule(state.step)
        split, why_not = split_step(
            optimizer, state.opt_state, state.params, total_of(gradients), rate, clip_norm
        )
        if split is None:
            raise AuditError(f"ledger: {why_not}")
        moves, memory = split.split(gradients, ledger.memory or None)
        moved = state._replace(params=after.params)
        (before, count), (there, _) = map(judged.losses, (state, moved))
        kept = all(torch.equal(b, after.buffers[name]) for name, b in state.buffers.items())
        now = there if kept else judged.losses(after)[0]

        def products(left: Callable[[range], Grads]) -> Tensor:
            sums = grams(left(judged.block), moves, layers_of(moves)).sum(0)
            return torch.where(count[:, None] > 0, sums / count[:, None], torch.nan)

        impact = impact_along(
            state.params,
            {name: after.params[name] - p for name, p in state.params.items()},
            lambda at: lambda block: judged.gradients(state._replace(params=at)),
            products,
            before,
            there,
            [judged.block],
            closes=_CLOSES,
        )
        matrix = torch.cat([impact.matrix, (now - there)[:, None]], 1)
        return Ledger(
            ledger.raised + matrix.clamp(min=0.0),
            ledger.lowered + matrix.clamp(max=0.0),
            ledger.begin,
            now,
            memory,
            ledger.steps + 1,
        )

    return LedgerKeeper(init, update, parts)


@dataclass(frozen=True, eq=False)
class _Judged:
    """The held-out losses of the classes, at any state, in evaluation mode."""

    skeleton: nn.Module
    forward: Forward
    context: AuditContext
    make_batches: MakeBatches

    @property
    def block(self) -> range:
        """Return all classes."""
        return range(self.context.classes)

    def losses(self, state: TrainState) -> tuple[Tensor, Tensor]:
        """Return the mean loss of each class, and how many examples it has."""
        return class_losses(self._at(state), self.make_batches, state.params)

    def gradients(self, state: TrainState) -> Grads:
        """Return the gradient of each class's sum of losses."""
        return loss_gradients(self._at(state), self.make_batches, self.block)

    def _at(self, state: TrainState) -> AuditContext:
        there = make_model_state(self.skeleton, state, forward=self.forward)
        return replace(self.context, state=there)


def _judged(
    model: nn.Module,
    held_out: Batch | Sequence[Batch],
    spec: LossSpec,
    names: tuple[str, ...],
    group_by: GroupBy | None,
) -> _Judged:
    """Choose, at the model's own tensors, how the gradients of held-out losses are measured."""
    skeleton = skeleton_of(model).eval()
    forward = make_forward(skeleton)
    with torch.no_grad():
        own = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        state = make_model_state(skeleton, own, forward=forward)
        make_batches = reiterable(held_out, state, batch_size=_BATCH, group_by=group_by)
        settings = AuditSettings(classes=names, per_example=False, group_by=group_by)
        _, probe = probe_of(make_batches)
        spec = replace(spec, class_weights=None)
        context, _ = prepare(state, spec, make_batches, probe, settings, with_step=False)
    return _Judged(skeleton, forward, replace(context, blocks=(range(len(names)),)), make_batches)


def _parts_of_gradient(
    forward: Forward,
    criterion: Criterion,
    state: TrainState,
    batch: Batch,
    hyper: Hyper,
    groups: Groups,
    classes: int,
) -> Grads:
    """Return each class's part of a batch's gradient, side by side."""
    leaves = {name: p.detach().requires_grad_() for name, p in state.params.items()}
    keys = example_keys(state.key, state.step, len(batch.targets))
    with torch.enable_grad():
        with keyed_randomness(keys):
            predictions, _ = forward(leaves, state.buffers, batch.inputs)
        scalar = criterion(predictions, batch, hyper)
    (cotangents,) = torch.autograd.grad(scalar, predictions, retain_graph=True)
    rows = {name: p.new_zeros(classes, *p.shape) for name, p in state.params.items()}
    wanted = [group for group in groups.counts if group >= 0]
    found = class_parts(predictions, cotangents, groups, [*leaves.values()], wanted)
    for group, of_group in found.items():
        for row, part in zip(rows.values(), of_group, strict=True):
            if part is not None:
                row[group] = part
    return rows
