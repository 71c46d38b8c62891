import math

import numpy as np
import pytest
import torch
from sklearn import metrics
from torch.testing import assert_close

from funcloss.decisions import (
    DecisionRule,
    calibration_error,
    make_costs,
    make_metrics,
    reliability,
    score,
)


def problem(n, classes, *, rough=False, seed=0):
    """Return probabilities, labels and weights; rough: many probabilities are equal."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(classes, size=n)
    scores = rng.normal(size=(n, classes)) + 1.5 * np.eye(classes)[labels]
    if rough:
        scores = scores.round()
    probs = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
    return probs, labels, rng.uniform(0.1, 2, n)


@pytest.mark.parametrize("rough", [False, True], ids=["distinct", "ties"])
@pytest.mark.parametrize("weighted", [False, True], ids=["equal", "weighted"])
@pytest.mark.parametrize("classes", [2, 3, 7])
def test_the_metrics_are_scikit_learns_and_those_of_plain_loops(classes, weighted, rough):
    probs, labels, weights = problem(200, classes, rough=rough)
    log_probs = torch.tensor(probs).log()
    probs = log_probs.exp().numpy()  # so that what is equal stays so
    weights = weights if weighted else None
    given = None if weights is None else torch.tensor(weights)
    got = make_metrics(log_probs, torch.tensor(labels), given)
    auc, precision = (
        np.array([by(labels == c, probs[:, c], sample_weight=weights) for c in range(classes)])
        for by in (metrics.roc_auc_score, metrics.average_precision_score)
    )
    assert_close(got.auc.numpy(), auc, atol=1e-12, rtol=0)
    assert_close(got.average_precision.numpy(), precision, atol=1e-12, rtol=0)
    assert got.mean_auc == pytest.approx(auc.mean())
    assert got.mean_average_precision == pytest.approx(precision.mean())
    assert got.log_score == pytest.approx(
        metrics.log_loss(labels, probs, sample_weight=weights, labels=range(classes))
    )
    w = np.ones(200) if weights is None else weights
    squares = [
        sum((p[c] - (y == c)) ** 2 for c in range(classes))
        for p, y in zip(probs, labels, strict=True)
    ]
    assert got.brier_score == pytest.approx(np.average(squares, weights=w))
    if classes == 2:
        of_one = metrics.brier_score_loss(labels, probs[:, 1], sample_weight=weights)
        assert got.brier_score == pytest.approx(2 * of_one)


def test_the_reliability_is_that_of_a_loop_over_the_bins():
    probs, labels, weights = problem(300, 4, seed=1)
    got = reliability(torch.tensor(probs).log(), torch.tensor(labels), torch.tensor(weights))
    confidence, right = probs.max(1), probs.argmax(1) == labels
    error = 0.0
    for k in range(15):
        inside = (confidence > k / 15) & (confidence <= (k + 1) / 15)
        assert int(got.count[k]) == inside.sum()
        if not inside.any():
            assert got.confidence[k].isnan()
            assert got.accuracy[k].isnan()
            continue
        means = [np.average(v[inside], weights=weights[inside]) for v in (confidence, right)]
        assert [float(got.confidence[k]), float(got.accuracy[k])] == pytest.approx(means)
        share = weights[inside].sum() / weights.sum()
        assert float(got.share[k]) == pytest.approx(share)
        error += share * abs(means[0] - means[1])
    assert got.error == pytest.approx(error)
    found = calibration_error(
        torch.tensor(probs).log(), torch.tensor(labels), torch.tensor(weights)
    )
    assert found == got.error


COSTS = make_costs(("a", "b", "c"), class_cost={"c": 5.0})


@pytest.mark.parametrize("prior", [None, [0.6, 0.3, 0.1]], ids=["counted", "prior"])
def test_an_evaluation_measures_the_probabilities_that_its_rule_decides_by(prior):
    probs, labels, _ = problem(120, 3)
    rule = DecisionRule(COSTS, temperature=2.0, log_shift=torch.tensor([0.0, 0.5, -1.0]))
    given = None if prior is None else torch.tensor(prior)
    found = score(torch.tensor(probs).log(), torch.tensor(labels), rule, prior=given)
    counts = np.bincount(labels)
    weights = (np.ones(3) if prior is None else prior / counts)[labels]
    shifted = np.sqrt(probs) * np.exp([0.0, 0.5, -1.0])
    shifted /= shifted.sum(1, keepdims=True)
    theirs = metrics.roc_auc_score(labels == 2, shifted[:, 2], sample_weight=weights)
    assert float(found.metrics.auc[2]) == pytest.approx(theirs, abs=1e-6)  # a prior in float32
    assert found.metrics.log_score == pytest.approx(
        metrics.log_loss(labels, shifted, sample_weight=weights), abs=1e-6
    )
    assert found.metrics.reliability.error == found.calibrated_error


def test_a_class_without_examples_is_nan_and_left_out_of_the_means():
    probs, labels, _ = problem(60, 4)
    labels = labels % 3
    got = make_metrics(torch.tensor(probs).log(), torch.tensor(labels))
    for values, mean in (
        (got.auc, got.mean_auc),
        (got.average_precision, got.mean_average_precision),
    ):
        assert values.isnan().tolist() == [False, False, False, True]
        assert mean == pytest.approx(float(values[:3].mean()))


def test_a_class_of_prior_0_is_as_if_it_were_absent():
    probs, labels, _ = problem(90, 3)
    rule = DecisionRule(COSTS)
    kept = torch.tensor(labels) < 2
    logits, prior = torch.tensor(probs).log(), torch.tensor([0.5, 0.5, 0.0])
    whole = score(logits, torch.tensor(labels), rule, prior=prior).metrics
    part = score(logits[kept], torch.tensor(labels)[kept], rule, prior=prior).metrics
    assert whole.auc[2].isnan()
    assert_close(whole.auc, part.auc, equal_nan=True)
    assert (whole.brier_score, whole.log_score) == pytest.approx((part.brier_score, part.log_score))
    assert torch.equal(whole.reliability.count, part.reliability.count)


@pytest.mark.parametrize("n", [1, 5])
def test_of_a_single_class_the_areas_are_nan_and_the_rest_is_known(n):
    got = make_metrics(torch.tensor([[0.9, 0.1]] * n).log(), torch.zeros(n).long())
    assert got.auc.isnan().all()
    assert got.average_precision.isnan().all()
    assert math.isnan(got.mean_auc)
    assert math.isnan(got.mean_average_precision)
    assert got.brier_score == pytest.approx(0.02, rel=1e-5)
    assert got.log_score == pytest.approx(-math.log(0.9), rel=1e-5)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_model_that_diverged_has_nan_metrics(bad):
    logits = torch.zeros(4, 3)
    logits[0, 1] = bad
    got = score(logits, torch.tensor([0, 1, 2, 0]), DecisionRule(COSTS)).metrics
    assert got.auc.isnan().all()
    assert math.isnan(got.brier_score)
    assert math.isnan(got.log_score)


def test_what_was_ruled_out_and_happened_has_no_finite_log_score():
    log_probs = torch.tensor([[0.0, -math.inf], [-math.inf, 0.0], [0.0, -math.inf]])
    got = make_metrics(log_probs, torch.tensor([0, 1, 1]))
    assert got.log_score == math.inf
    assert got.brier_score == pytest.approx(2 / 3)
    assert got.auc.tolist() == pytest.approx([0.75, 0.75])
