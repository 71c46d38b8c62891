"""Losses of the overlap of a mask and its probabilities, one value per image.

``where`` says which images count, or which pixels: it has the shape of the one or the other.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from funcloss._checks import check_per_class, check_tensor, option_of
from funcloss.losses._shared import finished, paired_inputs
from funcloss.typing import LossFn

_NAMES = ("probabilities", "targets")
_Counts = tuple[Tensor, Tensor, Tensor]  # true positives, false positives, false negatives


def dice(
    probabilities: Float[Tensor, "*batch_and_pixels"],
    targets: Float[Tensor, "*batch_and_pixels"],
    *,
    dim: int | tuple[int, ...] = -1,
    smooth: float | Tensor = 1.0,
    where: Bool[Tensor, "*batch_and_pixels"] | Bool[Tensor, "*batch"] | None = None,
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
            C)`` at ``dim=(-3, -2)`` gives one value per image and class.
        smooth: Added above and below, in pixels, above 0; as every number here, a scalar tensor
            or one per image too.
        where: Images that count, shape ``(*batch)``; the others give 0, with zero gradient. Or
            pixels that count, the shape of ``probabilities``; the others add 0 to every count.

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
    counts, where = _counts("dice", probabilities, targets, dim, where)
    hit, false_alarm, missed = counts
    wrong = false_alarm + missed
    smooth = option_of("dice", "smooth", smooth, tuple(hit.shape), low=0, above=True)
    return finished(wrong / (2 * hit + wrong + smooth), where, probabilities)


def jaccard(
    probabilities: Float[Tensor, "*batch_and_pixels"],
    targets: Float[Tensor, "*batch_and_pixels"],
    *,
    dim: int | tuple[int, ...] = -1,
    smooth: float | Tensor = 1.0,
    where: Bool[Tensor, "*batch_and_pixels"] | Bool[Tensor, "*batch"] | None = None,
) -> Float[Tensor, "*batch"]:
    """Jaccard loss of an image, ``1 - (TP + smooth) / (TP + FP + FN + smooth)``: soft 1 - IoU.

    The counts are those of :func:`dice`. An image that is empty in both gives 0. In ``[0, 1)``; it
    is ``2 * d / (1 + d)`` of the Dice loss ``d`` of twice the ``smooth``.

    Args:
        probabilities: Probability of the mask at each pixel, the axes of the pixels and of the
            batch in any order.
        targets: The mask, 0 or 1 or between, the shape of ``probabilities``.
        dim: The axes that belong to one image, negative. What remains is the batch.
        smooth: Added above and below, in pixels, above 0; as every number here, a scalar tensor
            or one per image too.
        where: Images that count, shape ``(*batch)``; the others give 0, with zero gradient. Or
            pixels that count, the shape of ``probabilities``; the others add 0 to every count.

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
    counts, where = _counts("jaccard", probabilities, targets, dim, where)
    return finished(_tversky("jaccard", counts, 1.0, 1.0, smooth), where, probabilities)


