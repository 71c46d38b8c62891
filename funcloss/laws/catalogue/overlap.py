"""The rows of :mod:`funcloss.losses.overlap`."""

import torch
from torch import Generator, Tensor

from funcloss.laws.subject import Subject
from funcloss.losses.overlap import dice, focal_tversky, jaccard, over_batch, tversky
from funcloss.typing import LossFn

PIXELS = 7  # not as many as there are classes: they are no classes

_COUPLED = {
    law: "couples the examples of a batch" for law in ("map over examples", "per-sample gradients")
}


def images_and_masks(n: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """Return probabilities and masks of 0 or 1, both ``(n, PIXELS)``."""
    logits = 2 * torch.randn(n, PIXELS, generator=generator, dtype=torch.float64)
    masks = torch.rand(n, PIXELS, generator=generator) > 0.6
    return logits.sigmoid(), masks.double()


def _index(p: list[float], t: list[float], alpha: float, beta: float, smooth: float) -> float:
    """Tversky's index of one image, pixel by pixel."""
    hit = false_alarm = missed = 0.0
    for a, b in zip(p, t, strict=True):
        hit += a * b
        false_alarm += a * (1 - b)
        missed += (1 - a) * b
    return (hit + smooth) / (hit + alpha * false_alarm + beta * missed + smooth)


def _tversky(
    probabilities: Tensor,
    targets: Tensor,
    alpha: float | Tensor = 0.3,
    beta: float | Tensor = 0.7,
    smooth: float | Tensor = 1.0,
    gamma: float | Tensor = 1.0,
) -> Tensor:
    a, b, s, g = (float(x) for x in (alpha, beta, smooth, gamma))
    images = zip(probabilities.tolist(), targets.tolist(), strict=True)
    values = [(1 - _index(p, t, a, b, s)) ** (1 / g) for p, t in images]
    return torch.tensor(values, dtype=torch.float64)


def _focal_tversky(probabilities: Tensor, targets: Tensor, gamma: float | Tensor = 4 / 3) -> Tensor:
    return _tversky(probabilities, targets, gamma=gamma)


def _jaccard(probabilities: Tensor, targets: Tensor, smooth: float | Tensor = 1.0) -> Tensor:
    return _tversky(probabilities, targets, 1.0, 1.0, smooth)


def _dice(probabilities: Tensor, targets: Tensor, smooth: float | Tensor = 1.0) -> Tensor:
    values = []
    for p, t in zip(probabilities.tolist(), targets.tolist(), strict=True):
        hit = sum(a * b for a, b in zip(p, t, strict=True))
        values.append(1 - (2 * hit + float(smooth)) / (sum(p) + sum(t) + float(smooth)))
    return torch.tensor(values, dtype=torch.float64)


def _batch_dice(probabilities: Tensor, targets: Tensor) -> Tensor:
    return _dice(probabilities.reshape(1, -1), targets.reshape(1, -1)).expand(len(targets))


def _row(loss: LossFn, reference: LossFn, **options: float | Tensor) -> Subject:
    return Subject(loss, images_and_masks, options, reference=reference, extremes=(0.0, 1.0))


SUBJECTS = {
    "dice": _row(dice, _dice),
    "dice, smooth": _row(dice, _dice, smooth=torch.tensor(0.1, dtype=torch.float64)),
    "jaccard": _row(jaccard, _jaccard),
    "tversky": _row(
        tversky,
        _tversky,
        alpha=torch.tensor(0.2, dtype=torch.float64),
        beta=torch.tensor(0.9, dtype=torch.float64),
    ),
    "focal_tversky": _row(focal_tversky, _focal_tversky),
    "focal_tversky, gamma": _row(
        focal_tversky, _focal_tversky, gamma=torch.tensor(2.0, dtype=torch.float64)
    ),
    "over_batch(dice)": _row(over_batch(dice), _batch_dice)._replace(limits=_COUPLED),
}
