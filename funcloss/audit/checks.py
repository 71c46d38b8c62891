"""Identities that hold in every audit, each computed another way than what it checks."""

from collections.abc import Iterable

import torch
from torch import Tensor

from funcloss.audit.data import MaskedBatch
from funcloss.audit.gradients import AuditContext, ClassGradients
from funcloss.audit.inner import distance, norm_of
from funcloss.audit.loss import values_of
from funcloss.audit.result import Check
from funcloss.errors import AuditError
from funcloss.typing import Grads, Params


def check_gradient(context: AuditContext, batch: MaskedBatch, gradients: ClassGradients) -> Check:
    """Compare the class gradients of one batch with the plain gradient of its loss."""
    state, n = context.state, len(batch)
    leaves = {name: p.detach().requires_grad_() for name, p in state.params.items()}
    # Other pieces than those of the audit: a loss that couples examples in secret would differ.
    chunk = context.chunk
    size = n if context.coupled or n <= chunk else chunk + chunk // 2 + 1
    plain = {name: torch.zeros_like(p) for name, p in leaves.items()}
    for start in range(0, n, size):
        part = batch.at(slice(start, min(start + size, n)))
        with torch.enable_grad():
            predictions = state.predict(leaves, part.inputs, part.keys)
            values = values_of(context.loss, predictions, part.targets)
            total = (context.weights[part.groups].to(values) * values).sum()
            found = torch.autograd.grad(
                total, list(leaves.values()), allow_unused=True, materialize_grads=True
            )
        for name, g in zip(leaves, found, strict=True):
            plain[name] += g
    # Where the class gradients cancel, their rounding is all that is left of the sum.
    size = max(norm_of(plain), gradients.probe_length, 1e-300)
    says = "sum of the class gradients against the plain gradient, first batch"
    return Check(
        "gradient", distance(gradients.probe, plain) / size, tolerance_of(state.params), says
    )


def check_slopes(context: AuditContext, gradients: ClassGradients, slope: Tensor) -> Check:
    """Compare each class's sum of slopes with the Gram matrix, of reverse mode."""
    gram, scale = gradients.grams.sum(0), gradients.scale
    weights, label = context.weights.cpu().to(gram), gradients.examples.label
    by_slopes = torch.zeros(len(gram)).double().index_add_(0, label, slope) / len(slope)
    by_gram = scale * (gram @ weights)
    lengths = gram.diagonal().clamp(min=0.0).sqrt()
    size = scale * lengths.max() * (weights @ gram @ weights).clamp(min=0.0).sqrt()
    error = float((by_slopes - by_gram).abs().max() / size.clamp(min=1e-300))
    says = "slopes along the gradient summed by class against the Gram matrix"
    return Check("slopes", error, tolerance_of(gradients.gradient), says)


def check_given(context: AuditContext, gradients: ClassGradients, given: Grads) -> Check:
    """Compare the sum of the class gradients with the gradient that a training step computed."""
    squares = gradients.grams.sum(0).diagonal() * context.weights.cpu().double().square()
    size = max(norm_of(given), gradients.scale * float(squares.sum()) ** 0.5, 1e-300)
    says = "sum of the class gradients against the gradient of the step"
    error = distance(gradients.gradient, given) / size
    return Check("step", error, tolerance_of(gradients.gradient), says)


def check_update(before: Params, after: Params, parts: Params) -> Check:
    """Compare the sum of the step's parts with what the parameters moved by."""
    moved = {name: after[name] - p for name, p in before.items()}
    length = max(norm_of(moved), 1e-300)
    tolerance = tolerance_of(before) + rounding_of(before, moved)
    says = "sum of the step's parts against params after less params before"
    return Check("update", distance(parts, moved) / length, tolerance, says)


def rounding_of(before: Params, step: Params) -> float:
    """Return how far a step may be rounded where it is added to params, relative to its length."""
    eps = torch.finfo(next(iter(before.values())).dtype).eps
    return 2 * eps * norm_of(before) / max(norm_of(step), 1e-300)


def require(checks: Iterable[Check], *, dropout: bool) -> None:
    """Raise ``AuditError`` with the likely cause if a check does not hold."""
    for check in checks:
        if not check.holds:
            raise AuditError(
                f"audit: the check {check.name!r} does not hold ({check.says}): relative error "
                f"{check.error:.2g}, tolerance {check.tolerance:.2g}; {_cause(check, dropout)}"
            )


def _cause(check: Check, dropout: bool) -> str:
    if check.name == "step" and dropout:
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


def tolerance_of(params: Params) -> float:
    """Return how far two ways to one gradient may be apart."""
    return max(1e-9, 1e4 * torch.finfo(next(iter(params.values())).dtype).eps)
