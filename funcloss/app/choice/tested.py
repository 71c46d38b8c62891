"""The test set, read once at the end: what is reported of the models that were chosen between."""

import math
from collections.abc import Sequence

import torch

from funcloss.app.report.choice import Row
from funcloss.decisions import DecisionScores, Evaluation, Interval, mean_interval, student, wilson


def row_of(
    name: str,
    scores: Sequence[DecisionScores],
    *,
    evaluation: Evaluation,
    focus: Sequence[int],
    plain: Sequence[DecisionScores] | None = None,
) -> Row:
    """Return what a model does on the test set, over its seeds, beside plain training.

    Args:
        name: What the model and its rule are called.
        scores: Its decisions, judged, one a seed.
        evaluation: Of the same examples, for the prior and the best constant decision.
        focus: Classes whose recall is told.
        plain: What is compared with, one a seed, on the same examples; None: nothing.

    Returns:
        The row, intervals at 95 % over examples and seeds.
    """
    labels, weights, known_prior = evaluation.labels, evaluation.weights, evaluation.known_prior
    paid = torch.stack([s.example_cost for s in scores])
    right = torch.stack([(s.decisions == labels).double() for s in scores])
    strata = labels if known_prior else None
    cost = mean_interval(paid, weights, strata=strata)
    difference = None
    if plain is not None:
        gap = paid - torch.stack([s.example_cost for s in plain])
        difference = mean_interval(gap, weights, strata=strata)
    accuracy = (
        mean_interval(right, weights, strata=strata)
        if known_prior
        else part_interval(right.mean(1).tolist(), len(labels))
    )
    constant = evaluation.constant_cost if evaluation.constant_cost > 0 else math.nan
    return Row(
        name=name,
        accuracy=accuracy,
        expected_cost=cost,
        normalised_cost=Interval(*(v / constant for v in cost)),
        recall=tuple(
            part_interval([float(s.recall.value[c]) for s in scores], int((labels == c).sum()))
            for c in focus
        ),
        difference=difference,
    )


def part_interval(parts: Sequence[float], n: int) -> Interval:
    """Return the mean of parts of the same ``n`` examples over seeds, with an interval at 95 %.

    Wilson's bounds for the examples, moved out by the spread of the seeds: the squares of the two
    distances from the mean add up.

    Args:
        parts: One a seed.
        n: Out of how many examples each.

    Returns:
        Mean and interval, within [0, 1].

    Example:
        >>> part_interval([1.0, 1.0], 100)
        Interval(value=1.0, low=0.963..., high=1.0)
    """
    mean = sum(parts) / len(parts)
    low, high = wilson(torch.tensor(mean * n), torch.tensor(float(n)))
    spread = 0.0
    if len(parts) > 1:
        variance = sum((p - mean) ** 2 for p in parts) / (len(parts) - 1)
        spread = student(len(parts) - 1) * math.sqrt(variance / len(parts))
    below, above = math.hypot(mean - float(low), spread), math.hypot(float(high) - mean, spread)
    return Interval(mean, max(mean - below, 0.0), min(mean + above, 1.0))
