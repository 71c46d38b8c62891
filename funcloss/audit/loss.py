"""The loss under audit: values, and gradients in the predictions, at cost 1."""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import grad, jvp

from funcloss.combinators import ClassWeighted, couples_examples, name_of, options_of
from funcloss.errors import AuditError
from funcloss.typing import LossFn

_OWN = {"class_weights"}


class LossSide(NamedTuple):
    """A loss with its options, and whether its examples are coupled."""

    loss: LossFn
    options: dict[str, Any]
    coupled: bool


def make_loss_side(
    loss: LossFn,
    options: Mapping[str, Any],
    predictions: Tensor,
    targets: Tensor,
    *,
    weighted: bool,
) -> LossSide:
    """Look at a loss.

    Args:
        loss: One value an example; or a scalar, the mean of what couples all examples.
        options: Its options by name.
        predictions: Of some examples, to try it on.
        targets: Of the same.
        weighted: Whether the audit puts class weights on its values.

    Returns:
        The loss without its class weights, if it is a class-weighted one.

    Raises:
        AuditError: class weights are given, and the loss puts them where it wants.
    """
    bound = loss.keywords.keys() if isinstance(loss, functools.partial) else set()
    if isinstance(loss, ClassWeighted) and not _OWN & options.keys():
        (loss,) = loss.losses
    elif weighted and _OWN & options_of(loss) - bound:
        raise AuditError(
            f"audit: {name_of(loss)} puts class weights where it wants: give them as "
            "options={'class_weights': ...}, and they are audited as they act"
        )
    side = LossSide(loss, dict(options), couples_examples(loss))
    return side._replace(coupled=side.coupled or _found_to_couple(side, predictions, targets))


def check_costs(side: LossSide, class_weights: Tensor | None, reduction: str) -> None:
    """Raise ``AuditError`` where class weights have no place to act."""
    if side.coupled and (class_weights is not None or reduction == "weighted_mean"):
        raise AuditError(
            "audit: the loss couples examples, so a class weight belongs to none of its values "
            "and a division by weights means nothing: give the loss its costs as options"
        )


def values_of(side: LossSide, predictions: Tensor, targets: Tensor) -> Tensor:
    """Return one value an example, at cost 1; those of a scalar loss are all its value.

    Raises:
        AuditError: the loss gives something else.
    """
    n = len(predictions)
    values = side.loss(predictions, targets, **side.options)
    if values.dim() == 0:
        return values.expand(n)
    if values.shape != (n,):
        raise AuditError(
            f"audit: {name_of(side.loss)} must give one value an example, ({n},), got "
            f"{tuple(values.shape)}: average over the rest of an example in the loss"
        )
    return values


def cotangents_of(
    side: LossSide, predictions: Tensor, targets: Tensor, weights: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return the values and the gradient of their sum, weighted if so asked, in the predictions."""
    with torch.enable_grad():
        leaf = predictions.detach().requires_grad_()
        values = values_of(side, leaf, targets)
        total = values.sum() if weights is None else (weights * values).sum()
        (back,) = torch.autograd.grad(total, leaf, materialize_grads=True, allow_unused=True)
    return values.detach(), back


def option_slopes(
    side: LossSide, predictions: Tensor, moves: Tensor, targets: Tensor, weights: Tensor
) -> dict[str, Tensor]:
    """Return the derivative, by each tensor option, of the loss's slope along a move.

    ``d/dk d/dt sum_i w_i l_i(z + t * moves, k)``: forward mode inside, reverse mode outside.

    Args:
        side: The loss.
        predictions: Where, ``(n, ...)``.
        moves: Along what, the same shape.
        targets: Of the examples.
        weights: Of the examples, ``(n,)``.

    Returns:
        By option, the shape of the option.
    """

    def slope(swept: dict[str, Tensor]) -> Tensor:
        now = side._replace(options=side.options | swept)

        def total(z: Tensor) -> Tensor:
            return (weights * values_of(now, z, targets)).sum()

        return jvp(total, (predictions,), (moves,))[1]

    return grad(slope)(swept_options(side))


def swept_options(side: LossSide) -> dict[str, Tensor]:
    """Return the options that have an elasticity: tensors of floating point."""
    return {
        name: value
        for name, value in side.options.items()
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


def _found_to_couple(side: LossSide, predictions: Tensor, targets: Tensor) -> bool:
    """Return whether a value changes with the predictions of another example."""
    if len(predictions) < 2:
        return False
    n = len(predictions)
    weights = torch.linspace(1.0, 2.0, n, dtype=predictions.dtype, device=predictions.device)
    with torch.enable_grad():
        leaf = predictions.detach().requires_grad_()
        values = values_of(side, leaf, targets)
        take = functools.partial(
            torch.autograd.grad, inputs=leaf, materialize_grads=True, allow_unused=True
        )
        (plain,) = take(values.sum(), retain_graph=True)
        (weighted,) = take((weights * values).sum())
    expected = weights.reshape(-1, *(1,) * (plain.dim() - 1)) * plain
    room = 1e-4 * float(plain.abs().max()) + 1e-30
    return not bool(((weighted - expected).abs() <= room).all())
