"""The Lovász extension of intersection over union, one value per image.

``where`` says which images count, or which pixels, as in the losses of overlap.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from funcloss._checks import check_class_labels
from funcloss._numbers import product, wide_dtype
from funcloss.losses._shared import finished, known_labels, one_hot, paired_inputs, states
from funcloss.losses.overlap import images_of, joined, mask_of, pixel_axes


@states(probabilities="none")
def lovasz_softmax(
    logits: Float[Tensor, "*batch_and_pixels classes"],
    labels: Int[Tensor, "*batch_and_pixels"],
    *,
    dim: int | tuple[int, ...] = -2,
    where: Bool[Tensor, "*batch_and_pixels"] | Bool[Tensor, "*batch"] | None = None,
) -> Float[Tensor, "*batch"]:
    """Lovász-softmax of an image: a convex surrogate of ``1 - IoU``, mean over the classes there.

    Of each class that is among the labels of the image, the errors ``|[label = c] -
    softmax(logits)_c|`` of the pixels, sorted from the largest down, are weighted by how much each
    further wrong pixel raises the Jaccard loss ``1 - IoU``: where every error is 0 or 1 it is that
    loss. In ``[0, 1]``. The gradient with respect to a sorted error is its weight. Memory of
    pixels times classes.

    Args:
        logits: Unnormalised log-probabilities of each pixel, classes last, the axes of the pixels
            and of the batch before them in any order.
        labels: Class indices in ``[0, classes)``, the shape of ``logits`` without its last axis.
        dim: The axes of ``logits`` that belong to one image, negative, without the last. What
            remains is the batch: ``(N, H, W, C)`` at ``dim=(-3, -2)`` gives one value per image.
        where: Images that count, shape ``(*batch)``; the others give 0, with zero gradient. Or
            pixels that count, the shape of ``labels``: as if the others were not there.

    Returns:
        Loss of each image, shape ``(*batch)``, dtype of ``logits``.

    Raises:
        TypeError: ``logits`` is not floating point, ``labels`` is, or ``where`` is not boolean.
        ValueError: the shapes do not fit, or ``dim`` is not of distinct negative axes before the
            last.
        IndexError: a label is out of range; compiled, the loss is NaN instead.

    Example:
        >>> labels = torch.tensor([[0, 0, 1]])  # three pixels
        >>> lovasz_softmax(torch.zeros(1, 3, 2), labels)
        tensor([0.5000])

    References:
        Berman, Triki and Blaschko, "The Lovász-Softmax loss: a tractable surrogate for the
        optimization of the intersection-over-union measure in neural networks", 2018, eq. 11 and
        algorithm 1, with the classes present and an image at a time.
    """
    name = "lovasz_softmax"
    check_class_labels(name, logits, labels, None)
    axes = pixel_axes(name, dim, classes=True)
    if logits.dim() < 1 - min(axes):
        got = tuple(logits.shape)
        raise ValueError(f"{name}: logits must have {1 - min(axes)} axes or more, got shape {got}")
    mask = mask_of(name, where, tuple(labels.shape), axes)
    scores = joined(logits.movedim(-1, 0), axes, mask).movedim(0, -1)
    known, spoiled = known_labels(name, joined(labels, axes, mask), scores.shape[-1])
    scores = scores.to(wide_dtype(logits))
    there = one_hot(known, scores.shape[-1])
    if mask is not None:
        there = there & mask.unsqueeze(-1)
    there = there.mT  # (*batch, classes, pixels)
    errors = (there.to(scores.dtype) - scores.softmax(-1).mT).abs()
    counted = None if mask is None else mask.unsqueeze(-2)
    of_class = _extension(errors, there, counted)
    present = there.any(-1)
    loss = torch.where(present, of_class, 0).sum(-1) / present.sum(-1).clamp(min=1)
    spoiled = None if spoiled is None else spoiled.sum(-1)
    return finished(loss, images_of(mask), logits, spoiled)


def lovasz_hinge(
    logits: Float[Tensor, "*batch_and_pixels"],
    targets: Float[Tensor, "*batch_and_pixels"],
    *,
    dim: int | tuple[int, ...] = -1,
    where: Bool[Tensor, "*batch_and_pixels"] | Bool[Tensor, "*batch"] | None = None,
) -> Float[Tensor, "*batch"]:
    """Lovász hinge of an image: a convex surrogate of ``1 - IoU`` of one mask.

    The hinge errors ``max(0, 1 - s z)`` of the pixels, with ``s = 2 t - 1``, sorted from the
    largest down, are weighted by how much each further wrong pixel raises the Jaccard loss ``1 -
    IoU``. In units of the logits, not negative, 0 where every pixel is right by 1. Of an image
    without the mask it is its largest error.

    Args:
        logits: Score of the mask at each pixel, positive inside, the axes of the pixels and of the
            batch in any order.
        targets: The mask, 0 or 1, the shape of ``logits``.
        dim: The axes that belong to one image, negative. What remains is the batch.
        where: Images that count, shape ``(*batch)``; the others give 0, with zero gradient. Or
            pixels that count, the shape of ``logits``: as if the others were not there.

    Returns:
        Loss of each image, shape ``(*batch)``, dtype of ``logits``.

    Raises:
        TypeError: ``logits`` or ``targets`` is not floating point, or ``where`` is not boolean.
        ValueError: the shapes do not fit, or ``dim`` is not of distinct negative axes.

    Example:
        >>> lovasz_hinge(torch.tensor([[2.0, 0.5, -3.0]]), torch.tensor([[1.0, 0.0, 0.0]]))
        tensor([0.7500])

    References:
        Berman, Triki and Blaschko, "The Lovász-Softmax loss: a tractable surrogate for the
        optimization of the intersection-over-union measure in neural networks", 2018, section 2.
    """
    name = "lovasz_hinge"
    axes = pixel_axes(name, dim)
    names = ("logits", "targets")
    z, t = paired_inputs(name, logits, targets, None, axes=-min(axes), names=names)
    mask = mask_of(name, where, tuple(z.shape), axes)
    z, t = joined(z, axes, mask), joined(t, axes, mask)
    errors = (1 - (2 * t - 1) * z).relu()
    return finished(_extension(errors, t > 0.5, mask), images_of(mask), logits)


def _extension(errors: Tensor, there: Tensor, counted: Tensor | None) -> Tensor:
    """Return the Lovász extension of the Jaccard loss at errors ``(..., pixels)``, not negative.

    ``there``: the pixels of the mask, which all count; ``counted``: those that do, None for all.
    """
    errors, order = errors.sort(stable=True, dim=-1, descending=True)
    inside = there.take_along_dim(order, -1).to(errors.dtype)
    outside = 1 - inside
    if counted is not None:
        counted = counted.expand(there.shape)
        outside = torch.where(counted.take_along_dim(order, -1), outside, 0)
    total = inside.sum(-1, keepdim=True)
    # After each further wrong pixel; 1 - intersection / union itself would cancel.
    intersection = total - inside.cumsum(-1)
    union = total + outside.cumsum(-1)
    before = union - outside
    # A pixel of the mask leaves the intersection; another one joins the union.
    leaves = inside / union.clamp(min=1)
    joins = outside * torch.where(before == 0, 1, intersection / (union * before).clamp(min=1))
    return product(leaves + joins, errors).sum(-1)
