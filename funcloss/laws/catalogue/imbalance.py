"""The rows of :mod:`funcloss.losses.imbalance`."""

import math

import torch
from torch import Tensor

from funcloss.laws.subject import Subject, logits_and_labels
from funcloss.losses.imbalance import (
    balanced_softmax,
    class_balanced,
    equalization,
    ldam,
    logit_adjusted,
    vector_scaling,
)

_COUNTS = torch.tensor([1000.0, 200.0, 50.0, 7.0, 1.0], dtype=torch.float64)
_ABSENT = torch.tensor([1000.0, 200.0, 50.0, 7.0, 0.0], dtype=torch.float64)
_AT_ZERO = {
    law: "a count of 0 is taken as 2^-126: the value jumps there, and its derivative by it is 0"
    for law in ("gradcheck", "gradgradcheck")
}


def _cross_entropy(scores: list[float], label: int) -> float:
    top = max(scores)
    return top - scores[label] + math.log(math.fsum(math.exp(s - top) for s in scores))


def _log(frequency: float) -> float:
    return math.log(frequency) if frequency > 0 else -126 * math.log(2)


def _balanced_softmax(logits: Tensor, labels: Tensor, class_counts: Tensor) -> Tensor:
    return _logit_adjusted(logits, labels, class_counts / class_counts.sum())


def _logit_adjusted(
    logits: Tensor, labels: Tensor, class_prior: Tensor, tau: float = 1.0
) -> Tensor:
    prior = class_prior.tolist()
    values = [
        _cross_entropy([a + tau * _log(p) for a, p in zip(z, prior, strict=True)], y)
        for z, y in zip(logits.tolist(), labels.tolist(), strict=True)
    ]
    return torch.tensor(values, dtype=torch.float64)


def _class_balanced(
    logits: Tensor, labels: Tensor, class_counts: Tensor, beta: float = 0.9999
) -> Tensor:
    counts = class_counts.tolist()
    weights = [1 / math.fsum(beta**i for i in range(int(n))) for n in counts]
    mean = math.fsum(w * n for w, n in zip(weights, counts, strict=True)) / sum(counts)
    values = [
        weights[y] / mean * _cross_entropy(z, y)
        for z, y in zip(logits.tolist(), labels.tolist(), strict=True)
    ]
    return torch.tensor(values, dtype=torch.float64)


def _ldam(
    logits: Tensor,
    labels: Tensor,
    class_counts: Tensor,
    max_margin: float = 0.5,
    scale: float = 30.0,
) -> Tensor:
    counts = class_counts.tolist()
    rarest = min(n for n in counts if n > 0)
    widest = max_margin * rarest**0.25  # the constant C of the paper's C / n^(1/4)
    values = []
    for z, y in zip(logits.tolist(), labels.tolist(), strict=True):
        z[y] -= widest / max(counts[y], rarest) ** 0.25
        values.append(_cross_entropy([scale * a for a in z], y))
    return torch.tensor(values, dtype=torch.float64)


def _vector_scaling(
    logits: Tensor, labels: Tensor, class_counts: Tensor, gamma: float = 0.2, tau: float = 1.0
) -> Tensor:
    counts = class_counts.tolist()
    total, most = sum(counts), max(counts)
    factors = [math.exp(gamma * (_log(n) - math.log(most))) for n in counts]
    terms = [tau * (_log(n) - math.log(total)) for n in counts]
    values = [
        _cross_entropy([f * a + t for f, a, t in zip(factors, z, terms, strict=True)], y)
        for z, y in zip(logits.tolist(), labels.tolist(), strict=True)
    ]
    return torch.tensor(values, dtype=torch.float64)


def _equalization(logits: Tensor, labels: Tensor, class_counts: Tensor, threshold: float) -> Tensor:
    frequencies = (class_counts / class_counts.sum()).tolist()
    values = []
    for z, label in zip(logits.tolist(), labels.tolist(), strict=True):
        value = 0.0
        for j, a in enumerate(z):
            y = 1.0 if j == label else 0.0
            weight = 1 - (1.0 if frequencies[j] < threshold else 0.0) * (1 - y)
            p = 1 / (1 + math.exp(-a))
            value -= weight * math.log(p if y else 1 - p)
        values.append(value)
    return torch.tensor(values, dtype=torch.float64)


SUBJECTS = {
    "balanced_softmax": Subject(
        balanced_softmax,
        logits_and_labels,
        {"class_counts": _COUNTS},
        reference=_balanced_softmax,
        minus_inf=True,
        shift=True,
    ),
    "balanced_softmax, a class absent": Subject(
        balanced_softmax,
        logits_and_labels,
        {"class_counts": _ABSENT},
        reference=lambda z, y, class_counts: _logit_adjusted(z, y, class_counts),
        shift=True,
        limits=_AT_ZERO,
    ),
    "class_balanced": Subject(
        class_balanced,
        logits_and_labels,
        {"class_counts": _COUNTS, "beta": torch.tensor(0.99, dtype=torch.float64)},
        reference=_class_balanced,
        minus_inf=True,
        shift=True,
    ),
    "logit_adjusted": Subject(
        logit_adjusted,
        logits_and_labels,
        {"class_prior": _COUNTS / _COUNTS.sum(), "tau": torch.tensor(1.5, dtype=torch.float64)},
        reference=_logit_adjusted,
        minus_inf=True,
        shift=True,
    ),
    "ldam": Subject(
        ldam,
        logits_and_labels,
        {"class_counts": _COUNTS},
        reference=_ldam,
        minus_inf=True,
        shift=True,
    ),
    "ldam, unscaled": Subject(
        ldam,
        logits_and_labels,
        {
            "class_counts": _COUNTS,
            "max_margin": torch.tensor(0.7, dtype=torch.float64),
            "scale": torch.tensor(1.0, dtype=torch.float64),
        },
        reference=_ldam,
        shift=True,
    ),
    "ldam, a class absent": Subject(
        ldam,
        logits_and_labels,
        {"class_counts": _ABSENT, "scale": 2.0},
        reference=_ldam,
        shift=True,
        limits={
            law: "a count of 0 is taken as the least other: the value jumps there"
            for law in ("gradcheck", "gradgradcheck")
        },
    ),
    "vector_scaling": Subject(
        vector_scaling,
        logits_and_labels,
        {
            "class_counts": _COUNTS,
            "gamma": torch.tensor(0.2, dtype=torch.float64),
            "tau": torch.tensor(1.25, dtype=torch.float64),
        },
        reference=_vector_scaling,
        shift=False,
    ),
    "vector_scaling, a class absent": Subject(
        vector_scaling,
        logits_and_labels,
        {"class_counts": _ABSENT},
        reference=_vector_scaling,
        shift=False,
        limits=_AT_ZERO,
    ),
    "equalization": Subject(
        equalization,
        logits_and_labels,
        {"class_counts": _COUNTS, "threshold": 0.01},
        reference=_equalization,
        minus_inf=True,
        shift=False,
    ),
}
