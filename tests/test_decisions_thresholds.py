"""Thresholds of two-class decisions, held to the decisions of minimum expected cost."""

import json
import math

import numpy as np
import pytest
import torch

from funcloss.decisions import (
    RULES,
    Calibration,
    DecisionRule,
    calibrate,
    class_frequencies,
    cost_curve,
    decision_sentences,
    fit_temperature,
    make_costs,
    min_cost_decisions,
    pair_thresholds,
    ratio_sensitivity,
)

AB, ABC = ("a", "b"), ("a", "b", "c")


def two(a_as_b, b_as_a, right=(0.0, 0.0)):
    return make_costs(AB, {"a": {"a": right[0], "b": a_as_b}, "b": {"a": b_as_a, "b": right[1]}})


@pytest.mark.parametrize(
    ("costs", "decision", "above"),
    [
        pytest.param(two(1, 20), "b", 1 / 21, id="a miss of b costs 20"),
        pytest.param(two(9, 1), "a", 0.1, id="a miss of a costs 9"),
        pytest.param(two(3, 8, right=(1, 2)), "b", 2 / 8, id="right decisions cost too"),
        pytest.param(two(-1, 3, right=(-2, -5)), "b", 1 / 9, id="gains"),
    ],
)
def test_the_threshold_is_where_the_cheaper_decision_changes(costs, decision, above):
    (found,) = pair_thresholds(costs)
    assert found.decision == decision
    assert found.above == pytest.approx(above)
    index = costs.classes.index(decision)
    for p in (found.above - 1e-6, found.above + 1e-6):
        probs = torch.empty(1, 2).double()
        probs[0, index], probs[0, 1 - index] = p, 1 - p
        decided = int(min_cost_decisions(probs.log(), costs.matrix))
        assert (decided == index) == (p > found.above)


def test_a_pair_without_a_trade_off_has_no_threshold():
    always_a = two(1, -1)  # deciding a is never worse
    assert pair_thresholds(always_a) == []
    assert decision_sentences(always_a) == []


def test_every_pair_of_several_classes_agrees_with_the_decisions():
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randint(1, 30, (3, 3), generator=generator).double()
    table = {
        t: {d: 0.0 if t == d else float(matrix[i, j]) for j, d in enumerate(ABC)}
        for i, t in enumerate(ABC)
    }
    costs = make_costs(ABC, table)
    thresholds = pair_thresholds(costs)
    assert len(thresholds) == 3
    assert [t.above for t in thresholds] == sorted(t.above for t in thresholds)
    for t in thresholds:
        i, j = ABC.index(t.decision), ABC.index(t.other)
        for shift in (-1e-6, 1e-6):
            probs = torch.zeros(3).double()
            probs[i], probs[j] = t.above + shift, 1 - t.above - shift
            expected = probs @ costs.matrix
            assert bool(expected[i] < expected[j]) == (shift > 0)


def test_the_words_name_threshold_pairs_and_other_decisions():
    cost = make_costs(AB, class_cost={"b": 20.0})
    assert decision_sentences(cost) == ["predict b when its probability exceeds 0.0476"]
    even = decision_sentences(make_costs(ABC))
    assert even == ["predict the most probable class: no two classes have unequal costs"]
    table = {t: {d: float(t != d) for d in ABC} | {"ask": 0.3} for t in ABC}
    table["c"]["a"] = 9.0
    lines = decision_sentences(make_costs(ABC, table))
    assert lines[0].startswith("between c and a: predict c when its probability exceeds 0.1 ")
    assert lines[-1] == "decide ask when every class has an expected cost above 0.3"
    many = tuple(map(str, range(30)))
    spoken = decision_sentences(make_costs(many, class_cost={"3": 5.0}))
    assert len(spoken) == 7
    assert "23 more pairs" in spoken[-1]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("weighted", [False, True])
