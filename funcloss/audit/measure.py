"""The audit: one pass for class gradients and norms, one for slopes, and what follows from them."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from funcloss.audit.checks import check_first_batch, check_given, check_slopes, check_update, hold
from funcloss.audit.data import GroupBy, batches
from funcloss.audit.gram import REDUCTIONS, balance, scale_of
from funcloss.audit.inner import (
    Layers,
    add_to,
    cross,
    grams,
    layers_of,
    norm_of,
    plus,
    scaled_rows,
    side_by_side,
    total_of,
)
from funcloss.audit.loss import LossSide, cotangents_of, make_loss_side, swept_options
from funcloss.audit.methods import BY_EXAMPLE, METHODS, Plan, has_forward_mode, make_plan
from funcloss.audit.passes import (
    Passes,
    Sorted,
    Work,
    check_labels,
    class_losses,
    gradient_pass,
    own_gradients,
    slope_pass,
    slope_pass_backward,
    sort_rows,
)
from funcloss.audit.result import (
    QUANTILES,
    Audit,
    Check,
    ExampleRows,
    Impact,
    Method,
    Spread,
    StepAudit,
)
from funcloss.audit.step import OWN_ROWS, split_step
from funcloss.audit.subject import Subject, make_subject
from funcloss.errors import AuditError
from funcloss.optim import Optimizer, Schedule
from funcloss.training import TrainState
from funcloss.typing import Grads, LossFn, Params

_PROBE = 3  # examples that a method is tried on
_COUPLING = 64  # examples that a loss is tried on


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
        state: A training state; or params by name, the rest being the model's; or None, all being
            the model's.
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
        method: ``auto``, or one of ``products``, ``examples``, ``classes`` and ``jacrev``.
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
    _check_arguments(reduction, method, optimizer, learning_rate, memory, batch_size)
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
        side = make_loss_side(loss, options, predictions, probe.targets)
        if side.coupled and (class_weights is not None or reduction == "weighted_mean"):
            raise AuditError(
                "audit: the loss couples examples, so a class weight belongs to none of its values "
                "and a division by weights means nothing: give the loss its costs as options"
            )
        request = None
        if optimizer is not None:
            rate = torch.as_tensor(learning_rate)
            if not isinstance(learning_rate, Tensor):
                rate = rate.to(predictions.dtype)
            request = _StepRequest(optimizer, rate, schedule, clip_norm)
        weights = _weights(class_weights, len(names), predictions)
        norms = per_example and method in ("auto", *BY_EXAMPLE)
        plan = _plan(subject, side, probe, predictions, len(names), norms, method)
        room = _room(plan, subject, len(names), memory, with_step=request is not None)
        work = Work(subject, side, len(names), room.chunk)
        measured = _gradient(
            work, plan, passes, weights, reduction, room.blocks, probed, norms=norms
        )
        slopes, notes = None, []
        if measured.sorted_by_class:
            notes.append("the data is sorted by class, so there is no spread from batch to batch")
        if per_example or swept_options(side):
            few = probe.at(torch.arange(min(len(probe.position), _PROBE)))
            forward = has_forward_mode(subject.predict, subject.params, few.chunk)
            slopes = _slopes(work, passes, measured, forward=forward)
            if not forward and swept_options(side):
                notes.append(
                    "the model has an operation without forward mode: no elasticity of the options"
                )
        checks = [check_first_batch(work, passes, probed, measured.first, weights, reduction)]
        if slopes is not None:
            gram = measured.grams.sum(0)
            checks.append(
                check_slopes(
                    gram, weights.cpu(), measured.label, slopes.slope, measured.scale,
                    predictions.dtype,
                )
            )  # fmt: skip
        if gradient is not None:
            checks.append(check_given(measured.gradient, gradient))
        for check in checks:
            hold(check, subject)
        step, impact = None, {}
        if request is not None:
            held = None if held_out is None else batches(held_out, **form)
            step, impact, more, why_not = _step(work, plan, passes, held, measured, names, request)
            for check in more:
                hold(check, subject)
            checks += more
            notes += why_not
    return _result(
        names, reduction, work, plan, measured, slopes, step, impact, checks, notes,
        per_example=per_example, seconds=time.perf_counter() - started,
    )  # fmt: skip


class _StepRequest(NamedTuple):
    optimizer: Optimizer
    learning_rate: Tensor
    schedule: Schedule | None
    clip_norm: float


class _Room(NamedTuple):
    """What the memory allows."""

    chunk: int  # examples at a time
    blocks: list[range]  # of the classes, whose gradients are held together


class _Measured(NamedTuple):
    """What the first pass came to."""

    sums: Callable[[range], Grads]  # class gradients of a block, sum_{y_i = c} grad l_i
    blocks: list[range]
    layers: Layers
    grams: Tensor  # (layers, classes, classes), of G_c = sums / n
    position: Tensor  # by example, in the order of the data
    label: Tensor
    loss: Tensor
    norm: Tensor
    margin: Tensor
    counts: Tensor  # (classes,)
    gradient: Grads  # of the reduced loss
    weights: Tensor  # of the classes
    scale: float  # gradient = scale / n * sum_c w_c sums_c
    first: Grads  # sum_c w_c sums_c of the first batch that has any
    spread: Spread | None
    sorted_by_class: bool  # so that no spread can be told

    @property
    def norm_of_gradient(self) -> float:
        """Norm of the gradient of the reduced loss."""
        return norm_of(self.gradient)


class _SpreadOf:
    """Shares and conflicts of the full batches, batch by batch, as running moments."""

    def __init__(self, class_weights: Tensor) -> None:
        self.class_weights = class_weights
        self.batches, self.batch_size = 0, 0
        self.seen, self.ever = 0, torch.zeros(len(class_weights), dtype=torch.bool)
        self.moments: dict[str, tuple[Tensor, Tensor, Tensor]] = {}

    def add(self, gram: Tensor, n: int) -> None:
        """Take in a batch of ``n`` examples by its Gram matrix."""
        self.batch_size = self.batch_size or n
        if n < self.batch_size or n == 0:
            return
        now = balance(gram, torch.ones(len(gram)), self.class_weights)
        self.batches += 1
        self.seen += int((gram.diagonal() > 0).sum())
        self.ever |= gram.diagonal() > 0
        for name, value in (("share", now.share), ("conflict", now.conflict)):
            count, mean, square = self.moments.get(name, (torch.zeros_like(value),) * 3)
            known = value.isfinite()
            count = count + known
            away = torch.where(known, value - mean, 0.0)
            mean = mean + away / count.clamp(min=1)
            square = square + away * torch.where(known, value - mean, 0.0)
            self.moments[name] = (count, mean, square)

    def sorted_by_class(self) -> bool:
        """Return whether batches that could hold every class hold less than half of them."""
        classes = int(self.ever.sum())
        return self.batch_size >= 4 * classes and 2 * self.seen < self.batches * classes

    def result(self) -> Spread | None:
        """Return the standard deviations; None of fewer than two batches, or of sorted ones."""
        if self.batches < 2 or self.sorted_by_class():
            return None
        deviation = {
            name: torch.where(count > 1, square / (count - 1), torch.nan).sqrt()
            for name, (count, _, square) in self.moments.items()
        }
        return Spread(self.batches, self.batch_size, deviation["share"], deviation["conflict"])


class _Slopes(NamedTuple):
    """What the second pass came to."""

    slope: Tensor  # by example, <grad l_i, g>
    elasticities: dict[str, Tensor]


def _check_arguments(
    reduction: str,
    method: str,
    optimizer: Optimizer | None,
    learning_rate: float | Tensor | None,
    memory: float,
    batch_size: int,
) -> None:
    for name, value, known in (
        ("reduction", reduction, REDUCTIONS),
        ("method", method, ("auto", *METHODS)),
    ):
        if value not in known:
            raise ValueError(f"audit: {name} must be one of {', '.join(known)}; got {value!r}")
    if optimizer is not None and learning_rate is None:
        raise ValueError("audit: an optimizer needs a learning_rate")
    if not memory > 0 or batch_size < 1:
        raise ValueError(
            f"audit: memory and batch_size must be positive, got {memory} and {batch_size}"
        )


def _first_rows(subject: Subject, passes: Passes) -> tuple[int, Sorted]:
    """Return number and a few examples of the first batch that has any that count."""
    for number, rows in enumerate(passes()):
        found = sort_rows(subject, number, rows, range(2**62))
        if n := len(found.position):
            few = torch.linspace(0, n - 1, min(n, _COUPLING), device=found.position.device).long()
            return number, found.at(few)
    raise AuditError("audit: no example counts")


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


def _plan(
    subject: Subject,
    side: LossSide,
    probe: Sorted,
    predictions: Tensor,
    classes: int,
    norms: bool,
    method: str,
) -> Plan:
    few = torch.linspace(0, len(probe.position) - 1, min(len(probe.position), _PROBE)).long()
    few = few.to(probe.position.device)
    part = probe.at(few)
    _, back = cotangents_of(side, predictions[few], part.targets)
    return make_plan(
        subject.predict, subject.params, part.chunk, back,
        classes=classes, norms=norms, forced=method,
    )  # fmt: skip


def _room(plan: Plan, subject: Subject, classes: int, memory: float, *, with_step: bool) -> _Room:
    """Part the memory between class gradients and a chunk of examples."""
    budget = memory * 2**20
    size = sum(p.nbytes for p in subject.params.values())
    copies = 4 if with_step else 2  # of a batch and of all; and of the steps
    together = max(1, min(classes, int(0.75 * budget / (copies * size))))
    left = max(budget - copies * together * size, 0.25 * budget)
    blocks = [range(start, min(start + together, classes)) for start in range(0, classes, together)]
    return _Room(max(1, int(left / plan.bytes_per_example)), blocks)


def _gradient(
    work: Work,
    plan: Plan,
    passes: Passes,
    weights: Tensor,
    reduction: str,
    blocks: list[range],
    probed: int,
    *,
    norms: bool,
) -> _Measured:
    """Pass over the data once a block of classes: gradients, norms, losses."""
    params = work.subject.params
    layers = layers_of(params)
    total = {name: torch.zeros_like(p) for name, p in params.items()}
    first = {name: torch.zeros_like(p) for name, p in params.items()}
    rows: list[tuple[Tensor, ...]] = []
    spread = _SpreadOf(weights.double().cpu())
    kept: Grads = {}
    for block in blocks:
        kept = side_by_side(params, len(block))
        of_block = weights[block.start : block.stop]
        found = gradient_pass(work, passes, plan.method, norms=norms, wanted=block)
        for number, findings in enumerate(found):
            if number == probed:
                first = plus(first, total_of(findings.sums, of_block))
            if len(blocks) == 1:
                spread.add(grams(findings.sums, findings.sums, layers).sum(0), findings.size)
            add_to(kept, findings.sums)
            rows.append(
                (
                    findings.rows.position,
                    findings.rows.chunk.groups,
                    findings.loss,
                    findings.square.clamp(min=0.0).sqrt(),
                    findings.margin,
                )
            )
        total = plus(total, total_of(kept, of_block))
    index, label, loss, norm, margin = (torch.cat(part) for part in zip(*rows, strict=True))
    order = index.argsort()
    count = label.bincount(minlength=work.classes).cpu()
    n = int(count.sum())
    burden = (weights.double().cpu() * count).sum()
    scale = float(scale_of(reduction, torch.tensor(float(n), dtype=torch.float64), burden))

    def sums(block: range) -> Grads:
        if len(blocks) == 1:
            return kept
        return _block_sums(work, plan, passes, block)

    return _Measured(
        sums=sums,
        blocks=blocks,
        layers=layers,
        grams=cross(sums, sums, blocks, layers) / n**2,
        position=index[order].cpu(),
        label=label[order].cpu(),
        loss=loss[order].double().cpu(),
        norm=norm[order].double().cpu(),
        margin=margin[order].double().cpu(),
        counts=count,
        gradient={name: (scale / n) * part for name, part in total.items()},
        weights=weights,
        scale=scale,
        first=first,
        spread=spread.result(),
        sorted_by_class=spread.batches > 1 and spread.sorted_by_class(),
    )


def _block_sums(work: Work, plan: Plan, passes: Passes, block: range) -> Grads:
    """Pass over the examples of a block of classes for their gradients alone."""
    kept = side_by_side(work.subject.params, len(block))
    for findings in gradient_pass(work, passes, plan.method, norms=False, wanted=block):
        add_to(kept, findings.sums)
    return kept


def _slopes(work: Work, passes: Passes, measured: _Measured, *, forward: bool) -> _Slopes:
    """Pass over the data along the gradient."""
    rows, by_name = [], {}
    swept = swept_options(work.side)
    found_of = (
        slope_pass(work, passes, measured.gradient, measured.weights, by_option=bool(swept))
        if forward
        else slope_pass_backward(work, passes, measured.gradient)
    )
    for found in found_of:
        rows.append((found.rows.position, found.rows.chunk.groups, found.loss, found.slope))
        for name, value in found.by_option.items():
            by_name[name] = by_name.get(name, 0) + value
    index, label, loss, slope = (torch.cat(part) for part in zip(*rows, strict=True))
    order = index.argsort()
    same = torch.equal(index[order].cpu(), measured.position)
    same = same and torch.equal(label[order].cpu(), measured.label)
    if not same or not torch.allclose(
        loss[order].double().cpu(), measured.loss, rtol=1e-3, atol=1e-5
    ):
        raise AuditError(
            "audit: the data gave other examples in the second pass than in the first: give data "
            "that comes in one order and without random changes"
        )
    factor = measured.scale / len(index) / max(measured.norm_of_gradient**2, 1e-300)
    elasticities = {
        name: (value.double() * by_name[name].double() * factor).cpu()
        for name, value in swept.items()
        if name in by_name
    }
    return _Slopes(slope[order].double().cpu(), elasticities)


def _step(
    work: Work,
    plan: Plan,
    passes: Passes,
    held: Passes | None,
    measured: _Measured,
    names: tuple[str, ...],
    request: _StepRequest,
) -> tuple[StepAudit | None, dict[str, Impact], list[Check], list[str]]:
    """Split the step, predict what it does to every class, and take it."""
    subject, blocks = work.subject, measured.blocks
    rate = request.learning_rate.to(subject.device)
    if request.schedule is not None:
        rate = rate * request.schedule(subject.step)
    split, why_not = split_step(
        request.optimizer,
        subject.opt_state,
        subject.params,
        measured.gradient,
        rate,
        request.clip_norm,
    )
    if split is None:
        return None, {}, [], [why_not]
    weights = measured.weights
    n, layers = int(measured.counts.sum()), measured.layers

    def moves(block: range) -> Params:
        of_block = (measured.scale / n) * weights[block.start : block.stop]
        return split.of_parts(scaled_rows(of_block, measured.sums(block)))

    own = split.own()
    rows = (*names, *OWN_ROWS)
    classes = len(names)
    gram = torch.zeros(len(rows), len(rows), dtype=torch.float64)
    gram[:classes, :classes] = cross(moves, moves, blocks, layers).sum(0)
    gram[classes:, classes:] = grams(own, own, layers).sum(0)
    total = total_of(own)
    for block in blocks:
        part = moves(block)
        total = plus(total, total_of(part))
        across = grams(part, own, layers).sum(0)
        gram[block.start : block.stop, classes:] = across
        gram[classes:, block.start : block.stop] = across.T
    after = plus(subject.params, split.whole)
    checks = [check_update(subject.params, after, total)]
    step = StepAudit(rows, gram, float(split.learning_rate), float(split.clip), split.note)
    parts = {"train": (passes, measured.sums)}
    if held is not None:
        parts["held_out"] = (held, lambda block: _block_sums(work, plan, held, block))
    if work.side.coupled:  # class parts of the whole loss are not gradients of the classes' losses
        parts = {
            part: (data, lambda block, data=data: own_gradients(work, plan.method, data, block))
            for part, (data, _) in parts.items()
        }
    impact = {}
    for part, (data, sums) in parts.items():
        matrix = torch.full((classes, len(rows)), torch.nan, dtype=torch.float64)
        matrix[:, :classes] = cross(sums, moves, blocks, layers).sum(0)
        for block in blocks:
            matrix[block.start : block.stop, classes:] = grams(sums(block), own, layers).sum(0)
        before, count = class_losses(work, data, subject.params)
        matrix = torch.where(count[:, None] > 0, matrix / count[:, None], torch.nan)
        impact[part] = Impact(matrix, before, class_losses(work, data, after)[0])
    known = impact["train"].predicted.isfinite()
    predicted, changed = impact["train"].predicted[known], impact["train"].measured[known]
    says = "predicted change of each class's loss against the change that the step makes"
    error = float((predicted - changed).norm() / changed.norm().clamp(min=1e-300))
    checks.append(Check("impact", error, None, says))
    return step, impact, checks, []


def _result(
    names: tuple[str, ...],
    reduction: str,
    work: Work,
    plan: Plan,
    measured: _Measured,
    slopes: _Slopes | None,
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
        class_weights=measured.weights.double().cpu(),
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
