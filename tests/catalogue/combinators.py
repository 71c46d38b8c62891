"""The rows of what combinators make of losses."""

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from catalogue.classes import COSTS, soft_targets
from catalogue.rows import LABELS, MULTI_HOT, VALUES, number, row
from funcloss import losses
from funcloss.combinators import (
    class_weighted,
    from_logits,
    mixup,
    one_hot_targets,
    sample_weighted,
    scaled,
    smoothed,
    soft,
    summed,
    temperature,
    where,
)
from funcloss.laws.case import CLASSES

_WEIGHTS = {"class_weights": torch.tensor([1.0, 0.5, 2.0, 0.0, 5.0], dtype=torch.float64)}


def _cross_entropy(logits: Tensor, labels: Tensor, **options) -> Tensor:
    return F.cross_entropy(logits, labels, reduction="none", **options)


def _weighted_smoothed(logits: Tensor, labels: Tensor, class_weights: Tensor) -> Tensor:
    return class_weights[labels] * _cross_entropy(logits, labels, label_smoothing=0.1)


def _smoothed_weighted(logits: Tensor, labels: Tensor, class_weights: Tensor) -> Tensor:
    return _cross_entropy(logits, labels, weight=class_weights, label_smoothing=0.1)


def _brier(predictions: Tensor, labels: Tensor) -> Tensor:
    targets = F.one_hot(labels, CLASSES).to(predictions)
    return F.mse_loss(predictions, targets, reduction="none").sum(-1)


def _fit_and_cost(logits: Tensor, labels: Tensor, cost_matrix: Tensor) -> Tensor:
    costs = (logits.softmax(-1) * cost_matrix[labels]).sum(-1)
    return _cross_entropy(logits, labels) + 0.5 * costs


def two_labels(n: int, generator: Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Return logits and two labels."""
    logits, labels = LABELS(n, generator)
    return logits, labels, torch.randint(CLASSES, (n,), generator=generator)


def _even(logits: Tensor, labels: Tensor) -> Tensor:
    return labels % 2 == 0


def _shared_weights(predictions: Tensor, targets: Tensor, **options: Tensor) -> Tensor:
    """Weigh every example by 2.5, whatever their number."""
    weights = torch.full_like(predictions, 2.5)
    return sample_weighted(losses.squared_error)(
        predictions, targets, sample_weights=weights, **options
    )


CASES = {
    "class_weighted(cross_entropy)": row(
        class_weighted(losses.cross_entropy),
        LABELS,
        lambda z, y, class_weights: _cross_entropy(z, y, weight=class_weights),
        _WEIGHTS,
        costs=("class_weights",),
        minus_inf=True,
        shift=True,
    ),
    "class_weighted(smoothed(cross_entropy))": row(
        class_weighted(smoothed(losses.cross_entropy)),
        LABELS,
        _weighted_smoothed,
        _WEIGHTS,
        costs=("class_weights",),
        shift=True,
    ),
    "smoothed(class_weighted(cross_entropy))": row(
        smoothed(class_weighted(losses.cross_entropy)),
        LABELS,
        _smoothed_weighted,
        _WEIGHTS,
        costs=("class_weights",),
        shift=True,
        limits={
            law: "the smoothed part pays for the weights of all classes"
            for law in ("weights", "cost effect")
        },
    ),
    "sample_weighted(squared_error)": row(
        _shared_weights, VALUES, lambda p, t: 2.5 * F.mse_loss(p, t, reduction="none")
    ),
    "scaled(cross_entropy)": row(
        scaled(losses.cross_entropy, "factor"),
        LABELS,
        lambda z, y, factor: factor * _cross_entropy(z, y),
        {"factor": number(0.3)},
        minus_inf=True,
        shift=True,
    ),
    "summed(cross_entropy, expected_cost)": row(
        summed({"fit": (1.0, losses.cross_entropy), "cost": (0.5, losses.expected_cost)}),
        LABELS,
        _fit_and_cost,
        {"cost_matrix": COSTS},
        costs=("cost_matrix",),
        shift=True,
    ),
    "from_logits(nll)": row(
        from_logits(losses.nll), LABELS, _cross_entropy, minus_inf=True, shift=True
    ),
    "one_hot_targets(squared_error)": row(
        one_hot_targets(losses.squared_error), LABELS, _brier, shift=False
    ),
    "temperature(cross_entropy)": row(
        temperature(losses.cross_entropy, 2.0),
        LABELS,
        lambda z, y: _cross_entropy(z / 2, y),
        minus_inf=True,
        shift=True,
    ),
    "soft(cross_entropy)": row(
        soft(losses.cross_entropy),
        soft_targets,
        _cross_entropy,
        shift=True,
        names=MULTI_HOT.names,
    ),
    "smoothed(cross_entropy)": row(
        smoothed(losses.cross_entropy, 0.1),
        LABELS,
        lambda z, y: _cross_entropy(z, y, label_smoothing=0.1),
        shift=True,
    ),
    "mixup(cross_entropy)": row(
        mixup(losses.cross_entropy),
        two_labels,
        lambda z, y, other, mix: mix * _cross_entropy(z, y) + (1 - mix) * _cross_entropy(z, other),
        {"mix": number(0.7)},
        shift=True,
        names=("logits", "labels", "labels"),
    ),
    "where(cross_entropy)": row(
        where(losses.cross_entropy, _even),
        LABELS,
        lambda z, y: _cross_entropy(z, y) * (y % 2 == 0),
        shift=True,
        limits={
            law: "which labels count is written into it"
            for law in ("class permutation", "direction", "cost effect", "labels out of range")
        },
    ),
}