def test_the_curve_is_the_cost_of_every_threshold(seed, weighted):
    generator = np.random.default_rng(seed)
    p = np.round(generator.random(60), 1).clip(1e-9)  # with ties and 1
    labels = (generator.random(60) < 0.3).astype(int)
    weights = generator.random(60) if weighted else np.ones(60)
    costs = make_costs(AB, class_cost={"b": 7.0})
    curve = cost_curve(
        torch.tensor(np.stack([1 - p, p], 1)).log(),
        torch.tensor(labels),
        costs,
        weights=torch.tensor(weights) if weighted else None,
    )

    def by_hand(above):
        paid = np.where(p > above + 1e-10, labels == 0, 7.0 * (labels == 1))
        return (weights * paid).sum() / weights.sum()

    assert curve.positive == "b"
    for above, cost in zip(curve.thresholds.tolist()[1:], curve.costs.tolist()[1:], strict=True):
        assert cost == pytest.approx(by_hand(above), abs=1e-12)
    assert curve.cost == pytest.approx(by_hand(curve.threshold))
    threshold, least = curve.lowest
    assert least == pytest.approx(by_hand(threshold))
    assert least == pytest.approx(min(by_hand(t) for t in [-1, *np.unique(p)]))


def test_the_sensitivity_keeps_the_threshold_and_changes_the_cost():
    p = torch.tensor([0.01, 0.08, 0.3, 0.9]).double()
    labels, costs = torch.tensor([0, 1, 0, 1]), make_costs(AB, class_cost={"b": 19.0})
    log_probs = torch.stack([1 - p, p], 1).log()
    rows = {r.factor: r for r in ratio_sensitivity(log_probs, labels, costs)}
    assert rows[1.0].threshold == pytest.approx(0.05)
    assert rows[1.0].kept == rows[1.0].right == pytest.approx(1 / 4)
    assert rows[0.25].threshold == pytest.approx(1 / 5.75)
    assert rows[0.25].right == pytest.approx((4.75 + 1) / 4)  # the second is missed, at its price
    assert rows[0.25].kept == pytest.approx(1 / 4)
    assert ratio_sensitivity(torch.zeros(1, 3), torch.tensor([0]), make_costs(ABC)) == []


def drawn(n, sharp, seed=0, classes=3):
    """Logits ``sharp`` times too sure, and labels drawn of the right probabilities."""
    generator = torch.Generator().manual_seed(seed)
    right = 2 * torch.randn(n, classes, generator=generator, dtype=torch.float64)
    labels = torch.multinomial(right.softmax(-1), 1, generator=generator)[:, 0]
    return sharp * right, labels


@pytest.mark.parametrize("n", [300, 6000])
@pytest.mark.parametrize("sharp", [0.4, 3.0])
def test_a_temperature_that_helps_is_applied(n, sharp):
    even = torch.full((3,), 1 / 3, dtype=torch.float64)
    logits, labels = drawn(n, sharp)
    found = calibrate(Calibration(even, even), logits, labels, held_out_prior=even)
    assert found.temperature == found.tried == pytest.approx(sharp, rel=0.25)
    shrunk = abs(math.log(found.tried)) < abs(math.log(fit_temperature(logits, labels)))
    assert shrunk  # towards 1, the more the fewer
    assert found.log_score[1] < found.log_score[0]
    assert found.sentence.startswith(f"temperature {found.temperature:.3f}: cross-entropy")


def test_a_temperature_that_does_not_help_is_not_applied_and_it_is_said():
    even = torch.full((3,), 1 / 3, dtype=torch.float64)
    applied = []
    for seed in range(20):  # right probabilities, few examples: what is fitted is chance
        logits, labels = drawn(40, 1.0, seed)
        found = calibrate(Calibration(even, even), logits, labels, held_out_prior=even)
        applied.append(found.temperature != 1)
        if not applied[-1]:
            assert "not applied" in found.sentence
            assert found.tried != 1
    assert sum(applied) < 10
    unfitted = Calibration(even, even)
    assert unfitted.temperature == 1
    assert "not calibrated" in unfitted.sentence


