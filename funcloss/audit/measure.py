"""The audit: one pass for class gradients and norms, one for slopes, and what follows from them."""

import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from funcloss.audit.checks import check_first_batch, check_given, check_slopes, require
from funcloss.audit.data import GroupBy, batches
from funcloss.audit.gradients import Along, Measured, slopes_along, whole_gradient
from funcloss.audit.gram import REDUCTIONS
from funcloss.audit.impact import StepRequest, step_and_impact
from funcloss.audit.loss import LossSide, check_costs, cotangents_of, make_loss_side, swept_options
from funcloss.audit.methods import BY_EXAMPLE, METHODS, Plan, has_forward_mode, make_plan
from funcloss.audit.passes import Kept, Passes, Work, check_labels, kept_rows
from funcloss.audit.result import QUANTILES, Audit, Check, ExampleRows, Impact, Method, StepAudit
from funcloss.audit.subject import Subject, make_subject
from funcloss.errors import AuditError
from funcloss.optim import Optimizer, Schedule
from funcloss.training import TrainState
from funcloss.typing import Grads, LossFn, Params

_PROBE = 3  # examples that a method is tried on
COUPLING = 64  # examples that a loss is tried on


def audit(
    model: nn.Module,
    state: TrainState | Params | None,
    loss: LossFn,
    data: Any,
    *,
    class_weights: Float[Tensor, " classes"] | None = None,
    cost_matrix: Float[Tensor, "classes decisions"] | None = None,
    options: Mapping[str, Any] | None = None,
    reduction: str = "mean",
    group_by: GroupBy | None = None,
    classes: Sequence[str] | int | None = None,
    held_out: Any = None,
    optimizer: Optimizer | None = None,
    learning_rate: float | Tensor | None = None,
    schedule: Schedule | None = None,
    clip_norm: float = 0.0,
    gradient: Grads | None = None,
    per_example: bool = True,
    method: str = "auto",
    memory: float = 2048.0,
    batch_size: int = 256,
    key: Tensor | None = None,
) -> Audit:
    """Measure who owns the gradient of a loss, and the step that is taken on it.

    With ``g_c = sum_{y_i = c} J_i^T dL/dz_i`` the part of class ``c``, the gradient is ``g = sum_c
    g_c``, for every loss, as long as the model does not couple examples. Share, elasticity and
    conflict follow from ``<g_a, g_b>``; norms and slopes are each example's own; the step is
    split as the optimiser takes it. The result is checked against itself before it is returned.

    Args:
        model: Any module, in the mode to audit it in. BatchNorm must be in evaluation mode;
            dropout in training mode draws from the examples' keys, as the training step's does.
        state: A training state; or tensors by name (``state_dict()``, say), the rest being the
            model's; or None, all being the model's. Of these the model trains what requires grad.
        loss: One value an example. Of a :func:`funcloss.class_weighted` loss the inner one is
            measured and the weights are put on its values. One that couples examples, declared or
            found to, gets its parts through its gradient in the predictions.
        data: The examples, in any form that :func:`funcloss.audit.batches` takes. A batch is also
            the unit of the spread, and of a loss that couples examples: shuffle sorted data.
        class_weights: Cost of each class, shape ``(classes,)``; None: 1.
        cost_matrix: The loss's option of that name, shape ``(classes, decisions)``.
        options: Further options of the loss by name. Each floating-point tensor gets an elasticity.
        reduction: What divides: ``mean`` by the examples that count, ``weighted_mean`` by the sum
            of their class weights, ``sum`` by nothing.
        group_by: From a batch to the integer group of each example, ``(batch,)``, in place of its
            label: for regression, for costs of other groups than classes.
        classes: Names of the classes, or their number; None: as many as there are predictions, or
            as the groups need.
        held_out: Further examples to predict the impact of the step on.
        optimizer: What takes the step; None: the gradient alone is audited.
        learning_rate: Its learning rate.
        schedule: Factor on it by number of the step.
        clip_norm: Largest norm of the gradient; 0 clips nothing.
        gradient: What a training step computed on the same data, to be compared.
        per_example: Whether to measure every example: norms, slopes and what follows.
        method: ``auto``, ``products``, ``examples``, ``classes`` or ``loop``.
        memory: What may be held at a time beside the model, in MiB.
        batch_size: Examples a batch of data that does not come in batches.
        key: Key of the dropout masks, where ``state`` brings none.

    Returns:
        The audit; the state, the model and torch's generator are untouched.

    Raises:
        AuditError: the data, the loss or the model cannot be audited, or a check does not hold.
        ValueError: an argument makes no sense.

    Example:
        >>> from funcloss import losses, models
        >>> model = models.linear((1, 2, 2), 3)
        >>> images, labels = torch.rand(12, 1, 2, 2), torch.arange(12) % 3
        >>> found = audit(model, None, losses.cross_entropy, (images, labels),
        ...               class_weights=torch.tensor([1.0, 1.0, 5.0]))
        >>> found.balance.share.sum()
        tensor(1., dtype=torch.float64)

    References:
        ``docs/audit.md`` has the derivations.
    """
    _check_arguments(
        reduction, method, optimizer, learning_rate, memory, batch_size, clip_norm, held_out
    )
    started = time.perf_counter()
    options = dict(options or {}) | ({} if cost_matrix is None else {"cost_matrix": cost_matrix})
    with torch.no_grad():
        subject = make_subject(model, state, key)
        form = {"batch_size": batch_size, "group_by": group_by, "device": subject.device}
        passes = batches(data, **form)
        probed, probe = _first_rows(subject, passes)
        predictions = subject.predict(subject.params, probe.chunk.inputs, probe.chunk.keys)
        names = _class_names(classes, None if group_by else predictions, passes)
        check_labels(probe.chunk.groups, len(names))
        side = make_loss_side(
            loss, options, predictions, probe.targets, weighted=class_weights is not None
        )
        check_costs(side, class_weights, reduction)
        request = None
        if optimizer is not None:
            rate = torch.as_tensor(learning_rate)
            if not isinstance(learning_rate, Tensor):
                rate = rate.to(predictions.dtype)
            request = StepRequest(optimizer, rate, schedule, clip_norm)
        weights = _weights(class_weights, len(names), predictions)
        norms = per_example and method in ("auto", *BY_EXAMPLE)
        plan = plan_for(subject, side, probe, norms=norms, method=method)
        room = _room(plan, subject, len(names), memory, with_step=request is not None)
        work = Work(subject, side, len(names), room.chunk)
        measured = whole_gradient(
            work, plan.method, passes, weights, reduction, room.blocks, probed, room.sample,
            norms=norms,
        )  # fmt: skip
        slopes, notes = None, []
        if measured.spread is None and len(measured.position) > batch_size:
            notes.append("too few batches, or too little memory, to tell a spread between them")
        if per_example or swept_options(side):
            few = probe.some(_PROBE).chunk
            forward = has_forward_mode(subject.predict, subject.params, few)
            slopes = slopes_along(work, passes, measured, forward=forward)
            if not forward and swept_options(side):
                notes.append(
                    "the model has an operation without forward mode: no elasticity of the options"
                )
        checks = [check_first_batch(work, passes, probed, measured, weights, reduction)]
        if slopes is not None:
            checks.append(check_slopes(measured, slopes.slope))
        if gradient is not None:
            checks.append(check_given(measured, gradient))
        for check in checks:
            require(check, subject)
        step, impact = None, {}
        if request is not None:
            held = None if held_out is None else batches(held_out, **form)
            step, impact, more, why_not = step_and_impact(
                work, plan.method, passes, held, measured, names, request
            )
            for check in more:
                require(check, subject)
            checks += more
            notes += why_not
    return _result(
        names, reduction, work, plan, measured, slopes, step, impact, checks, notes,
        per_example=per_example, seconds=time.perf_counter() - started,
    )  # fmt: skip


