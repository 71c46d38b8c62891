"""From values to a scalar: the only place that divides, and each name says by what."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from funcloss._checks import check_floating, check_shape, check_where
from funcloss._precision import wide_dtype


def mean(
    values: Float[Tensor, "*batch"], *, where: Bool[Tensor, "*batch"] | None = None
) -> Float[Tensor, ""]:
    """Mean over the examples that count, ``sum(values[where]) / sum(where)``.

    Args:
        values: One value an example, shape ``(*batch)``.
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
    if where is None:
        return values.mean()
    kept = torch.where(where, values, 0.0)
    # Half precision would overflow in the sum though the mean is in range.
    total = kept.sum(dtype=wide_dtype(values))
    return (total / where.sum()).to(values.dtype)


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
        values: One unweighted value an example, shape ``(*batch)``.
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
    if where is not None:
        values, weights = torch.where(where, values, 0.0), torch.where(where, weights, 0.0)
    wide = wide_dtype(values)
    weights = weights.to(wide)
    return ((weights * values.to(wide)).sum() / weights.sum()).to(values.dtype)
