"""The audit that travels with a training: one batch at a time, beside the step that is taken."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from funcloss._json import jsonable
from funcloss.audit.data import groups_of, select_valid
from funcloss.audit.gradients import AuditContext, batch_gradients
from funcloss.audit.gram import Balance, balance
from funcloss.audit.inner import grams, layers_of, scaled_rows, total_of
from funcloss.audit.loss import LossSpec, as_spec, inspected
from funcloss.audit.measure import COUPLING, plan_for
from funcloss.audit.methods import Measure
from funcloss.audit.result import StepAudit
from funcloss.audit.state import ModelState, check_no_coupling, make_predict
from funcloss.audit.step import split_step
from funcloss.errors import AuditError
from funcloss.objectives import make_forward
from funcloss.optim import Optimizer, Schedule
from funcloss.reduction import divisor
from funcloss.training import TrainState
from funcloss.typing import Batch, Grads, Hyper, LossFn, Params


@dataclass(frozen=True, eq=False)
class StepFindings:
    """Each class's share of the gradient of one batch, and of the step on it."""

    balance: Balance
    count: Int[Tensor, " classes"]
    loss: Float[Tensor, " classes"]  # mean at weight 1; NaN without examples
    step: StepAudit | None  # None: the optimiser does not say
    classes: tuple[str, ...] = ()
    note: str = ""  # what to doubt, and why there is no step; empty: nothing
    moved: float = math.nan  # distance of the step taken from the one told, relative; NaN: unknown

    def records(self) -> list[dict[str, Any]]:
        """Return a row per class, numbers and text, for a log."""
        columns = {
            "class": self.classes,
            "count": self.count,
            "loss": self.loss,
            "share": self.balance.share,
            "expected_share": self.balance.expected_share,
            "elasticity": self.balance.elasticity,
            "norm": self.balance.norm,
            "update_share": self.step.share if self.step else [None] * len(self.classes),
        }
        rows = zip(*jsonable(list(columns.values())), strict=False)
        return [dict(zip(columns, row, strict=True)) for row in rows]


def nothing_found(why: str) -> StepFindings:
    """Return findings without a class, of a step that could not be audited."""
    none = torch.zeros(0, dtype=torch.float64)
    unknown = balance(torch.zeros(0, 0, dtype=torch.float64), none.long(), none)
    return StepFindings(unknown, none.long(), none, None, (), why)


# (state, batch, hyper, memory) -> (findings, memory)
AuditStep = Callable[[TrainState, Batch, Hyper, Params | None], tuple[StepFindings, Params]]


def make_audit_step(
    model: nn.Module,
    loss: LossFn | LossSpec,
    optimizer: Optimizer,
    *,
    classes: tuple[str, ...],
    schedule: Schedule | None = None,
    clip_norm: float = 0.0,
) -> AuditStep:
    """Return a function that splits the step on a batch by class.

    It takes what the training step takes and touches none of it; ``hyper`` holds ``learning_rate``,
    perhaps ``class_weights``, and the loss's options. The memory that it gives back has one
    optimiser memory for each class; handed on from step to step, it splits every step exactly by
    the classes that caused it, however long ago. Without one, what the optimiser remembers is one
    row, ``history``.

    Args:
        model: In the mode that it is trained in.
        loss: As for :func:`funcloss.audit.audit`; ``hyper`` goes before its weights and options.
        optimizer: What takes the step.
        classes: Names of the classes.
        schedule: Factor on the learning rate by number of the step.
        clip_norm: Largest norm of the gradient; 0 clips nothing.

    Returns:
        ``(state, batch, hyper, memory) -> (findings, memory)``, to be called before the step.

    Raises:
        AuditError: the model couples the examples of a batch.

    Example:
        >>> from funcloss import losses, models, optim
        >>> from funcloss.training import init_state
        >>> model, optimizer = models.linear((1, 2, 2), 3), optim.sgd(momentum=0.9)
        >>> audit_step = make_audit_step(
        ...     model, losses.cross_entropy, optimizer, classes=("a", "b", "c"))
        >>> state, hyper = init_state(model, optimizer), {"learning_rate": torch.tensor(0.1)}
        >>> batch = Batch(torch.rand(6, 1, 2, 2), torch.tensor([0, 1, 2, 0, 1, 2]))
        >>> findings, memory = audit_step(state, batch, hyper, None)
        >>> findings.step.rows
        ('a', 'b', 'c', 'weight decay', 'history')
    """
    check_no_coupling(model)
    forward, gradients_of = make_forward(model), make_batch_audit(as_spec(loss), classes)

    def audit_step(
        state: TrainState, batch: Batch, hyper: Hyper, memory: Params | None
    ) -> tuple[StepFindings, Params]:
        predict = make_predict(forward, state.buffers)
        at = ModelState(predict, state.params, state.opt_state, state.step, state.key)
        found, parts = gradients_of(at, batch, hyper)
        rate = hyper["learning_rate"]
        rate = rate if schedule is None else rate * schedule(state.step)
        split, _ = split_step(
            optimizer, state.opt_state, state.params, total_of(parts), rate, clip_norm
        )
        if split is None:
            return found, memory or {}
        moves, memory = split.split(parts, memory or None)
        gram = grams(moves, moves, layers_of(moves)).sum(0)
        return replace(found, step=split.audited(classes, gram)), memory

    return torch.no_grad()(audit_step)


