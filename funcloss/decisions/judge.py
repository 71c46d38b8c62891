"""How good decisions are: what they cost, by which rule, and how surely that is known."""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from funcloss._checks import check_floating, check_labels, check_shape
from funcloss.decisions.costs import Costs
from funcloss.decisions.intervals import Interval, mean_interval, wilson
from funcloss.decisions.rules import log_posterior, min_cost_decisions

_BINS = 15


class RuleScores(NamedTuple):
    """What a decision rule does on labelled examples; intervals at 95 %."""

    decisions: Int[Tensor, " n"]
    example_cost: Float[Tensor, " n"]  # of each decision
    confusion: Int[Tensor, "classes decisions"]  # rows the truth, in counts
    cost: Float[Tensor, "classes decisions"]  # the same in cost units, of all examples together
    expected_cost: Interval  # an example, under the prior of the deployment
    class_cost: Float[Tensor, " classes"]  # its parts by true class
    normalised_cost: float  # over the best constant decision's; NaN unless that is above 0
    accuracy: Interval  # under the prior; a decision that is no class is never right
    recall: Float[Tensor, " classes"]  # NaN for a class that does not occur
    recall_low: Float[Tensor, " classes"]
    recall_high: Float[Tensor, " classes"]
    precision: Float[Tensor, " classes"]  # under the prior; NaN for a class never decided
    precision_low: Float[Tensor, " classes"]
    precision_high: Float[Tensor, " classes"]


class Judged(NamedTuple):
    """A model's decisions by the two rules, and how far its probabilities can be trusted."""

    argmax: RuleScores  # of the logits as they are
    min_cost: RuleScores  # of the calibrated probabilities
    temperature: float
    calibration_error: float  # of softmax(logits)
    calibrated_error: float  # of the calibrated probabilities
    prior: Float[Tensor, " classes"]  # that all is weighted by
    constant_cost: float  # an example, of the best constant decision
    constant_decision: str

    @property
    def rules(self) -> dict[str, RuleScores]:
        """Return the scores by name of the rule."""
        return {"argmax": self.argmax, "minimum expected cost": self.min_cost}


def judge(
    logits: Float[Tensor, "n classes"],
    labels: Int[Tensor, " n"],
    costs: Costs,
    *,
    scores: Float[Tensor, "n classes"] | None = None,
    temperature: float = 1.0,
    log_shift: Float[Tensor, " classes"] | None = None,
    prior: Float[Tensor, " classes"] | None = None,
) -> Judged:
    """Judge a model's decisions by what they cost, under argmax and under minimum expected cost.

    The expected cost is ``sum_c prior[c] * mean over class c of cost_matrix[c, decision]``; without
    a prior, the mean over the examples. A prior is taken as known, so that the interval of the cost
    is that of a stratified sample; those of accuracy and precision are Wilson's for as many
    examples as there would be if all weighed as much as the heaviest: at least as wide as is due.

    Args:
        logits: What the model says, shape ``(n, classes)``.
        labels: The truth, shape ``(n,)``.
        costs: What decisions cost.
        scores: What the calibrated probabilities are made of, if not of the logits.
        temperature: Of the calibrated probabilities, fitted on other examples than these.
        log_shift: What their log-probabilities are shifted by: see :func:`posterior_shift`.
        prior: Part of each class where the model is used; None: as among the examples. Classes
            without an example here are left out of it.

    Returns:
        Scores under both rules.

    Raises:
        TypeError: ``logits`` is not floating point, or ``labels`` is.
        ValueError: a shape does not fit, a label is no class, there are no examples, or ``prior``
            is negative, not finite or 0 for all classes that occur.

    Example:
        >>> from funcloss.decisions import make_costs
        >>> costs = make_costs(("well", "ill"), class_cost={"ill": 9.0})
        >>> logits = torch.tensor([[2.0, 0.0], [2.0, 0.0], [0.0, 2.0], [1.0, 0.0]])
        >>> judged = judge(logits, torch.tensor([0, 0, 1, 1]), costs)
        >>> judged.argmax.expected_cost.value, judged.min_cost.expected_cost.value
        (2.25, 0.5)

    References:
        Ferrer, "Analysis and comparison of classification metrics", 2022; Elkan, "The foundations
        of cost-sensitive learning", 2001.
    """
    check_floating("judge", "logits", logits)
    shape, classes = tuple(logits.shape), len(costs.classes)
    if len(shape) != 2 or shape[1] != classes:
        raise ValueError(f"judge: logits must have shape (n, {classes}), one a class, got {shape}")
    check_labels("judge", "labels", labels)
    check_shape("judge", "labels", labels, shape[:1], f"logits {shape}")
    logits, labels = logits.detach().cpu(), labels.cpu().long()
    ground = _ground("judge", labels, costs, prior)
    scores = logits if scores is None else scores.detach().cpu()
    log_probs = log_posterior(scores, temperature=temperature, log_shift=log_shift)
    best = int(ground.constant.argmin())
    return Judged(
        argmax=_scored(logits.argmax(-1), labels, costs, ground),
        min_cost=_scored(min_cost_decisions(log_probs, costs.matrix), labels, costs, ground),
        temperature=temperature,
        calibration_error=calibration_error(log_posterior(logits), labels, ground.weights),
        calibrated_error=calibration_error(log_probs, labels, ground.weights),
        prior=ground.prior,
        constant_cost=float(ground.constant[best]),
        constant_decision=costs.decisions[best],
    )


