"""The rows of :mod:`funcloss.losses.margin`."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from funcloss.laws.subject import (
    Subject,
    logits_and_labels,
    logits_and_multi_hot,
    scores_and_signs,
)
from funcloss.losses.margin import (
    hinge,
    multi_margin,
    multiclass_hinge,
    multilabel_margin,
    perceptron,
    squared_hinge,
)


def _of_pairs(formula: Callable[[float, float], float]) -> Callable[[Tensor, Tensor], Tensor]:
    """Return a formula of Python numbers as a loop over examples."""

    def reference(scores: Tensor, signs: Tensor) -> Tensor:
        pairs = zip(scores.tolist(), signs.tolist(), strict=True)
        return torch.tensor([formula(z, s) for z, s in pairs], dtype=torch.float64)

    return reference


def _multiclass_hinge(logits: Tensor, labels: Tensor, margin: float = 1.0) -> Tensor:
    values = []
    for z, y in zip(logits.tolist(), labels.tolist(), strict=True):
        worst = max(margin + z[k] - z[y] for k in range(len(z)) if k != y)
        values.append(max(0.0, worst))
    return torch.tensor(values, dtype=torch.float64)


def _multi_margin(
    logits: Tensor,
    labels: Tensor,
    margin: Tensor | float = 1.0,
    p: int = 1,
    class_weights: Tensor | None = None,
) -> Tensor:
    return F.multi_margin_loss(
        logits, labels, p=p, margin=float(margin), weight=class_weights, reduction="none"
    )


def _multilabel_margin(logits: Tensor, targets: Tensor) -> Tensor:
    values = []
    for z, t in zip(logits.tolist(), targets.tolist(), strict=True):
        yes = [j for j in range(len(z)) if t[j] == 1]
        no = [k for k in range(len(z)) if t[k] == 0]
        values.append(sum(max(0.0, 1 - (z[j] - z[k])) for j in yes for k in no) / len(z))
    return torch.tensor(values, dtype=torch.float64)


_WEIGHTS = torch.tensor([1.0, 0.5, 2.0, 0.25, 5.0], dtype=torch.float64)

SUBJECTS = {
    "hinge": Subject(
        hinge, scores_and_signs, reference=_of_pairs(lambda z, s: max(0.0, 1 - s * z))
    ),
    "squared_hinge": Subject(
        squared_hinge, scores_and_signs, reference=_of_pairs(lambda z, s: max(0.0, 1 - s * z) ** 2)
    ),
    "perceptron": Subject(
        perceptron, scores_and_signs, reference=_of_pairs(lambda z, s: max(0.0, -s * z))
    ),
    "multiclass_hinge": Subject(
        multiclass_hinge,
        logits_and_labels,
        reference=_multiclass_hinge,
        minus_inf=True,
        shift=True,
    ),
    "multiclass_hinge, margin 2.5": Subject(
        multiclass_hinge,
        logits_and_labels,
        {"margin": torch.tensor(2.5, dtype=torch.float64)},
        reference=_multiclass_hinge,
        shift=True,
    ),
    "multi_margin": Subject(
        multi_margin, logits_and_labels, reference=_multi_margin, minus_inf=True, shift=True
    ),
    "multi_margin, squared and weighted": Subject(
        multi_margin,
        logits_and_labels,
        {"margin": torch.tensor(2.5, dtype=torch.float64), "p": 2, "class_weights": _WEIGHTS},
        costs=("class_weights",),
        reference=_multi_margin,
        shift=True,
    ),
    "multilabel_margin": Subject(
        multilabel_margin, logits_and_multi_hot, reference=_multilabel_margin, shift=True
    ),
}
