"""The audit: a pass for class gradients and norms, one along the gradient, and what follows."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from funcloss.audit.checks import check_given, check_gradient, check_slopes, require
from funcloss.audit.data import (
    GroupBy,
    MakeBatches,
    MaskedBatch,
    check_labels,
    number_of,
    reiterable,
)
from funcloss.audit.directional import directional_derivatives, directional_of
from funcloss.audit.gradients import AuditContext, class_gradients
from funcloss.audit.gram import balance, cancelled
from funcloss.audit.loss import LossSpec, as_spec, cotangents_of, inspected, tensor_options
from funcloss.audit.methods import METHODS, Plan, make_plan
from funcloss.audit.result import Audit, Method, class_statistics
from funcloss.audit.state import ModelState, has_dropout, make_model_state
from funcloss.audit.step import StepSpec, step_and_impact
from funcloss.errors import AuditError
from funcloss.training import TrainState
from funcloss.typing import Grads, LossFn, Params

_PROBE = 3  # examples that a method is tried on
COUPLING = 64  # examples that a loss is tried on


@dataclass(frozen=True, eq=False)
class AuditSettings:
    """How an audit groups the examples, and how it measures.

    Args:
        classes: Names of the classes, or their number; None: as many as there are predictions, or
            as the groups need.
        group_by: From a batch to the integer group of each example, ``(batch,)``, in place of its
            label: for regression, for weights of other groups than classes.
        per_example: Whether to measure every example: norms, slopes and what follows.
        method: ``auto``, ``layers``, ``examples`` or ``backward``.
        memory: What may be held at a time beside the model, in MiB.
        batch_size: Examples per batch of data that does not come in batches.
        gradient: What a training step computed on the same data, to be compared.
        key: Key of the dropout masks, where the state brings none.

    Raises:
        ValueError: one of them makes no sense.
    """

    classes: Sequence[str] | int | None = None
    group_by: GroupBy | None = None
    per_example: bool = True
    method: str = "auto"
    memory: float = 2048.0
    batch_size: int = 256
    gradient: Grads | None = None
    key: Tensor | None = None

    def __post_init__(self) -> None:
        """Check what holds before any model or data is known."""
        known = ("auto", *METHODS)
        if self.method not in known:
            raise ValueError(
                f"AuditSettings: method must be one of {', '.join(known)}; got {self.method!r}"
            )
        if not 0 < self.memory < float("inf") or self.batch_size < 1:
            raise ValueError(
                "AuditSettings: memory and batch_size must be positive and finite, got "
                f"{self.memory} and {self.batch_size}"
            )
        number = number_of(self.classes)
        if number is not None and number < 1:
            raise ValueError(f"AuditSettings: classes must be at least 1, got {number}")


def audit(
    model: nn.Module,
    state: TrainState | Params | None,
    loss: LossFn | LossSpec,
    data: Any,
    *,
    step: StepSpec | None = None,
    settings: AuditSettings | None = None,
) -> Audit:
    """Measure each class's share of the gradient of a loss, and of the step that is taken on it.

    With ``g_c = sum_{y_i = c} J_i^T dL/dz_i`` the part of class ``c``, the gradient is ``g = sum_c
    g_c``, for every loss, as long as the model does not couple examples. Share, elasticity and
    conflict follow from ``<g_a, g_b>``; norms and slopes are each example's own; the step is
    split as the optimiser takes it. The result is checked against itself before it is returned.

    Args:
        model: Any module, in the mode to audit it in. BatchNorm must be in evaluation mode;
            dropout in training mode draws from the examples' keys, as the training step's does.
        state: A training state; or tensors by name (``state_dict()``, say), the rest being the
            model's; or None, all being the model's. Of these the model trains what requires grad.
        loss: One value per example, or a :class:`LossSpec` with class weights, options and
            reduction. A loss that couples examples, declared or found to, gets its parts through
            its gradient in the predictions.
        data: ``(inputs, targets)`` tensors or a :class:`funcloss.typing.Batch` in memory; a
            map-style ``torch.utils.data.Dataset``; a function that returns an iterator; or what
            can be iterated over again and again in one order, such as a list or an unshuffled
            DataLoader, over batches: tuples ``(inputs, targets)`` or ``(inputs, targets, where)``,
            or dicts with ``labels`` or ``targets``, perhaps ``where``, and the model's keywords. A
            batch is also the unit of the standard errors, and of a loss that couples examples:
            shuffle sorted data.
        step: The step to audit; None: the gradient alone.
        settings: How to group the examples and to measure; None: the defaults.

    Returns:
        The audit; the state, the model and torch's generator are untouched.

    Raises:
        AuditError: the data, the loss or the model cannot be audited, or a check does not hold.
        ValueError: the class weights do not fit the classes.

    Example:
        >>> from funcloss import losses, models
        >>> _ = torch.manual_seed(0)
        >>> model = models.linear((1, 2, 2), 3)
        >>> images, labels = torch.rand(12, 1, 2, 2), torch.arange(12) % 3
        >>> loss = LossSpec(losses.cross_entropy, class_weights=torch.tensor([1.0, 1.0, 5.0]))
        >>> audit(model, None, loss, (images, labels)).balance.share
        tensor([-0.0365, -0.1445,  1.1810], dtype=torch.float64)

    References:
        ``docs/audit.md`` has the derivations.
    """
    started, settings, notes = time.perf_counter(), settings or AuditSettings(), []
    batching = {"batch_size": settings.batch_size, "group_by": settings.group_by}
    with torch.no_grad():
        at = make_model_state(model, state, settings.key)
        make_batches = reiterable(data, at, **batching)
        number, probe = probe_of(make_batches)
        context, plan = prepare(
            at, as_spec(loss), make_batches, probe, settings, with_step=step is not None
        )
        notes += [plan.note] if plan.note else []
        gradients = class_gradients(context, make_batches, number, settings.memory * 2**16)
        examples, gradient_norm = gradients.examples, gradients.gradient_norm
        if gradients.standard_errors is None and len(examples.label) > settings.batch_size:
            notes.append("no standard errors: too few batches, or memory= too small")
        checks, elasticities = [check_gradient(context, probe, gradients)], {}
        if settings.per_example or tensor_options(context.loss):
            derivative = directional_of(at, probe.some(_PROBE), gradients.gradient)
            if derivative is None:
                notes.append(
                    "the slopes of single examples and the elasticities of the loss's options are "
                    "not measured: the model has an operation that can be differentiated only once"
                )
            else:
                found = directional_derivatives(context, make_batches, gradients, derivative)
                examples, elasticities = replace(examples, slope=found.slope), found.elasticities
                checks.append(check_slopes(context, gradients, found.slope))
        if settings.gradient is not None:
            checks.append(check_given(context, gradients, settings.gradient))
        require(checks, dropout=has_dropout(model))
        taken, impact = None, {}
        if step is not None:
            parts = {"train": make_batches}
            if step.held_out is not None:
                parts["held_out"] = reiterable(step.held_out, at, **batching)
            taken, impact, more, why_not = step_and_impact(context, gradients, step, parts)
            require(more, dropout=has_dropout(model))
            checks += more
            notes += [why_not] if why_not else []
    gram, counts = gradients.grams.sum(0), gradients.counts
    weights = context.weights.cpu().double()
    now = balance(gram, counts, weights, reduction=context.loss.reduction)
    eps = torch.finfo(next(iter(at.params.values())).dtype).eps
    notes += filter(None, [cancelled(now, eps)])
    layers = context.layers
    sizes = (sum(at.params[name].numel() for name in inside) for inside in layers.values())
    return Audit(
        classes=context.names,
        reduction=context.loss.reduction,
        linear_in_weights=not context.coupled,
        class_weights=weights,
        count=counts,
        gram=gram,
        layers=tuple(layers),
        layer_sizes=tuple(sizes),
        layer_gram=gradients.grams,
        **class_statistics(examples, context.classes, gradient_norm),
        standard_errors=gradients.standard_errors,
        examples=examples if settings.per_example else None,
        step=taken,
        impact=impact,
        elasticities=elasticities,
        method=Method(
            plan.method, plan.why, plan.costs, context.chunk, time.perf_counter() - started
        ),
        checks=tuple(checks),
        notes=tuple(notes),
    )


def prepare(
    state: ModelState,
    spec: LossSpec,
    make_batches: MakeBatches,
    probe: MaskedBatch,
    settings: AuditSettings,
    *,
    with_step: bool,
) -> tuple[AuditContext, Plan]:
    """Try model and loss on a few examples, and choose how to measure them."""
    few = probe.some(COUPLING)
    predictions = state.predict(state.params, few.inputs, few.keys)
    names = _class_names(settings, predictions, make_batches)
    check_labels(few.groups, len(names))
    spec, coupled = inspected(spec, predictions, few.targets)
    weights = _weights(spec.class_weights, len(names), predictions)
    plan = plan_for(state, spec, few, norms=settings.per_example, method=settings.method)
    chunk, blocks = _fit(plan, state, len(names), settings.memory, with_step=with_step)
    how = {"measure": plan.measure, "chunk": chunk, "blocks": blocks, "norms": plan.norms}
    return AuditContext(state, spec, coupled, names, weights, **how), plan


def probe_of(make_batches: MakeBatches) -> tuple[int, MaskedBatch]:
    """Return number and examples of the first batch that has two that count, or else one."""
    best = None
    for number, batch in enumerate(make_batches()):
        n = len(batch)
        if n and (best is None or n > 1):
            best = (number, batch)
        if n > 1:
            break
    if best is None:
        raise AuditError("audit: no example counts")
    return best


def _class_names(
    settings: AuditSettings, predictions: Tensor, make_batches: MakeBatches
) -> tuple[str, ...]:
    classes = settings.classes
    if classes is not None and not isinstance(classes, int):
        return tuple(map(str, classes))
    if classes is None and not settings.group_by and predictions.dim() == 2:
        classes = predictions.shape[1] if predictions.shape[1] > 1 else None
    if classes is None:
        classes = 1 + max(int(batch.groups.max()) for batch in make_batches() if len(batch))
    return tuple(map(str, range(classes)))


def _weights(class_weights: Tensor | None, classes: int, like: Tensor) -> Tensor:
    if class_weights is None:
        return like.new_ones(classes)
    if class_weights.shape != (classes,):
        raise ValueError(
            f"audit: class_weights must have shape ({classes},), got {tuple(class_weights.shape)}"
        )
    return class_weights.to(like)


def plan_for(
    state: ModelState, spec: LossSpec, batch: MaskedBatch, *, norms: bool, method: str = "auto"
) -> Plan:
    """Choose the method for a model by trying it on a few examples, as :func:`make_plan` does."""
    few = batch.some(_PROBE)
    predictions = state.predict(state.params, few.inputs, few.keys)
    _, cotangents = cotangents_of(spec, predictions, few.targets)
    return make_plan(state, few, cotangents, norms=norms, method=method)


def _fit(
    plan: Plan, state: ModelState, classes: int, memory: float, *, with_step: bool
) -> tuple[int, tuple[range, ...]]:
    """Return how many examples at a time, and which classes' gradients together, fit in MiB."""
    most = memory * 2**20
    size = sum(p.nbytes for p in state.params.values())
    copies = 8 if with_step else 2  # of a batch and of all; and of their steps on the way
    together = max(1, min(classes, int(0.75 * most / (copies * size))))
    left = max(most - copies * together * size, 0.25 * most)
    starts = range(0, classes, together)
    blocks = tuple(range(start, min(start + together, classes)) for start in starts)
    return max(1, int(left / plan.bytes_per_example)), blocks