@pytest.mark.parametrize(("n", "far"), [(10, 1.4), (10_000, 2.9)])
def test_few_examples_cannot_take_a_temperature_far(n, far):
    logits, labels = drawn(n, 3.0, seed=4)
    inverse = torch.linspace(math.log(0.2), math.log(5), 4001).double()
    losses = torch.stack(
        [
            torch.nn.functional.cross_entropy(logits * b.exp(), labels, reduction="sum")
            + b**2 / (2 * 0.5**2)
            for b in inverse
        ]
    )
    expected = float((-inverse[losses.argmin()]).exp())
    assert fit_temperature(logits, labels, spread=0.5) == pytest.approx(expected, rel=2e-3)
    assert fit_temperature(logits[:n], labels[:n], spread=1e6) == pytest.approx(
        fit_temperature(logits, labels), rel=1e-3
    )
    assert expected > far or n < 100


def test_no_error_on_validation_is_no_reason_to_be_certain():
    even = torch.tensor([0.5, 0.5]).double()
    logits = 4 * torch.eye(2).double().repeat(8, 1)
    labels = torch.tensor([0, 1] * 8)
    labels[3] = 0  # one error: the fold that has it pays for the certainty of the others
    found = calibrate(Calibration(even, even), logits, labels, held_out_prior=even)
    assert found.log_score[1] > found.log_score[0]
    assert found.temperature == 1


def test_a_class_that_validation_lacks_keeps_its_share_of_the_training():
    train = torch.tensor([150.0, 90.0, 2.0])
    found = class_frequencies(torch.tensor([20.0, 10.0, 0.0]), train)
    assert found.sum() == pytest.approx(1.0)
    assert found[2] == pytest.approx(2 / 242)  # neither raised nor lowered
    assert float(found[0] / found[1]) == pytest.approx(2.0)
    full = class_frequencies(torch.tensor([20.0, 9.0, 1.0]), train)
    assert full.tolist() == pytest.approx([20 / 30, 9 / 30, 1 / 30])
    assert class_frequencies(torch.zeros(3), train).tolist() == pytest.approx(
        (train / 242).tolist()
    )


@pytest.mark.parametrize("scale", [1.0, torch.tensor([1.0, 2.0, 0.5]).double()], ids=str)
def test_a_calibration_comes_back_from_json_and_decides_the_same(scale):
    logits, labels = drawn(300, 3.0)
    prior = torch.tensor([0.2, 0.3, 0.5]).double()
    made = Calibration(prior.flip(0), prior, scale)
    found = calibrate(made, logits, labels, held_out_prior=prior)
    again = Calibration.of_record(json.loads(json.dumps(found.record())))
    assert again.record() == found.record()
    costs = make_costs(ABC, class_cost={"c": 5.0})
    torch.testing.assert_close(
        again.rule(costs).log_probs(logits), found.rule(costs).log_probs(logits), rtol=0, atol=0
    )


def test_at_equal_costs_and_no_correction_the_rule_is_argmax():
    logits = torch.randn(500, 3, generator=torch.Generator().manual_seed(1))
    counts = torch.tensor([70.0, 20.0, 10.0])
    same = class_frequencies(counts, counts)
    rule = Calibration(same, same, temperature=2.5).rule(make_costs(ABC))
    torch.testing.assert_close(rule.decide(logits), logits.argmax(-1))
    by_cost, by_score = (rule.decisions(logits, by=by) for by in reversed(RULES))
    assert by_cost.names == by_score.names
    torch.testing.assert_close(by_cost.probability, by_cost.probabilities.max(-1).values)


def test_decisions_say_probability_and_expected_cost_also_of_what_is_no_class():
    table = {"a": {"a": 0.0, "b": 1.0, "ask": 0.2}, "b": {"a": 9.0, "b": 0.0, "ask": 0.2}}
    rule = DecisionRule(make_costs(AB, table))
    probs = torch.tensor([[0.99, 0.01], [0.6, 0.4], [0.1, 0.9]]).double()
    found = rule.decisions(probs.log())
    assert found.names == ["a", "ask", "b"]
    assert found.probability.tolist() == pytest.approx([0.99, float("nan"), 0.9], nan_ok=True)
    assert found.expected_cost.tolist() == pytest.approx([0.09, 0.2, 0.1])
    assert rule.decisions(probs.log(), by="argmax").names == ["a", "a", "b"]
    with pytest.raises(ValueError, match="by must be one of argmax, min-cost"):
        rule.decisions(probs.log(), by="cheapest")
