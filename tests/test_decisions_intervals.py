import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch.testing import assert_close

from funcloss.decisions import cost_interval, mean_interval, seed_interval, student, wilson

COUNTS = [(h, n) for n in (1, 2, 5, 10, 37, 1000, 100_000) for h in {0, 1, n // 3, n - 1, n}]


@pytest.mark.parametrize(("hits", "trials"), COUNTS)
def test_wilson_is_scipys(hits, trials):
    expected = stats.binomtest(hits, trials).proportion_ci(method="wilson")
    low, high = wilson(torch.tensor(hits), torch.tensor(trials))
    assert_close((float(low), float(high)), (expected.low, expected.high), atol=1e-12, rtol=0)


def test_wilson_of_nothing_is_nan_and_of_all_ends_at_the_bounds():
    low, high = wilson(torch.tensor([0, 0, 7]), torch.tensor([0, 3, 7]))
    assert low.isnan().tolist() == high.isnan().tolist() == [True, False, False]
    assert (float(low[1]), float(high[2])) == (0.0, 1.0)


def test_students_quantile_is_scipys_between_whole_numbers_too():
    freedom = np.concatenate([np.arange(1, 201), np.linspace(1, 40, 400), [1e3, 1e6, 1e12]])
    got = [student(float(df)) for df in freedom]
    assert_close(np.array(got), stats.t.ppf(0.975, freedom), atol=2e-4, rtol=0)
    assert student(0.5) == student(1.0)


@pytest.mark.parametrize(("hits", "trials"), COUNTS)
@pytest.mark.parametrize("price", [1.0, 20.0, -3.0])
def test_the_cost_of_two_decisions_of_a_class_has_jeffreys_interval(hits, trials, price):
    confusion = torch.tensor([[trials - hits, hits], [0, 0]])
    costs = torch.tensor([[0.0, price], [1e9, 0.0]])  # a class that does not occur costs nothing
    ends = price * stats.beta.ppf([0.025, 0.975], hits + 0.5, trials - hits + 0.5)
    value = price * hits / trials
    expected = (value, min(*ends, value), max(*ends, value))
    for prior in (None, torch.tensor([0.3, 0.7])):
        got = cost_interval(confusion, costs, prior)
        assert_close(tuple(got), expected, atol=1e-9, rtol=1e-6)
    if hits in (0, trials):  # a rate that was not seen is possible, 0 and 1 are, too
        assert value in (got.low, got.high)


def table(rng, classes, decisions, n):
    """Return counts and costs, some of them below 0, of a random classifier."""
    rates = rng.dirichlet(np.full(classes * decisions, 0.2))
    counts = rng.multinomial(n, rates).reshape(classes, decisions)
    return torch.tensor(counts), torch.tensor(rng.normal(1, 3, (classes, decisions)).round(1))


@pytest.mark.parametrize("n", [1, 2, 30, 3000])
@pytest.mark.parametrize("known", [False, True], ids=["counted", "known prior"])
def test_the_interval_of_a_cost_holds_the_mean_and_lies_within_what_is_possible(known, n):
    rng = np.random.default_rng(n)
    for classes, decisions in [(1, 1), (1, 3), (2, 2), (4, 6), (30, 30)]:
        for _ in range(20):
            counts, costs = table(rng, classes, decisions, n)
            prior = torch.tensor(rng.dirichlet(np.ones(classes))) if known else None
            seen = counts.sum(1) > 0
            part = counts.sum(1)[seen].double() if prior is None else prior[seen]
            part = part / part.sum()
            low, high = costs[seen].min(), costs[seen].max()
            if known:
                low, high = part @ costs[seen].amin(1), part @ costs[seen].amax(1)
            paid = (counts * costs).sum(1)[seen] / counts.sum(1)[seen]
            got = cost_interval(counts, costs, prior)
            assert got.value == pytest.approx(float(part @ paid))
            slack = 1e-9
            assert low - slack <= got.low <= got.value <= got.high <= high + slack
            assert got.low < got.high or low == high


@pytest.mark.parametrize(("n", "off"), [(20, 0.1), (400, 0.03)])
@pytest.mark.parametrize("seed", range(4))
def test_the_interval_of_a_cost_is_nearly_that_of_draws_from_the_posterior(seed, n, off):
    """One more example, half of it at the least and half at the largest cost: Dirichlet."""
    rng = np.random.default_rng(seed)
    counts, costs = table(rng, 3, 4, n)
    cells = counts.flatten().double().numpy()
    values = costs.flatten().numpy()
    seen = np.repeat(counts.sum(1).numpy() > 0, 4)
    cells[np.where(seen, values, np.inf).argmin()] += 0.5
    cells[np.where(seen, values, -np.inf).argmax()] += 0.5
    draws = rng.dirichlet(np.maximum(cells, 1e-12), 100_000) @ values
    _, low, high = cost_interval(counts, costs)
    assert_close(
        [low, high], np.quantile(draws, [0.025, 0.975]).tolist(), atol=off * (high - low), rtol=0
    )


@pytest.mark.parametrize("prior", [None, torch.tensor([1.0, 0.0])])
def test_without_an_example_the_cost_is_not_known(prior):
    confusion = torch.zeros(2, 2) if prior is None else torch.tensor([[0, 0], [1, 2]])
    assert all(map(math.isnan, cost_interval(confusion, torch.ones(2, 2), prior)))


COSTLY = torch.tensor([[0.0, 1.0], [20.0, 0.0]])
RATES = [(miss, alarm) for miss in (0.0, 0.05, 0.1, 0.3) for alarm in (0.02, 0.1)]


def held(low, truth, high):
    return low - 1e-12 <= truth <= high + 1e-12


@pytest.mark.parametrize("prior", [(52 / 70, 18 / 70), (0.9, 0.1), (0.5, 0.5)])
def test_the_cost_of_18_positives_and_52_negatives_is_held_at_95_percent(prior):
    """Exactly: of all tables there can be. Where no positive can be missed, they hold the rest."""
    tables = {
        (wrong, missed): cost_interval(
            torch.tensor([[52 - wrong, wrong], [missed, 18 - missed]]), COSTLY, torch.tensor(prior)
        )
        for wrong in range(16)  # of 52 at a rate of 0.1, more: 1e-4
        for missed in range(19)
    }
    for miss, alarm in RATES:
        truth = prior[0] * alarm + prior[1] * 20 * miss
        covered = sum(
            stats.binom.pmf(wrong, 52, alarm) * stats.binom.pmf(missed, 18, miss)
            for (wrong, missed), (_, low, high) in tables.items()
            if held(low, truth, high)
        )
        assert covered > 0.94, (miss, alarm)


CELLS = {
    "18 of 70, counted": (70, [52 / 70, 18 / 70], False, RATES),
    "two of 1,000, counted": (2000, [0.5, 0.5], False, [(0.0, 0.02), (0.1, 0.1)]),
    "two of 1,000, known": (2000, [0.5, 0.5], True, [(0.0, 0.02), (0.1, 0.1)]),
}


@pytest.mark.parametrize(("n", "parts", "known", "rates"), CELLS.values(), ids=CELLS)
def test_the_cost_of_a_sample_is_held_at_95_percent(n, parts, known, rates):
    rng, prior = np.random.default_rng(0), torch.tensor(parts) if known else None
    for miss, alarm in rates:
        inside = np.array([[1 - alarm, alarm], [miss, 1 - miss]])
        if known:
            rows = [
                rng.multinomial(round(n * p), r, 300) for p, r in zip(parts, inside, strict=True)
            ]
            drawn = np.stack(rows, 1)
        else:
            joint = np.array(parts)[:, None] * inside
            drawn = rng.multinomial(n, joint.flatten(), 300).reshape(-1, 2, 2)
        truth = parts[0] * alarm + parts[1] * 20 * miss
        found, often = np.unique(drawn, axis=0, return_counts=True)
        ends = [cost_interval(torch.tensor(t), COSTLY, prior)[1:] for t in found]
        covered = sum(
            k for (low, high), k in zip(ends, often, strict=True) if held(low, truth, high)
        )
        assert covered / 300 > 0.92, (miss, alarm)


@pytest.mark.parametrize("each", [1, 3, 10])
@pytest.mark.parametrize("known", [False, True], ids=["counted", "known prior"])
def test_many_classes_of_few_examples_do_not_add_up_to_a_bias(known, each):
    classes, rng = 200, np.random.default_rng(0)
    costs, prior = 1 - torch.eye(classes), torch.full((classes,), 1 / classes)
    truth = np.arange(classes).repeat(each)
    for error in (0.02, 0.3):
        found = []
        for _ in range(200):
            labels = truth if known else rng.integers(classes, size=len(truth))
            wrong = rng.random(len(truth)) < error
            made = np.where(wrong, (labels + 1) % classes, labels)
            cells = np.bincount(labels * classes + made, minlength=classes**2)
            confusion = torch.tensor(cells.reshape(classes, classes))
            found.append(cost_interval(confusion, costs, prior if known else None))
        covered = np.mean([low <= error <= high for _, low, high in found])
        assert covered > 0.9
        exact = 2 * 1.96 * math.sqrt(error * (1 - error) / len(truth))
        assert np.mean([high - low for _, low, high in found]) < 1.4 * exact


def test_a_mean_and_its_interval_end_within_what_is_possible():
    values = [0.8, 1.0]
    free = seed_interval(values)
    assert free.low < 0
    assert free.high > 1
    assert seed_interval(values, within=(0.0, 1.0)) == (0.9, 0.0, 1.0)
    assert seed_interval([0.5, 0.51], within=(0.0, 1.0)) == seed_interval([0.5, 0.51])
    paid = torch.tensor([[0.0, 0.0, 0.0, 8.0]])
    assert mean_interval(paid).low < 0
    bounded = mean_interval(paid, within=(0.0, 3.0))
    assert bounded == (2.0, 0.0, 3.0)
    assert math.isnan(seed_interval([0.5], within=(0.0, 1.0)).low)


def plain(values):
    """Return mean and interval of a sample as a textbook does."""
    low, high = stats.t.interval(0.95, len(values) - 1, np.mean(values), stats.sem(values))
    return float(np.mean(values)), float(low), float(high)


@pytest.mark.parametrize("n", [2, 3, 10, 500])
def test_of_one_seed_it_is_students_interval(n):
    values = np.random.default_rng(0).normal(3, 2, n)
    atol = 2e-4 * 2  # of the quantile, times the deviation
    assert_close(mean_interval(torch.tensor(values)[None]), plain(values), atol=atol, rtol=0)
    assert_close(seed_interval(values.tolist()), plain(values), atol=atol, rtol=0)
    assert_close(mean_interval(torch.tensor(values)[:, None]), plain(values), atol=atol, rtol=0)


def test_without_a_second_value_there_is_a_mean_and_no_interval():
    for interval in (mean_interval(torch.tensor([[2.0]])), seed_interval([2.0])):
        assert interval.value == 2.0
        assert math.isnan(interval.low + interval.high)
    assert all(math.isnan(x) for x in seed_interval([]))
    assert mean_interval(torch.full((3, 4), 2.0)) == (2.0, 2.0, 2.0)
    assert math.isnan(mean_interval(torch.tensor([[1.0, math.nan]])).low)


def loop(values, part, strata):
    """Return variance and Satterthwaite's freedom of one seed's stratified mean, by loops."""
    mean = sum(p * v for p, v in zip(part, values, strict=True))
    found = []
    for stratum in sorted(set(strata)):
        rows = [i for i, s in enumerate(strata) if s == stratum]
        n, share = len(rows), sum(part[i] for i in rows)
        centre = sum(part[i] * values[i] for i in rows) / share if n > 1 else mean
        square = sum(part[i] ** 2 * (values[i] - centre) ** 2 for i in rows)
        found.append((square * n / (n - 1) if n > 1 else square, max(n - 1, 1)))
    variance = sum(v for v, _ in found)
    return mean, variance, variance**2 / sum(v**2 / df for v, df in found)


@pytest.mark.parametrize("strata", [[0] * 12, [0, 1, 2] * 4, [0] * 7 + [2] * 4 + [5]])
def test_weights_and_strata_are_those_of_a_plain_loop(strata):
    rng = np.random.default_rng(0)
    values, weights = rng.exponential(size=12), rng.uniform(1, 3, 12)
    mean, variance, freedom = loop(values, weights / weights.sum(), strata)
    half = stats.t.ppf(0.975, freedom) * math.sqrt(variance)
    got = mean_interval(
        torch.tensor(values)[None], torch.tensor(weights), strata=torch.tensor(strata)
    )
    assert_close(got, (mean, mean - half, mean + half), atol=2e-4, rtol=0)


def test_a_stratum_of_no_weight_changes_nothing():
    values, weights = torch.tensor([[1.0, 2.0, 4.0, 9.0]]), torch.tensor([1.0, 1.0, 1.0, 0.0])
    strata = torch.tensor([0, 0, 0, 1])
    expected = mean_interval(values[:, :3])
    assert_close(mean_interval(values, weights, strata=strata), expected)


def covered(make, truth=0.0, draws=2000):
    """Return how often the interval of ``make(rng)`` holds the truth, and its mean width."""
    rng = np.random.default_rng(0)
    found = [make(rng) for _ in range(draws)]
    return (
        np.mean([low <= truth <= high for _, low, high in found]),
        np.mean([high - low for _, low, high in found]),
    )


@pytest.mark.parametrize("n", [5, 40])
def test_one_seed_covers_at_95_percent(n):
    rate, _ = covered(lambda rng: mean_interval(torch.tensor(rng.normal(size=(1, n)))))
    assert abs(rate - 0.95) < 0.02


@pytest.mark.slow
@pytest.mark.parametrize(("seed", "example"), [(1.0, 0.3), (0.3, 1.0), (0.3, 6.0), (1.0, 6.0)])
def test_five_seeds_cover_at_95_percent_what_seeds_and_examples_vary(seed, example):
    def make(rng):
        values = seed * rng.normal(size=(5, 1)) + example * rng.normal(size=(1, 60))
        return mean_interval(torch.tensor(values))

    rate, _ = covered(make)
    assert abs(rate - 0.95) < 0.02


def test_what_varies_with_seed_and_example_together_makes_it_wide_never_narrow():
    rate, width = covered(lambda rng: mean_interval(torch.tensor(rng.normal(size=(5, 60)))))
    assert rate > 0.94
    exact = 2 * 1.96 / math.sqrt(300)
    assert exact < width < 2 * exact


def test_a_paired_difference_is_narrower_than_two_unpaired_means():
    rng = np.random.default_rng(0)
    hard = rng.exponential(size=200)  # examples that cost either model much
    one, two = (hard + 0.1 * rng.normal(size=(3, 200)) for _ in range(2))
    a, b = mean_interval(torch.tensor(one)), mean_interval(torch.tensor(two))
    paired = mean_interval(torch.tensor(one - two))
    assert paired.value == pytest.approx(a.value - b.value)
    unpaired = math.hypot(a.high - a.low, b.high - b.low)
    assert paired.high - paired.low < unpaired / 4


def test_known_parts_of_strata_cover_at_95_percent_and_are_narrower():
    sizes, parts, means = [60, 12, 20], [0.2, 0.5, 0.3], [0.0, 5.0, -3.0]
    strata = torch.tensor(np.repeat([0, 1, 2], sizes))
    weights = torch.tensor(np.repeat(np.divide(parts, sizes), sizes))
    truth = float(np.dot(parts, means))

    def make(rng, **given):
        return mean_interval(
            torch.tensor(rng.normal(np.repeat(means, sizes)))[None], weights, **given
        )

    rate, width = covered(lambda rng: make(rng, strata=strata), truth)
    assert abs(rate - 0.95) < 0.02
    too_sure, too_wide = covered(make, truth)
    assert too_sure == 1.0
    assert too_wide > 2 * width
