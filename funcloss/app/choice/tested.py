"""The test set, read once at the end: what is reported of the models that were chosen between."""

import math
from collections.abc import Callable, Sequence

import torch

from funcloss.app.report.choice import Quality, Row
from funcloss.decisions import (
    DecisionScores,
    Evaluation,
    Interval,
    Metrics,
    cost_interval,
    mean_interval,
    part_interval,
    widened_by_seeds,
)


def quality_of(name: str, evaluations: Sequence[Evaluation]) -> Quality:
    """Return how good the probabilities of a model are, the mean over its seeds.

    Args:
        name: What the model is called.
        evaluations: On the same examples, one a seed.
    """
    every = [evaluation.metrics for evaluation in evaluations]

    def mean(value: Callable[[Metrics], float]) -> float:
        return math.fsum(map(value, every)) / len(every)

    counts = torch.stack([m.reliability.count.double() for m in every])
    of_bins = [
        (counts * torch.stack([getattr(m.reliability, name) for m in every]).nan_to_num()).sum(0)
        for name in ("confidence", "accuracy")
    ]
    total = counts.sum(0)
    rows = torch.stack([*(part / total for part in of_bins), total / len(every)], 1)
    return Quality(
        name,
        mean(lambda m: m.mean_auc),
        mean(lambda m: m.mean_average_precision),
        mean(lambda m: m.log_score),
        mean(lambda m: m.brier_score),
        mean(lambda m: m.reliability.error),
        tuple((c, a, n) for c, a, n in rows.tolist() if n),
    )


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
        The row, intervals at 95 % over examples and seeds, none beyond what is possible.
    """
    labels, weights, known_prior = evaluation.labels, evaluation.weights, evaluation.known_prior
    prior, costs = evaluation.prior if known_prior else None, evaluation.rule.costs.matrix
    least, largest = evaluation.possible_costs
    confusion = torch.stack([s.confusion.double() for s in scores]).mean(0)
    cost = widened_by_seeds(
        cost_interval(confusion, costs, prior),
        [s.expected_cost.value for s in scores],
        within=(least, largest),
    )
    difference = None
    if plain is not None:
        ours, theirs = (torch.stack([s.example_cost for s in each]) for each in (scores, plain))
        difference = mean_interval(
            ours - theirs,
            weights,
            strata=labels if known_prior else None,
            within=(least - largest, largest - least),
        )
    of_seed = [s.accuracy.value for s in scores]
    accuracy = (
        widened_by_seeds(cost_interval(confusion, torch.eye(*costs.shape), prior), of_seed)
        if known_prior
        else part_interval(of_seed, len(labels))
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
