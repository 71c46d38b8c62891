"""Losses of the overlap of a mask and its probabilities, one value an image."""

import functools

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from funcloss._checks import check_number, check_where
from funcloss.losses._shared import finished, mark_coupled, masked, paired_inputs
from funcloss.typing import LossFn


def dice(
    probabilities: Float[Tensor, "*batch_and_pixels"],
    targets: Float[Tensor, "*batch_and_pixels"],
    *,
    dim: int | tuple[int, ...] = -1,
    smooth: float | Tensor = 1.0,
    where: Bool[Tensor, "*batch"] | None = None,
) -> Float[Tensor, "*batch"]:
    """Dice loss of an image, ``1 - (2 * TP + smooth) / (2 * TP + FP + FN + smooth)``.

    With the soft counts ``TP = sum(p * t)``, ``FP = sum(p * (1 - t))`` and ``FN = sum((1 - p) *
    t)`` over the pixels of the image; ``2 * TP + FP + FN`` is ``sum(p) + sum(t)``. ``smooth``
    stands above and below the line, so an image that is empty in both gives 0, and one that is
    empty in the targets alone gives less than 1. In ``[0, 1)``.

    Args:
        probabilities: Probability of the mask at each pixel, the axes of the pixels and of the
            batch in any order.
        targets: The mask, 0 or 1 or between, the shape of ``probabilities``.
        dim: The axes that belong to one image, negative. What remains is the batch: ``(N, H, W,
            C)`` at ``dim=(-3, -2)`` gives one value an image and class.
        smooth: Added above and below, in pixels, above 0.
        where: Images that count, shape ``(*batch)``. The others give 0, with zero gradient.

    Returns:
        Loss of each image, shape ``(*batch)``, dtype of ``probabilities``.

    Raises:
        TypeError: ``probabilities`` or ``targets`` is not floating point, or ``where`` is not
            boolean.
        ValueError: the shapes do not fit, ``dim`` is not of distinct negative axes, or ``smooth``
            is not above 0.

    Example:
        >>> dice(torch.tensor([[1.0, 1.0, 0.0]]), torch.tensor([[1.0, 0.0, 0.0]]))
        tensor([0.2500])

    References:
        Dice, "Measures of the amount of ecologic association between species", 1945; Milletari et
        al., "V-Net", 2016 (there with squares below the line).
    """
    check_number("dice", "smooth", smooth, low=0, above=True)
    hit, false_alarm, missed = _counts("dice", probabilities, targets, dim, where)
    wrong = false_alarm + missed
    return finished(wrong / (2 * hit + wrong + smooth), where, probabilities)


def jaccard(
    probabilities: Float[Tensor, "*batch_and_pixels"],
    targets: Float[Tensor, "*batch_and_pixels"],
    *,
    dim: int | tuple[int, ...] = -1,
    smooth: float | Tensor = 1.0,
    where: Bool[Tensor, "*batch"] | None = None,
) -> Float[Tensor, "*batch"]:
    """Jaccard loss of an image, ``1 - (TP + smooth) / (TP + FP + FN + smooth)``: soft 1 - IoU.

    The counts are those of :func:`dice`. An image that is empty in both gives 0. In ``[0, 1)``; it
    is ``2 * d / (1 + d)`` of the Dice loss ``d`` of twice the ``smooth``.

    Args:
        probabilities: Probability of the mask at each pixel, the axes of the pixels and of the
            batch in any order.
        targets: The mask, 0 or 1 or between, the shape of ``probabilities``.
        dim: The axes that belong to one image, negative. What remains is the batch.
        smooth: Added above and below, in pixels, above 0.
        where: Images that count, shape ``(*batch)``. The others give 0, with zero gradient.

    Returns:
        Loss of each image, shape ``(*batch)``, dtype of ``probabilities``.

    Raises:
        TypeError: ``probabilities`` or ``targets`` is not floating point, or ``where`` is not
            boolean.
        ValueError: the shapes do not fit, ``dim`` is not of distinct negative axes, or ``smooth``
            is not above 0.

    Example:
        >>> jaccard(torch.tensor([[1.0, 1.0, 0.0]]), torch.tensor([[1.0, 0.0, 0.0]]))
        tensor([0.3333])

    References:
        Rahman and Wang, "Optimizing intersection-over-union in deep neural networks", 2016.
    """
    check_number("jaccard", "smooth", smooth, low=0, above=True)
    counts = _counts("jaccard", probabilities, targets, dim, where)
    return finished(_tversky(counts, 1.0, 1.0, smooth), where, probabilities)


