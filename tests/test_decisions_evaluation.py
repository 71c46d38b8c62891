import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics
from torch.testing import assert_close

from funcloss.decisions import (
    Costs,
    DecisionRule,
    calibration_error,
    log_posterior,
    make_costs,
    min_cost_decisions,
    score,
    wilson,
)


@pytest.fixture(scope="module")
def ec(_font_cache):
    """The package of Ferrer's paper, less a private check of scikit-learn's that has changed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MPLCONFIGDIR", _font_cache)
        from expected_cost import ec as package

        patch.setattr(package, "_check_targets", lambda *both: ("multiclass", *both))
        yield package


def judge(logits, labels, costs, *, prior=None, **rule):
    """Score a model by a rule of these costs."""
    return score(logits, labels, DecisionRule(costs, **rule), prior=prior)


def named(matrix):
    """Return the costs of a matrix, classes and decisions named by letters."""
    names = tuple("abcdefghijklmnop"[: matrix.shape[1]])
    return Costs(matrix, names[: matrix.shape[0]], names)


def problem(n, classes, extra=0, *, present=None, seed=0, benefits=False):
    """Return random logits, labels of the classes present, and costs."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(n, classes, generator=generator, dtype=torch.float64)
    pick = torch.randint(present or classes, (n,), generator=generator)
    costs = 5 * torch.rand(classes, classes + extra, generator=generator, dtype=torch.float64)
    if benefits:
        costs = costs - 2.5  # rewards among them, and a right decision is not free
    else:
        costs.fill_diagonal_(0.0)
    return logits, pick, named(costs)


def agree_with_the_package(ec, logits, labels, costs, prior=None):
    matrix, y = ec.CostMatrix(costs.matrix.numpy()), labels.numpy()
    judged = judge(logits, labels, costs, prior=prior)
    # A column: the package multiplies a flat prior along the decisions.
    given_prior = None if prior is None else judged.prior.numpy()[:, None]
    log_probs = logits.log_softmax(-1).numpy()
    decided, _ = ec.bayes_decisions(log_probs, matrix, silent=True)
    assert judged.min_cost.decisions.tolist() == decided.tolist()
    for scores in (judged.argmax, judged.min_cost):
        made = scores.decisions.numpy()
        ours = [scores.expected_cost.value]
        theirs = [ec.average_cost(y, made, matrix, given_prior)]
        if judged.constant_cost > 0:
            ours.append(scores.normalised_cost)
            theirs.append(ec.average_cost(y, made, matrix, given_prior, adjusted=True))
        else:
            assert math.isnan(scores.normalised_cost)
        assert_close(ours, theirs, atol=1e-10, rtol=1e-10)
        sizes = {"num_targets": len(costs.classes), "num_decisions": len(costs.decisions)}
        confusion = ec.generalized_confusion_matrix(y, made, **sizes)
        assert scores.confusion.tolist() == confusion.tolist()
    bayes, _ = ec.average_cost_for_bayes_decisions(y, log_probs, matrix, given_prior, silent=True)
    assert judged.min_cost.expected_cost.value == pytest.approx(float(bayes), abs=1e-10)


@pytest.mark.parametrize("prior", [None, "uneven", "one-is-0"])
@pytest.mark.parametrize("benefits", [False, True])
@pytest.mark.parametrize(
    ("classes", "extra", "present"),
    [(2, 0, 2), (3, 0, 3), (10, 0, 10), (2, 1, 2), (10, 2, 10), (5, 1, 3), (1, 1, 1)],
)
def test_costs_and_bayes_decisions_are_those_of_the_package(
    ec, classes, extra, present, benefits, prior
):
    part = None if prior is None else torch.arange(classes, 0, -1).float()
    if prior == "one-is-0" and classes > 1:
        part[1] = 0.0
    data = problem(200, classes, extra, present=present, benefits=benefits)
    agree_with_the_package(ec, *data, prior=part)


@given(st.integers(1, 40), st.integers(1, 6), st.integers(0, 2), st.integers(0, 999), st.booleans())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_any_problem_agrees_with_the_package(ec, n, classes, extra, seed, uneven):
    data = problem(n, classes, extra, seed=seed, benefits=seed % 2 == 0)
    prior = torch.linspace(1, 2, classes) if uneven else None
    agree_with_the_package(ec, *data, prior=prior)


