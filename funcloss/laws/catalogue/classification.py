"""The rows of :mod:`funcloss.losses.classification`."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from funcloss import losses
from funcloss.laws.subject import (
    Subject,
    log_probs_and_labels,
    logits_and_distributions,
    logits_and_labels,
)
from funcloss.losses.classification import asymmetric_single_label, poly1, softmax_focal


def _cross_entropy(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    return F.cross_entropy(logits, labels, reduction="none", label_smoothing=label_smoothing)


def _soft_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits, targets, reduction="none")


def _nll(log_probs: Tensor, labels: Tensor) -> Tensor:
    return F.nll_loss(log_probs, labels, reduction="none")


def _softmax(logits: list[float]) -> list[float]:
    powers = [math.exp(z - max(logits)) for z in logits]
    return [power / sum(powers) for power in powers]


def _softmax_focal(
    logits: Tensor, labels: Tensor, gamma: float = 2.0, alpha: Tensor | None = None
) -> Tensor:
    values = []
    for z, y in zip(logits.tolist(), labels.tolist(), strict=True):
        p = _softmax(z)[y]
        weight = 1.0 if alpha is None else alpha.tolist()[y]
        values.append(-weight * (1 - p) ** float(gamma) * math.log(p))
    return torch.tensor(values, dtype=torch.float64)


def _poly1(logits: Tensor, labels: Tensor, epsilon: float = 1.0) -> Tensor:
    values = []
    for z, y in zip(logits.tolist(), labels.tolist(), strict=True):
        p = _softmax(z)[y]
        values.append(-math.log(p) + float(epsilon) * (1 - p))
    return torch.tensor(values, dtype=torch.float64)


def _asymmetric_single_label(
    logits: Tensor,
    labels: Tensor,
    gamma_pos: float = 0.0,
    gamma_neg: float = 4.0,
    label_smoothing: float = 0.1,
) -> Tensor:
    values = []
    for z, y in zip(logits.tolist(), labels.tolist(), strict=True):
        value, eps = 0.0, float(label_smoothing)
        for k, p in enumerate(_softmax(z)):
            weight = (1 - p) ** float(gamma_pos) if k == y else p ** float(gamma_neg)
            value -= ((1 - eps) * (k == y) + eps / len(z)) * weight * math.log(p)
        values.append(value)
    return torch.tensor(values, dtype=torch.float64)


def _number(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


_ALPHA = torch.tensor([1.0, 0.5, 2.0, 0.25, 5.0], dtype=torch.float64)

SUBJECTS = {
    "cross_entropy": Subject(
        losses.cross_entropy,
        logits_and_labels,
        reference=_cross_entropy,
        minus_inf=True,
        shift=True,
    ),
    "cross_entropy, smoothed": Subject(
        losses.cross_entropy,
        logits_and_labels,
        {"label_smoothing": 0.1},
        reference=_cross_entropy,
        shift=True,
    ),
    "soft_cross_entropy": Subject(
        losses.soft_cross_entropy,
        logits_and_distributions,
        reference=_soft_cross_entropy,
        shift=True,
    ),
    "nll": Subject(
        losses.nll,
        log_probs_and_labels,
        reference=_nll,
        minus_inf=True,
        extremes=(-1e4, 0.0),
        shift=False,
    ),
    "softmax_focal": Subject(
        softmax_focal,
        logits_and_labels,
        reference=_softmax_focal,
        minus_inf=True,
        shift=True,
    ),
    "softmax_focal, weighted": Subject(
        softmax_focal,
        logits_and_labels,
        {"gamma": _number(0.5), "alpha": _ALPHA},
        costs=("alpha",),
        reference=_softmax_focal,
        minus_inf=True,
        shift=True,
    ),
    "poly1": Subject(
        poly1,
        logits_and_labels,
        reference=_poly1,
        minus_inf=True,
        shift=True,
    ),
    "poly1, epsilon -0.5": Subject(
        poly1,
        logits_and_labels,
        {"epsilon": _number(-0.5)},
        reference=_poly1,
        shift=True,
    ),
    "asymmetric_single_label": Subject(
        asymmetric_single_label,
        logits_and_labels,
        reference=_asymmetric_single_label,
        minus_inf=True,
        shift=True,
    ),
    "asymmetric_single_label, other options": Subject(
        asymmetric_single_label,
        logits_and_labels,
        {"gamma_pos": _number(0.5), "gamma_neg": _number(1.5), "label_smoothing": _number(0.2)},
        reference=_asymmetric_single_label,
        shift=True,
    ),
}
