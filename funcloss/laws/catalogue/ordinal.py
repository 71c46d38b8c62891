"""The rows of :mod:`funcloss.losses.ordinal`."""

import math
from collections.abc import Callable

import torch
from torch import Generator, Tensor

from funcloss.laws.subject import CLASSES, Subject, logits_and_labels
from funcloss.losses.ordinal import coral, corn, earth_mover, sord

ORDER = {"class permutation": "the order of the classes matters"}


def _thresholds_and_labels(n: int, generator: Generator) -> tuple[Tensor, Tensor]:
    logits = 3 * torch.randn(n, CLASSES - 1, generator=generator, dtype=torch.float64)
    return logits, torch.randint(CLASSES, (n,), generator=generator)


def _each(value: Callable[..., float]) -> Callable[..., Tensor]:
    """Return the loss that computes ``value(row, label)`` of one example after the other."""

    def reference(logits: Tensor, labels: Tensor, **options: float) -> Tensor:
        rows = zip(logits.tolist(), labels.tolist(), strict=True)
        return torch.tensor([value(row, y, **options) for row, y in rows], dtype=torch.float64)

    return reference


def _sigmoid(z: float) -> float:
    return 1 / (1 + math.exp(-z))


def _coral(row: list[float], label: int) -> float:
    above = [(_sigmoid(z), label > k) for k, z in enumerate(row)]
    return -sum(math.log(p) if t else math.log1p(-p) for p, t in above)


def _corn(row: list[float], label: int) -> float:
    """Return the negative logarithm of the label's probability, passed up to it and no further."""
    probability = 1.0
    for z in row[:label]:
        probability *= _sigmoid(z)
    if label < len(row):
        probability *= _sigmoid(-row[label])
    return -math.log(probability)


def _softmax(row: list[float]) -> list[float]:
    weights = [math.exp(z - max(row)) for z in row]
    return [w / sum(weights) for w in weights]


def _earth_mover(row: list[float], label: int) -> float:
    p, total = _softmax(row), 0.0
    for k in range(len(p)):
        gap = math.fsum(p[: k + 1]) - (1.0 if k >= label else 0.0)
        total += gap * gap
    return total


def _sord(row: list[float], label: int, scale: float = 1.0) -> float:
    targets = _softmax([-scale * (k - label) ** 2 for k in range(len(row))])
    return -sum(t * math.log(p) for t, p in zip(targets, _softmax(row), strict=True))


SUBJECTS = {
    "coral": Subject(
        coral, _thresholds_and_labels, reference=_each(_coral), shift=False, limits=ORDER
    ),
    "corn": Subject(
        corn, _thresholds_and_labels, reference=_each(_corn), shift=False, limits=ORDER
    ),
    "earth_mover": Subject(
        earth_mover, logits_and_labels, reference=_each(_earth_mover), shift=True, limits=ORDER
    ),
    "sord": Subject(
        sord, logits_and_labels, {"scale": 0.4}, reference=_each(_sord), shift=True, limits=ORDER
    ),
}
