"""Floors and ceilings: what they name, how weights follow them, and trainings that keep them."""

import contextlib
import dataclasses
import io
import itertools
import json
import math
import re
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import Killed, StopAt, resume, score_decisions
from torch._dynamo.testing import CompileCounter
from torch.testing import assert_close

from funcloss import training
from funcloss._json import jsonable
from funcloss.app import runs
from funcloss.app.audits import audit_run
from funcloss.app.choice.words import constraint_sentences
from funcloss.app.cli import app as shell
from funcloss.app.config import make_config
from funcloss.app.data import get_batch, normalised
from funcloss.app.options import AuditOptions, EvaluateOptions
from funcloss.app.report.choice import Ascent
from funcloss.app.report.choice import Constraint as Told
from funcloss.app.runs import evaluation, folder
from funcloss.app.runs.constrained import make_controller
from funcloss.app.runs.setup import make_setup
from funcloss.app.train import train
from funcloss.constraints.ascent import (
    CAP,
    RATE,
    Snapshot,
    ascend,
    decision_weights,
    init_dual,
    snapshot_of,
    weights_of,
)
from funcloss.constraints.bounds import (
    Constraint,
    constraint_text,
    directions,
    held,
    make_constraints,
    reached,
    violations,
)
from funcloss.decisions import make_costs
from funcloss.errors import ConfigError, RunError

DIGITS = tuple("0123456789")
NAMES = ("cat", "dog", "a:b", "precision:x", "cost")
RECALL, PRECISION, PAIR, COST = "recall", "precision", "pair", "cost"

SMALL = {
    "dataset": "mnist-sample",
    "model": "linear",
    "epochs": 4,
    "batch_size": 200,
    "compile": "off",
    "audit_every": 0,
    "log_every": 10,
    "threads": 1,
}


def config(**options):
    return make_config(SMALL, options)


@pytest.fixture(autouse=True)
def _no_figures(monkeypatch):
    """Drawing takes longer than these trainings do."""
    for name in ("curves", "confusion", "predictions"):
        monkeypatch.setattr(f"funcloss.app.report.run_figures.{name}", lambda *args: None)
    monkeypatch.setattr("funcloss.app.report.run_figures.save_figure", lambda f, path: path.touch())
    monkeypatch.setattr("funcloss.app.audits.draw_all", lambda *args: {})


# What they name.

FLOORS = [
    ("9", DIGITS, Constraint(RECALL, 0.9, 9)),
    ("recall:9", DIGITS, Constraint(RECALL, 0.9, 9)),
    ("precision:9", DIGITS, Constraint(PRECISION, 0.9, 9)),
    ("dog", NAMES, Constraint(RECALL, 0.9, 1)),
    ("1", NAMES, Constraint(RECALL, 0.9, 1)),
    ("precision:0", NAMES, Constraint(PRECISION, 0.9, 0)),
    ("a:b", NAMES, Constraint(RECALL, 0.9, 2)),
    ("precision:a:b", NAMES, Constraint(PRECISION, 0.9, 2)),
    ("precision:x", NAMES, Constraint(RECALL, 0.9, 3)),  # that is a class
    ("recall:precision:x", NAMES, Constraint(RECALL, 0.9, 3)),
    ("precision:precision:x", NAMES, Constraint(PRECISION, 0.9, 3)),
    ("cost", NAMES, Constraint(RECALL, 0.9, 4)),
]


@pytest.mark.parametrize(("key", "classes", "constraint"), FLOORS)
def test_a_floor_names_the_recall_or_the_precision_of_a_class(key, classes, constraint):
    assert make_constraints({key: 0.9}, {}, classes) == (constraint,)


CEILINGS = [
    ("9:4", DIGITS, Constraint(PAIR, 0.1, 9, 4)),
    ("cost", DIGITS, Constraint(COST, 0.1)),
    ("cost", NAMES, Constraint(COST, 0.1)),
    ("dog:cat", NAMES, Constraint(PAIR, 0.1, 1, 0)),
    ("1:0", NAMES, Constraint(PAIR, 0.1, 1, 0)),
    ("cost:dog", NAMES, Constraint(PAIR, 0.1, 4, 1)),
    ("a:b:dog", NAMES, Constraint(PAIR, 0.1, 2, 1)),
    ("precision:x:a:b", NAMES, Constraint(PAIR, 0.1, 3, 2)),
    ("dog:precision:x", NAMES, Constraint(PAIR, 0.1, 1, 3)),
]


@pytest.mark.parametrize(("key", "classes", "constraint"), CEILINGS)
def test_a_ceiling_names_a_pair_of_classes_or_the_cost(key, classes, constraint):
    assert make_constraints({}, {key: 0.1}, classes) == (constraint,)


def test_floors_come_first_and_their_ends_count():
    made = make_constraints({"9": 1.0, "precision:9": 1e-6}, {"9:4": 0, "cost": -2.5}, DIGITS)
    assert [constraint.bound for constraint in made] == [1.0, 1e-6, 0.0, -2.5]
    assert [constraint.is_floor for constraint in made] == [True, True, False, False]
    assert [constraint_text(constraint, DIGITS) for constraint in made] == [
        "recall of 9 at least 1",
        "precision of 9 at least 1e-06",
        "part of the true 9 called 4 at most 0",
        "expected cost an example at most -2.5",
    ]
    assert make_constraints({}, {}, DIGITS) == ()


AMBIGUOUS = ("a", "b", "a:b", "b:a")
REFUSED = [
    ({"ten": 0.9}, {}, DIGITS, "floor: no class 'ten'; the classes are 0, 1"),
    ({"10": 0.9}, {}, DIGITS, "floor: no class '10'"),
    ({"5": 0.9}, {}, NAMES, "floor: no class '5'"),
    ({"f1:9": 0.9}, {}, DIGITS, "floor: no class 'f1:9'"),
    ({"precision:": 0.9}, {}, DIGITS, "floor: no class ''"),
    ({"9:4": 0.9}, {}, DIGITS, "floor: no class '9:4'"),
    ({"9": 0.0}, {}, DIGITS, "floor 9 must be a recall above 0 and at most 1, got 0"),
    ({"9": 1.01}, {}, DIGITS, "floor 9 must be a recall above 0 and at most 1, got 1.01"),
    ({"9": 99}, {}, DIGITS, "at most 1, got 99"),
    ({"precision:9": -1}, {}, DIGITS, "floor precision:9 must be a precision above 0"),
    ({"9": math.nan}, {}, DIGITS, "floor 9 must be a recall above 0 and at most 1, got nan"),
    ({"9": 0.9, "recall:9": 0.8}, {}, DIGITS, "recall of 9 at least 0.8 is named twice"),
    ({"dog": 0.9, "1": 0.9}, {}, NAMES, "recall of dog at least 0.9 is named twice"),
    ({}, {"9": 0.1}, DIGITS, "ceiling must be TRUE:DECIDED as in 9:4, or cost; got '9'"),
    ({}, {"9:": 0.1}, DIGITS, "ceiling must be TRUE:DECIDED as in 9:4, or cost; got '9:'"),
    ({}, {"9:ten": 0.1}, DIGITS, "ceiling must be TRUE:DECIDED .*; the classes are 0, 1, 2"),
    ({}, {"9:4:3": 0.1}, DIGITS, "ceiling must be TRUE:DECIDED"),
    ({}, {"costs": 0.1}, DIGITS, "ceiling must be TRUE:DECIDED"),
    ({}, {"9:9": 0.1}, DIGITS, "ceiling 9:9: a 9 called itself is no mistake"),
    ({}, {"dog:1": 0.1}, NAMES, "ceiling dog:1: a dog called itself is no mistake"),
    ({}, {"9:4": 1.0}, DIGITS, "ceiling 9:4 must be a rate of at least 0 and below 1, got 1"),
    ({}, {"9:4": -0.1}, DIGITS, "ceiling 9:4 must be a rate of at least 0 and below 1, got -0.1"),
    ({}, {"9:4": math.nan}, DIGITS, "ceiling 9:4 must be a rate .* got nan"),
    ({}, {"cost": math.inf}, DIGITS, "ceiling cost must be a number, got inf"),
    ({}, {"dog:cat": 0.1, "1:0": 0.2}, NAMES, "part of the true dog called cat .* named twice"),
    ({}, {"a:b:a": 0.1}, AMBIGUOUS, "a true a called b:a or a true a:b called a: name the classes"),
]  # fmt: skip


