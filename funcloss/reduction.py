"""From values to a scalar: the only place that divides, and each name says by what.

A reduction is a numerator, the sum of the (weighted) values, and a denominator; of several batches
or processes, both add up.
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from funcloss._checks import check_floating, check_shape, check_where, option_of
from funcloss._numbers import product, wide_dtype

REDUCTIONS = ("mean", "weighted_mean", "sum")


class Fraction(NamedTuple):
    """What a reduction divides, and what by."""

    numerator: Float[Tensor, ""]  # float32 at least: half precision would overflow in the sum
    denominator: Tensor | float  # of no examples 0

    def quotient(self, empty: float = math.nan) -> Tensor:
        """Return numerator by denominator; ``empty``, with zero gradient, where that is 0.

        Example:
            >>> Fraction(torch.tensor(6.0), torch.tensor(3)).quotient()
            tensor(2.)
            >>> Fraction(torch.tensor(0.0), torch.tensor(0)).quotient(empty=0.0)
            tensor(0.)
        """
        numerator, denominator = self
        if not isinstance(denominator, Tensor):
            return numerator / denominator if denominator else torch.zeros_like(numerator) + empty
        denominator = denominator.to(numerator.device)
        nothing = denominator == 0
        return torch.where(nothing, empty, numerator / torch.where(nothing, 1, denominator))


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
    values: Float[Tensor, "*batch"],
    *,
    where: Bool[Tensor, "*batch"] | None = None,
    empty: float = math.nan,
    divisor: float | Tensor | None = None,
) -> Float[Tensor, ""]:
    """Mean over the examples that count, ``sum(values[where]) / sum(where)``.

    With a ``divisor`` it is that batch's term of a larger mean: the terms of accumulated batches,
    or of several processes, add up to the mean of all their examples, and so do their gradients.
    Where the divisor is not known before the values are, sum the numerators and denominators of
    :func:`fraction` instead.

    Args:
        values: One value per example, shape ``(*batch)``.
        where: Examples that count; None counts all.
        empty: The result, with zero gradient, where the divisor is 0 because no example counts.
        divisor: What to divide by in place of the number of examples that count, such as their
            number in all accumulated batches: a number, not negative, or a scalar tensor.

    Returns:
        A scalar of the dtype of ``values``.

    Raises:
        TypeError: ``values`` is not floating point, ``where`` is not boolean, or ``empty`` or
            ``divisor`` is not a number.
        ValueError: ``where`` does not have the shape of ``values``, or ``divisor`` is negative or
            not a scalar.

    Example:
        >>> mean(torch.tensor([1.0, 3.0, 8.0]), where=torch.tensor([True, True, False]))
        tensor(2.)
        >>> mean(torch.ones(2), where=torch.zeros(2, dtype=torch.bool), empty=0.0)
        tensor(0.)
        >>> mean(torch.tensor([1.0, 2.0]), divisor=3) + mean(torch.tensor([6.0]), divisor=3)
        tensor(3.)
    """
    check_floating("mean", "values", values)
    check_where("mean", where, tuple(values.shape))
    found = _divided_by("mean", fraction("mean", values, where=where), divisor, empty)
    return found.quotient(empty).to(values.dtype)


def weighted_mean(
    values: Float[Tensor, "*batch"],
    weights: Float[Tensor, "*batch"],
    *,
    where: Bool[Tensor, "*batch"] | None = None,
    empty: float = math.nan,
    divisor: float | Tensor | None = None,
) -> Float[Tensor, ""]:
    """Mean over the weights that count, ``sum(weights * values) / sum(weights)``.

    This is what ``torch.nn.functional.cross_entropy(weight=...)`` does. A factor common to all
    weights cancels, and so does every weight of a batch of one example: to let a cost act on
    per-example gradients, weight the values and use :func:`mean`. A value at weight 0 adds 0, also
    if it is infinite.

    Args:
        values: One unweighted value per example, shape ``(*batch)``.
        weights: Weight of each example, not negative, shape ``(*batch)``.
        where: Examples that count; None counts all.
        empty: The result, with zero gradient, where the divisor is 0.
        divisor: What to divide by in place of the sum of the weights that count, such as their sum
            over all accumulated batches: see :func:`mean`.

    Returns:
        A scalar of the dtype of ``values``.

    Raises:
        TypeError: ``values`` or ``weights`` is not floating point, ``where`` is not boolean, or
            ``empty`` or ``divisor`` is not a number.
        ValueError: the shapes differ, or ``divisor`` is negative or not a scalar.

    Example:
        >>> weighted_mean(torch.tensor([1.0, 4.0]), torch.tensor([2.0, 1.0]))
        tensor(2.)
        >>> weighted_mean(torch.tensor([1.0, 4.0]), torch.tensor([2.0, 1.0]), divisor=12.0)
        tensor(0.5000)
    """
    check_floating("weighted_mean", "values", values)
    check_floating("weighted_mean", "weights", weights)
    check_shape("weighted_mean", "weights", weights, tuple(values.shape), "values")
    check_where("weighted_mean", where, tuple(values.shape))
    if where is not None:  # before the product: 0 * NaN would be in the gradient
        values, weights = torch.where(where, values, 0.0), torch.where(where, weights, 0.0)
    wide = wide_dtype(values)
    weighted = product(weights.to(wide), values.to(wide))
    found = fraction("weighted_mean", weighted, weights=weights)
    return _divided_by("weighted_mean", found, divisor, empty).quotient(empty).to(values.dtype)


def _divided_by(
    name: str, found: Fraction, divisor: float | Tensor | None, empty: float
) -> Fraction:
    """Check what to divide by and what nothing is; return the fraction of that denominator."""
    if not isinstance(empty, (int, float)):
        raise TypeError(f"{name}: empty must be a number, got {type(empty).__name__}")
    if divisor is None:
        return found
    option_of(name, "divisor", divisor, None, low=0)
    return Fraction(found.numerator, divisor)