# (model, batch, hyper) -> (findings without a step, class parts of the gradient side by side)
BatchAudit = Callable[[ModelState, Batch, Hyper], tuple[StepFindings, Grads]]


def make_batch_audit(spec: LossSpec, classes: tuple[str, ...]) -> BatchAudit:
    """Return a function that audits the gradient of a batch; the first one shows how to measure.

    Args:
        spec: The loss; class weights and options of ``hyper`` go before its own.
        classes: Names of the classes.
    """
    # By whether there are class weights, and more than one example to try a method on.
    known: dict[tuple[bool, bool], tuple[LossSpec, bool, Measure]] = {}

    def batch_audit(state: ModelState, batch: Batch, hyper: Hyper) -> tuple[StepFindings, Grads]:
        weights = hyper.get("class_weights", spec.class_weights)
        options = {**spec.options, **loss_options(hyper)}
        valid = select_valid(batch, groups_of(batch, None), state)
        if not len(valid):
            raise AuditError("audit: no example counts")
        if (case := (weights is not None, len(valid) > 1)) not in known:
            few = valid.some(COUPLING)
            predictions = state.predict(state.params, few.inputs, few.keys)
            asked = replace(spec, class_weights=weights, options=options)
            inner, coupled = inspected(asked, predictions, few.targets)
            known[case] = inner, coupled, plan_for(state, inner, few, norms=False).measure
        inner, coupled, measure = known[case]
        like = next(iter(state.params.values()))
        weights = like.new_ones(len(classes)) if weights is None else weights.to(like)
        every = range(len(classes))
        context = AuditContext(
            state, replace(inner, class_weights=None, options=options), coupled, classes, weights,
            measure, chunk=len(valid), blocks=(every,),
        )  # fmt: skip
        seen = next(batch_gradients(context, lambda: iter([valid]), every))
        groups, n = seen.batch.groups, len(seen.loss)
        count = groups.bincount(minlength=len(classes))
        total = torch.zeros_like(weights).index_add_(0, groups, seen.loss.to(weights))
        weight_sum = (weights * count).sum().cpu()
        scale = float(torch.tensor(n) / divisor(spec.reduction, n, weight_sum))
        gram = grams(seen.sums, seen.sums, context.layers).sum(0) / n**2
        now = balance(gram, count.cpu(), weights.cpu().double(), reduction=spec.reduction)
        found = StepFindings(now, count.cpu(), (total / count).cpu().double(), None, classes)
        return found, scaled_rows(weights * (scale / n), seen.sums)

    return batch_audit


def loss_options(hyper: Hyper) -> dict[str, Tensor]:
    """Return what ``hyper`` holds for the loss itself: no learning rate, no class weights."""
    return {k: v for k, v in hyper.items() if k not in ("learning_rate", "class_weights")}