@pytest.mark.parametrize(("floor", "ceiling", "classes", "message"), REFUSED)
def test_what_names_no_limit_is_refused(floor, ceiling, classes, message):
    with pytest.raises(ConfigError, match=message):
        make_constraints(floor, ceiling, classes)


def test_two_readings_of_a_pair_are_told_apart_by_index():
    assert make_constraints({}, {"0:3": 0.1}, AMBIGUOUS) == (Constraint(PAIR, 0.1, 0, 3),)


# What is measured, against loops.

ABC = make_costs(("a", "b", "c"), class_cost={"b": 4.0})
EVERY = tuple(
    [Constraint(kind, 0.6, c) for kind in (RECALL, PRECISION) for c in range(3)]
    + [Constraint(PAIR, 0.2, t, d) for t, d in itertools.permutations(range(3), 2)]
    + [Constraint(COST, 0.1), Constraint(COST, 3.0)]
)


def decided(seed, n=60):
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (n,), generator=g)
    random = torch.randint(3, (n,), generator=g)
    return torch.where(torch.rand(n, generator=g) < 0.5, labels, random), labels


def by_loops(constraint, decisions, labels, matrix):
    """The rate that a constraint is about, and the examples it is measured on."""
    pairs = list(zip(labels.tolist(), decisions.tolist(), strict=True))
    of_truth = [d for t, d in pairs if t == constraint.truth]
    if constraint.kind == COST:
        return sum(float(matrix[t, d]) for t, d in pairs) / len(pairs), len(pairs)
    if constraint.kind == PRECISION:
        truths = [t for t, d in pairs if d == constraint.truth]
        return truths.count(constraint.truth) / len(truths), len(of_truth)
    wanted = constraint.truth if constraint.kind == RECALL else constraint.decided
    return of_truth.count(wanted) / len(of_truth), len(of_truth)


@pytest.mark.parametrize("seed", range(3))
def test_what_is_reached_and_missed_is_that_of_loops(seed):
    decisions, labels = decided(seed)
    scores = score_decisions(decisions, labels, ABC)
    values = reached(EVERY, scores)
    missed = violations(EVERY, values, scores.confusion.sum(1))
    for constraint, value, miss in zip(EVERY, values, missed.tolist(), strict=True):
        rate, n = by_loops(constraint, decisions, labels, ABC.matrix)
        assert value == pytest.approx(rate, abs=1e-12)
        if constraint.is_floor:
            gap, room = constraint.bound - rate, 1 - constraint.bound
        else:
            gap, room = rate - constraint.bound, constraint.bound
        one = rate / n if constraint.kind == COST else 1 / n  # an example's part of it
        assert miss == pytest.approx(gap / max(room, one), abs=1e-10)
        assert held([constraint], [value]) == (gap <= 0)
    assert held(EVERY, values) == all(held([e], [v]) for e, v in zip(EVERY, values, strict=True))
    assert len({held([e], [v]) for e, v in zip(EVERY, values, strict=True)}) == 2


def test_what_is_not_defined_is_not_held_and_moves_nothing():
    scores = score_decisions(torch.tensor([0, 0, 0]), torch.tensor([0, 0, 1]), ABC)
    constraints = make_constraints({"precision:b": 0.1, "c": 0.1}, {"c:a": 0.5}, ABC.classes)
    values = reached(constraints, scores)  # b is never decided, c never occurs
    assert all(map(math.isnan, values))
    assert not any(
        held([constraint], [v]) for constraint, v in zip(constraints, values, strict=True)
    )
    missed = violations(constraints, values, scores.confusion.sum(1))
    assert missed.tolist() == [0.0, 0.0, 0.0]
    assert snapshot_of(constraints, scores) == Snapshot(False, -math.inf, pytest.approx(-4 / 3))
    before = init_dual(constraints, 3)._replace(multipliers=torch.ones(3, dtype=torch.float64))
    assert ascend(before, constraints, scores, ABC).multipliers.tolist() == [1.0, 1.0, 1.0]


def test_a_bound_without_room_leaves_that_of_one_example():
    labels = torch.arange(2).repeat_interleave(10)
    decisions = torch.where(torch.arange(20) == 0, 1, labels)  # one a of ten is called b
    scores = score_decisions(decisions, labels, make_costs(("a", "b")))
    constraints = make_constraints({"a": 1.0, "b": 1.0}, {"a:b": 0.0, "cost": 0.0}, ("a", "b"))
    values = reached(constraints, scores)
    assert values == pytest.approx((0.9, 1.0, 0.1, 0.05))
    assert_close(
        violations(constraints, values, scores.confusion.sum(1)),
        torch.tensor([1.0, 0.0, 1.0, 20.0], dtype=torch.float64),
    )
    assert [held([e], [v]) for e, v in zip(constraints, values, strict=True)] == [
        False, True, False, False,
    ]  # fmt: skip


def test_a_cost_is_missed_by_as_much_in_any_unit():
    decisions, labels = decided(2)
    found = []
    for unit in (1.0, 1e6, 1e-6):
        costs = dataclasses.replace(ABC, matrix=ABC.matrix * unit)
        scores = score_decisions(decisions, labels, costs)
        constraints = tuple(Constraint(COST, bound * unit) for bound in (0.3, 0.0, -1.0))
        found.append(violations(constraints, reached(constraints, scores), scores.confusion.sum(1)))
    assert_close(found[1], found[0])
    assert_close(found[2], found[0])
    assert (found[0] > 0).all()


