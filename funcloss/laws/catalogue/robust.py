"""The rows of :mod:`funcloss.losses.robust`."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from funcloss.laws.subject import Subject, logits_and_labels
from funcloss.losses.robust import (
    bi_tempered,
    generalized_cross_entropy,
    mean_absolute_error,
    normalized_cross_entropy,
    symmetric_cross_entropy,
)


def _softmax(row: list[float]) -> list[float]:
    weights = [math.exp(z - max(row)) for z in row]
    return [w / sum(weights) for w in weights]


def _each(value: Callable[..., float]) -> Callable[..., Tensor]:
    """Return the loss that computes ``value(row, label)`` of one example after the other."""

    def reference(logits: Tensor, labels: Tensor, **options: float) -> Tensor:
        rows = zip(logits.tolist(), labels.tolist(), strict=True)
        return torch.tensor([value(row, y, **options) for row, y in rows], dtype=torch.float64)

    return reference


def _generalized(row: list[float], label: int, q: float = 0.7) -> float:
    p = _softmax(row)[label]
    return (1 - p**q) / q if q else -math.log(p)


def _symmetric(
    row: list[float], label: int, alpha: float = 1.0, beta: float = 1.0, log_zero: float = -4.0
) -> float:
    p = _softmax(row)
    reverse = -sum(p_k * (0.0 if k == label else log_zero) for k, p_k in enumerate(p))
    return -alpha * math.log(p[label]) + beta * reverse


def _normalized(row: list[float], label: int) -> float:
    p = _softmax(row)
    return math.log(p[label]) / sum(math.log(p_k) for p_k in p)


def _absolute(row: list[float], label: int) -> float:
    return sum(abs((k == label) - p) for k, p in enumerate(_softmax(row)))


def _log(x: float, t: float) -> float:
    return math.log(x) if t == 1 else (x ** (1 - t) - 1) / (1 - t)


def _exp(x: float, t: float) -> float:
    return math.exp(x) if t == 1 else (1 + (1 - t) * x) ** (1 / (1 - t))


def _tempered_softmax(row: list[float], t: float) -> list[float]:
    """Find the level by bisection."""
    low, high = max(row), max(row) - _log(1 / len(row), t)
    for _ in range(200):
        level = (low + high) / 2
        low, high = (level, high) if sum(_exp(z - level, t) for z in row) > 1 else (low, level)
    return [_exp(z - low, t) for z in row]


def _bi_tempered(
    row: list[float], label: int, t1: float = 0.8, t2: float = 1.2, label_smoothing: float = 0.0
) -> float:
    total = 0.0
    for k, p in enumerate(_tempered_softmax(row, t2)):
        y = (1 - label_smoothing) * (k == label) + label_smoothing / len(row)
        total += y * (_log(y, t1) - _log(p, t1)) if y else 0.0
        total -= (y ** (2 - t1) - p ** (2 - t1)) / (2 - t1)
    return total


def _row(loss: Callable[..., Tensor], value: Callable[..., float], **options: float) -> Subject:
    return Subject(loss, logits_and_labels, options, reference=_each(value), shift=True)


SUBJECTS = {
    "generalized_cross_entropy": _row(generalized_cross_entropy, _generalized),
    "generalized_cross_entropy, q = 0": _row(generalized_cross_entropy, _generalized, q=0.0),
    "symmetric_cross_entropy": _row(
        symmetric_cross_entropy, _symmetric, alpha=0.1, beta=0.7, log_zero=-6.0
    ),
    "normalized_cross_entropy": _row(normalized_cross_entropy, _normalized),
    "mean_absolute_error": _row(mean_absolute_error, _absolute),
    "bi_tempered": _row(bi_tempered, _bi_tempered),
    "bi_tempered, smoothed": _row(bi_tempered, _bi_tempered, t1=0.3, t2=2.5, label_smoothing=0.1),
    "bi_tempered, t1 = t2 = 1": _row(bi_tempered, _bi_tempered, t1=1.0, t2=1.0),
}
