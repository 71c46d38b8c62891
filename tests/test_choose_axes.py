"""What a sweep goes over, which trial it chooses, and its rows on the test set."""

import dataclasses
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import score_decisions
from hypothesis import example, given
from hypothesis import strategies as st
from scipy import stats

from funcloss.app.choice import words
from funcloss.app.choice.tested import row_of
from funcloss.app.config import make_config, plain_config
from funcloss.app.report.choice import Constraint as Reached
from funcloss.app.report.choice import Row
from funcloss.app.sweep import Axis, parse_values
from funcloss.app.sweep.axes import (
    by_name,
    describe,
    learning_rates,
    plain_trials,
    trial_config,
    trials_of,
)
from funcloss.app.sweep.select import baseline_of, chosen_of, faded, misses, order_of, points_of
from funcloss.constraints.bounds import make_constraints
from funcloss.decisions import (
    DecisionRule,
    Interval,
    cost_interval,
    make_costs,
    part_interval,
    score,
)
from funcloss.errors import ConfigError

NINE = Axis("class_weight", "9", (1.0, 2.0, 5.0, 10.0))
FOUR = Axis("class_weight", "4", (0.5, 2.0))
TAU = Axis("loss_option", "tau", (0.0, 1.0))
RATE = Axis("learning_rate", "", (0.01, 0.1))
DIGITS = tuple("0123456789")
TEN = make_costs(DIGITS)


# Values as they are typed.

VALUES = [
    ("1,2,5", (1, 2, 5)),
    ("5,1", (5, 1)),
    ("7", (7,)),
    ("1e-3,0.1", (0.001, 0.1)),
    ("0:2:5", (0, 0.5, 1, 1.5, 2)),
    ("-1:1:3", (-1, 0, 1)),
    ("-1:2:4", (-1, 0, 1, 2)),
    ("2:0:3", (2, 1, 0)),
    ("1:2:2", (1, 2)),
    ("1:2:log2", (1, 2)),
    ("1:100:log3", (1, 10, 100)),
    ("0.001:1:log4", (0.001, 0.01, 0.1, 1)),
    ("100:1:log3", (100, 10, 1)),
    ("0:1:4", (0, 0.3333, 0.6667, 1)),
    ("1000:1001:5", (1000, 1000.25, 1000.5, 1000.75, 1001)),
    ("1.00001:1.00003:3", (1.00001, 1.00002, 1.00003)),
]


@pytest.mark.parametrize(("text", "values"), VALUES, ids=[text for text, _ in VALUES])
def test_values_are_read(text, values):
    assert parse_values("x", text) == values


REFUSED = [
    ("1:2", "x must be a number, a list as in 1,2,5, or FIRST:LAST:COUNT as in 1:100:log16"),
    ("1:2:3:4", "x must be a number, a list"),
    ("", "x: '' is not a number"),
    ("1,,2", "x: '' is not a number"),
    ("1,2,", "x: '' is not a number"),
    ("a:b:3", "x: 'a' is not a number"),
    ("1:inf:3", "x: 'inf' is not a number"),
    ("nan,1", "x: 'nan' is not a number"),
    ("1,2,1.0", "x: 1,2,1.0 names a value twice"),
    ("0:10:log4", "x: log values must be above 0, got 0:10:log4"),
    ("-1:10:log4", "x: log values must be above 0"),
    ("3:3:4", "x: 3:3:4 begins and ends at one value"),
    ("1:2:1", "x: '1' must be how many, 2 to 4,096, as in 16 or log16"),
    ("1:2:0", "x: '0' must be how many"),
    ("1:2:-3", "x: '-3' must be how many"),
    ("1:2:2.5", "x: '2.5' must be how many"),
    ("1:2:log", "x: 'log' must be how many"),
    ("1:2:lin4", "x: 'lin4' must be how many"),
    ("1:2:4097", "x: '4097' must be how many, 2 to 4,096"),
    ("1:2:" + 5000 * "9", "must be how many, 2 to 4,096"),
    ("1:2:\N{SUPERSCRIPT TWO}", "must be how many"),
    ("1:1.0000000000000002:5", "x: 1.0 and 1.0000000000000002 are too close together"),
]