def test_a_rate_that_is_met_exactly_is_held_whatever_the_rounding():
    """Precision, accuracy and cost are sums of ``1 / n``, which no float64 is."""
    labels = torch.arange(2).repeat_interleave(50)
    off = []
    for hits, trials in ((4, 5), (7, 10), (9, 10), (28, 40), (19, 20), (45, 50)):
        decisions = torch.ones(100, dtype=torch.int64)
        decisions[:hits] = 0
        decisions[50 : 50 + trials - hits] = 0
        scores = score_decisions(decisions, labels, make_costs(("a", "b")))
        cost = (50 - hits + trials - hits) / 100
        constraints = make_constraints({"precision:a": hits / trials}, {"cost": cost}, ("a", "b"))
        values = reached(constraints, scores)
        assert held(constraints, values)
        assert not held(constraints, (values[0] - 1e-6, values[1]))
        assert not held(constraints, (values[0], values[1] + 1e-6))
        off += [values[0] != hits / trials, values[1] != cost]
    assert any(off)


def test_an_abstention_is_a_decision_of_its_own():
    costs = make_costs(("a", "b"), {"a": {"a": 0, "b": 1, "ask": 0.2}, "b": {"a": 5, "b": 0, "ask": 0.2}})  # noqa: E501  # fmt: skip
    decisions, labels = torch.tensor([0, 2, 1, 2, 1]), torch.tensor([0, 0, 1, 1, 0])
    constraints = make_constraints(
        {"a": 0.5, "precision:b": 0.5}, {"a:b": 0.5, "cost": 1}, costs.classes
    )
    values = reached(constraints, score_decisions(decisions, labels, costs))
    assert values == pytest.approx((1 / 3, 1 / 2, 1 / 3, (0.2 + 0.2 + 1) / 5))


# The ascent.


def test_a_limit_moves_the_classes_that_it_names():
    decisions, labels = decided(0)
    scores = score_decisions(decisions, labels, ABC)
    rows = directions(EVERY, scores, ABC)
    for constraint, row in zip(EVERY, rows.tolist(), strict=True):
        if constraint.kind == COST:
            paid = [0.0, 0.0, 0.0]
            for truth, decision in zip(labels.tolist(), decisions.tolist(), strict=True):
                paid[truth] += float(ABC.matrix[truth, decision])
            mean = sum(paid[truth] for truth in labels.tolist()) / len(labels)
            assert row == pytest.approx([(p - mean) / max(paid) for p in paid])
            # The mean weight of the examples stays: else all would learn faster, no more.
            assert sum(row[truth] for truth in labels.tolist()) == pytest.approx(0, abs=1e-12)
        else:
            sign = -1.0 if constraint.kind == PRECISION else 1.0
            assert row == [sign if c == constraint.truth else 0.0 for c in range(3)]


def test_a_cost_is_that_of_the_prior():
    """What is dear here and does not come there is not raised."""
    labels = torch.arange(3).repeat_interleave(10)
    decisions = torch.where(torch.arange(30) % 10 < 4, (labels + 1) % 3, labels)
    constraints = make_constraints({}, {"cost": 0.1}, ABC.classes)
    here = directions(constraints, score_decisions(decisions, labels, ABC), ABC)[0]
    prior = torch.tensor([0.9, 0.0, 0.1])
    there = directions(constraints, score_decisions(decisions, labels, ABC, prior=prior), ABC)[0]
    assert here.tolist() == pytest.approx([-0.25, 0.5, -0.25])
    assert there.argmax() == 0
    assert there[1] == there.min()


def test_benefits_and_no_cost_at_all_move_nothing():
    labels = torch.tensor([0, 1])
    constraints = make_constraints({}, {"cost": -0.5}, ("a", "b"))
    for table in ({"a": {"a": -1, "b": -0.5}, "b": {"a": -0.5, "b": -1}}, None):
        costs = make_costs(("a", "b"), table)
        assert directions(constraints, score_decisions(labels, labels, costs), costs).tolist() == [
            [0, 0]
        ]


@pytest.mark.parametrize(
    ("floor", "ceiling", "signs"),
    [
        ({"a": 0.99}, {}, (1, 0, 0)),
        ({"precision:a": 0.99}, {}, (-1, 0, 0)),
        ({}, {"b:a": 0.001}, (0, 1, 0)),
        ({}, {"cost": 0.01}, (-1, 1, -1)),  # raised and lowered around the mean
        ({"a": 0.01}, {"b:a": 0.9}, (0, 0, 0)),  # kept: at 0 already
    ],
)
def test_a_missed_limit_raises_or_lowers_its_class(floor, ceiling, signs):
    scores = score_decisions(*decided(1), ABC)
    constraints = make_constraints(floor, ceiling, ABC.classes)
    dual = ascend(init_dual(constraints, 3), constraints, scores, ABC)
    assert dual.log_weights.sign().tolist() == list(signs)
    assert float(dual.multipliers.max()) == (RATE if any(signs) else 0.0)  # missed by far
    assert_close(dual.log_weights, dual.multipliers @ directions(constraints, scores, ABC))
    assert dual.total.tolist() == [0.0, 0.0, 0.0]  # what was in force until now
    again = ascend(dual, constraints, scores, ABC)
    assert torch.equal(again.total, dual.log_weights)
    assert again.measured == 2


def test_multipliers_stay_between_0_and_the_cap():
    constraints = make_constraints({"a": 0.99, "b": 0.01}, {}, ABC.classes)
    scores = score_decisions(*decided(1), ABC)
    dual = init_dual(constraints, 3)
    for _ in range(60):
        dual = ascend(dual, constraints, scores, ABC)
    assert dual.multipliers.tolist() == [CAP, 0.0]
    assert weights_of(dual.log_weights) == {0: 1000.0}
    assert dual.measured == 60
    both = make_constraints({"a": 0.99}, {"a:b": 0.0, "a:c": 0.0}, ABC.classes)
    dual = init_dual(both, 3)._replace(multipliers=torch.full((3,), CAP, dtype=torch.float64))
    dual = ascend(dual, both, scores, ABC)  # three that move one class
    assert float(dual.log_weights[0]) == CAP


def responding(kind, log_weights):
    """Scores of a model whose rates follow the weight of class a, smooth and monotone."""
    u = float(log_weights[0])
    rate = 1 / (1 + math.exp(1 - u))
    base = score_decisions(torch.arange(3).repeat(1000), torch.arange(3).repeat(1000), ABC)
    of_a = torch.tensor([rate, 0.5, 0.5], dtype=torch.float64)
    missed = torch.tensor([[1000 * rate, 1000 * (1 - rate), 0], [0, 1000, 0], [0, 0, 1000]])
    return {
        RECALL: replace(base, recall=base.recall._replace(value=of_a)),
        PRECISION: replace(base, precision=base.precision._replace(value=1 - of_a)),
        PAIR: replace(base, confusion=missed),
        COST: replace(
            base,
            expected_cost=base.expected_cost._replace(value=1 - rate),
            class_cost=torch.tensor([4.0, 1.0, 0.0], dtype=torch.float64),
        ),
    }[kind]


