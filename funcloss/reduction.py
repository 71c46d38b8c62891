"""From values to a scalar: the only place that divides, and each name says by what.

A reduction is a numerator, the sum of the (weighted) values, and a denominator; of several batches
or processes, both add up.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from funcloss._checks import check_floating, check_shape, check_where
from funcloss._precision import wide_dtype

REDUCTIONS = ("mean", "weighted_mean", "sum")


class Fraction(NamedTuple):
    """What a reduction divides, and what by."""

    numerator: Float[Tensor, ""]  # float32 at least: half precision would overflow in the sum
    denominator: Tensor | float  # of no examples 0: the quotient is then NaN


def divisor(reduction: str, count: Tensor | float, weight_sum: Tensor | float) -> Tensor | float:
    """What a reduction divides by: the table of reductions.

    Args:
        reduction: ``mean``, ``weighted_mean`` or ``sum``.
        count: Number of examples that count.
        weight_sum: Sum of their weights.

    Returns:
        ``count``, ``weight_sum`` or 1.

    Raises:
        ValueError: there is no such reduction.

    Example:
        >>> [divisor(reduction, 4.0, 12.0) for reduction in REDUCTIONS]
        [4.0, 12.0, 1.0]
    """
    if reduction not in REDUCTIONS:
        known = ", ".join(REDUCTIONS)
        raise ValueError(f"reduction must be one of {known}; got {reduction!r}")
    return {"mean": count, "weighted_mean": weight_sum, "sum": 1.0}[reduction]


def fraction(
    reduction: str,
    values: Float[Tensor, "*batch"],
    *,
    weights: Float[Tensor, "*batch"] | None = None,
    where: Bool[Tensor, "*batch"] | None = None,
) -> Fraction:
    """Numerator and denominator of a reduction of values that are weighted already.

    Args:
        reduction: ``mean``, ``weighted_mean`` or ``sum``.
        values: One value per example, times its weight if it has one, shape ``(*batch)``.
        weights: The weights, for the denominator of ``weighted_mean``; None: 1 each.
        where: Examples that count; None counts all.

    Returns:
        The sum of the values that count, and what it is divided by.

    Raises:
        ValueError: there is no such reduction.

    Example:
        >>> values, weights = torch.tensor([2.0, 4.0]), torch.tensor([2.0, 1.0])
        >>> fraction("weighted_mean", values, weights=weights)
        Fraction(numerator=tensor(6.), denominator=tensor(3.))
    """
    if where is not None:
        values = torch.where(where, values, 0.0)
        weights = None if weights is None else torch.where(where, weights, 0.0)
    wide = wide_dtype(values)
    count = float(values.numel()) if where is None else where.sum()
    weight_sum = count if weights is None else weights.sum(dtype=wide)
    return Fraction(values.sum(dtype=wide), divisor(reduction, count, weight_sum))


def mean(
    values: Float[Tensor, "*batch"], *, where: Bool[Tensor, "*batch"] | None = None
) -> Float[Tensor, ""]:
    """Mean over the examples that count, ``sum(values[where]) / sum(where)``.

    Args:
        values: One value per example, shape ``(*batch)``.
        where: Examples that count; None counts all.

    Returns:
        A scalar of the dtype of ``values``; NaN when no example counts.

    Raises:
        TypeError: ``values`` is not floating point, or ``where`` is not boolean.
        ValueError: ``where`` does not have the shape of ``values``.

    Example:
        >>> mean(torch.tensor([1.0, 3.0, 8.0]), where=torch.tensor([True, True, False]))
        tensor(2.)
    """
    check_floating("mean", "values", values)
    check_where("mean", where, tuple(values.shape))
    numerator, denominator = fraction("mean", values, where=where)
    return (numerator / denominator).to(values.dtype)


def weighted_mean(
    values: Float[Tensor, "*batch"],
    weights: Float[Tensor, "*batch"],
    *,
    where: Bool[Tensor, "*batch"] | None = None,
) -> Float[Tensor, ""]:
    """Mean over the weights that count, ``sum(weights * values) / sum(weights)``.

    This is what ``torch.nn.functional.cross_entropy(weight=...)`` does. A factor common to all
    weights cancels, and so does every weight of a batch of one example: to let a cost act on
    per-example gradients, weight the values and use :func:`mean`.

    Args:
        values: One unweighted value per example, shape ``(*batch)``.
        weights: Weight of each example, not negative, shape ``(*batch)``.
        where: Examples that count; None counts all.

    Returns:
        A scalar of the dtype of ``values``; NaN when the weights that count sum to 0.

    Raises:
        TypeError: ``values`` or ``weights`` is not floating point, or ``where`` is not boolean.
        ValueError: the shapes differ.

    Example:
        >>> weighted_mean(torch.tensor([1.0, 4.0]), torch.tensor([2.0, 1.0]))
        tensor(2.)
    """
    check_floating("weighted_mean", "values", values)
    check_floating("weighted_mean", "weights", weights)
    check_shape("weighted_mean", "weights", weights, tuple(values.shape), "values")
    check_where("weighted_mean", where, tuple(values.shape))
    if where is not None:  # before the product: 0 * inf = NaN would be in the gradient
        values, weights = torch.where(where, values, 0.0), torch.where(where, weights, 0.0)
    wide = wide_dtype(values)
    weighted = weights.to(wide) * values.to(wide)
    numerator, denominator = fraction("weighted_mean", weighted, weights=weights)
    return (numerator / denominator).to(values.dtype)