@pytest.mark.parametrize(("text", "message"), REFUSED, ids=[text[:20] for text, _ in REFUSED])
def test_values_that_cannot_be_are_refused(text, message):
    with pytest.raises(ConfigError) as error:
        parse_values("x", text)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


PLAIN = st.floats(-1e6, 1e6, allow_subnormal=False).map(lambda v: float(f"{v:.6g}"))
POSITIVE = st.floats(1e-6, 1e6).map(lambda v: float(f"{v:.6g}"))
COUNT = st.integers(2, 60)


def ends_apart(first, last):
    return abs(last - first) > 1e-9 * max(abs(first), abs(last), 1e-3)


@given(PLAIN, PLAIN, COUNT)
@example(0.0, 1.0, 3)
@example(1000.0, 1001.0, 60)
def test_equal_steps_keep_ends_count_and_order(first, last, count):
    if not ends_apart(first, last):
        return
    values = parse_values("x", f"{first!r}:{last!r}:{count}")
    assert len(values) == count
    assert (values[0], values[-1]) == (first, last)
    steps = np.diff(values)
    assert (steps > 0).all() if last > first else (steps < 0).all()
    exact = np.linspace(first, last, count)
    assert np.abs(values - exact).max() <= 0.021 * abs(exact[1] - exact[0])


@given(POSITIVE, POSITIVE, COUNT)
@example(1.0, 100.0, 16)
def test_log_values_keep_ends_count_order_and_ratios(first, last, count):
    if not ends_apart(first, last):
        return
    values = np.array(parse_values("x", f"{first!r}:{last!r}:log{count}"))
    assert len(values) == count
    assert (values[0], values[-1]) == (first, last)
    steps = np.diff(values)
    assert (steps > 0).all() if last > first else (steps < 0).all()
    assert np.abs(values / np.geomspace(first, last, count) - 1).max() <= 5.1e-4


@given(st.lists(PLAIN, min_size=1, max_size=8, unique=True))
def test_a_list_is_what_it_says(numbers):
    assert parse_values("x", ",".join(map(repr, numbers))) == tuple(numbers)


# The grid.


def test_the_grid_is_every_combination_the_last_axis_fastest():
    grid = trials_of([TAU, RATE, NINE])
    assert len(grid) == 16
    assert grid[:5] == [
        *({"tau": 0.0, "learning_rate": 0.01, "class_weight 9": w} for w in NINE.values),
        {"tau": 0.0, "learning_rate": 0.1, "class_weight 9": 1.0},
    ]
    assert len({describe(trial) for trial in grid}) == 16
    assert describe(grid[0]) == "tau=0, learning_rate=0.01, class_weight 9=1"


BAD_AXES = [
    ([], "a sweep needs something to sweep: a class_weight, loss_option or learning_rate"),
    ([NINE, TAU, NINE], "class_weight 9 is swept twice"),
    ([Axis("class_weight", str(i), tuple(range(17))) for i in range(3)], "4,913 trials; at most"),
    ([Axis("momentum", "", (0.5,))], "class_weight, loss_option, learning_rate; got 'momentum'"),
    ([Axis("class_weight", "", (1.0,))], "class_weight must be swept as CLASS=VALUES"),
    ([Axis("loss_option", "", (1.0,))], "loss_option must be swept as NAME=VALUES"),
    ([Axis("learning_rate", "x", (1.0,))], "learning_rate must be swept as VALUES alone"),
    ([Axis("class_weight", "9", ())], "class_weight 9: there is no value to sweep"),
]


@pytest.mark.parametrize(("axes", "message"), BAD_AXES, ids=[m for _, m in BAD_AXES])
def test_what_cannot_be_swept_is_refused(axes, message):
    with pytest.raises(ConfigError) as error:
        trials_of(axes)
    assert message in str(error.value)


