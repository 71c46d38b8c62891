"""How good decisions are: what they cost, by which rule, and how surely that is known."""

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

from funcloss._checks import check_floating, check_labels, check_shape
from funcloss.decisions.intervals import Interval, cost_interval, mean_interval, wilson
from funcloss.decisions.metrics import Metrics, make_metrics, reliability
from funcloss.decisions.rules import DecisionRule, log_posterior
from funcloss.decisions.thresholds import CostCurve, Sensitivity, cost_curve, ratio_sensitivity

_AT_ONCE = 2**22  # costs, of examples with a matrix of their own


@dataclass(frozen=True)
class DecisionScores:
    """How decisions score on labelled examples; intervals at 95 %."""

    decisions: Int[Tensor, " n"]
    example_cost: Float[Tensor, " n"]  # of each decision
    confusion: Int[Tensor, "classes decisions"]  # rows the truth, in counts
    cost: Float[Tensor, "classes decisions"]  # the same in cost units, of all examples together
    expected_cost: Interval  # per example, under the prior of the deployment
    class_cost: Float[Tensor, " classes"]  # its parts by true class
    normalised_cost: float  # over the best constant decision's; NaN unless that is above 0
    accuracy: Interval  # under the prior; a decision that is no class is never right
    recall: Interval  # tensors by class; NaN for a class that does not occur
    precision: Interval  # tensors by class, under the prior; NaN for a class never decided
    balanced_accuracy: float  # mean recall of the classes that occur
    f1: Float[Tensor, " classes"]  # under the prior; NaN for a class that does not occur

    @property
    def macro_f1(self) -> float:
        """The mean F1 of the classes that occur."""
        return float(self.f1.nanmean())