class _Room(NamedTuple):
    """What the memory allows."""

    chunk: int  # examples at a time
    blocks: list[range]  # of the classes, whose gradients are held together
    sample: float  # bytes for class gradients of single batches


def _check_arguments(
    reduction: str,
    method: str,
    optimizer: Optimizer | None,
    learning_rate: float | Tensor | None,
    memory: float,
    batch_size: int,
    clip_norm: float,
    held_out: Any,
) -> None:
    for name, value, known in (
        ("reduction", reduction, REDUCTIONS),
        ("method", method, ("auto", *METHODS)),
    ):
        if value not in known:
            raise ValueError(f"audit: {name} must be one of {', '.join(known)}; got {value!r}")
    if optimizer is not None and learning_rate is None:
        raise ValueError("audit: an optimizer needs a learning_rate")
    if optimizer is None and (learning_rate is not None or clip_norm or held_out is not None):
        raise ValueError("audit: learning_rate, clip_norm and held_out need an optimizer")
    if not clip_norm >= 0.0:
        raise ValueError(f"audit: clip_norm must be at least 0, got {clip_norm}")
    if not 0 < memory < float("inf") or batch_size < 1:
        raise ValueError(
            "audit: memory and batch_size must be positive and finite, got "
            f"{memory} and {batch_size}"
        )


def _first_rows(subject: Subject, passes: Passes) -> tuple[int, Kept]:
    """Return number and some examples of the first batch that has two that count, or else one."""
    best = None
    for number, rows in enumerate(passes()):
        found = kept_rows(subject, number, rows)
        n = len(found.position)
        if n and (best is None or n > 1):
            best = (number, found.some(COUPLING))
        if n > 1:
            break
    if best is None:
        raise AuditError("audit: no example counts")
    return best