@pytest.mark.slow
@pytest.mark.parametrize("start", [0.0, 6.0])
@pytest.mark.parametrize(
    ("kind", "bound", "weight"),
    [  # where 1 / (1 + e^(1 - u)) is the bound: 1 - log(1 / bound - 1)
        (RECALL, 0.9, 1 + math.log(9)),
        (RECALL, 0.2, 0.0),  # kept at weight 1: the smallest
        (PRECISION, 0.8, 1 - math.log(4)),
        (PRECISION, 0.95, 1 - math.log(19)),
        (PAIR, 0.05, 1 + math.log(19)),
        (COST, 0.1, 1 + math.log(9)),
        (RECALL, 0.99999, CAP),  # beyond the cap
    ],
)
def test_the_ascent_finds_the_smallest_weight_that_keeps_a_limit(kind, bound, weight, start):
    constraints = (Constraint(kind, bound, -1 if kind == COST else 0, 1 if kind == PAIR else -1),)
    dual = init_dual(constraints, 3)
    dual = dual._replace(multipliers=dual.multipliers + start)
    for _ in range(300):
        dual = ascend(dual, constraints, responding(kind, dual.log_weights), ABC)
    assert float(dual.log_weights[0]) == pytest.approx(weight, abs=1e-3)
    # Around the mean of 4, 1 and 0 the others are two and five sevenths below, as a is above.
    others = [-2 / 7, -5 / 7] if kind == COST else [0.0, 0.0]
    assert_close(dual.log_weights[1:], dual.log_weights[0] * torch.tensor(others).double())


def test_weights_are_told_to_four_digits_without_those_of_1():
    logs = [0.0, math.log(1.23456), -math.log(3), 1e-9, math.log(1.0049), math.log(0.9949)]
    told = weights_of(torch.tensor(logs, dtype=torch.float64))
    assert told == {1: 1.235, 2: 0.3333, 5: 0.9949}
    assert weights_of(torch.tensor([-math.inf])) == {0: 0.0}


def test_a_moment_that_keeps_all_is_better_than_a_cheap_one():
    labels = torch.arange(2).repeat_interleave(10)
    constraints = make_constraints({"a": 0.9}, {}, ("a", "b"))

    def moment(a, b):
        """Of ten each, so many are right."""
        wrong = (torch.arange(20) < 10 - a) | (torch.arange(20) >= 10 + b)
        scores = score_decisions(torch.where(wrong, 1 - labels, labels), labels, costs)
        return snapshot_of(constraints, scores)

    costs = make_costs(("a", "b"))
    worst_first = [moment(0, 10), moment(7, 10), moment(8, 2), moment(8, 9), moment(9, 1),
                   moment(10, 1), moment(9, 5)]  # fmt: skip
    assert worst_first == sorted(worst_first)
    assert len(set(worst_first)) == len(worst_first)
    assert [m.feasible for m in worst_first] == [False] * 4 + [True] * 3
    assert moment(7, 10).margin == pytest.approx(-2.0)  # two examples, of the one there is room for
    assert moment(9, 5).worth == pytest.approx(-0.3)
    costs = make_costs(("a", "b"), class_cost={"b": 5.0})
    assert moment(9, 10) > moment(10, 9)  # as accurate, and cheaper


# Thresholds moved, against all thresholds.


def fixed(seed, n=400):
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (n,), generator=g)
    logits = torch.randn(n, 3, generator=g, dtype=torch.float64) + 1.2 * torch.eye(3)[labels]
    return logits.log_softmax(-1), labels


def precision_of(c, decisions, labels):
    return float((labels[decisions == c] == c).double().mean())


def best_by_hand(log_probs, labels, classes, points, keeps):
    """The best accuracy of all weights of some classes, of those that keep the constraints."""
    best = -math.inf
    for point in itertools.product(points, repeat=len(classes)):
        moved = log_probs.clone()
        moved[:, classes] += torch.tensor(point, dtype=torch.float64)
        decisions = moved.argmax(-1)
        if keeps(decisions):
            best = max(best, float((decisions == labels).double().mean()))
    return best


def recall_of(c, decisions, labels):
    return float((decisions[labels == c] == c).double().mean())


ONE = [
    ({"a": 0.8}, {}, lambda d, y: recall_of(0, d, y) >= 0.8),
    ({"a": 0.95}, {}, lambda d, y: recall_of(0, d, y) >= 0.95),
    ({"a": 1.0}, {}, lambda d, y: recall_of(0, d, y) == 1),
    ({"precision:a": 0.8}, {}, lambda d, y: precision_of(0, d, y) >= 0.8),
    ({}, {"a:b": 0.05}, lambda d, y: float((d[y == 0] == 1).double().mean()) <= 0.05),
]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("floor", "ceiling", "keeps"), ONE, ids=range(len(ONE)))
def test_moved_thresholds_are_near_the_best_of_one_class(floor, ceiling, keeps, seed):
    log_probs, labels = fixed(seed)
    constraints = make_constraints(floor, ceiling, ABC.classes)
    scored = partial(score_decisions, labels=labels, costs=ABC)
    log_weights, all_held = decision_weights(log_probs, constraints, ABC, scored)
    decisions = (log_probs + log_weights).argmax(-1)
    assert all_held
    assert keeps(decisions, labels)
    assert log_weights[1:].tolist() == [0.0, 0.0]
    # Every weight that changes a decision.
    edges = (log_probs[:, 1:].amax(-1) - log_probs[:, 0]).sort().values
    best = best_by_hand(
        log_probs, labels, [0], [*(edges + 1e-9).tolist(), -9.0], lambda d: keeps(d, labels)
    )
    assert float((decisions == labels).double().mean()) > best - 0.03


TWO = [
    (
        {"a": 0.75, "b": 0.65},
        lambda d, y: recall_of(0, d, y) >= 0.75 and recall_of(1, d, y) >= 0.65,
    ),
    (
        {"a": 0.8, "precision:b": 0.75},
        lambda d, y: recall_of(0, d, y) >= 0.8 and precision_of(1, d, y) >= 0.75,
    ),
]


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize(("floor", "keeps"), TWO, ids=["two recalls", "recall and precision"])
def test_moved_thresholds_are_near_the_best_of_two_classes(floor, keeps, seed):
    log_probs, labels = fixed(seed)
    constraints = make_constraints(floor, {}, ABC.classes)
    scored = partial(score_decisions, labels=labels, costs=ABC)
    log_weights, all_held = decision_weights(log_probs, constraints, ABC, scored)
    decisions = (log_probs + log_weights).argmax(-1)
    assert all_held
    assert keeps(decisions, labels)
    points = [i / 15 for i in range(-22, 23)]
    best = best_by_hand(log_probs, labels, [0, 1], points, lambda d: keeps(d, labels))
    assert best > 0.5
    assert float((decisions == labels).double().mean()) > best - 0.02