def test_classes_are_named_by_index_or_name_and_values_are_checked():
    axes = by_name([Axis("class_weight", "1", (2.0,)), RATE, TAU], ("cat", "dog"))
    assert [axis.name for axis in axes] == ["class_weight dog", "learning_rate", "tau"]
    for axis, message in (
        (Axis("class_weight", "cow", (2.0,)), "no class 'cow'"),
        (Axis("class_weight", "dog", (2.0, -1.0)), "class_weight dog: a weight must be at least 0"),
        (Axis("learning_rate", "", (0.1, 0.0)), "learning_rate must be above 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            by_name([axis], ("cat", "dog"))


def test_a_trial_is_the_shared_configuration_with_its_values():
    shared = make_config({"loss": "softmax_focal", "class_weight": {"4": 2, "9": 3}})
    axes = [NINE, Axis("loss_option", "gamma", (2.0,)), RATE]
    made = trial_config(shared, axes, {"class_weight 9": 5.0, "gamma": 2.0, "learning_rate": 0.1})
    assert made == dataclasses.replace(
        shared,
        class_weight={"4": 2.0, "9": 5.0},
        loss_option={"gamma": 2.0},
        learning_rate=0.1,
    )
    assert shared.class_weight == {"4": 2.0, "9": 3.0}


# Where plain training is in the grid of these axes, under these shared options.
PLAIN_AT = [
    ({}, [NINE], [{"class_weight 9": 1.0}]),
    ({}, [RATE], [{"learning_rate": 0.01}, {"learning_rate": 0.1}]),
    ({"learning_rate": 0.3}, [NINE, RATE],
     [{"class_weight 9": 1.0, "learning_rate": rate} for rate in RATE.values]),
    ({}, [NINE, FOUR], [{"class_weight 9": 1.0, "class_weight 4": 1.0}]),
    ({"class_weight": {"4": 1.0}}, [NINE], [{"class_weight 9": 1.0}]),
    ({"class_weight": {"4": 2.0}}, [NINE], []),
    ({"loss": "softmax_focal"}, [NINE], []),
    ({"loss": "logit_adjusted"}, [TAU], []),
    ({"loss": "softmax_focal", "loss_option": {"gamma": 0.0}}, [RATE], []),
]  # fmt: skip


@pytest.mark.parametrize(("options", "axes", "trials"), PLAIN_AT)
def test_plain_training_is_in_the_grid_or_beside_it(options, axes, trials):
    config = make_config(options)
    assert plain_trials(axes, config) == trials
    beside = plain_config(config)
    assert (beside.loss, beside.class_weight, beside.loss_option) == ("cross_entropy", {}, {})
    assert (beside.learning_rate, beside.seed) == (config.learning_rate, config.seed)


@pytest.mark.parametrize(("axes", "rates"), [([NINE, RATE], (0.01, 0.1)), ([NINE], (0.3,))])
def test_plain_training_has_the_learning_rates_of_the_others(axes, rates):
    assert learning_rates(axes, make_config({"learning_rate": 0.3})) == rates


# The choice, on records made by hand.

FLOOR = make_constraints({"9": 0.9}, {}, DIGITS)
BOTH = make_constraints({"9": 0.9}, {"9:4": 0.05}, DIGITS)


def record(trial, values, cost, reached=(), *, seed=0, diverged=False, plain=False, train=0.99):
    return {
        "seed": seed,
        "trial": trial,
        "name": describe(values),
        "values": values,
        "plain": plain,
        "diverged": diverged,
        "accuracy": 1 - cost,
        "expected_cost": cost,
        "rule_cost": cost / 2,
        "recall": dict.fromkeys(DIGITS, 0.5),
        "reached": list(reached),
        "support": [50] * 10,
        "train_accuracy": train,
    }


def nines(*rows):
    """Return a record a weight of 9: weight, expected cost, recall of 9."""
    return [record(i, {"class_weight 9": w}, cost, r) for i, (w, cost, *r) in enumerate(rows)]


def grid(*rows):
    """Return a record a pair of values: weight of 9, tau, expected cost, recall of 9."""
    return [
        record(i, {"class_weight 9": w, "tau": t}, cost, r)
        for i, (w, t, cost, *r) in enumerate(rows)
    ]


OUT = record(9, {}, 0.05, [1.0], plain=True)  # plain training outside of the grid
NAN = None  # as trials.jsonl has it
CHOICES = {
    "least cost": ([NINE], (), nines((1, 0.3), (2, 0.1), (5, 0.2)), 1),
    "least cost, a tie: the first": ([NINE], (), nines((1, 0.3), (2, 0.1), (5, 0.1)), 1),
    "the weight nearest to 1": (
        [NINE], FLOOR, nines((1, 0.1, 0.8), (2, 0.3, 0.91), (5, 0.2, 0.95)), 1,
    ),
    "whatever the order": (
        [NINE], FLOOR, nines((10, 0.1, 0.99), (5, 0.2, 0.95), (2, 0.3, 0.91), (1, 0.1, 0.8)), 2,
    ),
    "in ratios": ([NINE], FLOOR, nines((0.1, 0.1, 0.95), (0.4, 0.1, 0.95), (3, 0.1, 0.95)), 1),
    "two as near, the first": ([NINE], FLOOR, nines((2, 0.2, 0.95), (0.5, 0.1, 0.95)), 0),
    "0 is far from 1": ([NINE], FLOOR, nines((0, 0.1, 0.95), (100, 0.1, 0.95)), 1),
    "at the floor is above it": ([NINE], FLOOR, nines((1, 0.1, 0.8), (2, 0.3, 0.9)), 1),
    "plain keeps the floor": ([NINE], FLOOR, nines((1, 0.3, 0.95), (2, 0.1, 0.99)), 0),
    "no weights: the least cost that keeps it": (
        [RATE], FLOOR,
        [record(i, {"learning_rate": v}, c, [r])
         for i, (v, c, r) in enumerate([(0.1, 0.1, 0.8), (0.2, 0.3, 0.92), (0.3, 0.2, 0.91)])],
        2,
    ),
    "several axes: the least cost that keeps it": (
        [NINE, TAU], FLOOR, grid((1, 0, 0.3, 0.95), (5, 1, 0.2, 0.92), (2, 0, 0.1, 0.8)), 1,
    ),
    "none keeps it: the nearest": (
        [NINE], FLOOR, nines((1, 0.1, 0.7), (2, 0.2, 0.85), (5, 0.3, 0.8)), 1,
    ),
    "none keeps it, a tie: the first": (
        [NINE], FLOOR, nines((1, 0.3, 0.8), (2, 0.1, 0.8), (5, 0.1, 0.7)), 0,
    ),
    "two constraints, the worst counts": (
        # Missed by 0.5 and kept; by 0.1 and 0.6 of the room; by 0.3 and 0.2.
        [NINE], BOTH,
        nines((1, 0.1, 0.85, 0.0), (2, 0.1, 0.89, 0.08), (5, 0.1, 0.87, 0.06)), 2,
    ),
    "what is not defined does not keep a constraint": (
        [NINE], FLOOR, nines((1, 0.1, NAN), (2, 0.2, 0.95)), 1,
    ),
    "nor comes near it": ([NINE], FLOOR, nines((1, 0.1, NAN), (2, 0.2, 0.1)), 1),
    "nor if one of two is not": (
        [NINE], BOTH, nines((1, 0.1, 0.95, NAN), (2, 0.2, 0.1, 0.9)), 1,
    ),
    "diverged is out": (
        [NINE], (), [record(0, {"class_weight 9": 1.0}, 0.0, diverged=True),
                     record(1, {"class_weight 9": 2.0}, 0.3)], 1,
    ),
    "diverged is out under a floor": (
        [NINE], FLOOR,
        [record(0, {"class_weight 9": 1.0}, 0.1, [0.99], diverged=True),
         record(1, {"class_weight 9": 2.0}, 0.3, [0.1])], 1,
    ),
    "diverged on one seed is out": (
        [NINE], (),
        [record(0, {"class_weight 9": 1.0}, 0.0), record(1, {"class_weight 9": 2.0}, 0.3),
         record(0, {"class_weight 9": 1.0}, 0.9, seed=1, diverged=True),
         record(1, {"class_weight 9": 2.0}, 0.3, seed=1)], 1,
    ),
    "the mean over the seeds counts": (
        [NINE], FLOOR,
        [record(m, {"class_weight 9": w}, 0.1, [r], seed=s)
         for s, m, w, r in [(0, 0, 1.0, 0.95), (0, 1, 2.0, 0.89), (1, 0, 1.0, 0.84),
                            (1, 1, 2.0, 0.92)]], 1,
    ),
    "plain outside of the grid": ([NINE], (), [*nines((2, 0.3), (5, 0.2)), OUT], 2),
    "plain outside of the grid, under a floor": (
        [NINE], FLOOR, [*nines((2, 0.1, 0.95)), OUT], 1,
    ),
    "plain outside of the grid, where it misses a floor": (
        [NINE], FLOOR, [*nines((2, 0.3, 0.95)), OUT | {"reached": [0.8]}], 0,
    ),
    "all diverged": (
        [NINE], FLOOR, [record(i, {"class_weight 9": w}, 0.1, [1.0], diverged=True)
                        for i, w in enumerate((1.0, 2.0))], None,
    ),
    "all but plain outside of the grid diverged": (
        [NINE], (), [record(0, {"class_weight 9": 2.0}, 0.1, diverged=True), OUT], 1,
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    ("axes", "constraints", "records", "chosen"), CHOICES.values(), ids=CHOICES
)
def test_the_choice_follows_from_the_records(axes, constraints, records, chosen):
    points = points_of(records, constraints, ("9",), TEN)
    assert chosen_of(points, axes, constraints, misses(records, constraints)) == chosen


BASELINES = {
    "the only one": ([(0.3, True, False), (0.1, False, False)], 0),
    "the one of least cost": ([(0.3, True, False), (0.2, True, False), (0.1, False, False)], 1),
    "the one that did not diverge": ([(0.1, True, True), (0.2, True, False)], 1),
    "none that did not diverge": ([(0.1, True, True), (0.2, False, False)], None),
}


@pytest.mark.parametrize(("rows", "baseline"), BASELINES.values(), ids=BASELINES)
def test_what_is_compared_with_is_the_best_plain_training(rows, baseline):
    records = [
        record(i, {"learning_rate": 0.1 + i}, cost, plain=plain, diverged=diverged)
        for i, (cost, plain, diverged) in enumerate(rows)
    ]
    assert baseline_of(points_of(records, (), ("9",), TEN)) == baseline


def test_a_point_is_the_mean_over_its_sound_seeds():
    records = [
        record(0, {"class_weight 9": 2.0}, cost, [r], seed=s, diverged=d)
        for s, (cost, r, d) in enumerate([(0.1, 0.9, False), (0.4, 0.95, False), (9.0, 0.0, True)])
    ]
    (point,) = points_of(records, FLOOR, ("9", "4"), TEN)
    half = stats.t.ppf(0.975, 1) * np.std([0.1, 0.4], ddof=1) / math.sqrt(2)
    assert half > 1.0
    assert point.expected_cost == pytest.approx((0.25, 0.0, 1.0))  # all that is possible
    (dear,) = points_of(records, FLOOR, ("9",), make_costs(DIGITS, class_cost={"9": 9.0}))
    assert dear.expected_cost == pytest.approx((0.25, 0.0, 0.25 + half), rel=1e-3)
    assert point.rule_cost.value == pytest.approx(0.125)
    assert point.recall == (Interval(0.5, 0.5, 0.5), Interval(0.5, 0.5, 0.5))
    assert (point.feasible, point.seeds, point.diverged) == (True, 3, 1)
    (alone,) = points_of(records[:1], (), ("9",), TEN)
    assert alone.feasible is None
    assert math.isnan(alone.accuracy.low)


def test_how_far_a_trial_is_from_its_limits_is_in_units_of_their_room():
    records = nines((1, 0.1, 0.8, 0.0), (2, 0.1, 0.95, 0.1), (5, 0.1, 0.95, 0.05), (9, 0.1, NAN, 0))
    assert misses(records, BOTH) == pytest.approx([1.0, 1.0, 0.0, math.inf])


# What is said of it.


def sentences(records, axes, constraints=()):
    points = points_of(records, constraints, ("9",), TEN)
    number = chosen_of(points, axes, constraints, misses(records, constraints))
    baseline = baseline_of(points)
    reached = tuple(
        Reached("recall of 9 at least 0.9", x.bound, v, v >= x.bound)
        for x, v in zip(constraints, records[number]["reached"], strict=True)
    )
    plain = None if baseline is None else points[baseline]
    return words.sweep_sentences(points, points[number], plain, reached, order_of(axes))


def test_the_answer_names_the_trial_and_the_reason():
    records = nines((1, 0.3, 0.8), (2, 0.1, 0.91), (5, 0.2, 0.95))
    records[0]["plain"] = True
    assert sentences(records, [NINE], FLOOR) == [
        "class_weight 9=2 is the smallest weight that keeps every constraint on validation data. "
        "recall of 9 at least 0.9: 0.9100."
    ]
    both_ways = replace(NINE, values=(0.5, 2.0))
    assert (
        "9=2 is the weight nearest to 1 that keeps every"
        in (sentences(records, [both_ways], FLOOR)[0])
    )
    free = [r | {"reached": []} for r in records]
    best = "class_weight 9=2 has the least expected cost on validation data, 0.1000 an example; "
    assert sentences(free, [NINE]) == [best + "plain training costs 0.3000."]
    lost = [free[0] | {"diverged": True}, *free[1:]]
    assert sentences(lost, [NINE])[0] == best + "plain diverged."
    cheap = [free[0] | {"expected_cost": 0.05}, *free[1:]]
    assert sentences(cheap, [NINE]) == [
        "class_weight 9=1 has the least expected cost on validation data, 0.0500 an example; no "
        "trial that was swept costs less."
    ]
    low = nines((1, 0.3, 0.7), (2, 0.1, 0.8))
    assert sentences(low, [NINE], FLOOR) == [
        "No trial keeps every constraint on validation data; nearest is class_weight 9=2. "
        "recall of 9 at least 0.9: 0.8000."
    ]
    several = grid((1, 0, 0.3, 0.95), (5, 1, 0.2, 0.92))
    assert (
        "is the trial of least expected cost that keeps every constraint"
        in (sentences(several, [NINE, TAU], FLOOR)[0])
    )


def test_those_that_diverged_are_named_and_counted():
    records = [
        record(m, {"class_weight 9": float(m)}, 0.1, seed=s, diverged=m > 0 and s < m)
        for s in range(2)
        for m in range(8)
    ]
    said = sentences(records, [NINE])[1]
    assert said.startswith("Diverged, and out of the choice: class_weight 9=1 on 1 of 2 seeds, ")
    assert "class_weight 9=2 on 2 of 2 seeds" in said
    assert said.endswith("class_weight 9=5 on 2 of 2 seeds and 2 more.")


@pytest.mark.parametrize(
    ("axes", "accuracies", "error"),
    [
        ([NINE], (1.0, 0.9995), 0.00025),
        ([NINE, RATE], (1.0, 1.0), 0.0),
        ([NINE], (1.0, 0.998), None),
        ([NINE], (1.0, 0.9, "diverged"), None),
        ([NINE], (1.0, "diverged"), 0.0),
        ([NINE], ("diverged",), None),
        ([RATE, TAU], (1.0, 1.0), None),
    ],
)
def test_class_weights_fade_where_no_training_example_is_wrong(axes, accuracies, error):
    records = [
        record(i, {"class_weight 9": 1.0 + i}, 0.1, diverged=a == "diverged",
               train=0.1 if a == "diverged" else a)
        for i, a in enumerate(accuracies)
    ]  # fmt: skip
    found = faded(records, axes)
    assert (found is None) if error is None else found.value == pytest.approx(error)


# Rows on the test set, against numpy.


def made_up(seeds=3, n=400, seed=0):
    """Return labels, and logits of a model and of a better one, a seed each."""
    draw = np.random.default_rng(seed)
    labels = draw.choice(3, n, p=[0.6, 0.3, 0.1])
    hard = draw.normal(size=(n, 3))
    models = []
    for gain in (0.8, 1.4):
        noise = draw.normal(size=(seeds, n, 3)) * 0.5
        models.append(hard + noise + gain * np.eye(3)[labels])
    return labels, *models


COSTS = make_costs(("a", "b", "c"), class_cost={"c": 7.0, "b": 2.0})
PRIOR = np.array([0.9, 0.08, 0.02])


def scored(logits, labels, prior):
    known = None if prior is None else torch.tensor(prior)
    return [
        score_decisions(torch.tensor(z.argmax(-1)), torch.tensor(labels), COSTS, prior=known)
        for z in logits
    ]


def interval(values, labels, prior):
    """Return mean, variance over examples plus seeds, and degrees of freedom, in numpy."""
    seeds, n = values.shape
    part = np.bincount(labels) / n if prior is None else prior
    of_example = values.mean(0)
    if prior is None:
        sources = [(of_example.var(ddof=1) / n, n - 1)]
    else:
        sources = [
            (p**2 * (v := of_example[labels == c]).var(ddof=1) / len(v), len(v) - 1)
            for c, p in enumerate(part)
        ]
    of_seed = sum(p * values[:, labels == c].mean(1) for c, p in enumerate(part))
    if seeds > 1:
        sources.append((of_seed.var(ddof=1) / seeds, seeds - 1))
    variance = sum(v for v, _ in sources)
    freedom = variance**2 / sum(v**2 / df for v, df in sources)
    half = stats.t.ppf(0.975, freedom) * math.sqrt(variance)
    mean = of_seed.mean()
    return mean, mean - half, mean + half


@pytest.mark.parametrize("seeds", [1, 3])
@pytest.mark.parametrize("prior", [None, PRIOR], ids=["counted", "known prior"])
def test_a_row_is_what_numpy_makes_of_the_decisions(prior, seeds):
    labels, plain, chosen = made_up(seeds)
    known = None if prior is None else torch.tensor(prior)
    found = score(torch.tensor(chosen[0]), torch.tensor(labels), DecisionRule(COSTS), prior=known)
    row = row_of(
        "chosen", scored(chosen, labels, prior), evaluation=found,
        focus=[2, 0], plain=scored(plain, labels, prior),
    )  # fmt: skip
    table = COSTS.matrix.numpy()
    made = chosen.argmax(-1)
    paid = table[labels, made]
    right = (chosen.argmax(-1) == labels).astype(float)
    gap = paid - table[labels, plain.argmax(-1)]
    part = np.bincount(labels) / len(labels) if prior is None else prior
    confusion = np.zeros((3, 3))
    for m in made:
        np.add.at(confusion, (labels, m), 1 / seeds)

    def over_seeds(values, costs):
        of_seed = [sum(p * v[labels == c].mean() for c, p in enumerate(part)) for v in values]
        spread = 0.0
        if seeds > 1:
            spread = stats.t.ppf(0.975, seeds - 1) * np.std(of_seed, ddof=1) / math.sqrt(seeds)
        value, low, high = cost_interval(torch.tensor(confusion), torch.tensor(costs), known)
        assert value == pytest.approx(np.mean(of_seed), abs=1e-12)
        ends = value - math.hypot(value - low, spread), value + math.hypot(high - value, spread)
        return value, max(ends[0], 0.0), min(ends[1], costs.max())

    assert row.expected_cost == pytest.approx(over_seeds(paid, table), rel=1e-3)
    if seeds == 1:
        (alone,) = scored(chosen, labels, prior)
        assert row.expected_cost == pytest.approx(alone.expected_cost)
    accuracy = (
        part_interval(right.mean(1).tolist(), len(labels))
        if prior is None
        else over_seeds(right, np.eye(3))
    )
    assert row.accuracy == pytest.approx(accuracy, rel=1e-3)
    assert row.difference == pytest.approx(interval(gap, labels, prior), rel=1e-3)
    constant = (part @ table).min()
    assert row.normalised_cost == pytest.approx(np.array(row.expected_cost) / constant)
    for c, recall in zip((2, 0), row.recall, strict=True):
        assert recall.value == pytest.approx(right[:, labels == c].mean(), abs=1e-12)
    # The pairing is what makes it narrow: the two models find the same examples hard.
    apart = interval(paid, labels, prior), interval(table[labels, plain.argmax(-1)], labels, prior)
    unpaired = math.hypot(*(high - low for _, low, high in apart))
    assert row.difference.high - row.difference.low < unpaired


def test_the_row_of_plain_training_has_no_difference():
    labels, plain, _ = made_up()
    found = score(torch.tensor(plain[0]), torch.tensor(labels), DecisionRule(COSTS))
    by = {"evaluation": found, "focus": [0]}
    found = scored(plain, labels, None)
    assert row_of("plain", found, **by).difference is None
    assert row_of("again", found, **by, plain=found).difference == (0.0, 0.0, 0.0)


@pytest.mark.parametrize(("hits", "n"), [(0, 10), (3, 10), (10, 10), (499, 500)])
def test_the_interval_of_a_part_on_one_seed_is_wilsons(hits, n):
    found = part_interval([hits / n], n)
    wilson = stats.binomtest(hits, n).proportion_ci(method="wilson")
    assert found == pytest.approx((hits / n, wilson.low, wilson.high), abs=1e-6)


def test_the_interval_of_a_part_widens_with_the_spread_of_the_seeds():
    parts, n = [0.90, 0.94, 0.98], 50
    wilson = stats.binomtest(47, n).proportion_ci(method="wilson")
    spread = stats.t.ppf(0.975, 2) * np.std(parts, ddof=1) / math.sqrt(3)
    low = 0.94 - math.hypot(0.94 - wilson.low, spread)
    high = min(0.94 + math.hypot(wilson.high - 0.94, spread), 1.0)
    assert part_interval(parts, n) == pytest.approx((0.94, low, high), abs=2e-4)
    same = part_interval([0.94] * 3, n)
    assert same == pytest.approx((0.94, wilson.low, wilson.high), abs=1e-6)
    ends = part_interval([0.0, 1.0], n)
    assert (ends.low, ends.high) == (0.0, 1.0)
    assert all(map(math.isnan, part_interval([math.nan], 0)))


def row(name, cost, difference=None):
    one = Interval(0.9, 0.88, 0.92)
    return Row(name, one, Interval(cost, cost - 0.01, cost + 0.01), one, (one,), difference)


PLAIN, RULE = row("plain", 0.2), row("plain, thresholds moved", 0.12, Interval(-0.08, -0.09, -0.07))
CHOSEN = row("class_weight 9=5", 0.1, Interval(-0.1, -0.11, 0.01))


@pytest.mark.parametrize(
    ("gap", "said"),
    [
        (Interval(0.02, 0.01, 0.03),
         "The decision rule alone costs less than the costs in training: "
         "prefer it (+0.0200 an example [+0.0100, +0.0300])."),
        (Interval(-0.02, -0.03, -0.01),
         "The costs in training save more than the decision rule alone "
         "(-0.0200 an example [-0.0300, -0.0100])."),
        (Interval(0.02, -0.01, 0.05),
         "Between the costs in training and the decision rule alone no "
         "difference can be told (+0.0200 an example [-0.0100, +0.0500], which may be chance)."),
    ],
)  # fmt: skip
def test_the_costs_in_training_are_held_against_the_decision_rule(gap, said):
    constraints = [("recall of 9 at least 0.9", 0.875)]
    lines = words.tested_sentences(PLAIN, CHOSEN, RULE, gap, constraints, ("9",), "test set")
    scores = "accuracy 90.00 [88.00, 92.00] %, recall of 9 90.00 [88.00, 92.00] %, expected cost"
    assert lines == [
        f"On the test set, read once: {scores} 0.1000 [0.0900, 0.1100]; plain: {scores} 0.2000 "
        "[0.1900, 0.2100].",
        "Expected cost of class_weight 9=5 against plain: -0.1000 an example [-0.1100, +0.0100], "
        "which may be chance.",
        "The constraints on the test set: recall of 9 at least 0.9: 0.8750.",
        f"Without training anew, plain, thresholds moved: {scores} 0.1200 [0.1100, 0.1300]; "
        "-0.0800 an example [-0.0900, -0.0700].",
        said,
    ]


def test_where_plain_training_is_chosen_it_is_not_compared_with_itself():
    lines = words.tested_sentences(PLAIN, None, RULE, None, [], ("9",), "test set")
    assert len(lines) == 2
    assert lines[0].startswith("On the test set, read once: accuracy 90.00")
    assert "; plain:" not in lines[0]
    same = row("plain, minimum expected cost", 0.2, Interval(0.0, 0.0, 0.0))
    assert words.tested_sentences(PLAIN, None, same, None, [], ("9",), "test set")[1].endswith(
        "; the same decisions."
    )
