"""The rows of :mod:`funcloss.losses.fused`."""

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from funcloss.laws.subject import CLASSES, Subject
from funcloss.losses.fused import linear_cross_entropy

FEATURES = 3


def _features_and_labels(n: int, generator: Generator) -> tuple[Tensor, Tensor]:
    features = torch.randn(n, FEATURES, generator=generator, dtype=torch.float64)
    return features, torch.randint(CLASSES, (n,), generator=generator)


def _loss(
    features: Tensor,
    labels: Tensor,
    *,
    weight: Tensor,
    bias: Tensor | None = None,
    where: Tensor | None = None,
) -> Tensor:
    """Return the loss as a function of (predictions, targets), in chunks that do not divide."""
    return linear_cross_entropy(features, weight, labels, bias=bias, chunk_size=3, where=where)


def _explicit(
    features: Tensor, labels: Tensor, weight: Tensor, bias: Tensor | None = None
) -> Tensor:
    return F.cross_entropy(F.linear(features, weight, bias), labels, reduction="none")


_WEIGHT = torch.linspace(-2.0, 2.0, CLASSES * FEATURES, dtype=torch.float64).sin()
_HEAD = {"weight": _WEIGHT.reshape(CLASSES, FEATURES)}
_BIAS = torch.linspace(-1.0, 1.0, CLASSES, dtype=torch.float64)
_FIRST_ORDER = (
    "map over examples",
    "per-sample gradients",
    "gradcheck",  # which asks for forward mode too
    "gradgradcheck",
    "jacrev = jacfwd",
    "hessian",
)
_LIMITS: dict[str, str] = {
    **{law: "a chunked backward of first order" for law in _FIRST_ORDER},
    **{law: "it compiles, but not its vmap(grad)" for law in ("compile", "inductor")},
}

SUBJECTS = {
    "linear_cross_entropy": Subject(
        _loss,
        _features_and_labels,
        {**_HEAD, "bias": _BIAS},
        reference=_explicit,
        limits=_LIMITS,
    ),
    "linear_cross_entropy, no bias": Subject(
        _loss,
        _features_and_labels,
        _HEAD,
        reference=_explicit,
        limits=_LIMITS,
    ),
}