def test_where_no_threshold_keeps_a_limit_the_nearest_is_told_as_missed():
    log_probs, labels = fixed(0)
    constraints = make_constraints({"a": 0.95, "b": 0.95}, {}, ABC.classes)
    scored = partial(score_decisions, labels=labels, costs=ABC)
    log_weights, all_held = decision_weights(log_probs, constraints, ABC, scored)
    assert not all_held
    values, at_one = (
        reached(constraints, scored((log_probs + w).argmax(-1)))
        for w in (log_weights, 0 * log_weights)
    )
    assert not held(constraints, values)
    assert min(values) >= min(at_one)


# Trainings on real digits. The linear model finds the 8 hardest.


def trained(run, **options):
    return runs.run(config(**options), run)


def argmax_of(outcome, part="validation"):
    return outcome.summary[part]["rules"]["argmax"]


def measurements(run):
    return [r for r in [*folder.records_of(run)] if r["kind"] == "constraints"]


def tensors(run, file):
    return runs.load_tensors(Path(run) / file)[0]


def same(a, b):
    """Whether two runs ended in the same state, memory and model."""
    pairs = [[tensors(run, file) for run in (a, b)] for file in
             ("checkpoint.safetensors", "model.safetensors")]  # fmt: skip
    return all(
        x.keys() == y.keys()
        and all(torch.equal(x[name].nan_to_num(7), y[name].nan_to_num(7)) for name in x)
        for x, y in pairs
    )


def told(run, *kinds):
    """What was recorded, less what the clock said."""
    clocks = ("seconds", "images_per_second")
    records = [r for r in [*folder.records_of(run)] if not kinds or r["kind"] in kinds]
    return [{k: v for k, v in r.items() if k not in clocks} for r in records]


@pytest.fixture(scope="module")
def room(tmp_path_factory):
    return tmp_path_factory.mktemp("floors")


