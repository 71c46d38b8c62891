"""Losses of distances and of vectors: pairs, triplets, and whole batches."""

import math
from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from funcloss._checks import check_labels, check_shape, check_signs, option_of
from funcloss.losses._shared import (
    alike_inputs,
    finished,
    masked,
    of_label,
    one_hot,
    paired_inputs,
    states,
)

_PAIR = ("first", "second")
_EPS = 9.999999960041972e-13  # torch's own: 1e-12 as a float32


def hinge_embedding(
    distances: Float[Tensor, "*batch"],
    signs: Float[Tensor, "*batch"] | Int[Tensor, "*batch"],
    *,
    margin: float | Tensor = 1.0,
    where: Bool[Tensor, "*batch"] | None = None,
) -> Float[Tensor, "*batch"]:
    """Distance of a like pair; for an unlike one ``max(0, margin - distance)``.

    Its gradient with respect to the distance is 1 for a like pair, -1 for an unlike pair within
    the margin, 0 beyond it. In the unit of the distances.

    Args:
        distances: Distance of each pair, shape ``(*batch)``.
        signs: +1 for a like pair, -1 for an unlike one, shape ``(*batch)``.
        margin: Distance at which an unlike pair no longer costs.
        where: Pairs that count. The others give 0, with zero gradient.

    Returns:
        Loss of each pair, shape ``(*batch)``, dtype of ``distances``.

    Raises:
        TypeError: ``distances`` is not floating point, ``signs`` is boolean, or ``where`` is not.
        ValueError: ``signs`` or ``where`` does not have the shape of ``distances``.

    Example:
        >>> hinge_embedding(torch.tensor([0.25, 0.25]), torch.tensor([1, -1]))
        tensor([0.2500, 0.7500])

    References:
        Hadsell, Chopra and LeCun, "Dimensionality reduction by learning an invariant mapping",
        2006 (there of squares).
    """
    (near,), like = _pairs("hinge_embedding", where, signs, 0, ("distances",), distances)
    margin = option_of("hinge_embedding", "margin", margin, tuple(near.shape))
    loss = torch.where(like > 0, near, (margin - near).clamp(min=0))
    return finished(loss, where, distances)


def margin_ranking(
    first: Float[Tensor, "*batch"],
    second: Float[Tensor, "*batch"],
    signs: Float[Tensor, "*batch"] | Int[Tensor, "*batch"],
    *,
    margin: float | Tensor = 0.0,
    where: Bool[Tensor, "*batch"] | None = None,
) -> Float[Tensor, "*batch"]:
    """Hinge of a pair of scores, ``max(0, margin - sign * (first - second))``.

    A sign of +1 wants the first score higher. Where it is above 0 its gradient is ``-sign`` with
    respect to the first score and ``sign`` with respect to the second. At a margin of 1 and a
    second score of 0 it is the hinge loss of the first.

    Args:
        first: Score of the first of each pair, shape ``(*batch)``.
        second: Score of the second, shape ``(*batch)``.
        signs: +1 where the first should rank higher, -1 where the second should.
        margin: By how much it should.
        where: Pairs that count. The others give 0, with zero gradient.

    Returns:
        Loss of each pair, shape ``(*batch)``, dtype of ``first``.

    Raises:
        TypeError: ``first`` or ``second`` is not floating point, ``signs`` is boolean, or
            ``where`` is not.
        ValueError: ``second``, ``signs`` or ``where`` does not have the shape of ``first``.

    Example:
        >>> margin_ranking(torch.ones(2), torch.zeros(2), torch.tensor([1, -1]), margin=0.5)
        tensor([0.0000, 1.5000])

    References:
        Herbrich, Graepel and Obermayer, "Large margin rank boundaries for ordinal regression",
        2000.
    """
    (high, low), order = _pairs("margin_ranking", where, signs, 0, _PAIR, first, second)
    margin = option_of("margin_ranking", "margin", margin, tuple(high.shape))
    # margin - order * (...) takes a fourteenth more time when it is compiled for a CPU.
    return finished((-order * (high - low) + margin).clamp(min=0), where, first)