@dataclass(frozen=True)
class Evaluation:
    """A model on labelled examples: its decisions by two rules, and how far to trust its scores.

    Everything but the fields is computed when it is first asked for.
    """

    logits: Float[Tensor, "n classes"]
    labels: Int[Tensor, " n"]
    rule: DecisionRule  # of minimum expected cost
    prior: Float[Tensor, " classes"]  # that everything is weighted by; sums to 1
    known_prior: bool  # it was given, not counted: how often each class comes is then certain
    loss: float = math.nan  # of all examples together
    repeats: int = 1  # how often each example is among them; the intervals count it once
    # costs of each example by name, for the cells of the costs that have one
    amounts: Mapping[str, Float[Tensor, " n"]] = field(default_factory=dict)

    @functools.cached_property
    def argmax(self) -> DecisionScores:
        """The likeliest class, by the scores as they are."""
        return self.scored(self.logits.argmax(-1))

    @functools.cached_property
    def min_cost(self) -> DecisionScores:
        """The decisions of minimum expected cost, at calibrated probabilities."""
        rule, costs = self.rule, self.rule.costs
        if not costs.amounts:
            return self.scored(rule.decide(self.logits))
        decided = []
        size = max(1, _AT_ONCE // costs.matrix.numel())
        for some in torch.arange(len(self.labels)).split(size):
            own = costs.of_examples({name: a[some] for name, a in self.amounts.items()})
            decided.append(rule.decide(self.logits[some], own))
        return self.scored(torch.cat(decided))

    @property
    def rules(self) -> dict[str, DecisionScores]:
        """The scores by name of the rule."""
        return {"argmax": self.argmax, "minimum expected cost": self.min_cost}

    @functools.cached_property
    def calibration_error(self) -> float:
        """The calibration error of ``softmax(logits)``."""
        return calibration_error(log_posterior(self.logits), self.labels, self.weights)

    @functools.cached_property
    def log_probs(self) -> Float[Tensor, "n classes"]:
        """The log-probabilities that the rule decides by, float64."""
        return self.rule.log_probs(self.logits)

    @functools.cached_property
    def calibrated_error(self) -> float:
        """The calibration error of the probabilities that the rule decides by."""
        return calibration_error(self.log_probs, self.labels, self.weights)

    @functools.cached_property
    def metrics(self) -> Metrics:
        """The metrics of the probabilities that the rule decides by."""
        return make_metrics(self.log_probs, self.labels, self.weights)

    @functools.cached_property
    def curve(self) -> CostCurve | None:
        """The expected cost at every threshold, of two classes whose mistakes have one cost."""
        return cost_curve(self.log_probs, self.labels, self.rule.costs, weights=self.weights)

    @functools.cached_property
    def sensitivity(self) -> list[Sensitivity]:
        """How the expected cost depends on the ratio of the costs; none where there is no curve."""
        return ratio_sensitivity(self.log_probs, self.labels, self.rule.costs, weights=self.weights)

    @functools.cached_property
    def counts(self) -> Float[Tensor, " classes"]:
        """Examples of each class, float64."""
        return self.labels.bincount(minlength=len(self.rule.costs.classes)).double()

    @functools.cached_property
    def weights(self) -> Float[Tensor, " n"]:
        """Weight of each example under the prior; they sum to 1."""
        return torch.where(self.counts > 0, self.prior / self.counts, 0.0)[self.labels]

    @functools.cached_property
    def constant_costs(self) -> Float[Tensor, " decisions"]:
        """Expected cost of always deciding one way, for each decision."""
        matrix = self.rule.costs.matrix.clone()
        for truth, decision, values in self.rule.costs.cells(self.amounts, len(self.labels)):
            own = values[self.labels == truth]
            matrix[truth, decision] = own.mean() if len(own) else 0.0
        return self.prior @ matrix

    @property
    def constant_cost(self) -> float:
        """Expected cost of the best constant decision."""
        return float(self.constant_costs.min())

    @property
    def constant_decision(self) -> str:
        """The best constant decision."""
        return self.rule.costs.decisions[int(self.constant_costs.argmin())]

    @functools.cached_property
    def possible_costs(self) -> tuple[float, float]:
        """The least and the largest expected cost that any decisions can have."""
        occurs = self.prior > 0
        cells = self.rule.costs.cells(self.amounts, len(self.labels))
        least, most = self.rule.costs.matrix.clone(), self.rule.costs.matrix.clone()
        for truth, decision, values in cells:
            least[truth, decision], most[truth, decision] = values.min(), values.max()
        least, most = least[occurs].amin(1), most[occurs].amax(1)
        if not self.known_prior:
            return float(least.min()), float(most.max())
        parts = self.prior[occurs]
        return float(parts @ least), float(parts @ most)

    def _mean_cost(self, paid: Tensor) -> Interval:
        """Return the mean of what each example costs."""
        each = paid.reshape(self.repeats, -1)
        n = each.shape[1]
        strata = self.labels[:n] if self.known_prior else None
        return mean_interval(each, self.weights[:n], strata=strata, within=self.possible_costs)

    def scored(self, decisions: Int[Tensor, " n"]) -> DecisionScores:
        """Return how decisions on the same examples score, however they were made.

        Args:
            decisions: Index of each decision among ``rule.costs.decisions``, shape ``(n,)``.

        Returns:
            Their scores.

        Raises:
            TypeError: ``decisions`` is floating point.
            ValueError: the shape does not fit, or a decision is none of the costs.

        Example:
            >>> from funcloss.decisions import make_costs, score
            >>> costs = make_costs(("well", "ill"), class_cost={"ill": 9.0})
            >>> scores = score(torch.zeros(2, 2), torch.tensor([0, 1]), DecisionRule(costs))
            >>> scores.scored(torch.tensor([0, 0])).expected_cost.value
            4.5
        """
        who, costs, labels = "scored", self.rule.costs, self.labels
        check_labels(who, "decisions", decisions)
        check_shape(who, "decisions", decisions, tuple(labels.shape), "the labels")
        decisions = decisions.cpu().long()
        _check_indices(who, "decisions", decisions, len(costs.decisions))
        classes, columns = costs.matrix.shape
        confusion = (labels * columns + decisions).bincount(minlength=classes * columns)
        confusion = confusion.reshape(classes, columns)
        paid = costs.matrix[labels, decisions]
        in_cells = torch.where(confusion > 0, confusion * costs.matrix, 0.0)
        for truth, decision, values in costs.cells(self.amounts, len(labels)):
            here = (labels == truth) & (decisions == decision)
            paid[here] = values[here]
            in_cells[truth, decision] = paid[here].sum()
        right = (labels == decisions).double()
        known_prior = self.prior if self.known_prior else None
        expected = cost_interval(confusion / self.repeats, costs.matrix, known_prior)
        if costs.amounts:  # not those of a matrix
            expected = self._mean_cost(paid)
        support, hits = confusion.sum(1) / self.repeats, confusion.diagonal() / self.repeats
        recall = hits.double() / support
        precision, trials = _precision(decisions, right, self.weights, classes)
        decided = trials * self.weights.max()  # fraction of all, under the prior
        trials = trials / self.repeats
        occurs = self.prior > 0
        constant = self.constant_cost
        return DecisionScores(
            decisions=decisions,
            example_cost=paid,
            confusion=confusion,
            cost=in_cells,
            expected_cost=expected,
            class_cost=torch.zeros(classes).double().index_add(0, labels, self.weights * paid),
            normalised_cost=expected.value / constant if constant > 0 else math.nan,
            accuracy=_part(right, self.weights, self.repeats),
            recall=Interval(recall, *wilson(hits, support)),
            precision=Interval(precision, *wilson(precision * trials, trials)),
            balanced_accuracy=float(recall[occurs].mean()),
            f1=torch.where(occurs, 2 * self.prior * recall / (self.prior + decided), math.nan),
        )


def score(
    logits: Float[Tensor, "n classes"],
    labels: Int[Tensor, " n"],
    rule: DecisionRule,
    *,
    prior: Float[Tensor, " classes"] | None = None,
    loss: float = math.nan,
    repeats: int = 1,
    amounts: Mapping[str, Float[Tensor, " n"]] | None = None,
) -> Evaluation:
    """Score a model's decisions by what they cost, under argmax and under minimum expected cost.

    The expected cost is ``sum_c prior[c] * mean over class c of cost_matrix[c, decision]``; without
    a prior, the mean over the examples. A prior is taken as known, so that the interval of the
    cost, see :func:`cost_interval`, is that of a stratified sample; those of accuracy and precision
    are Wilson's for as many examples as there would be if all weighed as much as the heaviest: at
    least as wide as is due.

    Args:
        logits: The model's scores, shape ``(n, classes)``.
        labels: The truth, shape ``(n,)``.
        rule: How decisions are made of the scores, and what they cost.
        prior: Fraction of each class where the model is used; None: as among the examples. Classes
            without an example here are left out of it.
        loss: Of all examples together, if it is known.
        repeats: How often each example is among them, scored by as many models. Confusion matrices
            count every time, intervals count it once.
        amounts: Costs of each example by name, for the cells of ``rule.costs`` that have one.

    Returns:
        Scores under both rules.

    Raises:
        TypeError: ``logits`` is not floating point, or ``labels`` is.
        ValueError: a shape does not fit, a label is no class, there are no examples, an amount is
            missing, or ``prior`` is negative, not finite or 0 for all classes that occur.

    Example:
        >>> from funcloss.decisions import make_costs
        >>> rule = DecisionRule(make_costs(("well", "ill"), class_cost={"ill": 9.0}))
        >>> logits = torch.tensor([[2.0, 0.0], [2.0, 0.0], [0.0, 2.0], [1.0, 0.0]])
        >>> found = score(logits, torch.tensor([0, 0, 1, 1]), rule)
        >>> found.argmax.expected_cost.value, found.min_cost.expected_cost.value
        (2.25, 0.5)

    References:
        Ferrer, "Analysis and comparison of classification metrics", 2022; Elkan, "The foundations
        of cost-sensitive learning", 2001.
    """
    check_floating("score", "logits", logits)
    shape, classes = tuple(logits.shape), len(rule.costs.classes)
    if len(shape) != 2 or shape[1] != classes:
        raise ValueError(
            f"score: logits must have shape (n, {classes}), one per class, got {shape}"
        )
    check_labels("score", "labels", labels)
    check_shape("score", "labels", labels, shape[:1], f"logits {shape}")
    labels = labels.cpu().long()
    if not len(labels):
        raise ValueError("score: there are no examples")
    _check_indices("score", "labels", labels, classes)
    counts = labels.bincount(minlength=classes).double()
    amounts = {name: a.detach().cpu() for name, a in (amounts or {}).items()}
    list(rule.costs.cells(amounts, len(labels)))  # checked
    return Evaluation(
        logits=logits.detach().cpu(),
        labels=labels,
        rule=rule,
        prior=_of_present("score", prior, counts),
        known_prior=prior is not None,
        loss=loss,
        repeats=repeats,
        amounts=amounts,
    )


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
    return reliability(log_probs, labels, weights).error


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


def _part(right: Tensor, weights: Tensor, repeats: int) -> Interval:
    total = weights.sum()
    part, trials = (weights * right).sum() / total, total / weights.max() / repeats
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
