"""The rows of :mod:`funcloss.losses.binary`."""

import math

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from funcloss.laws.subject import (
    Subject,
    logits_and_bits,
    logits_and_multi_hot,
    scores_and_signs,
)
from funcloss.losses.binary import (
    asymmetric,
    binary_cross_entropy,
    binary_cross_entropy_with_logits,
    multilabel_soft_margin,
    sigmoid_focal,
    soft_margin,
)


def probabilities_and_bits(n: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """Return probabilities ``(n)`` and targets of 0 or 1 ``(n)``."""
    logits, bits = logits_and_bits(n, generator)
    return logits.sigmoid(), bits


def logits_and_soft_bits(n: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """Return logits and targets in ``[0, 1]``, both ``(n)``."""
    logits = 3 * torch.randn(n, generator=generator, dtype=torch.float64)
    return logits, torch.rand(n, generator=generator, dtype=torch.float64)


def _binary_cross_entropy(probabilities: Tensor, targets: Tensor) -> Tensor:
    return F.binary_cross_entropy(probabilities, targets, reduction="none")


def _binary_cross_entropy_with_logits(
    logits: Tensor, targets: Tensor, pos_weight: Tensor | None = None
) -> Tensor:
    return F.binary_cross_entropy_with_logits(
        logits, targets, pos_weight=pos_weight, reduction="none"
    )


def _multilabel_soft_margin(
    logits: Tensor, targets: Tensor, class_weights: Tensor | None = None
) -> Tensor:
    return F.multilabel_soft_margin_loss(logits, targets, class_weights, reduction="none")


def _soft_margin(scores: Tensor, signs: Tensor) -> Tensor:
    return F.soft_margin_loss(scores, signs, reduction="none")


def _sigmoid_focal(
    logits: Tensor, targets: Tensor, gamma: float = 2.0, alpha: float | None = None
) -> Tensor:
    values = []
    for z, t in zip(logits.tolist(), targets.tolist(), strict=True):
        p = 1 / (1 + math.exp(-z))
        right = p * t + (1 - p) * (1 - t)
        value = -((1 - right) ** gamma) * (t * math.log(p) + (1 - t) * math.log(1 - p))
        values.append(value if alpha is None else (alpha * t + (1 - alpha) * (1 - t)) * value)
    return torch.tensor(values, dtype=torch.float64)


def _asymmetric(
    logits: Tensor,
    targets: Tensor,
    gamma_pos: float = 0.0,
    gamma_neg: float = 4.0,
    shift: float = 0.05,
) -> Tensor:
    values = []
    for row, bits in zip(logits.tolist(), targets.tolist(), strict=True):
        value = 0.0
        for z, t in zip(row, bits, strict=True):
            p = 1 / (1 + math.exp(-z))
            shifted = max(p - shift, 0.0)
            if t == 1:
                value -= (1 - p) ** gamma_pos * math.log(p)
            elif shifted > 0:
                value -= shifted**gamma_neg * math.log(1 - shifted)
        values.append(value)
    return torch.tensor(values, dtype=torch.float64)


def _number(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


_WEIGHTS = torch.tensor([1.0, 0.5, 2.0, 0.25, 5.0], dtype=torch.float64)

SUBJECTS = {
    "binary_cross_entropy": Subject(
        binary_cross_entropy,
        probabilities_and_bits,
        reference=_binary_cross_entropy,
        extremes=(0.0, 1.0),
    ),
    "binary_cross_entropy_with_logits": Subject(
        binary_cross_entropy_with_logits,
        logits_and_bits,
        reference=_binary_cross_entropy_with_logits,
    ),
    "binary_cross_entropy_with_logits, soft and weighted": Subject(
        binary_cross_entropy_with_logits,
        logits_and_soft_bits,
        {"pos_weight": _number(3.0)},
        reference=_binary_cross_entropy_with_logits,
    ),
    "multilabel_soft_margin": Subject(
        multilabel_soft_margin,
        logits_and_multi_hot,
        reference=_multilabel_soft_margin,
        shift=False,
    ),
    "multilabel_soft_margin, weighted": Subject(
        multilabel_soft_margin,
        logits_and_multi_hot,
        {"class_weights": _WEIGHTS},
        costs=("class_weights",),
        reference=_multilabel_soft_margin,
        shift=False,
    ),
    "soft_margin": Subject(soft_margin, scores_and_signs, reference=_soft_margin),
    "sigmoid_focal": Subject(sigmoid_focal, logits_and_bits, reference=_sigmoid_focal),
    "sigmoid_focal, soft and weighted": Subject(
        sigmoid_focal,
        logits_and_soft_bits,
        {"gamma": _number(0.5), "alpha": _number(0.25)},
        reference=_sigmoid_focal,
    ),
    "asymmetric": Subject(asymmetric, logits_and_multi_hot, reference=_asymmetric, shift=False),
    "asymmetric, other options": Subject(
        asymmetric,
        logits_and_multi_hot,
        {"gamma_pos": _number(0.5), "gamma_neg": _number(1.5), "shift": _number(0.2)},
        reference=_asymmetric,
        shift=False,
    ),
}