def score_decisions(
    decisions: Int[Tensor, " n"],
    labels: Int[Tensor, " n"],
    costs: Costs,
    *,
    prior: Float[Tensor, " classes"] | None = None,
) -> RuleScores:
    """Judge decisions, however they were made, by what they cost.

    Args:
        decisions: Index of each decision among ``costs.decisions``, shape ``(n,)``.
        labels: The truth, shape ``(n,)``.
        costs: What decisions cost.
        prior: As for :func:`judge`.

    Returns:
        Their scores.

    Raises:
        TypeError: ``decisions`` or ``labels`` is floating point.
        ValueError: a decision is none of ``costs``; otherwise as for :func:`judge`.

    Example:
        >>> from funcloss.decisions import make_costs
        >>> costs = make_costs(("well", "ill"), class_cost={"ill": 9.0})
        >>> score_decisions(torch.tensor([0, 0]), torch.tensor([0, 1]), costs).expected_cost.value
        4.5
    """
    who = "score_decisions"
    check_labels(who, "decisions", decisions)
    check_labels(who, "labels", labels)
    check_shape(
        who, "labels", labels, tuple(decisions.shape), f"decisions {tuple(decisions.shape)}"
    )
    decisions, labels = decisions.cpu().long(), labels.cpu().long()
    ground = _ground(who, labels, costs, prior)
    _check_indices(who, "decisions", decisions, len(costs.decisions))
    return _scored(decisions, labels, costs, ground)


class _Ground(NamedTuple):
    """What decisions on the same examples are judged by."""

    prior: Tensor
    weights: Tensor  # of each example, summing to 1
    strata: Tensor | None
    constant: Tensor  # expected cost of each constant decision


def _ground(who: str, labels: Tensor, costs: Costs, prior: Tensor | None) -> _Ground:
    if not len(labels):
        raise ValueError(f"{who}: there are no examples")
    _check_indices(who, "labels", labels, len(costs.classes))
    counts = labels.bincount(minlength=len(costs.classes)).double()
    strata = None if prior is None else labels
    prior = _of_present(who, prior, counts)
    weights = torch.where(counts > 0, prior / counts, 0.0)[labels]
    return _Ground(prior, weights, strata, prior @ costs.matrix)


