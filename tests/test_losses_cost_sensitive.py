"""The losses of a cost matrix: what they reduce to, what their rows do, what they decide."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.func import grad, jacrev, vmap
from torch.testing import assert_close

from funcloss import mean
from funcloss.losses.cost_sensitive import (
    cost_hinge,
    expected_cost,
    log_bilinear,
    one_sided_decision,
    one_sided_regression,
    softmax_margin,
)

LOSSES = [expected_cost, log_bilinear, softmax_margin, cost_hinge, one_sided_regression]
MISTAKES = 1 - torch.eye(5, dtype=torch.float64)  # every mistake costs 1
LABELS = torch.arange(50) % 5


COSTS = 0.1 + 3 * torch.rand(5, 5, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
COSTS = COSTS * MISTAKES


def logits_of(kind: str, n: int = 50) -> torch.Tensor:
    logits = torch.randn(n, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    if kind == "ties":
        return logits.round()
    scale = {"random": 3.0, "tiny": 1e-9, "zeros": 0.0, "large": 1e4}[kind]
    return logits * scale


def of_costs(loss, costs):
    return lambda z, y: loss(z, y, cost_matrix=costs.to(z))


def torch_cross_entropy(z, y):
    return F.cross_entropy(z, y, reduction="none")


def torch_probability_of_mistake(z, y):
    return torch.where(F.one_hot(y, 5).bool(), 0, z.softmax(-1)).sum(-1)


def torch_multi_margin_of_the_worst(z, y):
    """The two-class multi-margin of torch, over the label and the worst of the others."""
    other = torch.where(F.one_hot(y, 5).bool(), -torch.inf, z).amax(-1)
    pair = torch.stack([z.gather(-1, y[:, None])[:, 0], other], -1)
    return 2 * F.multi_margin_loss(pair, torch.zeros_like(y), reduction="none")


def torch_one_against_all(z, y):
    rows = MISTAKES.to(z)[y]  # the softplus of x is torch's binary cross-entropy to 0, of -x to 1
    return F.binary_cross_entropy_with_logits(z - rows, rows, reduction="none").sum(-1)


MEETINGS = {
    "expected_cost, mistakes": (of_costs(expected_cost, MISTAKES), torch_probability_of_mistake),
    "softmax_margin, no costs": (of_costs(softmax_margin, 0 * MISTAKES), torch_cross_entropy),
    "softmax_margin, even costs": (
        of_costs(softmax_margin, torch.full((5, 5), 1.5)),
        lambda z, y: torch_cross_entropy(z, y) + 1.5,
    ),
    "cost_hinge, mistakes": (of_costs(cost_hinge, MISTAKES), torch_multi_margin_of_the_worst),
    "cost_hinge, no costs": (
        of_costs(cost_hinge, 0 * MISTAKES),
        lambda z, y: z.amax(-1) - z.gather(-1, y[:, None])[:, 0],  # the perceptron's
    ),
    "one_sided_regression, mistakes": (
        of_costs(one_sided_regression, MISTAKES),
        torch_one_against_all,
    ),
}


@pytest.mark.parametrize("kind", ["random", "tiny", "zeros", "ties", "large"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
@pytest.mark.parametrize(("ours", "theirs"), MEETINGS.values(), ids=MEETINGS.keys())
def test_at_plain_costs_it_is_another_loss(ours, theirs, dtype, tolerance, kind):
    logits = logits_of(kind).to(dtype)
    got, expected = ours(logits, LABELS), theirs(logits, LABELS)
    size = expected.abs().maximum(logits.abs().amax(-1)).clamp(min=1.0)
    assert ((got - expected).abs() <= tolerance * size).all()
    if kind in ("random", "large"):  # elsewhere are kinks, which have no one gradient
        got, expected = (grad(lambda z: f(z, LABELS).sum())(logits) for f in (ours, theirs))  # noqa: B023
        assert ((got - expected).abs() <= 4 * tolerance * size[:, None]).all()


@pytest.mark.parametrize("loss", [log_bilinear, softmax_margin], ids=lambda loss: loss.__name__)
def test_of_two_classes_it_is_cross_entropy_at_the_neutral_costs(loss):
    logits, labels = logits_of("random")[:, :2], LABELS % 2
    plain = torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=torch.float64)
    costs = plain if loss is log_bilinear else 0 * plain
    values = loss(logits, labels, cost_matrix=costs)
    assert_close(values, torch_cross_entropy(logits, labels), rtol=1e-12, atol=1e-12)
    assert_close(mean(values), F.cross_entropy(logits, labels))
    assert_close(values.sum(), F.cross_entropy(logits, labels, reduction="sum"))


def test_the_gradients_that_the_docstrings_state():
    logits, rows = logits_of("random"), COSTS[LABELS]
    p, label = logits.softmax(-1), F.one_hot(LABELS, 5)
    expected = {
        expected_cost: p * (rows - (p * rows).sum(-1, keepdim=True)),
        softmax_margin: (logits + rows).softmax(-1) - label,
        cost_hinge: F.one_hot((logits + rows).argmax(-1), 5) - label,
        one_sided_regression: (2 * label - 1) * ((2 * label - 1) * (logits - rows)).sigmoid(),
    }
    ratio = rows * p / (1 - p)
    expected[log_bilinear] = ratio - p * ratio.sum(-1, keepdim=True)
    for loss in LOSSES:
        got = grad(lambda z: loss(z, LABELS, cost_matrix=COSTS).sum())(logits)  # noqa: B023
        assert_close(got, expected[loss].double(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.__name__)
def test_costs_of_another_class_never_matter(loss):
    logits, costs = logits_of("random", 5), COSTS
    slopes = jacrev(lambda m: loss(logits, torch.arange(5), cost_matrix=m))(costs)
    own = torch.eye(5, dtype=torch.bool)
    assert (slopes[~own] == 0).all()
    assert (slopes[own] != 0).any(-1).all()
    mistakes = slopes[own][~own].reshape(5, 4)
    assert (mistakes >= 0).all()


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.__name__)
def test_a_sweep_maps_over_cost_matrices(loss):
    logits, factors = logits_of("random"), torch.tensor([0.5, 1.0, 4.0], dtype=torch.float64)

    def at(factor):
        return loss(logits, LABELS, cost_matrix=factor * COSTS)

    def slope_of_one(z, y, costs):
        return grad(lambda m: loss(z, y, cost_matrix=m))(costs)

    assert_close(vmap(at)(factors), torch.stack([at(factor) for factor in factors]))
    each = vmap(slope_of_one, in_dims=(0, 0, None))(logits, LABELS, COSTS)
    whole = grad(lambda m: loss(logits, LABELS, cost_matrix=m).sum())(COSTS)
    assert_close(each.sum(0), whole)


def test_elkan_decides_by_his_threshold():
    # Elkan 2001, eq. 2: decide 1 above p* = (c10 - c00) / (c10 - c00 + c01 - c11), where his c_ij
    # is the cost of deciding i when j is true.
    costs = torch.tensor([[0.5, 3.0], [9.0, 1.0]], dtype=torch.float64)  # rows true
    threshold = (3.0 - 0.5) / (3.0 - 0.5 + 9.0 - 1.0)

    def slope(p):
        def total(z):
            zero, one = expected_cost(z.expand(2, 2), torch.arange(2), cost_matrix=costs)
            return (1 - p) * zero + p * one

        return grad(total)(torch.tensor([0.3, -0.4], dtype=torch.float64))

    assert_close(slope(threshold), torch.zeros(2, dtype=torch.float64))
    assert slope(threshold + 0.05)[1] < 0 < slope(threshold + 0.05)[0]
    assert slope(threshold - 0.05)[1] > 0 > slope(threshold - 0.05)[0]


def test_known_values_of_a_binary_decision():
    # Deciding by p = 1/4 and 3/4, where a miss costs 9 and a false alarm 1.
    logits = torch.tensor([0.0, math.log(3)]).expand(2, 2)
    labels, costs = torch.tensor([0, 1]), torch.tensor([[0.0, 1.0], [9.0, 0.0]])
    assert_close(expected_cost(logits, labels, cost_matrix=costs), torch.tensor([0.75, 2.25]))
    expected = torch.tensor([math.log(4), 9 * math.log(4 / 3)])
    assert_close(log_bilinear(logits, labels, cost_matrix=costs), expected)
    expected = torch.tensor([math.log1p(3 * math.e), math.log1p(math.exp(9) / 3)])
    assert_close(softmax_margin(logits, labels, cost_matrix=costs), expected)
    expected = torch.tensor([1 + math.log(3), 9 - math.log(3)])
    assert_close(cost_hinge(logits, labels, cost_matrix=costs), expected)


def test_hinges_bound_the_cost_of_the_decision():
    logits, costs = logits_of("random", 200), COSTS
    labels = torch.arange(200) % 5
    hinge = cost_hinge(logits, labels, cost_matrix=costs)
    smooth = softmax_margin(logits, labels, cost_matrix=costs)
    paid = costs[labels, logits.argmax(-1)]
    assert (hinge >= paid).all()
    assert (smooth > hinge).all()
    assert (smooth <= hinge + math.log(5)).all()


def test_one_sided_errors_bound_the_cost_of_the_decision():
    # Tu and Lin 2010, for costs whose least is 0.
    estimates, costs = logits_of("random", 200), COSTS
    labels = torch.arange(200) % 5
    decided = one_sided_decision(estimates)
    assert torch.equal(decided, estimates.argmin(-1))
    values = one_sided_regression(estimates, labels, cost_matrix=costs)
    assert (values >= costs[labels, decided]).all()
    assert torch.equal(one_sided_decision(costs), torch.arange(5))


def test_one_sided_regression_takes_every_cheapest_decision_as_such():
    costs = torch.tensor([[0.0, 0.0, 2.0]])
    push = grad(lambda r: one_sided_regression(r, torch.tensor(0), cost_matrix=costs))
    assert push(torch.zeros(3)).sign().tolist() == [1.0, 1.0, -1.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1e4, -1e4])
def test_log_bilinear_is_exact_at_both_ends(dtype, size):
    costs = COSTS.to(dtype)
    for wrong in range(5):
        logits = torch.zeros(5, dtype=dtype)
        logits[wrong] = size
        values, slopes = vmap(
            lambda y: (
                log_bilinear(logits, y, cost_matrix=costs),  # noqa: B023
                grad(lambda z: log_bilinear(z, y, cost_matrix=costs))(logits),  # noqa: B023
            )
        )(torch.arange(5))
        others = costs.sum(-1) - costs[:, wrong]  # diagonal 0; spread evenly at -1e4
        sure = costs[:, wrong] * (1e4 - math.log(4))
        even = others * math.log(4 / 3)
        expected = sure if size > 0 else even
        assert_close(values, expected, rtol=1e-5 if dtype == torch.float32 else 1e-10, atol=1e-6)
        assert slopes.isfinite().all()


def test_log_bilinear_where_only_the_label_is_possible():
    logits = torch.tensor([2.0, -math.inf, -math.inf])
    of = lambda z: log_bilinear(z, torch.tensor(0), cost_matrix=1 - torch.eye(3))  # noqa: E731
    assert of(logits) == 0
    assert (grad(of)(logits) == 0).all()
    assert log_bilinear(torch.zeros(1), torch.tensor(0), cost_matrix=torch.ones(1, 1)) == 0


def test_a_matrix_may_have_decisions_that_are_no_class():
    logits = torch.cat([logits_of("random"), torch.full((50, 1), -1e4).double()], -1)
    costs = torch.cat([COSTS, torch.full((5, 1), 0.2).double()], -1)
    for loss in (expected_cost, log_bilinear, softmax_margin, cost_hinge):
        # A decision that is never taken changes nothing.
        got = loss(logits, LABELS, cost_matrix=costs)
        assert_close(got, loss(logits[:, :5], LABELS, cost_matrix=costs[:, :5]))


FIVE, ZERO = torch.zeros(2, 5), torch.zeros(2, dtype=torch.long)


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.__name__)
@pytest.mark.parametrize(
    ("costs", "error", "message"),
    [
        (torch.ones(5), ValueError, r"cost_matrix must have shape \(classes, 5\), .* got \(5,\)"),
        (torch.ones(5, 4), ValueError, r"one column per decision, got \(5, 4\)"),
        (torch.ones(5, 5).long(), TypeError, "cost_matrix must be floating point, got torch.int64"),
    ],
)
def test_a_wrong_matrix_is_refused(loss, costs, error, message):
    with pytest.raises(error, match=f"{loss.__name__}: .*{message}"):
        loss(FIVE, ZERO, cost_matrix=costs)


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        ((ZERO, ZERO), TypeError, "cost_estimates must be floating point, got torch.int64"),
        ((FIVE, FIVE), TypeError, "labels must hold integer classes"),
        ((FIVE[0, 0], ZERO[0]), ValueError, "cost_estimates must have a decision axis"),
        ((FIVE, ZERO[0]), ValueError, r"labels must have shape \(2,\) to match cost_estimates"),
    ],
)
def test_wrong_estimates_are_refused(args, error, message):
    with pytest.raises(error, match=f"one_sided_regression: {message}"):
        one_sided_regression(*args, cost_matrix=torch.ones(5, 5))


@pytest.mark.parametrize("loss", [log_bilinear, softmax_margin, cost_hinge])
def test_more_classes_than_decisions_are_refused(loss):
    with pytest.raises(ValueError, match="must have a decision for each class, got"):
        loss(FIVE, ZERO, cost_matrix=torch.ones(6, 5))
    assert expected_cost(FIVE, ZERO, cost_matrix=torch.ones(6, 5)).tolist() == [1.0, 1.0]


# -- a row of costs per example --------------------------------------------------------------------


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.__name__)
def test_costs_of_each_example_are_its_own_row(loss):
    logits, rows = logits_of("random"), COSTS[LABELS]
    expected = loss(logits, LABELS, cost_matrix=COSTS)
    assert_close(loss(logits, LABELS, costs=rows), expected)
    amounts = torch.linspace(0.5, 9.0, 50, dtype=torch.float64)
    own = loss(logits, LABELS, costs=amounts[:, None] * rows)
    alone = [
        loss(z, y, cost_matrix=a * COSTS) for z, y, a in zip(logits, LABELS, amounts, strict=True)
    ]
    assert_close(own, torch.stack(alone))
    assert_close(vmap(lambda z, y, c: loss(z, y, costs=c))(logits, LABELS, rows), expected)
    slopes = vmap(grad(lambda z, y, c: loss(z, y, costs=c)))(logits, LABELS, rows)
    assert_close(slopes, grad(lambda z: loss(z, LABELS, cost_matrix=COSTS).sum())(logits))
    by_cost = grad(lambda c: loss(logits, LABELS, costs=c).sum())(rows)
    by_matrix = grad(lambda m: loss(logits, LABELS, cost_matrix=m).sum())(COSTS)
    assert_close(torch.zeros(5, 5).double().index_add(0, LABELS, by_cost), by_matrix)


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.__name__)
def test_masked_costs_and_labels_may_hold_anything(loss):
    logits, rows, where = logits_of("random"), COSTS[LABELS], LABELS != 2
    labels = torch.where(where, LABELS, -100)
    rows = torch.where(where[:, None], rows, torch.nan)
    values = loss(logits, labels, costs=rows, where=where)
    expected = loss(logits, LABELS, cost_matrix=COSTS)
    assert_close(values, torch.where(where, expected, 0.0))
    slope = grad(lambda z: loss(z, labels, costs=rows, where=where).sum())(logits)
    assert (slope[~where] == 0).all()


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.__name__)
def test_one_kind_of_costs_is_given_and_fits(loss):
    rows = torch.ones(2, 5)
    for given, came in (
        ({}, "neither"),
        ({"cost_matrix": torch.ones(5, 5), "costs": rows}, "both"),
    ):
        with pytest.raises(ValueError, match=f"{loss.__name__}: give either .* got {came}"):
            loss(FIVE, ZERO, **given)
    with pytest.raises(ValueError, match=r"costs must have shape \(2, 5\) to match"):
        loss(FIVE, ZERO, costs=torch.ones(5))
    with pytest.raises(TypeError, match="costs must be floating point"):
        loss(FIVE, ZERO, costs=rows.long())
    for name in ("costs", "cost_matrix"):
        with pytest.raises(TypeError, match=f"{name} must be a tensor, got list"):
            loss(FIVE, ZERO, **{name: [[1.0] * 5] * 5})


# -- labels and infinities -------------------------------------------------------------------------


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.__name__)
@pytest.mark.parametrize("label", [-100, -1, 4, 5])
def test_the_classes_are_the_rows_and_a_label_beyond_them_is_refused(loss, label):
    logits, costs = torch.zeros(2, 5), torch.ones(4, 5)  # four classes and to abstain
    labels = torch.tensor([1, label])
    assert loss.classes(logits, cost_matrix=costs) == 4
    assert loss.classes(logits, costs=logits) == 5
    with pytest.raises(IndexError, match=rf"{loss.__name__}: labels must be in \[0, 4\)"):
        loss(logits, labels, cost_matrix=costs)
    compiled = torch.compile(loss, backend="aot_eager")
    assert compiled(logits, labels, cost_matrix=costs).isnan().tolist() == [False, True]
    where = torch.tensor([True, False])
    assert loss(logits, labels, cost_matrix=costs, where=where)[1] == 0


INF = math.inf
AT_INFINITY = [  # of label 0, and costs of 0, 1 and 0
    (expected_cost, [0.0, -INF, 0.0], 0.0),
    (expected_cost, [-INF, 0.0, -INF], 1.0),
    (log_bilinear, [0.0, -INF, -INF], 0.0),
    (log_bilinear, [-INF, 0.0, -INF], INF),
    (log_bilinear, [-INF, -INF, 0.0], 0.0),  # certain of what costs nothing
    (softmax_margin, [0.0, -INF, 0.0], math.log(2)),
    (softmax_margin, [-INF, 0.0, 0.0], INF),
    (cost_hinge, [0.0, -INF, -INF], 0.0),
    (cost_hinge, [-INF, 0.0, -INF], INF),
    (cost_hinge, [INF, 0.0, 0.0], 0.0),
    (one_sided_regression, [-INF, INF, INF], 0.0),
    (one_sided_regression, [INF, INF, INF], INF),
]


@pytest.mark.parametrize(("loss", "logits", "expected"), AT_INFINITY)
def test_infinite_logits_cost_what_their_limit_costs(loss, logits, expected):
    rows, logits = torch.tensor([0.0, 1.0, 0.0]), torch.tensor(logits)
    if loss is one_sided_regression:
        rows = torch.tensor([0.0, 1.0, 1.0])
    value = loss(logits, torch.tensor(0), costs=rows)
    assert_close(value, torch.tensor(expected))
    if math.isfinite(expected):
        slope = grad(lambda z: loss(z, torch.tensor(0), costs=rows))(logits)
        assert slope.isfinite().all()


def test_a_decision_that_is_never_taken_may_cost_anything():
    logits, rows = torch.tensor([0.0, -INF, 0.0]), torch.tensor([1.0, INF, 3.0])
    assert expected_cost(logits, torch.tensor(0), costs=rows) == 2.0
    slope = grad(lambda z: expected_cost(z, torch.tensor(0), costs=rows))(logits)
    assert_close(slope, torch.tensor([-0.5, 0.0, 0.5]))
