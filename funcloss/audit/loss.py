"""The loss under audit: values, and gradients with respect to the predictions, at weight 1."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import grad, jvp

from funcloss.combinators import ClassWeighted, couples_examples, name_of, options_of
from funcloss.errors import AuditError
from funcloss.reduction import REDUCTIONS
from funcloss.typing import LossFn

_OWN = {"class_weights"}


@dataclass(frozen=True, eq=False)
class LossSpec:
    """A loss as a training applies it: ``sum_i w[y_i] l_i`` over what ``reduction`` divides by.

    Args:
        loss: One value per example, at weight 1; or the scalar of a batch. The inner loss of a
            :func:`funcloss.class_weighted` one is measured, and the weights are put on its values.
        class_weights: Weight of each class, shape ``(classes,)``; None: 1.
        options: The loss's own options by name, a ``cost_matrix`` for example.
        reduction: What divides: ``mean`` by the number of examples that count, ``weighted_mean``
            by the sum of their class weights, ``sum`` by nothing.

    Raises:
        ValueError: the reduction is unknown, or the class weights are no weights.

    Example:
        >>> from funcloss import losses
        >>> LossSpec(losses.cross_entropy, torch.tensor([1.0, 5.0])).reduction
        'mean'
    """

    loss: LossFn
    class_weights: Float[Tensor, " classes"] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    reduction: str = "mean"

    def __post_init__(self) -> None:
        """Check what holds before any model or data is known."""
        if self.reduction not in REDUCTIONS:
            known = ", ".join(REDUCTIONS)
            raise ValueError(f"LossSpec: reduction must be one of {known}; got {self.reduction!r}")
        weights = self.class_weights
        if weights is None:
            return
        if weights.dim() != 1:
            raise ValueError(
                f"LossSpec: class_weights must have shape (classes,), got {tuple(weights.shape)}"
            )
        if not bool((weights >= 0).all()) or not bool(weights.any()):
            raise ValueError(
                "LossSpec: class_weights must be at least 0, and one of them above, got "
                f"{weights.tolist()}"
            )


def as_spec(loss: LossFn | LossSpec) -> LossSpec:
    """Return a bare loss as one without weights and options."""
    return loss if isinstance(loss, LossSpec) else LossSpec(loss)


def inspected(spec: LossSpec, predictions: Tensor, targets: Tensor) -> tuple[LossSpec, bool]:
    """Try a loss on some examples: return it without class weights of its own, and if it couples.

    Raises:
        AuditError: class weights are given, and the loss applies them where it wants, or couples
            examples; or its values are not finite, so that nothing can be said of it.
    """
    loss, weighted = spec.loss, spec.class_weights is not None
    bound = loss.keywords.keys() if isinstance(loss, functools.partial) else set()
    if isinstance(loss, ClassWeighted) and not _OWN & spec.options.keys():
        (loss,) = loss.losses
    elif weighted and _OWN & options_of(loss) - bound:
        raise AuditError(
            f"audit: {name_of(loss)} applies class weights where it wants: give them as "
            "options={'class_weights': ...}, and they are audited as they act"
        )
    spec = replace(spec, loss=loss)
    if not values_of(spec, predictions, targets).isfinite().all():
        raise AuditError("audit: the loss is not finite: there is no gradient to split")
    coupled = couples_examples(loss) or _found_to_couple(spec, predictions, targets)
    if coupled and (weighted or spec.reduction == "weighted_mean"):
        raise AuditError(
            "audit: the loss couples examples, so a class weight belongs to none of its values "
            "and a division by weights means nothing: give the loss its weights as options"
        )
    return spec, coupled


def values_of(spec: LossSpec, predictions: Tensor, targets: Tensor) -> Tensor:
    """Return one value per example, at weight 1; those of a scalar loss are all its value.

    Raises:
        AuditError: the loss gives something else.
    """
    n = len(predictions)
    values = spec.loss(predictions, targets, **spec.options)
    if values.dim() == 0:
        return values.expand(n)
    if values.shape != (n,):
        raise AuditError(
            f"audit: {name_of(spec.loss)} must give one value per example, ({n},), got "
            f"{tuple(values.shape)}: average over the rest of an example in the loss"
        )
    return values


def cotangents_of(
    spec: LossSpec, predictions: Tensor, targets: Tensor, weights: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return the values, and the gradient of their (weighted) sum in the predictions."""
    with torch.enable_grad():
        leaf = predictions.detach().requires_grad_()
        values = values_of(spec, leaf, targets)
        total = values.sum() if weights is None else (weights * values).sum()
        (cotangents,) = torch.autograd.grad(total, leaf, materialize_grads=True, allow_unused=True)
    return values.detach(), cotangents


def option_slopes(
    spec: LossSpec, predictions: Tensor, tangents: Tensor, targets: Tensor, weights: Tensor
) -> dict[str, Tensor]:
    """Return the derivative, by each tensor option, of the loss's slope along ``tangents``.

    ``d/dk d/dt sum_i w_i l_i(z + t * tangents, k)``: forward mode inside, reverse mode outside.
    """

    def slope(options: dict[str, Tensor]) -> Tensor:
        changed = replace(spec, options={**spec.options, **options})

        def total(z: Tensor) -> Tensor:
            return (weights * values_of(changed, z, targets)).sum()

        return jvp(total, (predictions,), (tangents,))[1]

    return grad(slope)(tensor_options(spec))


def tensor_options(spec: LossSpec) -> dict[str, Tensor]:
    """Return the options that have an elasticity: tensors of floating point."""
    return {
        name: value
        for name, value in spec.options.items()
        if isinstance(value, Tensor) and value.is_floating_point()
    }


def margins(predictions: Tensor, labels: Tensor) -> Tensor:
    """Return the true class's score less the best other, ``(n,)``; NaN where there are none."""
    none = torch.full((len(labels),), torch.nan, device=labels.device)
    of_classes = predictions.dim() == 2 and predictions.shape[1] > 1
    if not of_classes or labels.dim() != 1 or labels.is_floating_point():
        return none
    true = labels[:, None] == torch.arange(predictions.shape[1], device=labels.device)
    others = predictions.masked_fill(true, -torch.inf).amax(1)
    own = predictions.masked_fill(~true, 0.0).sum(1)
    return torch.where(true.any(1), own - others, none)


def _found_to_couple(spec: LossSpec, predictions: Tensor, targets: Tensor) -> bool:
    """Return whether a value changes with the predictions of another example."""
    n = len(predictions)
    if n < 2:
        return False
    weights = torch.linspace(1.0, 2.0, n, dtype=predictions.dtype, device=predictions.device)
    _, plain = cotangents_of(spec, predictions, targets)
    _, weighted = cotangents_of(spec, predictions, targets, weights)
    expected = weights.reshape(-1, *(1,) * (plain.dim() - 1)) * plain
    tolerance = 1e-4 * float(plain.abs().max()) + 1e-30
    return not bool(((weighted - expected).abs() <= tolerance).all())
