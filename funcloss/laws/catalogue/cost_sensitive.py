"""The rows of :mod:`funcloss.losses.cost_sensitive`."""

import math
from collections.abc import Callable

import torch
from torch import Generator, Tensor

from funcloss.laws.subject import CLASSES, Subject, logits_and_labels
from funcloss.losses.cost_sensitive import (
    cost_hinge,
    expected_cost,
    log_bilinear,
    one_sided_regression,
    softmax_margin,
)
from funcloss.typing import LossFn

# Right decisions are free; no two mistakes on a class cost the same.
_COSTS = torch.tensor(
    [
        [0.0, 1.0, 2.0, 0.5, 4.0],
        [9.0, 0.0, 1.5, 2.5, 0.7],
        [0.3, 1.2, 0.0, 3.0, 1.1],
        [2.2, 0.9, 0.4, 0.0, 5.0],
        [1.3, 0.8, 6.0, 1.7, 0.0],
    ],
    dtype=torch.float64,
)
_ABSTAIN = torch.tensor([[0.25], [0.2], [0.15], [0.35], [0.6]], dtype=torch.float64)
_WITH_ABSTAIN = torch.cat([_COSTS, _ABSTAIN], -1)
_RIGHT_COSTS_TOO = _COSTS + 0.1 * torch.eye(CLASSES, dtype=torch.float64)


def logits_of_decisions_and_labels(n: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """Return logits ``(n, CLASSES + 1)``, the last to abstain, and labels ``(n)``."""
    logits = 3 * torch.randn(n, CLASSES + 1, generator=generator, dtype=torch.float64)
    return logits, torch.randint(CLASSES, (n,), generator=generator)


def _by_example(
    value: Callable[[list[float], int, list[float]], float],
) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Lift the value of one example, of plain floats, to a batch."""

    def values(predictions: Tensor, labels: Tensor, cost_matrix: Tensor) -> Tensor:
        costs = cost_matrix.tolist()
        pairs = zip(predictions.tolist(), labels.tolist(), strict=True)
        return torch.tensor([value(z, y, costs[y]) for z, y in pairs], dtype=torch.float64)

    return values


def _softmax(z: list[float]) -> list[float]:
    powers = [math.exp(a - max(z)) for a in z]
    return [power / math.fsum(powers) for power in powers]


def _expected_cost(z: list[float], y: int, costs: list[float]) -> float:
    return math.fsum(c * p for c, p in zip(costs, _softmax(z), strict=True))


def _log_bilinear(z: list[float], y: int, costs: list[float]) -> float:
    p = _softmax(z)
    others = [math.fsum(p[:k] + p[k + 1 :]) for k in range(len(p))]
    return -math.fsum(costs[k] * math.log(others[k]) for k in range(len(p)) if k != y)


def _softmax_margin(z: list[float], y: int, costs: list[float]) -> float:
    return math.log(math.fsum(math.exp(a + c) for a, c in zip(z, costs, strict=True))) - z[y]


def _cost_hinge(z: list[float], y: int, costs: list[float]) -> float:
    return max(a + c for a, c in zip(z, costs, strict=True)) - z[y]


def _one_sided_regression(r: list[float], y: int, costs: list[float]) -> float:
    signs = [1 if c == min(costs) else -1 for c in costs]
    terms = zip(signs, r, costs, strict=True)
    return math.fsum(math.log1p(math.exp(s * (a - c))) for s, a, c in terms)


def _subjects(
    loss: LossFn, value: Callable[[list[float], int, list[float]], float], *, shift: bool
) -> dict[str, Subject]:
    """Return the rows of a loss: on squares of free right decisions or not, and on an oblong."""
    name = loss.__name__

    def subject(cost_matrix: Tensor, data=logits_and_labels, **fields) -> Subject:
        options = {"cost_matrix": cost_matrix}
        return Subject(
            loss,
            data,
            options,
            costs=("cost_matrix",),
            reference=_by_example(value),
            shift=shift,
            minus_inf=loss is not one_sided_regression,
            **fields,
        )

    oblong = {"class permutation": "the last decision is no class"}
    return {
        name: subject(_COSTS),
        f"{name}, right decisions cost too": subject(_RIGHT_COSTS_TOO),
        f"{name}, with a decision to abstain": subject(
            _WITH_ABSTAIN, logits_of_decisions_and_labels, limits=oblong
        ),
    }


SUBJECTS = {
    **_subjects(expected_cost, _expected_cost, shift=True),
    **_subjects(log_bilinear, _log_bilinear, shift=True),
    **_subjects(softmax_margin, _softmax_margin, shift=True),
    **_subjects(cost_hinge, _cost_hinge, shift=True),
    **_subjects(one_sided_regression, _one_sided_regression, shift=False),
}