def _class_names(
    classes: Sequence[str] | int | None, predictions: Tensor | None, passes: Passes
) -> tuple[str, ...]:
    if classes is not None and not isinstance(classes, int):
        return tuple(map(str, classes))
    if classes is None and predictions is not None and predictions.dim() == 2:
        classes = predictions.shape[1] if predictions.shape[1] > 1 else None
    if classes is None:
        classes = 1 + max(int(rows.groups.max()) for rows in passes() if len(rows.groups))
    if classes < 1:
        raise ValueError(f"audit: classes must be at least 1, got {classes}")
    return tuple(map(str, range(classes)))


def _weights(class_weights: Tensor | None, classes: int, like: Tensor) -> Tensor:
    if class_weights is None:
        return like.new_ones(classes)
    weights = torch.as_tensor(class_weights).to(like)
    if weights.shape != (classes,):
        raise ValueError(
            f"audit: class_weights must have shape ({classes},), got {tuple(weights.shape)}"
        )
    if not bool((weights >= 0).all()) or not bool(weights.any()):
        raise ValueError(
            f"audit: class_weights must be at least 0, and one above; got {weights.tolist()}"
        )
    return weights


def plan_for(
    subject: Subject, side: LossSide, rows: Kept, *, norms: bool, method: str = "auto"
) -> Plan:
    """Choose the method for a model by trying it on a few rows, as :func:`make_plan` does."""
    few = rows.some(_PROBE)
    predictions = subject.predict(subject.params, few.chunk.inputs, few.chunk.keys)
    _, back = cotangents_of(side, predictions, few.targets)
    return make_plan(subject.predict, subject.params, few.chunk, back, norms=norms, forced=method)


def _room(plan: Plan, subject: Subject, classes: int, memory: float, *, with_step: bool) -> _Room:
    """Part the memory between class gradients and a chunk of examples."""
    budget = memory * 2**20
    size = sum(p.nbytes for p in subject.params.values())
    copies = 8 if with_step else 2  # of a batch and of all; and of their steps on the way
    together = max(1, min(classes, int(0.75 * budget / (copies * size))))
    left = max(budget - copies * together * size, 0.25 * budget)
    blocks = [range(start, min(start + together, classes)) for start in range(0, classes, together)]
    return _Room(max(1, int(left / plan.bytes_per_example)), blocks, budget / 16)


def _result(
    names: tuple[str, ...],
    reduction: str,
    work: Work,
    plan: Plan,
    measured: Measured,
    slopes: Along | None,
    step: StepAudit | None,
    impact: dict[str, Impact],
    checks: list[Check],
    notes: list[str],
    *,
    per_example: bool,
    seconds: float,
) -> Audit:
    classes, n = len(names), len(measured.position)
    slope = torch.full_like(measured.loss, torch.nan) if slopes is None else slopes.slope
    rows = ExampleRows(
        measured.position, measured.label, measured.loss, measured.norm, slope, measured.margin
    )
    alignment, loss = (torch.full((classes,), torch.nan).double() for _ in range(2))
    length = torch.zeros(classes).double().index_add_(0, measured.label, measured.norm) / n
    if measured.norm.isnan().all():
        length = torch.full_like(length, torch.nan)
    quantiles = torch.full((classes, len(QUANTILES)), torch.nan).double()
    cosine = rows.alignment(measured.norm_of_gradient)
    levels = torch.tensor(QUANTILES, dtype=torch.float64)
    for c in range(classes):
        inside = measured.label == c
        if not bool(inside.any()):
            continue
        loss[c] = measured.loss[inside].mean()
        alignment[c] = cosine[inside].nanmean()
        quantiles[c] = measured.norm[inside].quantile(levels)
    return Audit(
        classes=names,
        reduction=reduction,
        linear_in_weights=not work.side.coupled,
        class_weights=measured.weights.cpu().double(),
        count=measured.counts,
        loss=loss,
        gram=measured.grams.sum(0),
        layers=tuple(measured.layers),
        layer_sizes=tuple(
            sum(work.subject.params[name].numel() for name in inside)
            for inside in measured.layers.values()
        ),
        layer_gram=measured.grams,
        length=length,
        norm_quantiles=quantiles,
        alignment=alignment,
        spread=measured.spread,
        examples=rows if per_example else None,
        step=step,
        impact=impact,
        elasticities={} if slopes is None else slopes.elasticities,
        method=Method(plan.method, plan.why, plan.costs, work.chunk, seconds),
        checks=tuple(checks),
        notes=tuple(notes),
    )
