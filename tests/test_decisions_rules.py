import math

import numpy as np
import pytest
import torch
from scipy import optimize
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.metrics import make_scorer
from sklearn.model_selection import TunedThresholdClassifierCV
from torch.testing import assert_close

from funcloss.decisions import (
    expected_costs,
    fit_temperature,
    log_posterior,
    min_cost_decisions,
    posterior_shift,
)


def random(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def zero_one(classes):
    return 1.0 - torch.eye(classes, dtype=torch.float64)


@pytest.mark.parametrize("temperature", [0.3, 1.0, torch.tensor(4.0)])
@pytest.mark.parametrize("shift", [None, [0.0, 1.0, -2.0], [0.0, -math.inf, 1.0]])
def test_posteriors_are_a_shifted_softmax(temperature, shift):
    logits = random(2, 5, 3)
    got = log_posterior(
        logits, temperature=temperature, log_shift=None if shift is None else torch.tensor(shift)
    ).exp()
    weights = np.exp(shift or [0.0] * 3)
    power = np.exp(logits.numpy() / float(temperature)) * weights
    assert_close(got, torch.from_numpy(power / power.sum(-1, keepdims=True)), atol=1e-12, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_posteriors_of_low_precision_are_computed_in_float64(dtype):
    logits, shift = (random(4, 3) * 1e4).to(dtype), torch.tensor([0.0, 1.0, 2.0])
    got = log_posterior(logits, log_shift=shift.to(dtype))
    assert_close(got, log_posterior(logits.double(), log_shift=shift), rtol=0, atol=0)


PRIORS = [
    pytest.param([0.2, 0.5, 0.3], [0.6, 0.3, 0.1], id="another"),
    pytest.param([0.2, 0.5, 0.3], [0.5, 0.0, 0.5], id="one-never-used"),
    pytest.param([1 / 3, 1 / 3, 1 / 3], [1.0, 0.0, 0.0], id="one-only"),
    pytest.param([0.5, 0.0, 0.5], [0.7, 0.0, 0.3], id="one-never-learnt"),
]


@pytest.mark.parametrize("weights", [None, [1.0, 4.0, 0.5]])
@pytest.mark.parametrize(("train_prior", "prior"), PRIORS)
def test_a_shift_turns_the_posterior_of_a_weighted_training_into_that_of_use(
    train_prior, prior, weights
):
    likelihood = random(50, 3).exp()  # of the example under each class

    def posterior(part):
        joint = likelihood * torch.as_tensor(part, dtype=torch.float64)
        return joint / joint.sum(-1, keepdim=True)

    learnt = posterior(train_prior)
    class_weights = None if weights is None else torch.tensor(weights)
    if weights is not None:  # where weighted cross-entropy is least
        learnt = learnt * class_weights
    shift = posterior_shift(
        prior=torch.tensor(prior),
        train_prior=torch.tensor(train_prior),
        class_weights=class_weights,
    )
    got = log_posterior(learnt.log(), log_shift=shift).exp()
    assert_close(got, posterior(prior), atol=1e-6, rtol=0)  # priors came in float32


def test_a_shift_takes_class_weights_back():
    probs, weights = random(20, 4).softmax(-1), torch.tensor([1.0, 7.0, 0.25, 3.0])
    shift = posterior_shift(class_weights=weights)
    assert_close(log_posterior((probs * weights).log(), log_shift=shift).exp(), probs)


def test_weighted_cross_entropy_is_least_where_the_shift_says():
    probs = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64)
    weights = torch.tensor([1.0, 2.0, 9.0], dtype=torch.float64)

    def loss(logits):
        return -float((weights * probs * torch.from_numpy(logits).log_softmax(-1)).sum())

    logits = torch.from_numpy(optimize.minimize(loss, np.zeros(3), tol=1e-10).x)
    shift = posterior_shift(class_weights=weights)
    assert_close(log_posterior(logits, log_shift=shift).exp(), probs, atol=1e-5, rtol=0)


def test_a_class_never_learnt_does_not_spoil_the_others():
    shift = posterior_shift(
        prior=torch.tensor([0.5, 0.25, 0.25]),
        train_prior=torch.tensor([0.5, 0.5, 0.0]),
        class_weights=torch.tensor([1.0, 0.0, 2.0]),
    )
    expected = [math.log(1.0), math.log(0.5), math.log(0.25 / 2)]
    assert_close(shift, torch.tensor(expected, dtype=torch.float64))
    assert posterior_shift() is None
    assert posterior_shift(train_prior=torch.tensor([0.5, 0.5])) is None


def test_expected_costs_are_those_of_a_plain_loop():
    log_probs, matrix = random(2, 7, 3).log_softmax(-1), random(3, 5)
    got = expected_costs(log_probs, matrix)
    for i, j, d in np.ndindex(2, 7, 5):
        cost = sum(math.exp(log_probs[i, j, c]) * float(matrix[c, d]) for c in range(3))
        assert float(got[i, j, d]) == pytest.approx(cost, abs=1e-12)


def test_costs_beyond_the_precision_of_the_logits_decide_right():
    log_probs = torch.tensor([0.9999, 0.0001]).log().half()
    matrix = torch.tensor([[0.0, 1.0], [1e5, 0.0]])
    assert expected_costs(log_probs, matrix).isfinite().all()
    assert int(min_cost_decisions(log_probs, matrix)) == 1
    nearly = torch.tensor([[2.0**24 + 1, 2.0**24]], dtype=torch.float64)  # one number in float32
    assert int(min_cost_decisions(torch.zeros(1), nearly)) == 1


@pytest.mark.parametrize("classes", [2, 3, 10, 100])
def test_of_equal_costs_the_first_is_decided_as_argmax_does(classes):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randint(3, (2000, classes), generator=generator).float()  # many ties
    got = min_cost_decisions(log_posterior(logits), zero_one(classes))
    assert_close(got, logits.argmax(-1))
    alone = [min_cost_decisions(log_posterior(row), zero_one(classes)) for row in logits[:200]]
    assert_close(torch.stack(alone), got[:200])


def test_ties_at_elkans_threshold_go_to_the_first():
    for cost in (1.0, 3.0, 9.0, 99.0, 1e6):
        log_probs = torch.tensor([cost, 1.0], dtype=torch.float64).log().log_softmax(-1)
        matrix = torch.tensor([[0.0, 1.0], [cost, 0.0]], dtype=torch.float64)
        assert int(min_cost_decisions(log_probs, matrix)) == 0
        assert int(min_cost_decisions(log_probs.flip(0), matrix)) == (1 if cost > 1 else 0)
    nearly = torch.tensor([0.9 - 1e-9, 0.1 + 1e-9], dtype=torch.float64).log()
    assert int(min_cost_decisions(nearly, torch.tensor([[0.0, 1.0], [9.0, 0.0]]))) == 1


class Told(ClassifierMixin, BaseEstimator):
    """A classifier whose one feature is the probability of class 1."""

    def fit(self, x, y):
        self.classes_ = np.array([0, 1])
        return self

    def predict_proba(self, x):
        return np.hstack([1 - x, x])

    def predict(self, x):
        return (x[:, 0] > 0.5).astype(int)


@pytest.mark.parametrize(("false_alarm", "miss"), [(1.0, 6.0), (1.0, 2.0), (7.0, 1.0), (3.0, 3.1)])
def test_a_threshold_tuned_by_scikit_learn_decides_the_same(false_alarm, miss):
    matrix = torch.tensor([[0.0, false_alarm], [miss, 0.0]], dtype=torch.float64)
    # 100 examples at each of 99 probabilities, which are right.
    percent = np.repeat(np.arange(1, 100), 100)
    labels = (np.tile(np.arange(100), 99) < percent).astype(int)
    x = percent[:, None] / 100

    def cost(y, decided):
        return float(matrix.numpy()[y, decided].mean())

    tuned = TunedThresholdClassifierCV(
        Told().fit(x, labels),
        scoring=make_scorer(cost, greater_is_better=False),
        thresholds=(np.arange(99) + 0.5) / 100,
        cv="prefit",
        refit=False,
    ).fit(x, labels)
    assert tuned.best_threshold_ == pytest.approx(false_alarm / (false_alarm + miss), abs=0.01)
    got = min_cost_decisions(torch.from_numpy(np.hstack([1 - x, x])).log(), matrix)
    assert got.tolist() == tuned.predict(x).tolist()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: log_posterior(torch.zeros(2).long()), TypeError, "logits must be floating point"),
        (
            lambda: log_posterior(torch.zeros(2, 3), log_shift=torch.zeros(2)),
            ValueError,
            r"log_posterior: log_shift must have shape \(3,\) to match logits \(2, 3\), got \(2,\)",
        ),
        (
            lambda: log_posterior(torch.zeros(2), temperature=0.0),
            ValueError,
            r"log_posterior: temperature must be in \(0, inf\), got 0.0",
        ),
        (
            lambda: posterior_shift(prior=torch.ones(2)),
            ValueError,
            "posterior_shift: prior needs train_prior",
        ),
        (
            lambda: posterior_shift(prior=torch.ones(2), train_prior=torch.ones(3)),
            ValueError,
            r"posterior_shift: train_prior must have shape \(2,\) to match prior, got \(3,\)",
        ),
        (
            lambda: fit_temperature(torch.zeros(2, 3), torch.zeros(3).long()),
            ValueError,
            r"fit_temperature: labels must have shape \(2,\)",
        ),
        (
            lambda: fit_temperature(torch.zeros(2, 3), torch.zeros(2)),
            TypeError,
            "fit_temperature: labels must hold integer classes",
        ),
        (
            lambda: min_cost_decisions(torch.zeros(2, 3), torch.zeros(2, 3)),
            ValueError,
            r"cost_matrix must have shape \(3, decisions\), one row per class, or .*; got \(2, 3\)",
        ),
    ],
)
def test_a_wrong_request_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()