@pytest.mark.parametrize("classes", [2, 3, 10])
def test_zero_one_costs_are_scikit_learns_metrics(classes):
    logits, labels, _ = problem(300, classes)
    every = list(range(classes))
    judged = judge(logits, labels, make_costs([str(c) for c in every]))
    for scores in (judged.argmax, judged.min_cost):
        y, made = labels.numpy(), scores.decisions.numpy()
        accuracy = metrics.accuracy_score(y, made)
        ours = [scores.accuracy.value, 1 - scores.expected_cost.value]
        assert_close(ours, [accuracy, accuracy], atol=1e-12, rtol=0)
        assert scores.confusion.tolist() == metrics.confusion_matrix(y, made).tolist()
        for name in ("recall", "precision"):
            theirs = getattr(metrics, f"{name}_score")(y, made, average=None, zero_division=0)
            assert_close(getattr(scores, name).value.numpy(), theirs, atol=1e-12, rtol=0)
    assert judged.argmax.decisions.tolist() == judged.min_cost.decisions.tolist()
    balanced = judge(logits, labels, make_costs([str(c) for c in every]), prior=torch.ones(classes))
    expected = metrics.balanced_accuracy_score(labels, logits.argmax(-1))
    assert balanced.argmax.accuracy.value == pytest.approx(expected, abs=1e-12)
    chance = metrics.balanced_accuracy_score(labels, logits.argmax(-1), adjusted=True)
    assert 1 - balanced.argmax.normalised_cost == pytest.approx(chance, abs=1e-12)


@pytest.mark.parametrize("prior", [None, [0.5, 0.3, 0.2, 0.0]], ids=["counted", "prior"])
def test_f1_and_balanced_accuracy_are_scikit_learns(prior):
    logits, labels, costs = problem(300, 4, 1)
    costs.matrix[:, 4] = 0.5
    judged = judge(logits, labels, costs, prior=None if prior is None else torch.tensor(prior))
    y, weights = labels.numpy(), judged.weights.numpy()
    occurs = [0, 1, 2, 3] if prior is None else [0, 1, 2]
    for scores in judged.rules.values():
        made = scores.decisions.numpy()
        assert (made == 4).any() == (scores is judged.min_cost)  # no class: a mistake
        theirs = metrics.f1_score(y, made, labels=range(4), average=None, sample_weight=weights)
        assert_close(scores.f1.numpy()[occurs], theirs[occurs], atol=1e-7, rtol=0)
        assert scores.macro_f1 == pytest.approx(theirs[occurs].mean(), abs=1e-7)
        recalls = metrics.recall_score(y, made, labels=occurs, average=None)
        assert scores.balanced_accuracy == pytest.approx(recalls.mean(), abs=1e-7)
    if prior is None:
        made = judged.argmax.decisions.numpy()
        theirs = metrics.balanced_accuracy_score(y, made)
        assert judged.argmax.balanced_accuracy == pytest.approx(theirs, abs=1e-12)
    else:
        assert judged.argmax.f1[3].isnan()


def test_a_class_that_is_absent_has_no_f1_and_one_never_decided_has_0():
    costs, labels = make_costs(tuple("abc")), torch.tensor([0, 0, 1])
    scores = judge(torch.eye(3)[[0, 2, 0]], labels, costs).argmax  # c is decided, but absent
    assert_close(scores.f1, torch.tensor([0.5, 0.0, math.nan]).double(), equal_nan=True)
    assert (scores.macro_f1, scores.balanced_accuracy) == (0.25, 0.25)


@pytest.mark.parametrize("prior", [None, torch.tensor([0.7, 0.2, 0.1])])
def test_no_decisions_cost_less_or_more_than_is_possible(prior):
    logits, labels, costs = problem(60, 3, 1, benefits=True)
    judged = judge(logits, labels, costs, prior=prior)
    low, high = judged.possible_costs
    paid = costs.matrix[labels]
    ends = (judged.weights @ paid.amin(1), judged.weights @ paid.amax(1))
    expected = (paid.min(), paid.max()) if prior is None else ends
    assert (low, high) == pytest.approx(tuple(map(float, expected)))
    for made in (paid.argmin(1), paid.argmax(1)):
        cost = judged.scored(made).expected_cost
        assert low - 1e-12 <= cost.low <= cost.value <= cost.high <= high + 1e-12


