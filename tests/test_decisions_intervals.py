import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch.testing import assert_close

from funcloss.decisions import mean_interval, seed_interval, student, wilson

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