def calibration_error(
    log_probs: Float[Tensor, "n classes"],
    labels: Int[Tensor, " n"],
    weights: Float[Tensor, " n"] | None = None,
) -> float:
    """Return how far confidence and accuracy are apart, over 15 bins of equal width, in [0, 1].

    ``sum_b part_b * |accuracy_b - confidence_b|``, the confidence being that of the likeliest
    class. Its least is above 0 on few examples, even of perfect probabilities.

    Args:
        log_probs: Log-probabilities, shape ``(n, classes)``.
        labels: The truth, shape ``(n,)``.
        weights: Of each example; None: equal.

    Returns:
        The expected calibration error.

    Example:
        >>> log_probs = torch.tensor([[0.9, 0.1], [0.9, 0.1]]).log()
        >>> round(calibration_error(log_probs, torch.tensor([0, 1])), 6)
        0.4

    References:
        Naeini, Cooper and Hauskrecht, "Obtaining well calibrated probabilities using Bayesian
        binning", 2015; Guo, Pleiss, Sun and Weinberger, 2017.
    """
    part = torch.ones(len(labels)) if weights is None else weights.cpu()
    part = part.double() / part.double().sum()
    confidence, guess = log_probs.detach().cpu().double().exp().max(-1)
    bins = (confidence * _BINS).ceil().long().clamp(1, _BINS) - 1  # each with its upper edge
    gap = part * ((guess == labels.cpu()).double() - confidence)
    return float(torch.zeros(_BINS, dtype=torch.float64).index_add(0, bins, gap).abs().sum())


def _scored(decisions: Tensor, labels: Tensor, costs: Costs, ground: _Ground) -> RuleScores:
    classes, columns = costs.matrix.shape
    weights, constant = ground.weights, float(ground.constant.min())
    confusion = (labels * columns + decisions).bincount(minlength=classes * columns)
    confusion = confusion.reshape(classes, columns)
    paid = costs.matrix[labels, decisions]
    right = (labels == decisions).double()
    expected = mean_interval(paid[None], weights, strata=ground.strata)
    support, hits = confusion.sum(1), confusion.diagonal()
    recall_low, recall_high = wilson(hits, support)
    precision, trials = _precision(decisions, right, weights, classes)
    precision_low, precision_high = wilson(precision * trials, trials)
    return RuleScores(
        decisions=decisions,
        example_cost=paid,
        confusion=confusion,
        cost=torch.where(confusion > 0, confusion * costs.matrix, 0.0),
        expected_cost=expected,
        class_cost=torch.zeros(classes).double().index_add(0, labels, weights * paid),
        normalised_cost=expected.value / constant if constant > 0 else math.nan,
        accuracy=_part(right, weights),
        recall=hits.double() / support,
        recall_low=recall_low,
        recall_high=recall_high,
        precision=precision,
        precision_low=precision_low,
        precision_high=precision_high,
    )


def _precision(
    decisions: Tensor, right: Tensor, weights: Tensor, classes: int
) -> tuple[Tensor, Tensor]:
    """Return the precision of each class and out of how many equal examples it would be known.

    With parts ``w`` of the total, right or not, ``sum w^2 (right - p)^2 <= max(w) p (1 - p)``.
    The heaviest example may be one that was not seen to be decided so.
    """

    def by_decision(values: Tensor) -> Tensor:
        size = max(classes, int(decisions.max()) + 1)
        return values.new_zeros(size).index_add(0, decisions, values)[:classes]

    total = by_decision(weights)
    return by_decision(weights * right) / total, total / weights.max()


def _part(right: Tensor, weights: Tensor) -> Interval:
    total = weights.sum()
    part, trials = (weights * right).sum() / total, total / weights.max()
    low, high = wilson(part * trials, trials)
    return Interval(float(part), float(low), float(high))


def _of_present(who: str, prior: Tensor | None, counts: Tensor) -> Tensor:
    """Return the prior over the classes that occur, summing to 1."""
    if prior is None:
        return counts / counts.sum()
    check_shape(who, "prior", prior, tuple(counts.shape), "the classes of costs")
    prior = prior.detach().cpu().double()
    if not ((prior >= 0) & prior.isfinite()).all():
        raise ValueError(f"{who}: prior must be finite and at least 0, got {prior.tolist()}")
    present = torch.where(counts > 0, prior, 0.0)
    if not present.sum() > 0:
        raise ValueError(f"{who}: prior must be above 0 for a class that occurs")
    return present / present.sum()


def _check_indices(who: str, what: str, indices: Tensor, size: int) -> None:
    low, high = int(indices.min()), int(indices.max())
    if low < 0 or high >= size:
        raise ValueError(f"{who}: {what} must be in [0, {size}), got {low} to {high}")