def test_under_a_prior_all_is_that_of_weighted_examples():
    logits, labels, costs = problem(300, 4, 1, benefits=True)
    prior = torch.tensor([0.7, 0.2, 0.1, 0.0])
    weights = (prior / labels.bincount())[labels].double().numpy()
    scores = judge(logits, labels, costs, prior=prior).min_cost
    y, made = labels.numpy(), scores.decisions.numpy()
    accuracy = metrics.accuracy_score(y, made, sample_weight=weights)
    assert scores.accuracy.value == pytest.approx(accuracy, abs=1e-7)  # a prior in float32
    precision = metrics.precision_score(
        y, made, sample_weight=weights, average=None, labels=range(4), zero_division=np.nan
    )
    assert_close(scores.precision.value.numpy(), precision, atol=1e-6, rtol=0, equal_nan=True)
    paid = costs.matrix[labels, scores.decisions].numpy()
    assert scores.expected_cost.value == pytest.approx(float(weights @ paid), abs=1e-6)
    assert scores.example_cost.tolist() == paid.tolist()
    assert scores.cost.sum() == pytest.approx(paid.sum())


def test_parts_of_the_examples_have_wilsons_interval_of_their_counts():
    logits, labels, costs = problem(150, 3, 1)
    scores = judge(logits, labels, costs).min_cost
    hits, support = scores.confusion.diagonal(), scores.confusion.sum(1)
    decided = scores.confusion.sum(0)[:3]
    assert_close(scores.recall[1:], wilson(hits, support))
    assert_close(scores.precision[1:], wilson(hits, decided))
    low, high = wilson(hits.sum(), support.sum())
    assert_close(scores.accuracy[1:], (float(low), float(high)))