def triplet_margin(
    anchor: Float[Tensor, "*batch features"],
    positive: Float[Tensor, "*batch features"],
    negative: Float[Tensor, "*batch features"],
    *,
    margin: float | Tensor = 1.0,
    p: float | Tensor = 2.0,
    eps: float | Tensor = 1e-6,
    swap: bool = False,
    distance: Callable[[Tensor, Tensor], Tensor] | None = None,
    where: Bool[Tensor, "*batch"] | None = None,
) -> Float[Tensor, "*batch"]:
    """Triplet loss, ``max(0, margin + d(anchor, positive) - d(anchor, negative))``.

    ``d`` is the ``p``-norm of the difference plus ``eps``, as in torch, so ``d`` of two equal
    vectors is not quite 0; at a difference of exactly ``-eps`` the gradient of ``d`` is 0. With
    ``swap``, ``d(positive, negative)`` takes the place of ``d(anchor, negative)`` where it is
    smaller.

    Args:
        anchor: Vectors, shape ``(*batch, features)``.
        positive: Vectors that should be near, the shape of ``anchor``.
        negative: Vectors that should be farther, the shape of ``anchor``.
        margin: By how much, above 0.
        p: Order of the norm, above 0; ``math.inf``, as a plain number, for the largest entry.
        eps: Added to each entry of a difference.
        swap: Whether the negative is compared with whichever of the two is nearer.
        distance: Any function of two batches of vectors that gives one value a pair, in place of
            the norm: ``p`` and ``eps`` are then not used. Under ``where`` it is handed zeros for
            a triplet that does not count; its gradient must be finite there.
        where: Triplets that count. The others give 0, with zero gradient.

    Returns:
        Loss of each triplet, shape ``(*batch)``, dtype of ``anchor``.

    Raises:
        TypeError: a vector is not floating point, or ``where`` is not boolean.
        ValueError: the shapes differ, ``margin`` or ``p`` is not above 0, or ``distance`` does
            not give one value a pair.

    Example:
        >>> anchor, positive, negative = torch.tensor([[[0.0, 0.0]], [[0.0, 3.0]], [[2.0, 0.0]]])
        >>> triplet_margin(anchor, positive, negative)
        tensor([2.])

    References:
        Schroff, Kalenichenko and Philbin, "FaceNet", 2015; swap: Balntas et al., "Learning local
        feature descriptors with triplets and shallow convolutional neural networks", 2016.
    """
    names = ("anchor", "positive", "negative")
    points = alike_inputs("triplet_margin", where, 1, names, anchor, positive, negative)
    triplets = tuple(anchor.shape[:-1])
    margin = option_of("triplet_margin", "margin", margin, triplets, low=0, above=True)
    p = option_of("triplet_margin", "p", p, triplets, axes=1, low=0, above=True)
    eps = option_of("triplet_margin", "eps", eps, triplets, axes=1)

    def between(one: Tensor, other: Tensor) -> Tensor:
        if distance is None:
            return _norm(one - other + eps, p)
        values = distance(one, other)
        shape = tuple(one.shape)
        check_shape("triplet_margin", "distance(...)", values, shape[:-1], f"vectors {shape}")
        return values

    near, far = between(points[0], points[1]), between(points[0], points[2])
    if swap:
        far = torch.minimum(far, between(points[1], points[2]))
    return finished((margin + near - far).clamp(min=0), where, anchor)


