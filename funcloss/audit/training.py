"""The audit that travels with a training: one batch at a time, beside the step that is taken."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from funcloss.audit.data import Rows, groups_of
from funcloss.audit.gram import Balance, balance, scale_of
from funcloss.audit.inner import grams, layers_of, scaled_rows, total_of
from funcloss.audit.loss import check_costs, make_loss_side
from funcloss.audit.measure import COUPLING, plan_for
from funcloss.audit.passes import Work, gradient_pass, kept_rows
from funcloss.audit.result import StepAudit, plain
from funcloss.audit.step import OWN_ROWS, split_step
from funcloss.audit.subject import Subject, check_couples_nothing, make_predict
from funcloss.errors import AuditError
from funcloss.objectives import make_forward
from funcloss.optim import Optimizer, Schedule
from funcloss.training import TrainState
from funcloss.typing import Batch, Hyper, LossFn, Params


class StepFindings(NamedTuple):
    """Who owns the gradient of one batch, and the step on it."""

    balance: Balance
    count: Int[Tensor, " classes"]  # pyright: ignore[reportIncompatibleMethodOverride]
    loss: Float[Tensor, " classes"]  # mean at cost 1; NaN without examples
    step: StepAudit | None  # None: the optimiser does not say
    classes: tuple[str, ...] = ()
    note: str = ""  # what to doubt, and why there is no step; empty: nothing

    def records(self) -> list[dict[str, Any]]:
        """Return a row a class, numbers and text, for a log."""
        columns = {
            "class": self.classes,
            "count": self.count.tolist(),
            "loss": plain(self.loss),
            "share": plain(self.balance.share),
            "budget": plain(self.balance.budget),
            "elasticity": plain(self.balance.elasticity),
            "norm": plain(self.balance.norm),
            "update_share": plain(self.step.share) if self.step else [None] * len(self.classes),
        }
        rows = zip(*columns.values(), strict=False)
        return [dict(zip(columns, row, strict=True)) for row in rows]


# (state, batch, hyper, memory) -> (findings, memory)
AuditStep = Callable[[TrainState, Batch, Hyper, Params | None], tuple[StepFindings, Params]]


def make_audit_step(
    model: nn.Module,
    loss: LossFn,
    optimizer: Optimizer,
    *,
    classes: tuple[str, ...],
    reduction: str = "mean",
    schedule: Schedule | None = None,
    clip_norm: float = 0.0,
) -> AuditStep:
    """Return a function that says how the step on a batch is made up, class by class.

    It takes what the training step takes and touches none of it; ``hyper`` holds ``learning_rate``,
    perhaps ``class_weights``, and the loss's options. The memory that it gives back has one
    optimiser memory for each class; handed on from step to step, it splits every step exactly by
    the classes that caused it, however long ago. Without one, what the optimiser remembers is one
    row, ``history``.

    Args:
        model: In the mode that it is trained in.
        loss: As for :func:`funcloss.audit.audit`.
        optimizer: What takes the step.
        classes: Names of the classes.
        reduction: What divides: ``mean``, ``weighted_mean`` or ``sum``.
        schedule: Factor on the learning rate by number of the step.
        clip_norm: Largest norm of the gradient; 0 clips nothing.

    Returns:
        ``(state, batch, hyper, memory) -> (findings, memory)``, to be called before the step.

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
    check_couples_nothing(model)
    forward = make_forward(model)
    found: dict[str, Any] = {}  # how to measure, found out at the first batch

    def audit_step(
        state: TrainState, batch: Batch, hyper: Hyper, memory: Params | None
    ) -> tuple[StepFindings, Params]:
        subject = Subject(
            predict=make_predict(forward, state.buffers),
            params=state.params,
            opt_state=state.opt_state,
            step=state.step,
            key=state.key,
            device=state.step.device,
            drops=True,
        )
        weights = hyper.get("class_weights")
        options = loss_options(hyper)
        rows = Rows(*batch, groups=groups_of(batch, None), first=0)
        if not found:
            weighted = weights is not None
            found.update(_method(subject, loss, options, rows, weighted=weighted))
        side = found["side"]._replace(options=options)
        check_costs(side, weights, reduction)
        work = Work(subject, side, len(classes), len(batch.targets))
        every = range(len(classes))
        seen = next(
            gradient_pass(work, lambda: iter([rows]), found["method"], norms=False, wanted=every),
            None,
        )
        if seen is None:
            raise AuditError("audit: no example counts")
        weights = seen.loss.new_ones(len(classes)) if weights is None else weights
        groups, n = seen.rows.chunk.groups, len(seen.loss)
        count = groups.bincount(minlength=len(classes))
        total = torch.zeros_like(weights).index_add_(0, groups, seen.loss.to(weights))
        scale = scale_of(reduction, torch.tensor(float(n)), (weights * count).sum().cpu())
        parts = scaled_rows(weights * (float(scale) / n), seen.sums)
        gram = grams(seen.sums, seen.sums, layers_of(state.params)).sum(0) / n**2
        rate = hyper["learning_rate"]
        rate = rate if schedule is None else rate * schedule(state.step)
        split, _ = split_step(
            optimizer, state.opt_state, state.params, total_of(parts), rate, clip_norm
        )
        step, memory = None, memory or {}
        if split is not None:
            moves, memory = split.split(parts, memory or None)
            step = StepAudit(
                (*classes, *OWN_ROWS),
                grams(moves, moves, layers_of(state.params)).sum(0),
                float(split.learning_rate),
                float(split.clip),
                split.note,
            )
        now = balance(gram, count.cpu(), weights.cpu().double(), reduction=reduction)
        mean = (total / count).cpu().double()
        return StepFindings(now, count.cpu(), mean, step, classes), memory

    return torch.no_grad()(audit_step)


def loss_options(hyper: Hyper) -> dict[str, Tensor]:
    """Return what ``hyper`` holds for the loss itself: no learning rate, no class weights."""
    return {k: v for k, v in hyper.items() if k not in ("learning_rate", "class_weights")}


def _method(
    subject: Subject,
    loss: LossFn,
    options: dict[str, Any],
    rows: Rows,
    *,
    weighted: bool,
) -> dict[str, Any]:
    few = kept_rows(subject, 0, rows)
    if not len(few.position):
        raise AuditError("audit: no example counts")
    few = few.some(COUPLING)
    predictions = subject.predict(subject.params, few.chunk.inputs, few.chunk.keys)
    side = make_loss_side(loss, options, predictions, few.targets, weighted=weighted)
    plan = plan_for(subject, side, few, norms=False)
    return {"side": side, "method": plan.method}