def tversky(
    probabilities: Float[Tensor, "*batch_and_pixels"],
    targets: Float[Tensor, "*batch_and_pixels"],
    *,
    alpha: float | Tensor = 0.3,
    beta: float | Tensor = 0.7,
    dim: int | tuple[int, ...] = -1,
    smooth: float | Tensor = 1.0,
    where: Bool[Tensor, "*batch"] | None = None,
) -> Float[Tensor, "*batch"]:
    """Tversky loss, ``1 - (TP + smooth) / (TP + alpha * FP + beta * FN + smooth)``.

    The counts are those of :func:`dice`. ``alpha`` is the cost of a false alarm and ``beta`` that
    of a miss. At ``alpha = beta = 1`` it is :func:`jaccard`; at 1/2 it is :func:`dice` of twice
    the ``smooth``. An image that is empty in both gives 0. In ``[0, 1)``.

    Args:
        probabilities: Probability of the mask at each pixel, the axes of the pixels and of the
            batch in any order.
        targets: The mask, 0 or 1 or between, the shape of ``probabilities``.
        alpha: Cost of false positives, at least 0.
        beta: Cost of false negatives, at least 0.
        dim: The axes that belong to one image, negative. What remains is the batch.
        smooth: Added above and below, in pixels, above 0.
        where: Images that count, shape ``(*batch)``. The others give 0, with zero gradient.

    Returns:
        Loss of each image, shape ``(*batch)``, dtype of ``probabilities``.

    Raises:
        TypeError: ``probabilities`` or ``targets`` is not floating point, or ``where`` is not
            boolean.
        ValueError: the shapes do not fit, ``dim`` is not of distinct negative axes, or a number is
            outside its range.

    Example:
        >>> tversky(torch.tensor([[1.0, 1.0, 0.0]]), torch.tensor([[1.0, 0.0, 0.0]]))
        tensor([0.1304])

    References:
        Salehi, Erdogmus and Gholipour, "Tversky loss function for image segmentation using 3D
        fully convolutional deep networks", 2017.
    """
    _check_costs("tversky", alpha, beta, smooth)
    counts = _counts("tversky", probabilities, targets, dim, where)
    return finished(_tversky(counts, alpha, beta, smooth), where, probabilities)


def focal_tversky(
    probabilities: Float[Tensor, "*batch_and_pixels"],
    targets: Float[Tensor, "*batch_and_pixels"],
    *,
    gamma: float | Tensor = 4 / 3,
    alpha: float | Tensor = 0.3,
    beta: float | Tensor = 0.7,
    dim: int | tuple[int, ...] = -1,
    smooth: float | Tensor = 1.0,
    where: Bool[Tensor, "*batch"] | None = None,
) -> Float[Tensor, "*batch"]:
    """Focal Tversky loss, ``tversky ** (1 / gamma)``: above 1, well-segmented images weigh more.

    The exponent is the inverse of ``gamma``, as in the paper; at ``gamma = 1`` it is
    :func:`tversky`. Above 1 its slope grows without bound as an image becomes perfect; at exactly
    0 its gradient is 0. In ``[0, 1)``.

    Args:
        probabilities: Probability of the mask at each pixel, the axes of the pixels and of the
            batch in any order.
        targets: The mask, 0 or 1 or between, the shape of ``probabilities``.
        gamma: Inverse of the exponent, above 0; the paper takes it from 1 to 3.
        alpha: Cost of false positives, at least 0. (The paper's alpha is our beta.)
        beta: Cost of false negatives, at least 0.
        dim: The axes that belong to one image, negative. What remains is the batch.
        smooth: Added above and below, in pixels, above 0.
        where: Images that count, shape ``(*batch)``. The others give 0, with zero gradient.

    Returns:
        Loss of each image, shape ``(*batch)``, dtype of ``probabilities``.

    Raises:
        TypeError: ``probabilities`` or ``targets`` is not floating point, or ``where`` is not
            boolean.
        ValueError: the shapes do not fit, ``dim`` is not of distinct negative axes, or a number is
            outside its range.

    Example:
        >>> focal_tversky(torch.tensor([[1.0, 1.0, 0.0]]), torch.tensor([[1.0, 0.0, 0.0]]))
        tensor([0.2170])

    References:
        Abraham and Khan, "A novel focal Tversky loss function with improved attention U-Net for
        lesion segmentation", 2019.
    """
    check_number("focal_tversky", "gamma", gamma, low=0, above=True)
    _check_costs("focal_tversky", alpha, beta, smooth)
    counts = _counts("focal_tversky", probabilities, targets, dim, where)
    loss = _tversky(counts, alpha, beta, smooth)
    # The slope of a root is infinite at 0.
    root = torch.where(loss > 0, loss, 1.0) ** (1 / gamma)
    return finished(torch.where(loss > 0, root, 0.0), where, probabilities)


