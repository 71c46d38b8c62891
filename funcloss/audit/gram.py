"""Shares, elasticities and conflicts from the inner products of class gradients.

With ``G_c`` the gradient of class ``c``'s part of the loss at weight 1, the gradient under any
class weights is ``g = sum_c w_c G_c``; so the matrix ``K[a, b] = <G_a, G_b>`` gives the share of
every class under any weights, without the gradients.
"""

import math
from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor

from funcloss.reduction import divisor

_CANCELLED = 1e-4  # |g| / sum |g_c| below which shares are doubted, whatever the dtype


@dataclass(frozen=True, eq=False)
class Balance:
    """How a gradient is made up of its classes under given class weights."""

    class_weights: Float[Tensor, " classes"]
    expected_share: Float[Tensor, " classes"]  # from weight and count, w_c n_c / sum_j w_j n_j
    share: Float[Tensor, " classes"]  # <g_c, g> / |g|^2; sums to 1, negative: it pulls back
    elasticity: Float[Tensor, " classes"]  # d log |g| / d log w_c
    norm: Float[Tensor, " classes"]  # |g_c|
    conflict: Float[Tensor, "classes classes"]  # cos(g_a, g_b); NaN where one is 0
    gradient_norm: Float[Tensor, ""]  # |g|


def balance(
    gram: Float[Tensor, "classes classes"],
    count: Int[Tensor, " classes"],
    class_weights: Float[Tensor, " classes"],
    *,
    reduction: str = "mean",
) -> Balance:
    """Return share, elasticity, conflict and norm under any class weights, ``w_c (Kw)_c / wKw``.

    Args:
        gram: ``<G_a, G_b>`` of the classes' parts of the mean loss at weight 1, that is, of
            ``G_c = sum_{y_i = c} grad l_i / n``; shape ``(classes, classes)``.
        count: Examples of each class, shape ``(classes,)``.
        class_weights: Weight of each class, at least 0, shape ``(classes,)``.
        reduction: What divides: ``mean`` by ``n``, ``weighted_mean`` by ``sum_i w[y_i]``, ``sum``
            by nothing. Shares do not depend on it, elasticities do: multiplying every weight by
            one number changes nothing after ``weighted_mean``, so there they are
            ``share - expected_share``.

    Returns:
        The balance, in the dtype of ``gram``; shares are NaN where the gradient is 0.

    Raises:
        ValueError: a shape does not fit, a weight is negative, or ``reduction`` is unknown.

    Example:
        >>> import torch
        >>> gram = torch.tensor([[2.0, -1.0], [-1.0, 1.0]])
        >>> balance(gram, torch.tensor([4, 4]), torch.tensor([1.0, 1.0])).share
        tensor([1., 0.])
    """
    classes = len(gram)
    if gram.shape != (classes, classes) or count.shape != (classes,):
        raise ValueError(
            "balance: gram must have shape (classes, classes) and count (classes,), got "
            f"{tuple(gram.shape)} and {tuple(count.shape)}"
        )
    if class_weights.shape != (classes,):
        raise ValueError(
            f"balance: class_weights must have shape ({classes},), got {tuple(class_weights.shape)}"
        )
    if not (class_weights >= 0).all():
        raise ValueError(f"balance: class_weights must be at least 0, got {class_weights.tolist()}")
    weights = class_weights.to(gram)
    weight_sums = weights * count.to(gram)
    n = count.to(gram).sum()
    scale = n / divisor(reduction, n, weight_sums.sum())  # of sum_c w_c G_c
    expected = weight_sums / weight_sums.sum()
    along = weights * (gram @ weights)  # <g_c, g>, but for the scale
    share = along / along.sum()
    return Balance(
        class_weights=class_weights,
        expected_share=expected,
        share=share,
        elasticity=share - expected if reduction == "weighted_mean" else share,
        norm=scale * weights * gram.diagonal().clamp(min=0.0).sqrt(),
        conflict=cosines(gram),
        gradient_norm=scale * along.sum().clamp(min=0.0).sqrt(),
    )


def cancelled(now: Balance, eps: float) -> str:
    """Return a note if the gradient is short against its parts, so that shares may be rounding.

    Args:
        now: The balance.
        eps: Of the dtype that the gradients were computed in.

    Example:
        >>> import torch
        >>> gram = torch.tensor([[1.0, -1.0], [-1.0, 1.0 + 1e-9]], dtype=torch.float64)
        >>> now = balance(gram, torch.tensor([4, 4]), torch.ones(2))
        >>> cancelled(now, 1e-7)
        'the class parts cancel: the gradient is 1.6e-05 of their lengths together, so shares are \
large and rounding shows in them'
    """
    left = float(now.gradient_norm / now.norm.sum())
    if not left < max(_CANCELLED, math.sqrt(10.0 * eps)):
        return ""
    return (
        f"the class parts cancel: the gradient is {left:.1e} of their lengths together, so shares "
        "are large and rounding shows in them"
    )


def cosines(gram: Float[Tensor, "*layers n n"]) -> Float[Tensor, "*layers n n"]:
    """Return the cosine of each pair from their inner products; NaN where one of them is 0.

    Args:
        gram: Inner products, shape ``(*layers, n, n)``.

    Returns:
        ``K[a, b] / sqrt(K[a, a] K[b, b])`` in ``[-1, 1]``, the shape of ``gram``.

    Example:
        >>> import torch
        >>> cosines(torch.tensor([[4.0, -2.0], [-2.0, 4.0]]))[0, 1]
        tensor(-0.5000)
    """
    length = gram.diagonal(dim1=-2, dim2=-1).clamp(min=0.0).sqrt()
    return (gram / (length[..., :, None] * length[..., None, :])).clamp(-1.0, 1.0)