def cosine_embedding(
    first: Float[Tensor, "*batch features"],
    second: Float[Tensor, "*batch features"],
    signs: Float[Tensor, "*batch"] | Int[Tensor, "*batch"],
    *,
    margin: float | Tensor = 0.0,
    where: Bool[Tensor, "*batch"] | None = None,
) -> Float[Tensor, "*batch"]:
    """Cosine loss of a pair: ``1 - cos`` if alike, ``max(0, cos - margin)`` if not.

    In ``[0, 2]``. As in torch, 1e-12 is added to both squared norms, so a zero vector has cosine
    0 with every other and a finite, though large, gradient. For like pairs it is
    :func:`cosine_distance`, but for how small vectors are held off 0.

    Args:
        first: Vectors, shape ``(*batch, features)``.
        second: Vectors to compare them with, the shape of ``first``.
        signs: +1 for a like pair, -1 for an unlike one, shape ``(*batch)``.
        margin: Cosine below which an unlike pair no longer costs, in ``[-1, 1]``.
        where: Pairs that count. The others give 0, with zero gradient.

    Returns:
        Loss of each pair, shape ``(*batch)``, dtype of ``first``.

    Raises:
        TypeError: ``first`` or ``second`` is not floating point, ``signs`` is boolean, or
            ``where`` is not.
        ValueError: the shapes do not fit, or ``margin`` is outside its range.

    Example:
        >>> pairs = torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([[0.0, 2.0], [2.0, 0.0]])
        >>> cosine_embedding(*pairs, torch.tensor([1, -1]))
        tensor([1., 1.])

    References:
        Bromley et al., "Signature verification using a siamese time delay neural network", 1993.
    """
    pair, like = _pairs("cosine_embedding", where, signs, 1, _PAIR, first, second)
    margin = option_of("cosine_embedding", "margin", margin, tuple(like.shape), low=-1, high=1)
    (one, a), (other, b) = (_bounded(vectors) for vectors in pair)
    sizes = (one.square().sum(-1) + _EPS * a**2) * (other.square().sum(-1) + _EPS * b**2)
    cosine = (one * other).sum(-1) / sizes.sqrt()
    loss = torch.where(like > 0, 1 - cosine, (cosine - margin).clamp(min=0))
    return finished(loss, where, first)


def cosine_distance(
    predictions: Float[Tensor, "*batch features"],
    targets: Float[Tensor, "*batch features"],
    *,
    eps: float | Tensor = 1e-8,
    where: Bool[Tensor, "*batch"] | None = None,
) -> Float[Tensor, "*batch"]:
    """One less the cosine of two vectors, ``1 - p @ t / (|p| * |t|)``, in ``[0, 2]``.

    No norm is taken as less than ``eps``: a zero vector has distance 1 from every other and a
    finite gradient, of size up to ``1 / eps``. For vectors of length 1 it is half the squared
    Euclidean distance.

    Args:
        predictions: Vectors, shape ``(*batch, features)``.
        targets: Vectors to turn towards, the shape of ``predictions``.
        eps: Least norm, above 0.
        where: Examples that count. The others give 0, with zero gradient.

    Returns:
        Loss of each example, shape ``(*batch)``, dtype of ``predictions``.

    Raises:
        TypeError: ``predictions`` or ``targets`` is not floating point, or ``where`` is not
            boolean.
        ValueError: ``targets`` or ``where`` does not fit the shape of ``predictions``, or ``eps``
            is not above 0.

    Example:
        >>> cosine_distance(torch.tensor([[1.0, 1.0]]), torch.tensor([[0.0, 5.0]]))
        tensor([0.2929])

    References:
        Salton, Wong and Yang, "A vector space model for automatic indexing", 1975.
    """
    one, other = paired_inputs("cosine_distance", predictions, targets, where, axes=1)
    eps = option_of(
        "cosine_distance", "eps", eps, tuple(predictions.shape[:-1]), axes=1, low=0, above=True
    )
    cosine = (_unit(one, eps) * _unit(other, eps)).sum(-1)
    return finished(1 - cosine, where, predictions)


