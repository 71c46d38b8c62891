"""The rows of losses of yes or no: bits, signs, several labels at once, masks."""

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from catalogue.rows import (
    BITS,
    MULTI_HOT,
    SIGNS,
    WEIGHTS,
    OfTorch,
    each,
    number,
    row,
    wide,
)
from funcloss import losses
from funcloss.laws.feed import Feed


def soft_bits(n: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """Return logits and targets in ``[0, 1]``, both ``(n)``."""
    logits, _ = BITS(n, generator)
    return logits, torch.rand(n, generator=generator, dtype=torch.float64)


def _torchvision(z: Tensor, t: Tensor, *, reduction: str, gamma: float = 2.0, alpha: float = -1.0):
    from torchvision.ops import sigmoid_focal_loss

    return sigmoid_focal_loss(z, t, alpha, gamma, reduction)


def _asymmetric(z: Tensor, t: Tensor, gamma_pos=0.0, gamma_neg=4.0, shift=0.05) -> Tensor:
    """The code of Ridnik et al., without its cut of the logarithm, summed over the classes."""
    yes = z.sigmoid()
    no = (1 - yes + shift).clamp(max=1)
    weight = (1 - yes * t - no * (1 - t)) ** (gamma_pos * t + gamma_neg * (1 - t))
    return -((t * yes.log() + (1 - t) * no.log()) * weight).sum(-1)


def index_lists(bits: Tensor) -> Tensor:
    """Return multi-hot targets as torch's lists of indices, each ended by -1."""
    rows = [row.nonzero().flatten().tolist() for row in bits]
    return torch.tensor([row + [-1] * (bits.shape[-1] - len(row)) for row in rows])


def _multilabel_margin(z: Tensor, t: Tensor, *, reduction: str) -> Tensor:
    return F.multilabel_margin_loss(z, index_lists(t), reduction=reduction)


def _soft_margin(scores: Tensor, signs: Tensor) -> Tensor:
    return F.soft_margin_loss(scores, signs, reduction="none")


def _hinge(score: float, sign: float) -> float:
    return max(0.0, 1 - sign * score)


def _tversky(p: list[float], t: list[float], alpha=0.3, beta=0.7, smooth=1.0, gamma=1.0) -> float:
    hit = false_alarm = missed = 0.0
    for a, b in zip(p, t, strict=True):
        hit, false_alarm, missed = hit + a * b, false_alarm + a * (1 - b), missed + (1 - a) * b
    index = (hit + smooth) / (hit + alpha * false_alarm + beta * missed + smooth)
    return (1 - index) ** (1 / gamma)


def _focal_tversky(p: list[float], t: list[float], gamma=4 / 3) -> float:
    return _tversky(p, t, gamma=gamma)


def _dice(p: list[float], t: list[float], smooth=1.0) -> float:
    hit = sum(a * b for a, b in zip(p, t, strict=True))
    return 1 - (2 * hit + smooth) / (sum(p) + sum(t) + smooth)


def _batch_dice(p: Tensor, t: Tensor) -> Tensor:
    return each(_dice)(p.reshape(1, -1), t.reshape(1, -1)).expand(len(t))


MASKS = wide("probabilities", "targets")
_BCE = OfTorch(F.binary_cross_entropy_with_logits)
_SOFT_MARGIN = OfTorch(F.multilabel_soft_margin_loss)
_FOCAL = OfTorch(_torchvision)

CASES = {
    "binary_cross_entropy": row(
        losses.binary_cross_entropy,
        Feed(("probabilities", "targets")),
        OfTorch(F.binary_cross_entropy),
    ),
    "binary_cross_entropy_with_logits": row(losses.binary_cross_entropy_with_logits, BITS, _BCE),
    "binary_cross_entropy_with_logits, soft and weighted": row(
        losses.binary_cross_entropy_with_logits,
        soft_bits,
        _BCE,
        {"pos_weight": number(3.0)},
        names=BITS.names,
    ),
    "multilabel_soft_margin": row(
        losses.multilabel_soft_margin, MULTI_HOT, _SOFT_MARGIN, shift=False
    ),
    "multilabel_soft_margin, weighted": row(
        losses.multilabel_soft_margin,
        MULTI_HOT,
        _SOFT_MARGIN,
        {"class_weights": WEIGHTS},
        costs=("class_weights",),
        shift=False,
    ),
    "soft_margin": row(losses.soft_margin, SIGNS, _soft_margin),
    "sigmoid_focal": row(losses.sigmoid_focal, BITS, _FOCAL),
    "sigmoid_focal, soft and weighted": row(
        losses.sigmoid_focal,
        soft_bits,
        _FOCAL,
        {"gamma": number(0.5), "alpha": number(0.25)},
        names=BITS.names,
    ),
    "asymmetric": row(losses.asymmetric, MULTI_HOT, _asymmetric, shift=False),
    "asymmetric, other options": row(
        losses.asymmetric,
        MULTI_HOT,
        _asymmetric,
        {"gamma_pos": number(0.5), "gamma_neg": number(1.5), "shift": number(0.2)},
        shift=False,
    ),
    "hinge": row(losses.hinge, SIGNS, each(_hinge)),
    "squared_hinge": row(losses.squared_hinge, SIGNS, each(lambda z, s: _hinge(z, s) ** 2)),
    "perceptron": row(losses.perceptron, SIGNS, each(lambda z, s: max(0.0, -s * z))),
    "multilabel_margin": row(
        losses.multilabel_margin, MULTI_HOT, OfTorch(_multilabel_margin), shift=True
    ),
    "dice": row(losses.dice, MASKS, each(_dice)),
    "dice, smooth": row(losses.dice, MASKS, each(_dice), {"smooth": number(0.1)}),
    "jaccard": row(losses.jaccard, MASKS, each(lambda p, t: _tversky(p, t, 1.0, 1.0))),
    "tversky": row(
        losses.tversky, MASKS, each(_tversky), {"alpha": number(0.2), "beta": number(0.9)}
    ),
    "focal_tversky": row(losses.focal_tversky, MASKS, each(_focal_tversky)),
    "focal_tversky, gamma": row(
        losses.focal_tversky, MASKS, each(_focal_tversky), {"gamma": number(2.0)}
    ),
    "over_batch(dice)": row(losses.over_batch(losses.dice), MASKS, _batch_dice),
}
