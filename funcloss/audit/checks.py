"""What must hold of every audit, each computed another way than what it checks."""

import itertools

import torch
from torch import Tensor

from funcloss.audit.gradients import Measured
from funcloss.audit.inner import distance, norm_of
from funcloss.audit.loss import values_of
from funcloss.audit.passes import Passes, Work, kept_rows
from funcloss.audit.result import Check
from funcloss.audit.subject import Subject
from funcloss.errors import AuditError
from funcloss.reduction import mean, weighted_mean
from funcloss.typing import Grads, Params


def check_first_batch(
    work: Work, passes: Passes, number: int, measured: Measured, weights: Tensor, reduction: str
) -> Check:
    """Compare the class gradients of one batch with the plain gradient of its loss.

    Args:
        work: The model and the loss.
        passes: The data.
        number: Which batch.
        measured: What the audit found of that batch.
        weights: Of the classes.
        reduction: What divides.
    """
    subject, side = work.subject, work.side
    rows = next(itertools.islice(passes(), number, None))
    every = kept_rows(subject, number, rows)
    n = len(every.position)
    leaves = {name: p.detach().requires_grad_() for name, p in subject.params.items()}
    of_rows = weights[every.chunk.groups]
    # Other pieces than those of the audit: a loss that couples examples in secret would differ.
    size = n if side.coupled or n <= work.chunk else work.chunk + work.chunk // 2 + 1
    plain = {name: torch.zeros_like(p) for name, p in leaves.items()}
    for start in range(0, n, size):
        piece = slice(start, min(start + size, n))
        burden = _burden(of_rows[piece], reduction)
        if burden == 0.0:
            continue
        part = every.chunk[piece]
        with torch.enable_grad():
            predictions = subject.predict(leaves, part.inputs, part.keys)
            values = values_of(side, predictions, every.targets[piece])
            reduced = _reduced(values, of_rows[piece], reduction)
            found = torch.autograd.grad(
                reduced, list(leaves.values()), allow_unused=True, materialize_grads=True
            )
        # From the mean of a piece to the sum, which adds up over pieces.
        for name, g in zip(leaves, found, strict=True):
            plain[name] += burden * g
    # Where the class gradients cancel, their rounding is all that is left of the sum.
    error = distance(measured.first, plain) / max(norm_of(plain), measured.first_length, 1e-300)
    says = "sum of the class gradients against the plain gradient, first batch"
    return Check("gradient", error, tolerance_of(subject.params), says)


def check_slopes(measured: Measured, slope: Tensor) -> Check:
    """Compare each class's sum of slopes, forward mode, with the Gram matrix, reverse mode.

    Args:
        measured: The class gradients.
        slope: ``<grad l_i, g>`` of each example.
    """
    gram, scale = measured.grams.sum(0), measured.scale
    weights = measured.weights.cpu().to(gram)
    by_slopes = torch.zeros(len(gram)).double().index_add_(0, measured.label, slope) / len(slope)
    by_gram = scale * (gram @ weights)
    size = (
        scale
        * gram.diagonal().clamp(min=0.0).sqrt()
        * (weights @ gram @ weights).clamp(min=0.0).sqrt()
    )
    error = float((by_slopes - by_gram).abs().max() / size.max().clamp(min=1e-300))
    says = "slopes along the gradient summed by class, forward mode, against the Gram matrix"
    return Check("slopes", error, tolerance_of(measured.gradient), says)


def check_given(measured: Measured, given: Grads) -> Check:
    """Compare the sum of the class gradients with the gradient that a training step computed."""
    parts = measured.gradient
    error = distance(parts, given) / max(norm_of(given), measured.length, 1e-300)
    says = "sum of the class gradients against the gradient of the step"
    return Check("step", error, tolerance_of(parts), says)


def check_update(before: Params, after: Params, parts: Params) -> Check:
    """Compare the sum of the step's parts with what the parameters moved by."""
    moved = {name: after[name] - p for name, p in before.items()}
    length = max(norm_of(moved), 1e-300)
    eps = torch.finfo(next(iter(before.values())).dtype).eps
    # A step far shorter than the params is rounded when it is added to them.
    room = tolerance_of(before) + 2 * eps * norm_of(before) / length
    says = "sum of the step's parts against params after less params before"
    return Check("update", distance(parts, moved) / length, room, says)


def require(check: Check, subject: Subject) -> None:
    """Raise ``AuditError`` with the likely cause if a check does not hold."""
    if check.tolerance is None or check.error <= check.tolerance:
        return
    raise AuditError(
        f"audit: the check {check.name!r} does not hold ({check.says}): off by "
        f"{check.error:.2g}, at most {check.tolerance:.2g}; {_cause(check, subject)}"
    )


def _cause(check: Check, subject: Subject) -> str:
    if check.name == "step" and subject.drops:
        return (
            "the step's dropout drew other masks: audit with the state of the step, before it, or "
            "model.eval()"
        )
    if check.name == "step":
        return (
            "likely causes: the step divides by the sum of the class weights "
            "(reduction='weighted_mean'), clips (give clip_norm), adds a penalty, or saw other "
            "examples or other params"
        )
    if check.name == "update":
        return "the optimiser does not take the step that its split says"
    return (
        "likely causes: the model couples examples, draws random numbers of its own, or has a "
        "layer whose forward-mode derivative is not that of its backward"
    )


def _reduced(values: Tensor, weights: Tensor, reduction: str) -> Tensor:
    if reduction == "weighted_mean":
        return weighted_mean(values, weights)
    weighted = weights.to(values) * values
    return weighted.sum() if reduction == "sum" else mean(weighted)


def _burden(weights: Tensor, reduction: str) -> float:
    if reduction == "sum":
        return 1.0
    return float(weights.sum()) if reduction == "weighted_mean" else float(len(weights))


def tolerance_of(params: Params) -> float:
    """Return how far two ways to one gradient may be apart."""
    return max(1e-9, 1e4 * torch.finfo(next(iter(params.values())).dtype).eps)