@pytest.fixture(scope="module")
def quick():
    """As ``_no_figures``, for the fixtures of the module."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("curves", "confusion", "predictions"):
            patch.setattr(f"funcloss.app.report.run_figures.{name}", lambda *args: None)
        patch.setattr("funcloss.app.report.run_figures.save_figure", lambda f, path: path.touch())
        yield


@pytest.fixture(scope="module")
def plain(room, quick):
    return trained(room / "plain", epochs=8)


@pytest.fixture(scope="module")
def floored(room, quick):
    return trained(room / "floored", epochs=8, floor={"8": 0.93})


def replayed(made, bound, every):
    """A training under a floor on the 8, by hand: ``(step, weight, recall, accuracy, state)``."""
    setup = make_setup(made)
    held_out = setup.dataset.validation
    images = normalised(held_out.inputs, setup.dataset.mean, setup.dataset.std)
    state, multiplier, rows = setup.state, 0.0, []
    steps = made.epochs * setup.per_epoch
    for step in range(steps + 1):
        if step and (step % every == 0 or step == steps):
            with torch.no_grad():
                logits = torch.func.functional_call(setup.model, state.params, (images,))
            right = (logits.argmax(-1) == held_out.labels).tolist()
            of_8 = [r for r, y in zip(right, held_out.labels.tolist(), strict=True) if y == 8]
            recall = sum(of_8) / len(of_8)
            rows.append((step, math.exp(multiplier), recall, sum(right) / len(right), state))
            miss = (bound - recall) / max(1 - bound, 1 / len(of_8))
            multiplier = min(max(multiplier + 0.2 * min(max(miss, -1.0), 1.0), 0.0), CAP)
        if step < steps:
            epoch, position = divmod(step, setup.per_epoch)
            order = training.epoch_order(state.key, epoch, len(setup.dataset.train.labels))
            index = order[position * made.batch_size : (position + 1) * made.batch_size]
            weights = torch.ones(10)
            weights[8] = float(torch.tensor(multiplier, dtype=torch.float64).exp())
            batch = get_batch(setup.dataset, setup.dataset.train, index)
            state, _ = setup.train_step(state, batch, setup.hyper | {"class_weights": weights})
    return rows, state


def test_every_measurement_is_that_of_the_pure_steps_and_the_best_is_kept(floored):
    run = floored.folder
    rows, last = replayed(folder.read_config(run), 0.93, every=4)
    records = measurements(run)
    assert [r["step"] for r in records] == [row[0] for row in rows] == list(range(4, 161, 4))
    for record, (_, weight, recall, accuracy, _) in zip(records, rows, strict=True):
        assert record["weights"].get("8", 1.0) == pytest.approx(weight, rel=1e-3)
        assert record["reached"] == {"recall of 8 at least 0.93": recall}
        assert record["accuracy"] == pytest.approx(accuracy)
        assert record["feasible"] == (recall >= 0.93)
    best = max(rows, key=lambda row: (row[2] >= 0.93, min(row[2], 0.93), row[3]))
    summary = floored.summary
    assert best[2] >= 0.93
    assert summary["best_step"] == best[0]
    assert summary["feasible"] is True
    assert summary["constraints"] == [
        {"constraint": "recall of 8 at least 0.93", "bound": 0.93, "reached": best[2], "held": True}
    ]
    kept = tensors(run, "model.safetensors")
    assert kept.keys() == best[4].params.keys()
    assert all(torch.equal(kept[name], p) for name, p in best[4].params.items())
    checkpoint = tensors(run, "checkpoint.safetensors")
    assert all(torch.equal(checkpoint[f"state/params/{n}"], p) for n, p in last.params.items())
    assert int(checkpoint["state/step"]) == 160
    assert (
        summary["validation"]["rules"]["argmax"]["recall"]["8"][0] == best[2]
    )  # the summary is of what is kept


def test_the_weight_found_is_the_mean_of_the_second_half(floored):
    rows, _ = replayed(folder.read_config(floored.folder), 0.93, every=4)
    after = [math.log(weight) for step, weight, *_ in rows if step > 80]  # in force up to there
    found = floored.summary["weights_found"]
    assert list(found) == ["8"]
    assert found["8"] == pytest.approx(math.exp(sum(after) / len(after)), rel=1e-3)
    assert floored.summary["weights_at_best"]["8"] == pytest.approx(
        next(w for step, w, *_ in rows if step == floored.summary["best_step"]), rel=1e-3
    )


def test_what_was_found_used_plainly_is_near_the_floor(floored, plain, tmp_path):
    found = floored.summary["weights_found"]
    assert 1.5 < found["8"] < 50
    again = trained(tmp_path / "run", epochs=8, class_weight=found)
    recall = again.summary["validation"]["rules"]["argmax"]["recall"]["8"][0]
    assert plain.summary["validation"]["rules"]["argmax"]["recall"]["8"][0] < 0.89
    assert recall == pytest.approx(0.93, abs=0.04)


def test_an_audit_sees_the_weights_of_the_last_steps(floored):
    run = floored.folder
    weights = tensors(run, "checkpoint.safetensors")["hyper/class_weights"]
    assert float(weights[8]) == pytest.approx(measurements(run)[-1]["weights"]["8"], rel=1e-3)
    assert weights[:8].tolist() == [1.0] * 8
    found = audit_run(run, AuditOptions(examples=500)).audit
    assert_close(found.class_weights.float(), weights)
    assert found.balance.share.sum() == pytest.approx(1.0)


def test_it_is_evaluated_with_the_weights_that_its_model_was_given(floored):
    """They tell what prior the probabilities are of, and what the loss was."""
    found = runs.evaluate_run(floored.folder, EvaluateOptions(split="validation"))
    record = runs.evaluation.record_of(found.evaluation)
    assert record == floored.summary["validation"]
    assert found.evaluation.loss == pytest.approx(floored.summary["validation"]["loss"])


def test_a_step_that_is_audited_is_given_the_weights_of_the_moment(tmp_path):
    made = config(floor={"8": 0.99}, epochs=1, batch_size=250, floor_every=3, audit_every=3)
    train(made, tmp_path / "run")
    records = [*folder.records_of(tmp_path / "run")]
    weight_at = {
        r["step"]: r["weights"].get("8", 1.0) for r in records if r["kind"] == "constraints"
    }
    counts = make_setup(made).dataset.train.labels
    audits = [r for r in records if r["kind"] == "audit" and r["class"] == "8"]
    assert [r["step"] for r in audits] == [1, 4, 7, 10, 13, 16]
    order = training.epoch_order(make_setup(made).state.key, 0, len(counts))
    for before, row in zip([3, 6, 9, 12, 15], audits[1:], strict=True):
        weight = weight_at[before + 3] if before < 15 else weight_at[16]  # used from here on
        assert weight > weight_at[before]
        part = (counts[order[before * 250 : (before + 1) * 250]] == 8).sum().item()
        assert row["expected_share"] == pytest.approx(
            weight * part / (weight * part + 250 - part), rel=1e-3
        )


def test_a_floor_that_plain_training_keeps_needs_no_weights(tmp_path):
    bare = trained(tmp_path / "bare", floor={"0": 0.01}, ceiling={"0:1": 0.99})
    assert bare.summary["weights_found"] == bare.summary["weights_at_best"] == {}
    assert all(r["feasible"] and r["weights"] == {} for r in measurements(bare.folder))
    assert bare.summary["best_step"] == max(
        measurements(bare.folder), key=lambda r: (r["accuracy"], -r["step"])
    )["step"]  # fmt: skip
    alone = trained(tmp_path / "plain")
    state = [tensors(o.folder, "checkpoint.safetensors") for o in (bare, alone)]
    assert all(torch.equal(state[0][k], t) for k, t in state[1].items())


def test_weights_of_the_configuration_go_into_those_that_are_told(tmp_path):
    """They replace those of the configuration, where they are used plainly."""
    run = trained(tmp_path / "run", class_weight={"8": 3.0, "1": 2.0}, floor={"8": 0.99})
    first, *_, last = measurements(run.folder)
    assert first["weights"] == {"1": 2.0, "8": 3.0}
    assert last["weights"]["8"] > 3.0
    assert last["weights"]["1"] == run.summary["weights_found"]["1"] == 2.0
    given = tensors(run.folder, "checkpoint.safetensors")["hyper/class_weights"]
    assert [float(given[1]), float(given[8])] == pytest.approx(
        [2.0, last["weights"]["8"]], rel=1e-3
    )
    assert run.summary["weights_found"]["8"] > 3.0
    best = runs.load(run.folder).class_weights
    assert best[8].item() == pytest.approx(run.summary["weights_at_best"]["8"], rel=1e-3)


MOVES = [
    ({"floor": {"precision:8": 0.97}}, {"8": -1}, lambda s: s["precision"]["8"][0]),
    ({"ceiling": {"8:5": 0.0}}, {"8": +1}, lambda s: -s["confusion"][8][5]),
    (
        {"ceiling": {"cost": 0.1}, "class_cost": {"8": 20}},
        {"8": +1},
        lambda s: -s["expected_cost"][0],
    ),
    (
        {"floor": {"5": 0.95, "8": 0.95}},
        {"5": +1, "8": +1},
        lambda s: s["recall"]["5"][0] + s["recall"]["8"][0],
    ),
]


@pytest.mark.parametrize(
    ("options", "signs", "score"), MOVES, ids=["precision", "pair", "cost", "two recalls"]
)
def test_a_limit_moves_a_real_training_its_way(plain, tmp_path, options, signs, score):
    run = trained(tmp_path / "run", epochs=8, **options)
    moved = {name: math.log(w) for name, w in run.summary["weights_found"].items()}
    assert all(way * moved[name] > 0.1 for name, way in signs.items())
    assert max(moved, key=lambda name: abs(moved[name])) in signs
    costs = {"class_cost": options["class_cost"]} if "class_cost" in options else {}
    before = runs.evaluate_run(plain.folder, EvaluateOptions(split="validation", **costs))
    before = runs.evaluation.record_of(before.evaluation)["rules"]["argmax"]
    assert score(argmax_of(run)) > score(before)


def test_a_long_tail_is_held_up(tmp_path):
    """Few training examples of the last classes, and a floor on the rarest."""
    tail = {"imbalance": 20, "batch_size": 100, "epochs": 8}
    bare = trained(tmp_path / "plain", **tail)
    run = trained(tmp_path / "run", floor={"9": 0.7}, **tail)
    assert bare.summary["validation"]["rules"]["argmax"]["recall"]["9"][0] < 0.7
    assert run.summary["feasible"]
    assert run.summary["validation"]["rules"]["argmax"]["recall"]["9"][0] >= 0.7
    assert run.summary["weights_found"]["9"] > 2


def test_weights_that_change_compile_nothing_anew(tmp_path, monkeypatch):
    counter, real, seen = CompileCounter(), torch.compile, []
    monkeypatch.setattr(torch, "compile", lambda fn, **how: real(fn, backend=counter, **how))

    def show(event):
        if isinstance(event, runs.Started):
            seen.append(counter.frame_count)

    made = config(compile="on", floor={"8": 0.99}, epochs=2, batch_size=400, floor_every=2)
    runs.run(made, tmp_path / "run", watcher=runs.Watcher(show))
    assert len({json.dumps(r["weights"]) for r in measurements(tmp_path / "run")}) > 5
    assert seen == [counter.frame_count]
    assert counter.frame_count >= 1


# What cannot be kept.


@pytest.fixture(scope="module")
def missed(room, quick):
    """A training by the command under floors that no weights keep: exit code and output."""
    options = ["--dataset", "mnist-sample", "--model", "linear", "--epochs", "2", "--batch-size",
               "200", "--compile", "off", "--audit-every", "0", "--threads", "1", "--quiet",
               "--floor", "3=1", "--floor", "8=1", "--run-dir", str(room / "missed")]  # fmt: skip
    out, code = io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out):
        patch.setattr("funcloss.app.audits.draw_all", lambda *args: {})
        patch.setattr(sys, "argv", ["funcloss-train", *options])
        try:
            shell.main_train()
        except SystemExit as end:
            code = end.code or 0
    return room / "missed", code, out.getvalue()


def test_floors_that_cannot_be_kept_are_said_first_how_near_and_at_what_price(missed):
    run, code, out = missed
    assert code == 0
    summary = json.loads((run / "summary.json").read_text())
    first, *rest = out.splitlines()
    assert first.startswith("Not every constraint could be kept on validation data. Nearest after ")
    assert summary["feasible"] is False
    for constraint in summary["constraints"]:
        if constraint["held"]:
            assert constraint["constraint"] not in first
        else:
            by = 1 - constraint["reached"]
            assert (
                f"{constraint['constraint']} is missed by {by:.4f}, at {constraint['reached']:.4f}"
                in first
            )
    assert not all(constraint["held"] for constraint in summary["constraints"])
    measured = len(measurements(run))
    assert f"after {summary['best_step']} steps, the best of {measured} measurements, at 0" in first
    weights = "Weights that it came to, which keep not every constraint: --class-weight 3="
    assert any(line.startswith(weights) for line in rest)
    price = r"Expected cost of the model under constraints against plain: [+-]\d"
    assert any(re.match(price, line) for line in rest)
    tested = (
        r"The constraints on the test set: recall of 3 at least 1: \d\.\d{4}; "
        "recall of 8 at least 1"
    )
    assert any(re.match(tested, line) for line in rest)
    nearest = max(
        measurements(run), key=lambda r: (min(r["reached"].values()), r["accuracy"], -r["step"])
    )
    assert nearest["step"] == summary["best_step"]


def test_a_finished_training_under_limits_is_not_taken_up_again(missed, run_cli):
    run, _, _ = missed
    before = {f.name: f.stat().st_mtime_ns for f in run.rglob("*")}
    code, out, err = run_cli("train", "--resume", run)
    assert (code, out) == (1, "")
    assert err == f"error: {run} is finished: its report is {run / 'floor.html'}\n"
    assert {f.name: f.stat().st_mtime_ns for f in run.rglob("*")} == before


def test_its_run_folder_serves_every_command(missed, run_cli):
    run, _, _ = missed
    code, out, _ = run_cli("evaluate", run, "--split", "validation")
    assert code == 0
    accuracy = json.loads((run / "summary.json").read_text())["validation"]["rules"]["argmax"]
    accuracy = accuracy["accuracy"][0]
    assert f"accuracy {accuracy:.2%}" in out
    code, out, _ = run_cli("audit", run, "--examples", 200, "--quiet", "--out", run / "audit")
    assert code == 0
    assert folder.foreign(run) == ["audit/"]
    report = json.loads((run / "floor.json").read_text())
    assert [constraint["text"] for constraint in report["constraints"]] == [
        "recall of 3 at least 1", "recall of 8 at least 1",
    ]  # fmt: skip
    assert len(report["ascent"]) == len(measurements(run))
    assert "<html" in (run / "floor.html").read_text()


def test_words_of_what_is_kept_and_of_what_is_missed():
    kept = Told("recall of 9 at least 0.9", 0.9, 0.95, True)
    lost = Told("precision of 4 at least 0.9", 0.9, math.nan, False)
    moments = [Ascent(10, {}, (0.5,), 0.9, False), Ascent(1234, {"9": 2.5}, (0.95,), 0.9, True)]
    assert constraint_sentences([kept], moments, moments[1], {"a b": 2.5}, plain_keeps=False) == [
        "Every constraint is kept on validation data after 1,234 steps, the best of 2 "
        "measurements, at 1 of which every constraint held. recall of 9 at least 0.9: 0.9500.",
        "Weights found, to be used plainly: --class-weight 'a b=2.5'",
    ]
    lines = constraint_sentences([kept, lost], moments, moments[0], {}, plain_keeps=False)
    assert len(lines) == 1
    assert "precision of 4 at least 0.9 is missed: it is not defined" in lines[0]
    assert "recall of 9" not in lines[0]
    lines = constraint_sentences([kept], moments, moments[1], {}, plain_keeps=True)
    assert lines[1:] == ["Plain training keeps every constraint on validation data as it is."]


# Stops and kills.

BRIEF = {"epochs": 2, "batch_size": 500, "floor_every": 3, "floor": {"8": 0.9}}  # 8 steps an epoch


@pytest.fixture
def no_report(monkeypatch):
    """The report of a choice, less the page and what is measured for it alone."""

    def written(choice, page, run_dir, setup):
        page.with_suffix(".json").write_text(json.dumps(jsonable(choice)))
        return [page]

    monkeypatch.setattr("funcloss.app.train.written", written)
    monkeypatch.setattr("funcloss.app.choice.finish._gradient_of", lambda *args: ({}, 0))


@pytest.fixture
def whole(tmp_path, no_report):
    train(config(**BRIEF), tmp_path / "run")
    return (tmp_path / "run").rename(tmp_path / "whole")


@pytest.mark.slow
def test_stopped_at_any_step_of_either_training_it_goes_on_to_the_same_bits(tmp_path, whole):
    steps = [r["step"] for r in measurements(whole)]
    assert steps == [3, 6, 9, 12, 15, 16]
    for at in (1, 3, 8, 9, 15, 16, 17, 24, 30):  # 16 of each
        run = tmp_path / "run"
        stopped = train(config(**BRIEF), run, should_stop=StopAt(at))
        assert not stopped.finished
        assert (run / "summary.json").exists() == (at >= 16)
        assert (run / "plain").exists() == (at >= 16)
        if at in (1, 9):  # and once more
            assert not resume(run, should_stop=StopAt(5)).finished
        ended = resume(run)
        assert ended.finished
        assert same(run, whole)
        assert same(run / "plain", whole / "plain")
        assert told(run, "constraints", "epoch") == told(whole, "constraints", "epoch")
        assert (run / "floor.json").read_text() == (whole / "floor.json").read_text()
        run.rename(tmp_path / f"run{at}")


def killing(monkeypatch, at):
    """Die at the ``at``-th file that is moved into place or measurement that is recorded."""
    left, replace, append = [at], Path.replace, folder.append_line

    def count():
        left[0] -= 1
        if left[0] == 0:
            raise Killed

    def dying_replace(path, target):
        count()
        return replace(path, target)

    def dying_append(run, record):
        append(run, record)
        if record["kind"] == "constraints":
            count()

    monkeypatch.setattr(runs.lifecycle, "_SAVED_EVERY", 0.0)  # a checkpoint after each epoch
    monkeypatch.setattr(Path, "replace", dying_replace)
    monkeypatch.setattr(folder, "append_line", dying_append)


@pytest.mark.slow
def test_killed_at_any_write_or_measurement_it_goes_on_to_the_same_bits(tmp_path, monkeypatch):
    made = config(**BRIEF)
    runs.run(made, tmp_path / "whole")
    taken_up = 0
    for at in range(1, 40):
        run = tmp_path / f"run{at}"
        with monkeypatch.context() as patch:
            killing(patch, at)
            try:
                runs.run(made, run)
            except Killed:
                alive = False
            else:
                alive = True
        if alive:
            break
        if run.exists():
            taken_up += 1
            assert runs.run(folder.read_config(run), run, resume=True).finished
            assert same(run, tmp_path / "whole")
            assert told(run) == told(tmp_path / "whole")
    assert taken_up > 10
    assert 12 < at < 39


def test_a_folder_without_a_run_is_not_taken_up(tmp_path):
    with pytest.raises(RunError, match="is not a run folder"):
        resume(tmp_path)


# Honest.


UNFIT = [
    ({"val_fraction": 0, "floor": {"8": 0.9}}, "none is held out: set val_fraction, to 0.1 say"),
    ({"floor": {"ten": 0.9}}, "floor: no class 'ten'"),
    ({"floor": {"8": 2}}, "floor 8 must be a recall above 0 and at most 1, got 2"),
    (
        {"floor": {"8": 0.9}, "reduction": "weighted_mean", "class_weight": {"8": 2}},
        "which reduction weighted_mean divides by again: use reduction mean",
    ),
]


@pytest.mark.parametrize(("options", "message"), UNFIT, ids=range(len(UNFIT)))
def test_limits_that_cannot_be_measured_are_refused_before_anything_is_written(
    tmp_path, options, message
):
    with pytest.raises(ConfigError, match=message):
        train(config(**options), tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_the_command_refuses_them_with_exit_code_2(tmp_path, run_cli):
    args = ["train", "--dataset", "mnist-sample", "--run-dir", tmp_path / "run"]
    for more, message in (
        (["--floor", "ten=0.9"], "floor: no class 'ten'"),
        (["--floor", "8=0.9", "--val-fraction", "0"], "set val_fraction, to 0.1 say"),
        (["--ceiling", "8:8=0.1"], "ceiling 8:8: a 8 called itself is no mistake"),
    ):
        code, _, err = run_cli(*args, *more)
        assert code == 2
        assert message in err
        assert err.count("error: ") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_limit_on_a_class_that_is_not_held_out_is_refused(sample):
    setup = make_setup(config(floor={"8": 0.9}))
    few = setup.dataset.validation
    few = type(few)(few.inputs[few.labels != 8], few.labels[few.labels != 8])
    setup = dataclasses.replace(setup, dataset=dataclasses.replace(setup.dataset, validation=few))
    with pytest.raises(ConfigError, match="there is no validation example of 8 to measure"):
        runs.constrained.constraints_of(setup)


def test_the_test_set_is_read_once_after_the_last_measurement(tmp_path, monkeypatch, no_report):
    events, real = [], evaluation.evaluate_examples

    def spy(model, dataset, examples):
        events.append("test" if examples is dataset.test else "validation")
        return real(model, dataset, examples)

    monkeypatch.setattr(evaluation, "evaluate_examples", spy)
    show = lambda event: events.append(type(event).__name__)  # noqa: E731
    train(config(**BRIEF), tmp_path / "run", show=show)
    first = events.index("test")
    begun = [i for i, event in enumerate(events) if event == "Started"]
    measured = [i for i, event in enumerate(events) if event == "Constrained"]
    assert len(begun) == 2
    assert len(measured) == 6
    assert max(measured) < first < begun[1]
    assert events[:first].count("validation") >= 6
    # Plain training: at its end alone.
    assert max(i for i, event in enumerate(events) if event == "EpochReport") < min(
        i for i in range(begun[1], len(events)) if events[i] == "test"
    )


def test_garbage_for_a_test_set_changes_the_test_rows_alone(tmp_path, monkeypatch, whole):
    from funcloss.app.runs import setup as room

    real = room.load_dataset

    def garbled(*args, **options):
        dataset = real(*args, **options)
        test = dataset.test
        images = torch.randint_like(test.inputs, 256)
        return dataclasses.replace(dataset, test=type(test)(images, torch.zeros_like(test.labels)))

    monkeypatch.setattr(room, "load_dataset", garbled)
    run = tmp_path / "run"
    train(config(**BRIEF), run)
    assert same(run, whole)
    assert same(run / "plain", whole / "plain")
    assert told(run) == told(whole)
    summaries = [json.loads((p / "summary.json").read_text()) for p in (run, whole)]
    for name in ("constraints", "best_step", "weights_found", "validation"):
        assert summaries[0][name] == summaries[1][name]
    assert summaries[0]["validation"] == summaries[1]["validation"]
    assert summaries[0]["test"] != summaries[1]["test"]
    choices = [json.loads((p / "floor.json").read_text()) for p in (run, whole)]
    of_test = ("rows", "lines", "qualities")
    for name in choices[0].keys() - set(of_test):
        assert choices[0][name] == choices[1][name]
    before = [line for line in choices[1]["lines"] if "test set" not in line][:2]
    assert choices[0]["lines"][:2] == choices[1]["lines"][:2] == before
    assert all(choices[0][name] != choices[1][name] for name in of_test)


def test_a_moment_that_has_hardly_learnt_gives_way_to_a_later_one():
    setup = make_setup(config(epochs=4, floor={"9": 0.3}))
    controller, state = make_controller(setup), setup.state
    order = training.epoch_order(state.key, 0, len(setup.dataset.train.labels))
    for batch in setup.iter_batches(order.split(setup.config.batch_size)[:10]):
        state, _ = setup.train_step(state, batch, setup.hyper)
    half = setup.config.epochs * setup.per_epoch // 2

    def at(step, bias):  # a larger bias of the 9 keeps its floor, and spoils the rest
        raised = state.params["fc.bias"] + bias * (torch.arange(10) == 9)
        return state._replace(step=torch.tensor(step), params={**state.params, "fc.bias": raised})

    memory = controller.init(setup.state)
    worth = []
    for step, bias in ((1, 1.0), (half, 3.0), (half + 1, 2.0), (half + 2, -9.0)):
        memory, line = controller.update(memory, at(step, bias))
        assert line["feasible"] == (bias > 0)
        worth.append(line["accuracy"])
    assert worth[2] < worth[0]
    assert int(memory.step) == half + 1


@pytest.mark.parametrize("floor", [{"9": 0.9}, {"precision:9": 0.9}])
def test_a_limit_on_a_class_of_no_weight_is_refused(floor):
    with pytest.raises(ConfigError, match="class 9 has class_weight 0, which no multiplier"):
        make_controller(make_setup(config(class_weight={"9": 0.0}, floor=floor)))
