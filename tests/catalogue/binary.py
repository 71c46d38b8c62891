"""The rows of losses of yes or no: bits, signs, several labels at once, masks."""

import math
from collections.abc import Callable

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
    softmax,
    wide,
)
from funcloss import losses
from funcloss.laws.case import CLASSES
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


def _smoothed(loss: OfTorch) -> Callable[..., Tensor]:
    """Return a loss of torch's, of targets drawn to a half."""

    def smoothed(z: Tensor, t: Tensor, *, label_smoothing: Tensor) -> Tensor:
        return loss(z, torch.lerp(t, torch.full_like(t, 0.5), label_smoothing.to(t)))

    return smoothed


def _generalized_dice(
    p: list[list[float]], t: list[list[float]], power=2.0, smooth=1.0, class_weights=None
) -> float:
    """Weighted by 1 / volume^2; a class that is absent, as much as the rarest."""
    classes = range(len(p[0]))
    volumes = [sum(row[c] for row in t) for c in classes]
    rarest = min((v for v in volumes if v > 0), default=1.0)
    weights = [rarest**power / (v or rarest) ** power for v in volumes]
    weights = [w * (class_weights[c] if class_weights else 1) for c, w in enumerate(weights)]
    pairs = [(weights[c], a[c], b[c]) for a, b in zip(p, t, strict=True) for c in classes]
    both = 2 * sum(w * a * b for w, a, b in pairs)
    return 1 - (both + smooth) / (sum(w * (a + b) for w, a, b in pairs) + smooth)


def lovasz_weights(mask: list[int]) -> list[float]:
    """Algorithm 1 of Berman et al.: how much each further wrong pixel adds to 1 - IoU."""
    weights, before = [], 0.0
    for i in range(len(mask)):
        intersection = sum(mask[i + 1 :])
        union = sum(mask) + sum(1 - inside for inside in mask[: i + 1])
        weights.append(1 - intersection / union - before)
        before += weights[-1]
    return weights


def lovasz_of(errors: list[float], mask: list[int]) -> float:
    """The Lovász extension of the Jaccard loss."""
    order = sorted(range(len(errors)), key=lambda i: -errors[i])
    weights = lovasz_weights([mask[i] for i in order])
    return sum(errors[i] * w for i, w in zip(order, weights, strict=True))


def _lovasz_softmax(z: list[list[float]], y: list[int]) -> float:
    p = [softmax(row) for row in z]
    of_classes = []
    for c in sorted(set(y)):
        mask = [int(label == c) for label in y]
        errors = [abs(inside - row[c]) for inside, row in zip(mask, p, strict=True)]
        of_classes.append(lovasz_of(errors, mask))
    return math.fsum(of_classes) / len(of_classes)


def _lovasz_hinge(z: list[float], t: list[float]) -> float:
    errors = [max(0.0, 1 - (2 * b - 1) * a) for a, b in zip(z, t, strict=True)]
    return lovasz_of(errors, [int(b) for b in t])


_PIXELS = 6


def class_masks(n: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """Return probabilities and one-hot targets of six pixels, of which a class may be absent."""
    logits, labels = class_maps(n, generator)
    return logits.softmax(-1), F.one_hot(labels, CLASSES).double()


def class_maps(n: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """Return logits and labels of six pixels of an image each."""
    logits = torch.randn(n, _PIXELS, CLASSES, generator=generator, dtype=torch.float64)
    return 2 * logits, torch.randint(CLASSES, (n, _PIXELS), generator=generator)


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
    "binary_cross_entropy_with_logits, smoothed": row(
        losses.binary_cross_entropy_with_logits,
        soft_bits,
        _smoothed(_BCE),
        {"label_smoothing": number(0.2)},
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
    "sigmoid_focal, smoothed": row(
        losses.sigmoid_focal, BITS, _smoothed(_FOCAL), {"label_smoothing": number(0.2)}
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
    "generalized_dice": row(
        losses.generalized_dice, class_masks, each(_generalized_dice), shift=False, extremes=(0, 1)
    ),
    "generalized_dice, weighted": row(
        losses.generalized_dice,
        class_masks,
        each(_generalized_dice),
        {"class_weights": WEIGHTS, "power": number(0.7), "smooth": number(0.1)},
        shift=False,
        extremes=(0, 1),
    ),
    "lovasz_softmax": row(losses.lovasz_softmax, class_maps, each(_lovasz_softmax), shift=True),
    "lovasz_hinge": row(losses.lovasz_hinge, MULTI_HOT, each(_lovasz_hinge), shift=False),
    "over_batch(dice)": row(losses.over_batch(losses.dice), MASKS, _batch_dice),
}
