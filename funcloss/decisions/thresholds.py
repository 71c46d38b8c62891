"""Decisions of minimum expected cost as thresholds on probabilities, in numbers and in words."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from funcloss.decisions.costs import Costs

_ROUNDING = 1e-12  # of the largest cost, of sums over the examples
_NAMED = 6  # pairs of classes that are put into words


@dataclass(frozen=True)
class Threshold:
    """Of two classes: predict ``decision`` when its fraction of their probability is larger."""

    decision: str
    other: str
    above: float  # in [0, 1]


def pair_thresholds(costs: Costs) -> list[Threshold]:
    r"""Return the threshold between every two classes, those furthest from 1/2 first.

    Of two classes ``a`` and ``b`` alone, ``a`` costs less when ``p_a > (c_ba - c_bb) / (c_ba - c_bb
    + c_ab - c_aa)``, ``c_ba`` being what deciding ``a`` on a true ``b`` costs.

    Args:
        costs: What decisions cost.

    Returns:
        One per pair, of the decision with the lower threshold; none for a pair of which one
        decision is never the worse, a right decision costs more than a wrong one, or each example
        has its own cost.

    Example:
        >>> from funcloss.decisions import make_costs
        >>> pair_thresholds(make_costs(("well", "ill"), class_cost={"ill": 19.0}))
        [Threshold(decision='ill', other='well', above=0.05)]

    References:
        Elkan, "The foundations of cost-sensitive learning", 2001, eq. 2.
    """
    found = [
        Threshold(costs.classes[d], costs.classes[o], float(above))
        for row in _rows_of_pairs(costs)
        for d, o, above in zip(*(part.tolist() for part in row), strict=True)
    ]
    return sorted(found, key=lambda t: t.above)


def _rows_of_pairs(costs: Costs) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield, for each class, its pairs with later ones: decision, other, threshold."""
    size = len(costs.classes)
    matrix, right = costs.matrix[:, :size], costs.matrix.diagonal()
    own: dict[int, list[int]] = {}  # pairs whose examples have costs of their own
    for truth, decision, _ in costs.amounts:
        own.setdefault(min(truth, decision), []).append(max(truth, decision))
    for a in range(size):
        b = torch.arange(a + 1, size)
        miss = matrix[a, b] - right[a]  # of a true a, by deciding b
        false_alarm = matrix[b, a] - right[b]
        there = (miss > 0) & (false_alarm > 0)
        there[[other - a - 1 for other in own.get(a, [])]] = False
        b, miss, false_alarm = b[there], miss[there], false_alarm[there]
        of_b = miss <= false_alarm  # the decision whose threshold is the lower
        yield (
            torch.where(of_b, b, a),
            torch.where(of_b, a, b),
            torch.minimum(miss, false_alarm) / (miss + false_alarm),
        )


def decision_sentences(costs: Costs) -> list[str]:
    r"""Return how decisions of minimum expected cost are made, in plain words.

    Args:
        costs: What decisions cost.

    Returns:
        For two classes the threshold; for several, the threshold of each pair whose mistakes do not
        cost the same, the most unequal first; and when to take a decision that is no class.

    Example:
        >>> from funcloss.decisions import make_costs
        >>> print(*decision_sentences(make_costs(("benign", "malignant"), class_cost={"malignant":
        ...     20.0})), sep="\n")
        predict malignant when its probability exceeds 0.0476
    """
    if costs.amounts:
        names = ", ".join(dict.fromkeys(name for *_, name in costs.amounts))
        return [f"the threshold of each example depends on its {names}"]
    if len(costs.classes) == 2 and not costs.extra:
        return [
            f"predict {t.decision} when its probability exceeds {_number(t.above)}"
            for t in pair_thresholds(costs)
        ]
    named: list[tuple[float, int, int]] = []  # the most unequal pairs
    pairs, unequal = 0, 0
    for decisions, others, above in _rows_of_pairs(costs):
        pairs += len(above)
        unequal += int((above < 0.5 - 1e-12).sum())
        order = above.argsort(stable=True)[:_NAMED]
        rows = zip(*(part[order].tolist() for part in (above, decisions, others)), strict=True)
        named = sorted((*named, *rows), key=lambda row: row[0])[:_NAMED]
    lines = [
        f"between {costs.classes[d]} and {costs.classes[o]}: predict {costs.classes[d]} when its "
        f"probability exceeds {_number(above)} of the two's sum"
        for above, d, o in named
        if above < 0.5 - 1e-12
    ]
    if unequal > _NAMED:
        lines.append(f"{unequal - _NAMED:,} more pairs have a threshold other than 1/2")
    if not lines and pairs and not costs.extra:
        lines = ["predict the most probable class: no two classes have unequal costs"]
    size = len(costs.classes)
    for name, column in zip(costs.extra, costs.matrix.T[size:], strict=True):
        low, high = float(column.min()), float(column.max())
        price = _number(low) if low == high else f"its own ({_number(low)} to {_number(high)})"
        lines.append(f"decide {name} when every class has an expected cost above {price}")
    return lines


@dataclass(frozen=True)
class CostCurve:
    """The cost of two-class decisions at every threshold, on labelled examples."""

    positive: str  # the class that is predicted above the threshold
    thresholds: Float[Tensor, " points"]  # rising, from 0 to 1
    costs: Float[Tensor, " points"]  # expected cost per example
    threshold: float  # of minimum expected cost, by the costs alone
    cost: float  # at that threshold
    lowest: tuple[float, float]  # threshold of least cost on these examples, and that cost