def tversky(
    probabilities: Float[Tensor, "*batch_and_pixels"],
    targets: Float[Tensor, "*batch_and_pixels"],
    *,
    alpha: float | Tensor = 0.3,
    beta: float | Tensor = 0.7,
    dim: int | tuple[int, ...] = -1,
    smooth: float | Tensor = 1.0,
    where: Bool[Tensor, "*batch_and_pixels"] | Bool[Tensor, "*batch"] | None = None,
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
        smooth: Added above and below, in pixels, above 0; as every number here, a scalar tensor
            or one per image too.
        where: Images that count, shape ``(*batch)``; the others give 0, with zero gradient. Or
            pixels that count, the shape of ``probabilities``; the others add 0 to every count.

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
    counts, where = _counts("tversky", probabilities, targets, dim, where)
    return finished(_tversky("tversky", counts, alpha, beta, smooth), where, probabilities)


def focal_tversky(
    probabilities: Float[Tensor, "*batch_and_pixels"],
    targets: Float[Tensor, "*batch_and_pixels"],
    *,
    gamma: float | Tensor = 4 / 3,
    alpha: float | Tensor = 0.3,
    beta: float | Tensor = 0.7,
    dim: int | tuple[int, ...] = -1,
    smooth: float | Tensor = 1.0,
    where: Bool[Tensor, "*batch_and_pixels"] | Bool[Tensor, "*batch"] | None = None,
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
        smooth: Added above and below, in pixels, above 0; as every number here, a scalar tensor
            or one per image too.
        where: Images that count, shape ``(*batch)``; the others give 0, with zero gradient. Or
            pixels that count, the shape of ``probabilities``; the others add 0 to every count.

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
    name = "focal_tversky"
    counts, where = _counts(name, probabilities, targets, dim, where)
    loss = _tversky(name, counts, alpha, beta, smooth)
    gamma = option_of(name, "gamma", gamma, tuple(loss.shape), low=0, above=True)
    # The slope of a root is infinite at 0.
    root = torch.where(loss > 0, loss, 1.0) ** (1 / gamma)
    return finished(torch.where(loss > 0, root, 0.0), where, probabilities)


def generalized_dice(
    probabilities: Float[Tensor, "*batch_and_pixels classes"],
    targets: Float[Tensor, "*batch_and_pixels classes"],
    *,
    dim: int | tuple[int, ...] = -2,
    class_weights: Float[Tensor, " classes"] | None = None,
    power: float | Tensor = 2.0,
    smooth: float | Tensor = 1.0,
    where: Bool[Tensor, "*batch_and_pixels"] | Bool[Tensor, "*batch"] | None = None,
) -> Float[Tensor, "*batch"]:
    """Generalised Dice of all classes of an image, ``1 - 2 sum(w TP) / sum(w (2 TP + FP + FN))``.

    The counts are those of :func:`dice`, of each class; the sums are over the classes, and
    ``smooth`` is added above and below. A class weighs ``w = class_weight * (rarest /
    volume)^power`` by its number of pixels in the targets of the image, its volume, and that of
    the rarest class that is there; so its weights are those of the paper, ``1 / volume^2``, up to
    a factor that cancels. A class that is not in the targets weighs as much as the rarest. At
    ``power=0`` only ``class_weights`` weigh. An image that is right everywhere gives 0. In
    ``[0, 1)``.

    Args:
        probabilities: Probability of each class at each pixel, classes last, the axes of the
            pixels and of the batch before them in any order.
        targets: One-hot classes, or shares of them, the shape of ``probabilities``.
        dim: The axes that belong to one image, negative, without the last. What remains is the
            batch: ``(N, H, W, C)`` at ``dim=(-3, -2)`` gives one value per image.
        class_weights: Weight of each class, not negative, shape ``(classes,)``; None: all 1.
        power: How much more a rare class weighs, at least 0: a number, a scalar tensor or one per
            image.
        smooth: Added above and below, above 0, in pixels of the rarest class, of the same shapes.
        where: Images that count, shape ``(*batch)``; the others give 0, with zero gradient. Or
            pixels that count, the shape of ``probabilities`` without its last axis; the others add
            0 to every count.

    Returns:
        Loss of each image, shape ``(*batch)``, dtype of ``probabilities``.

    Raises:
        TypeError: ``probabilities``, ``targets`` or ``class_weights`` is not floating point, or
            ``where`` is not boolean.
        ValueError: the shapes do not fit, ``dim`` is not of distinct negative axes before the last,
            or a number is outside its range.

    Example:
        >>> targets = torch.tensor([[[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]])  # three pixels
        >>> generalized_dice(torch.full((1, 3, 2), 0.5), targets, smooth=1e-6)
        tensor([0.5556])

    References:
        Sudre et al., "Generalised Dice overlap as a deep learning loss function for highly
        unbalanced segmentations", 2017.
    """
    name = "generalized_dice"
    axes = pixel_axes(name, dim, classes=True)
    p, t = paired_inputs(name, probabilities, targets, None, axes=1 - min(axes), names=_NAMES)
    mask = mask_of(name, where, tuple(p.shape[:-1]), axes)
    # With the classes in front, the pixels have the axes that they have without them.
    images, masks = (joined(x.movedim(-1, 0), axes, mask) for x in (p, t))
    hit, false_alarm, missed = (x.movedim(0, -1) for x in _counted(images, masks))
    examples = tuple(hit.shape[:-1])
    power = option_of(name, "power", power, examples, axes=1, low=0)
    smooth = option_of(name, "smooth", smooth, examples, low=0, above=True)
    weights = _rarity(masks.sum(-1).movedim(0, -1)) ** power
    if class_weights is not None:
        check_per_class(name, "class_weights", class_weights, probabilities)
        weights = weights * class_weights
    wrong = (weights * (false_alarm + missed)).sum(-1)
    loss = wrong / (2 * (weights * hit).sum(-1) + wrong + smooth)
    return finished(loss, images_of(mask), probabilities)


def _rarity(volume: Tensor) -> Tensor:
    """Return the least volume above 0 over each volume, 1 of a class that has none."""
    there = volume > 0
    least = torch.where(there, volume, torch.inf).amin(-1, keepdim=True)
    return torch.where(there, least / torch.where(there, volume, 1), 1)


def over_batch(loss: LossFn) -> LossFn:
    """Return the overlap loss of a whole batch, its images joined into one: batch Dice.

    The counts are summed over the images before the loss divides, so an image without the mask
    no longer stands alone. Every image that counts is given the value of all, so
    ``funcloss.mean`` is that value. **It couples the examples of a batch.** All axes but ``dim``
    are the batch; for a value per class, map over the classes: ``vmap(over_batch(dice),
    in_dims=-1, out_dims=-1)``.

    Args:
        loss: One of :func:`dice`, :func:`jaccard`, :func:`tversky` and :func:`focal_tversky`, or
            any of one mask to which a pixel that is 0 in both adds nothing: so what does not count
            is left out. (:func:`generalized_dice` takes the batch among the axes of ``dim``.)

    Returns:
        A loss of ``(probabilities, targets)``, with the keywords of ``loss``.

    Example:
        >>> probabilities, targets = torch.tensor([[[0.0, 0.0], [1.0, 0.0]], [[0.0, 1.0]] * 2])
        >>> over_batch(dice)(probabilities, targets)
        tensor([0.7500, 0.7500])

    References:
        Isensee et al., "nnU-Net", 2021.
    """
    return OverBatch(loss)


@dataclass(frozen=True)
class OverBatch:
    """What :func:`over_batch` returns."""

    loss: LossFn
    couples_examples = True

    def __post_init__(self) -> None:
        """Take the signature of the loss, and so its options."""
        object.__setattr__(self, "__wrapped__", self.loss)

    def __repr__(self) -> str:
        """Return it as it was written: ``over_batch(dice)``."""
        return f"over_batch({getattr(self.loss, '__name__', repr(self.loss))})"

    def __call__(
        self,
        probabilities: Tensor,
        targets: Tensor,
        *,
        dim: int | tuple[int, ...] = -1,
        where: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        """Return one value per image, that of all of them."""
        images, masks, mask = _images("over_batch", probabilities, targets, dim, where)
        value = self.loss(images.reshape(-1), masks.reshape(-1), **options)
        return finished(value.expand(images.shape[:-1]), images_of(mask), probabilities)


def pixel_axes(name: str, dim: int | tuple[int, ...], *, classes: bool = False) -> tuple[int, ...]:
    """Check the axes of one image; return them, without a last axis of ``classes``."""
    axes = (dim,) if isinstance(dim, int) else tuple(dim)
    if not axes or max(axes) >= -int(classes) or len(set(axes)) < len(axes):
        before = " before the last, the classes" if classes else ""
        raise ValueError(
            f"{name}: dim must be one or more distinct negative axes{before}, got {dim}"
        )
    return tuple(axis + int(classes) for axis in axes)


def mask_of(
    name: str, where: Tensor | None, grid: tuple[int, ...], axes: tuple[int, ...]
) -> Tensor | None:
    """Check ``where``, of images or of pixels; return ``(*batch, 1)`` or ``(*batch, pixels)``.

    ``grid`` is the shape of pixels and batch, of which ``axes`` are the pixels.
    """
    if where is None:
        return None
    check_tensor(name, "where", where)
    if where.dtype != torch.bool:
        raise TypeError(f"{name}: where must be boolean, got {where.dtype}")
    got = tuple(where.shape)
    batch = tuple(size for axis, size in enumerate(grid, -len(grid)) if axis not in axes)
    if got not in (batch, grid):
        raise ValueError(
            f"{name}: where must have shape {batch}, of images, or {grid}, of pixels, got {got}"
        )
    return where.unsqueeze(-1) if got == batch else joined(where, axes, None)


def joined(x: Tensor, axes: tuple[int, ...], mask: Tensor | None) -> Tensor:
    """Return the pixels of each image along one axis, the last, 0 where they do not count."""
    x = x.movedim(axes, tuple(range(-len(axes), 0))).flatten(-len(axes))
    return x if mask is None else torch.where(mask, x, 0)


def images_of(mask: Tensor | None) -> Tensor | None:
    """Return which images have a pixel that counts."""
    return None if mask is None else mask.any(-1)


def _images(
    name: str,
    probabilities: Tensor,
    targets: Tensor,
    dim: int | tuple[int, ...],
    where: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Check images and masks; return them wide, ``(*batch, pixels)``, and what counts of them."""
    axes = pixel_axes(name, dim)
    p, t = paired_inputs(name, probabilities, targets, None, axes=-min(axes), names=_NAMES)
    mask = mask_of(name, where, tuple(p.shape), axes)
    return joined(p, axes, mask), joined(t, axes, mask), mask


def _counts(
    name: str,
    probabilities: Tensor,
    targets: Tensor,
    dim: int | tuple[int, ...],
    where: Tensor | None,
) -> tuple[_Counts, Tensor | None]:
    """Return the counts of each image, and which images count."""
    p, t, mask = _images(name, probabilities, targets, dim, where)
    return _counted(p, t), images_of(mask)


def _counted(p: Tensor, t: Tensor) -> _Counts:
    """Return the soft true positives, false positives and false negatives."""
    return (p * t).sum(-1), (p * (1 - t)).sum(-1), ((1 - p) * t).sum(-1)


def _tversky(
    name: str,
    counts: _Counts,
    alpha: float | Tensor,
    beta: float | Tensor,
    smooth: float | Tensor,
) -> Tensor:
    """Return one minus the index, without taking it from 1."""
    hit, false_alarm, missed = counts
    examples = tuple(hit.shape)
    alpha = option_of(name, "alpha", alpha, examples, low=0)
    beta = option_of(name, "beta", beta, examples, low=0)
    smooth = option_of(name, "smooth", smooth, examples, low=0, above=True)
    wrong = alpha * false_alarm + beta * missed
    return wrong / (hit + wrong + smooth)
