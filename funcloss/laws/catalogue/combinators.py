"""The rows of what combinators make of the catalogue."""

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

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
from funcloss.laws.subject import (
    CLASSES,
    Subject,
    logits_and_distributions,
    logits_and_labels,
    values_and_targets,
)

WEIGHTS = torch.tensor([1.0, 0.5, 2.0, 0.0, 5.0], dtype=torch.float64)
COSTS = (1 - torch.eye(CLASSES, dtype=torch.float64)) * torch.arange(1.0, 6.0)[:, None]


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits, labels, reduction="none")


def _weighted(logits: Tensor, labels: Tensor, class_weights: Tensor) -> Tensor:
    return F.cross_entropy(logits, labels, weight=class_weights, reduction="none")


def _weighted_smoothed(logits: Tensor, labels: Tensor, class_weights: Tensor) -> Tensor:
    plain = _cross_entropy(logits, labels), -logits.log_softmax(-1).mean(-1)
    return torch.stack([w * (0.9 * a + 0.1 * b) for w, a, b in zip(
        class_weights[labels], *plain, strict=True)])  # fmt: skip


def _smoothed_weighted(logits: Tensor, labels: Tensor, class_weights: Tensor) -> Tensor:
    return F.cross_entropy(
        logits, labels, weight=class_weights, label_smoothing=0.1, reduction="none"
    )


def _brier(predictions: Tensor, labels: Tensor) -> Tensor:
    targets = F.one_hot(labels, CLASSES).to(predictions)
    return F.mse_loss(predictions, targets, reduction="none").sum(-1)


def _fit_and_cost(logits: Tensor, labels: Tensor, cost_matrix: Tensor) -> Tensor:
    costs = (logits.softmax(-1) * cost_matrix[labels]).sum(-1)
    return _cross_entropy(logits, labels) + 0.5 * costs


def _two_labels(n: int, generator: Generator) -> tuple[Tensor, Tensor, Tensor]:
    logits, labels = logits_and_labels(n, generator)
    return logits, labels, torch.randint(CLASSES, (n,), generator=generator)


def _even(logits: Tensor, labels: Tensor) -> Tensor:
    return labels % 2 == 0


def _shared_weights(predictions: Tensor, targets: Tensor, **options: Tensor) -> Tensor:
    """Weigh every example by 2.5, whatever their number."""
    weights = torch.full_like(predictions, 2.5)
    return sample_weighted(losses.squared_error)(
        predictions, targets, sample_weights=weights, **options
    )


SUBJECTS = {
    "class_weighted(cross_entropy)": Subject(
        class_weighted(losses.cross_entropy),
        logits_and_labels,
        {"class_weights": WEIGHTS},
        costs=("class_weights",),
        reference=_weighted,
        minus_inf=True,
        shift=True,
    ),
    "class_weighted(smoothed(cross_entropy))": Subject(
        class_weighted(smoothed(losses.cross_entropy)),
        logits_and_labels,
        {"class_weights": WEIGHTS},
        costs=("class_weights",),
        reference=_weighted_smoothed,
        shift=True,
    ),
    "smoothed(class_weighted(cross_entropy))": Subject(
        smoothed(class_weighted(losses.cross_entropy)),
        logits_and_labels,
        {"class_weights": WEIGHTS},
        costs=("class_weights",),
        reference=_smoothed_weighted,
        shift=True,
        limits={
            "weights": "the smoothed part pays for the weights of all classes",
            "cost effect": "the smoothed part pays for the weights of all classes",
        },
    ),
    "sample_weighted(squared_error)": Subject(
        _shared_weights,
        values_and_targets,
        reference=lambda p, t: 2.5 * F.mse_loss(p, t, reduction="none"),
    ),
    "scaled(cross_entropy)": Subject(
        scaled(losses.cross_entropy, "factor"),
        logits_and_labels,
        {"factor": torch.tensor(0.3, dtype=torch.float64)},
        reference=lambda z, y, factor: factor * _cross_entropy(z, y),
        minus_inf=True,
        shift=True,
    ),
    "summed(cross_entropy, expected_cost)": Subject(
        summed({"fit": (1.0, losses.cross_entropy), "cost": (0.5, losses.expected_cost)}),
        logits_and_labels,
        {"cost_matrix": COSTS},
        costs=("cost_matrix",),
        reference=_fit_and_cost,
        shift=True,
    ),
    "from_logits(nll)": Subject(
        from_logits(losses.nll),
        logits_and_labels,
        reference=_cross_entropy,
        minus_inf=True,
        shift=True,
    ),
    "one_hot_targets(squared_error)": Subject(
        one_hot_targets(losses.squared_error), logits_and_labels, reference=_brier, shift=False
    ),
    "temperature(cross_entropy)": Subject(
        temperature(losses.cross_entropy, 2.0),
        logits_and_labels,
        reference=lambda z, y: _cross_entropy(z / 2, y),
        minus_inf=True,
        shift=True,
    ),
    "soft(cross_entropy)": Subject(
        soft(losses.cross_entropy),
        logits_and_distributions,
        reference=lambda z, t: F.cross_entropy(z, t, reduction="none"),
        shift=True,
    ),
    "smoothed(cross_entropy)": Subject(
        smoothed(losses.cross_entropy, 0.1),
        logits_and_labels,
        reference=lambda z, y: F.cross_entropy(z, y, reduction="none", label_smoothing=0.1),
        shift=True,
    ),
    "mixup(cross_entropy)": Subject(
        mixup(losses.cross_entropy),
        _two_labels,
        {"mix": 0.7},
        reference=lambda z, y, other, mix: (
            mix * _cross_entropy(z, y) + (1 - mix) * _cross_entropy(z, other)
        ),
        shift=True,
    ),
    "where(cross_entropy)": Subject(
        where(losses.cross_entropy, _even),
        logits_and_labels,
        reference=lambda z, y: _cross_entropy(z, y) * (y % 2 == 0),
        shift=True,
        limits={"class permutation": "which labels count is written into it"},
    ),
}