@states(couples_examples=True)
def nt_xent(
    first: Float[Tensor, "batch features"],
    second: Float[Tensor, "batch features"],
    *,
    temperature: float | Tensor = 0.5,
    where: Bool[Tensor, " batch"] | None = None,
) -> Float[Tensor, " batch"]:
    """Normalised, temperature-scaled cross-entropy between two views of each example (SimCLR).

    A view is asked which of all other ``2 * batch - 1`` views is that of its own example: the
    cross-entropy of the cosines divided by the temperature, in nats. The value of an example is
    the mean over its two views, so ``funcloss.mean`` divides by ``2 * batch`` views, as in the
    paper. **It couples the examples of a batch**: every other one is a negative.

    Args:
        first: Vectors of one view, shape ``(batch, features)``; any length above 1e-8 is the same.
        second: Vectors of the other view, the shape of ``first``.
        temperature: Divisor of the cosines, above 0.
        where: Examples that count, shape ``(batch,)``. The others give 0, with zero gradient, and
            are no negatives.

    Returns:
        Loss of each example, at least 0, shape ``(batch,)``, dtype of ``first``; 0 where only one
        example counts.

    Raises:
        TypeError: ``first`` or ``second`` is not floating point, or ``where`` is not boolean.
        ValueError: the shapes differ, there is not exactly one batch axis, or ``temperature`` is
            not above 0.

    Example:
        >>> nt_xent(torch.eye(2), torch.eye(2), temperature=1.0)
        tensor([0.5514, 0.5514])

    References:
        Chen et al., "A simple framework for contrastive learning of visual representations", 2020.
    """
    temperature = option_of("nt_xent", "temperature", temperature, None, low=0, above=True)
    _check_one_batch_axis("nt_xent", "first", first)
    pair = paired_inputs("nt_xent", first, second, where, axes=1, names=_PAIR)
    n = first.shape[0]
    views = _unit(torch.cat(pair))
    others = torch.arange(2 * n, device=first.device).roll(n)  # the other view of each
    allowed = ~one_hot(others.roll(n), 2 * n)
    if where is not None:
        # A view keeps its other one, so no row is left without an entry.
        allowed = allowed & (torch.cat([where, where]) | one_hot(others, 2 * n))
    losses = -of_label(_log_shares(views, allowed, temperature), others)
    return finished((losses[:n] + losses[n:]) / 2, where, first)


@states(couples_examples=True, probabilities="none")
def supervised_contrastive(
    embeddings: Float[Tensor, "batch features"],
    labels: Int[Tensor, " batch"],
    *,
    temperature: float | Tensor = 0.1,
    where: Bool[Tensor, " batch"] | None = None,
) -> Float[Tensor, " batch"]:
    """Supervised contrastive loss ``L_out``: the log-share of each positive, averaged outside.

    An anchor's positives are the other examples of its label; the share of one is its part of
    ``sum(exp(cos / temperature))`` over all examples but the anchor. The value of an anchor is
    minus the mean log-share of its positives, in nats. An anchor without any gives 0, with zero
    gradient, and ``funcloss.mean`` still counts it: pass ``where`` to leave it out. **It couples
    the examples of a batch.** If the embeddings are the two views of each example, one below the
    other, and the labels number the examples, its mean is that of :func:`nt_xent`.

    Args:
        embeddings: Vectors, shape ``(batch, features)``; any length above 1e-8 is the same.
        labels: Classes, shape ``(batch,)``.
        temperature: Divisor of the cosines, above 0.
        where: Examples that count, shape ``(batch,)``. The others give 0, with zero gradient, and
            are neither positives nor negatives.

    Returns:
        Loss of each example, at least 0, shape ``(batch,)``, dtype of ``embeddings``.

    Raises:
        TypeError: ``embeddings`` is not floating point, ``labels`` is, or ``where`` is not boolean.
        ValueError: the shapes do not fit, there is not exactly one batch axis, or ``temperature``
            is not above 0.

    Example:
        >>> embeddings = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
        >>> supervised_contrastive(embeddings, torch.tensor([0, 0, 1]), temperature=1.0)
        tensor([0.3133, 0.3133, 0.0000])

    References:
        Khosla et al., "Supervised contrastive learning", 2020, eq. 2.
    """
    name = "supervised_contrastive"
    temperature = option_of(name, "temperature", temperature, None, low=0, above=True)
    _check_one_batch_axis(name, "embeddings", embeddings)
    check_labels(name, "labels", labels)
    check_shape(name, "labels", labels, embeddings.shape[:1], f"embeddings {(*embeddings.shape,)}")
    (vectors,) = alike_inputs(name, where, 1, ("embeddings",), embeddings)
    n = labels.shape[0]
    allowed = ~one_hot(torch.arange(n, device=labels.device), n)
    if where is not None:
        allowed = allowed & where
    positives = allowed & (labels.unsqueeze(-1) == labels)
    costs = torch.where(positives, -_log_shares(_unit(vectors), allowed, temperature), 0.0)
    loss = costs.sum(-1) / positives.sum(-1).clamp(min=1)
    return finished(loss, where, embeddings)