RATES = [  # examples of each class, prior, recall of each class
    pytest.param([1000, 10], [0.5, 0.5], [0.99, 0.6], id="few-that-weigh-much"),
    pytest.param([300, 50], [0.5, 0.5], [0.999, 0.9], id="rare-mistakes-that-weigh-much"),
    pytest.param([100] * 5, [0.96] + [0.01] * 4, [0.98] * 5, id="one-class-is-nearly-all"),
    pytest.param([200] * 3, [1 / 3] * 3, [0.9, 0.8, 0.7], id="as-they-come"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("sizes", "prior", "recalls"), RATES)
def test_intervals_hold_under_a_prior(sizes, prior, recalls):
    classes = len(sizes)
    labels = torch.arange(classes).repeat_interleave(torch.tensor(sizes))
    keep = torch.tensor(recalls, dtype=torch.float64)
    rates = ((1 - keep) / (classes - 1))[:, None].expand(-1, classes).clone()
    rates.diagonal().copy_(keep)
    part = torch.tensor(prior, dtype=torch.float64)
    truth = [float(part @ keep), *(part * keep / (part @ rates)).tolist()]
    costs, held = make_costs([str(c) for c in range(classes)]), []
    generator = torch.Generator().manual_seed(0)
    for _ in range(400):
        decided = torch.multinomial(rates[labels], 1, generator=generator).squeeze(-1)
        scores = judge(torch.eye(classes)[decided], labels, costs, prior=part).argmax
        low = torch.tensor([scores.accuracy.low, *scores.precision.low])
        high = torch.tensor([scores.accuracy.high, *scores.precision.high])
        held.append((low <= torch.tensor(truth)) & (torch.tensor(truth) <= high))
    assert (torch.stack(held).double().mean(0) > 0.92).all()


def test_a_known_prior_is_no_uncertainty_of_the_cost():
    labels = torch.arange(2).repeat(50)
    costs = named(torch.tensor([[0.0, 1.0], [9.0, 0.0]], dtype=torch.float64))
    wrong = torch.eye(2)[1 - labels]  # costs 1 or 9, by the class alone
    known = judge(wrong, labels, costs, prior=torch.tensor([0.5, 0.5])).argmax.expected_cost
    sampled = judge(wrong, labels, costs).argmax.expected_cost
    assert_close((known.value, known.high), (5.0, 5.0))  # no decisions cost more
    assert known.low > 4.7
    assert sampled.low < 4.3 < 5.7 < sampled.high


def test_normalised_cost_is_1_for_the_best_constant_decision_under_the_prior():
    labels = torch.tensor([0] * 8 + [1] * 2)
    costs = make_costs(
        ("well", "ill"), {"well": {"well": 0, "ill": 1}, "ill": {"well": 9, "ill": 0}}
    )
    for prior, best in ((None, "ill"), (torch.tensor([0.99, 0.01]), "well")):
        constant = torch.eye(2)[torch.full((10,), costs.decisions.index(best))]
        judged = judge(constant, labels, costs, prior=prior)
        assert judged.constant_decision == best
        assert judged.argmax.normalised_cost == pytest.approx(1.0)
    free = judge(torch.eye(2)[labels], labels, make_costs(("well", "ill"), class_cost={"ill": 0}))
    assert free.constant_decision == "well"
    assert math.isnan(free.argmax.normalised_cost)


def test_temperature_and_shift_reach_the_decisions_of_minimum_cost_alone():
    logits, labels, costs = problem(100, 3, 1)
    shift = torch.tensor([0.0, 1.0, -1.0])
    judged = judge(logits, labels, costs, temperature=3.0, log_shift=shift)
    log_probs = log_posterior(logits, temperature=3.0, log_shift=shift)
    expected = min_cost_decisions(log_probs, costs.matrix)
    assert judged.min_cost.decisions.tolist() == expected.tolist()
    assert judged.argmax.decisions.tolist() == logits.argmax(-1).tolist()
    errors = [calibration_error(z, labels) for z in (log_posterior(logits), log_probs)]
    assert [judged.calibration_error, judged.calibrated_error] == pytest.approx(errors)
    assert errors[0] != pytest.approx(errors[1], abs=0.01)
    assert judged.rule.temperature == 3.0
    assert list(judged.rules.values()) == [judged.argmax, judged.min_cost]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("rows", [slice(1), slice(None)])
def test_a_model_that_diverged_is_judged_all_the_same(bad, rows):
    logits, labels, costs = problem(20, 3, 1)
    logits[rows, 1] = bad
    for prior in (None, torch.tensor([0.2, 0.3, 0.5])):
        judged = judge(logits, labels, costs, prior=prior)
        for scores in judged.rules.values():
            assert scores.confusion.sum() == 20
            assert math.isfinite(scores.expected_cost.value)
    logits[:] = bad
    assert judge(logits, labels, costs).argmax.confusion[:, 0].sum() == 20


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("integers", [torch.int32, torch.uint8, torch.int16])
def test_other_dtypes_are_judged_as_their_values(dtype, integers):
    logits, labels, costs = problem(500, 16)  # 16 x 16 cells: beyond uint8
    logits = logits.to(dtype)
    expected = judge(logits.double(), labels, costs)
    got = judge(logits.requires_grad_(), labels.to(integers), costs)
    for ours, theirs in zip(got.rules.values(), expected.rules.values(), strict=True):
        assert_close(vars(ours), vars(theirs), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("prior", [None, torch.tensor([0.5, 0.25, 0.25])])
def test_one_example_has_a_cost_and_hardly_an_interval(prior):
    costs = make_costs(("a", "b", "c"), class_cost={"b": 4})
    judged = judge(torch.tensor([[1.0, 0.0, 0.0]]), torch.tensor([1]), costs, prior=prior)
    scores = judged.argmax
    assert scores.expected_cost.value == 4.0
    assert 0.0 < scores.expected_cost.low < 0.7
    assert scores.expected_cost.high == 4.0
    assert judged.prior.tolist() == [0.0, 1.0, 0.0]
    assert scores.recall.value.isnan().tolist() == [True, False, True]
    assert scores.precision.value.isnan().tolist() == [False, True, True]
    assert scores.precision.low.isnan().tolist() == [False, True, True]
    assert (scores.accuracy.value, scores.accuracy.low) == (0.0, 0.0)


@pytest.mark.parametrize("n", range(1, 60))
def test_all_right_is_exactly_1(n):
    labels = torch.arange(n) % 3
    scores = judge(torch.eye(3)[labels], labels, make_costs(tuple("abc"))).argmax
    assert (scores.accuracy.value, scores.accuracy.high) == (1.0, 1.0)


def test_decisions_that_are_no_class_are_never_right():
    costs = make_costs(("a", "b"), {t: {"a": 9, "b": 9, "ask": 1} for t in "ab"})
    logits, labels, _ = problem(20, 2)
    scores = judge(logits, labels, costs).min_cost
    assert scores.decisions.tolist() == [2] * 20
    assert (scores.accuracy.value, scores.expected_cost.value) == (0.0, pytest.approx(1.0))
    assert scores.recall.value.tolist() == [0.0, 0.0]
    assert scores.precision.value.isnan().all()


GOOD = (torch.zeros(2, 3), torch.tensor([0, 1]))
WRONG = [
    ((torch.zeros(2, 3).long(), GOOD[1]), {}, TypeError, "logits must be floating point"),
    ((GOOD[0], torch.zeros(2)), {}, TypeError, "labels must hold integer classes"),
    ((torch.zeros(2, 4), GOOD[1]), {}, ValueError, r"shape \(n, 3\), one per class, got \(2, 4\)"),
    ((torch.zeros(3), GOOD[1]), {}, ValueError, r"shape \(n, 3\), one per class, got \(3,\)"),
    ((GOOD[0], torch.tensor([0])), {}, ValueError, r"labels must have shape \(2,\)"),
    ((GOOD[0][:0], GOOD[1][:0]), {}, ValueError, "score: there are no examples"),
    ((GOOD[0], torch.tensor([0, 3])), {}, ValueError, r"labels must be in \[0, 3\), got 0 to 3"),
    ((GOOD[0], torch.tensor([-1, 2])), {}, ValueError, r"in \[0, 3\), got -1 to 2"),
    (GOOD, {"prior": torch.ones(2)}, ValueError, r"prior must have shape \(3,\)"),
    (GOOD, {"prior": torch.tensor([0.0, 0.0, 1.0])}, ValueError, "above 0 for a class that occurs"),
    (GOOD, {"prior": torch.tensor([-1.0, 1.0, 1.0])}, ValueError, "finite and at least 0, got"),
    (GOOD, {"prior": torch.tensor([math.nan, 1.0, 1.0])}, ValueError, "finite and at least 0"),
    (GOOD, {"log_shift": torch.zeros(2)}, ValueError, r"log_shift must have shape \(3,\)"),
    (GOOD, {"temperature": -1.0}, ValueError, "temperature must be in"),
]


@pytest.mark.parametrize(("data", "options", "error", "message"), WRONG)
def test_a_wrong_request_is_refused(data, options, error, message):
    with pytest.raises(error, match=message):
        list(judge(*data, make_costs(tuple("abc")), **options).rules)


@pytest.mark.parametrize("prior", [None, torch.tensor([0.2, 0.3, 0.5])])
def test_decisions_are_scored_as_a_models_are(prior):
    logits, labels, costs = problem(100, 3, 1)
    expected = judge(logits, labels, costs, prior=prior).min_cost
    found = judge(logits, labels.int(), costs, prior=prior)
    got = found.scored(expected.decisions.to(torch.uint8))
    assert_close(vars(got), vars(expected), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("decisions", "error", "message"),
    [
        (torch.zeros(2), TypeError, "decisions must hold integer classes"),
        (torch.tensor([0]), ValueError, r"decisions must have shape \(2,\) to match the labels"),
        (torch.tensor([0, 4]), ValueError, r"decisions must be in \[0, 4\), got 0 to 4"),
    ],
)
def test_decisions_that_are_none_are_refused(decisions, error, message):
    costs = make_costs(("a", "b", "c"), {t: dict.fromkeys("abcd", 1) for t in "abc"})
    with pytest.raises(error, match=f"scored: {message}"):
        judge(torch.zeros(2, 3), torch.tensor([0, 1]), costs).scored(decisions)