def cost_curve(
    log_probs: Float[Tensor, "n two"],
    labels: Int[Tensor, " n"],
    costs: Costs,
    *,
    weights: Float[Tensor, " n"] | None = None,
) -> CostCurve | None:
    """Return the expected cost of predicting the positive class above each threshold.

    The positive class is the one whose miss costs more, the second where both cost the same.

    Args:
        log_probs: Log-probabilities of two classes, shape ``(n, 2)``.
        labels: The truth, shape ``(n,)``.
        costs: What decisions cost.
        weights: Of each example; None: equal.

    Returns:
        The curve, a point per distinct probability and one at each end; None unless there are two
        classes, two decisions and a threshold between them, the same for every example.

    Example:
        >>> from funcloss.decisions import make_costs
        >>> costs = make_costs(("well", "ill"), class_cost={"ill": 19.0})
        >>> log_probs = torch.tensor([[0.9, 0.1], [0.98, 0.02], [0.6, 0.4]]).log()
        >>> curve = cost_curve(log_probs, torch.tensor([0, 0, 1]), costs)
        >>> curve.threshold, round(curve.cost, 3), curve.lowest[1]
        (0.05, 0.333, 0.0)
    """
    thresholds = pair_thresholds(costs) if len(costs.decisions) == len(costs.classes) == 2 else []
    if not thresholds:
        return None
    found = thresholds[0]
    equal = abs(found.above - 0.5) < 1e-12
    positive = 1 if equal else costs.classes.index(found.decision)
    p, labels, part = _of_class(positive, log_probs, labels, weights)
    as_positive = part * costs.matrix[labels, positive]
    as_negative = part * costs.matrix[labels, 1 - positive]
    # At a threshold equal to its probability an example is not predicted positive; at 0 all are.
    points, place = p.clamp(min=torch.finfo(p.dtype).tiny).unique(return_inverse=True)
    change = torch.zeros_like(points).index_add(0, place, as_negative - as_positive)
    curve = torch.cat([as_positive.sum()[None], as_positive.sum() + change.cumsum(0)])
    curve = torch.where(curve.abs() < _ROUNDING * costs.matrix.abs().max(), 0.0, curve)
    points = torch.cat([torch.zeros(1).double(), points])
    if points[-1] < 1:
        points = torch.cat([points, points.new_ones(1)])
        curve = torch.cat([curve, curve[-1:]])
    best = int(curve.argmin())
    after = float(points[best + 1]) if best + 1 < len(points) else 1.0
    return CostCurve(
        positive=costs.classes[positive],
        thresholds=points,
        costs=curve,
        threshold=found.above,
        cost=_at(points, curve, found.above),
        lowest=((float(points[best]) + after) / 2, float(curve[best])),
    )


def _at(points: Tensor, curve: Tensor, threshold: float) -> float:
    """Return the value of a step function that holds from each point to the next."""
    place = int(torch.searchsorted(points, torch.tensor(threshold).double(), right=True)) - 1
    return float(curve[max(place, 0)])


@dataclass(frozen=True)
class Sensitivity:
    """What the decisions cost if the mistakes cost another ratio than was thought."""

    factor: float  # of the cost of missing the positive class
    threshold: float  # that would be right then
    kept: float  # expected cost at the threshold in use
    right: float  # expected cost at the right one


def ratio_sensitivity(
    log_probs: Float[Tensor, "n two"],
    labels: Int[Tensor, " n"],
    costs: Costs,
    *,
    factors: Sequence[float] = (0.25, 0.5, 1.0, 2.0, 4.0),
    weights: Float[Tensor, " n"] | None = None,
) -> list[Sensitivity]:
    """Return how the expected cost depends on the ratio of the two mistakes' costs.

    The cost of missing the positive class is multiplied by each factor; the threshold in use stays
    what the costs as given make it.

    Args:
        log_probs: Log-probabilities of two classes, shape ``(n, 2)``.
        labels: The truth, shape ``(n,)``.
        costs: What decisions cost.
        factors: Above 0.
        weights: Of each example; None: equal.

    Returns:
        One per factor; none where :func:`cost_curve` gives none.

    Example:
        >>> from funcloss.decisions import make_costs
        >>> costs = make_costs(("well", "ill"), class_cost={"ill": 19.0})
        >>> log_probs = torch.tensor([[0.9, 0.1], [0.98, 0.02], [0.6, 0.4]]).log()
        >>> found = ratio_sensitivity(log_probs, torch.tensor([0, 0, 1]), costs, factors=(0.1,))
        >>> round(found[0].threshold, 3), round(found[0].kept, 3), found[0].right
        (0.345, 0.333, 0.0)
    """
    curve = cost_curve(log_probs, labels, costs, weights=weights)
    if curve is None:
        return []
    positive = costs.classes.index(curve.positive)
    other = 1 - positive
    p, labels, part = _of_class(positive, log_probs, labels, weights)

    def paid(above: float, matrix: Tensor) -> float:
        decided = torch.where(p > above, positive, other)
        return float((part * matrix[labels, decided]).sum())

    found = []
    for factor in factors:
        matrix = costs.matrix.clone()
        miss = factor * (matrix[positive, other] - matrix[positive, positive])
        matrix[positive, other] = matrix[positive, positive] + miss
        alarm = matrix[other, positive] - matrix[other, other]
        threshold = float(alarm / (alarm + miss))
        kept, right = paid(curve.threshold, matrix), paid(threshold, matrix)
        found.append(Sensitivity(factor, threshold, kept, right))
    return found


def _of_class(
    c: int, log_probs: Tensor, labels: Tensor, weights: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the probability of a class, the labels, and weights that sum to 1, on the CPU."""
    p = log_probs.detach().cpu().double().exp()[:, c]
    part = torch.ones_like(p) if weights is None else weights.detach().cpu().double()
    return p, labels.cpu().long(), part / part.sum()


def _number(value: float) -> str:
    return f"{value:.3g}"