def _pairs(
    name: str,
    where: Tensor | None,
    signs: Tensor,
    axes: int,
    names: tuple[str, ...],
    *tensors: Tensor,
) -> tuple[list[Tensor], Tensor]:
    """Check tensors of one shape and a sign per example; return them masked and wide."""
    wide = alike_inputs(name, where, axes, names, *tensors)
    shape = tuple(wide[0].shape)
    match = f"{names[0]} {shape}"
    check_signs(name, signs)
    check_shape(name, "signs", signs, shape[: len(shape) - axes], match)
    return wide, masked(signs, where).to(wide[0].dtype)


def _check_one_batch_axis(name: str, what: str, vectors: Tensor) -> None:
    """Raise ``ValueError`` unless ``vectors`` has shape ``(batch, features)``."""
    if vectors.dim() != 2:
        got = tuple(vectors.shape)
        raise ValueError(f"{name}: {what} must have shape (batch, features), got {got}")


def _norm(vectors: Tensor, p: float | Tensor) -> Tensor:
    """Return the ``p``-norm of each vector; that of a zero vector has gradient 0."""
    if not isinstance(p, Tensor) and p == 2:
        return _length(vectors)
    sizes = vectors.abs()
    if not isinstance(p, Tensor) and p == math.inf:
        return sizes.amax(-1)
    # In units of the largest entry no power overflows; the norm does not depend on the unit, so
    # the unit need not be differentiated.
    largest = sizes.amax(-1).detach()
    some = largest > 0
    unit = torch.where(some, largest, 1.0)
    shares = sizes / unit.unsqueeze(-1)
    powers = torch.where(shares > 0, torch.where(shares > 0, shares, 1.0) ** p, 0.0).sum(-1)
    root = 1 / (p.squeeze(-1) if isinstance(p, Tensor) and p.dim() else p)
    return torch.where(some, unit * torch.where(some, powers, 1.0) ** root, 0.0)


def _bounded(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Return vectors without an entry above 1, and their scale: 1, or 1 over its largest entry.

    Their squares do not overflow. The scale is constant in a derivative: neither a cosine nor a
    length, divided by it, depends on it.
    """
    largest = vectors.detach().abs().amax(-1).clamp(1, torch.finfo(vectors.dtype).max)
    scale = 1 / largest
    return scale.unsqueeze(-1) * vectors, scale


def _length(vectors: Tensor) -> Tensor:
    """Return the length of each vector; that of a zero vector has gradient 0."""
    bounded, scale = _bounded(vectors)
    squares = bounded.square().sum(-1)
    some = squares > 0
    return torch.where(some, torch.where(some, squares, 1.0).sqrt(), 0.0) / scale


def _unit(vectors: Tensor, eps: float | Tensor = 1e-8) -> Tensor:
    """Return each vector divided by its norm, or by ``eps`` if that is larger."""
    length = _length(vectors).unsqueeze(-1)
    return vectors / (length.clamp(min=eps) if not isinstance(eps, Tensor) else length.maximum(eps))


def _log_shares(units: Tensor, allowed: Tensor, temperature: float | Tensor) -> Tensor:
    """Return the log of each one's part of ``sum(exp(cos / temperature))`` over those allowed."""
    scores = units @ units.mT / temperature
    # Not -inf: a row in which nothing is allowed would be NaN.
    return torch.where(allowed, scores, torch.finfo(scores.dtype).min).log_softmax(-1)