def over_batch(loss: LossFn) -> LossFn:
    """Return the overlap loss of a whole batch, its images joined into one: batch Dice.

    The counts are summed over the images before the loss divides, so an image without the mask
    no longer stands alone. Every image that counts is given the value of all, so
    ``funcloss.mean`` is that value. **It couples the examples of a batch.** All axes but ``dim``
    are the batch; for a value a class, map over the classes: ``vmap(over_batch(dice), in_dims=-1,
    out_dims=-1)``.

    Args:
        loss: A loss of this module, or any to which a pixel that is 0 in both adds nothing: so
            an image that does not count is left out.

    Returns:
        A loss of ``(probabilities, targets)``, with the keywords of ``loss``.

    Example:
        >>> probabilities, targets = torch.tensor([[[0.0, 0.0], [1.0, 0.0]], [[0.0, 1.0]] * 2])
        >>> over_batch(dice)(probabilities, targets)
        tensor([0.7500, 0.7500])

    References:
        Isensee et al., "nnU-Net", 2021.
    """

    @mark_coupled
    @functools.wraps(loss)
    def coupled(
        probabilities: Tensor,
        targets: Tensor,
        *,
        dim: int | tuple[int, ...] = -1,
        where: Tensor | None = None,
        **options,
    ) -> Tensor:
        images, masks = _images("over_batch", probabilities, targets, dim, where)
        value = loss(images.reshape(-1), masks.reshape(-1), **options)
        return finished(value.expand(images.shape[:-1]), where, probabilities)

    return coupled


def _check_costs(
    name: str, alpha: float | Tensor, beta: float | Tensor, smooth: float | Tensor
) -> None:
    check_number(name, "alpha", alpha, low=0)
    check_number(name, "beta", beta, low=0)
    check_number(name, "smooth", smooth, low=0, above=True)


def _images(
    name: str,
    probabilities: Tensor,
    targets: Tensor,
    dim: int | tuple[int, ...],
    where: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Check images and masks; return them masked and wide, ``(*batch, pixels)``."""
    axes = (dim,) if isinstance(dim, int) else tuple(dim)
    if not axes or max(axes) >= 0 or len(set(axes)) < len(axes):
        raise ValueError(f"{name}: dim must be one or more distinct negative axes, got {dim}")
    names = ("probabilities", "targets")
    pair = paired_inputs(name, probabilities, targets, None, axes=-min(axes), names=names)
    last = tuple(range(-len(axes), 0))
    images, masks = (x.movedim(axes, last).flatten(-len(axes)) for x in pair)
    check_where(name, where, tuple(images.shape[:-1]))
    return masked(images, where), masked(masks, where)


def _counts(
    name: str,
    probabilities: Tensor,
    targets: Tensor,
    dim: int | tuple[int, ...],
    where: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the soft true positives, false positives and false negatives of each image."""
    p, t = _images(name, probabilities, targets, dim, where)
    return (p * t).sum(-1), (p * (1 - t)).sum(-1), ((1 - p) * t).sum(-1)


def _tversky(
    counts: tuple[Tensor, Tensor, Tensor],
    alpha: float | Tensor,
    beta: float | Tensor,
    smooth: float | Tensor,
) -> Tensor:
    """Return one less the index, without taking it from 1."""
    hit, false_alarm, missed = counts
    wrong = alpha * false_alarm + beta * missed
    return wrong / (hit + wrong + smooth)
