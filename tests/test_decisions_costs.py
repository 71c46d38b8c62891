import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from funcloss.decisions import Costs, class_index, cost_sentences, make_costs
from funcloss.errors import ConfigError

DIGITS = tuple("0123456789")
PETS = ("cat", "dog")


def float64(rows):
    return torch.tensor(rows, dtype=torch.float64)


def table(classes, decisions, rows):
    return {t: dict(zip(decisions, row, strict=True)) for t, row in zip(classes, rows, strict=True)}


MADE = [
    pytest.param(PETS, {}, [[0, 1], [1, 0]], PETS, id="every-mistake-1"),
    pytest.param(PETS, {"class_cost": {"dog": 5}}, [[0, 1], [5, 0]], PETS, id="by-name"),
    pytest.param(PETS, {"class_cost": {"1": 0.5}}, [[0, 1], [0.5, 0]], PETS, id="by-index"),
    pytest.param(
        PETS,
        {"table": {"dog": {"dog": 0, "cat": 9}, "cat": {"dog": 2, "cat": -1}}},
        [[-1, 2], [9, 0]],
        PETS,
        id="any-order",
    ),
    pytest.param(
        PETS,
        {
            "table": {
                "dog": {"vet": 3, "cat": 9, "none": 0.25, "dog": 0},
                "cat": {"dog": 2, "cat": 0, "none": 0.5, "vet": 4},
            }
        },
        [[0, 2, 4, 0.5], [9, 0, 3, 0.25]],
        ("cat", "dog", "vet", "none"),
        id="more-decisions-in-the-order-of-the-first-row",
    ),
    pytest.param(
        ("1", "0"), {"class_cost": {"0": 7}}, [[0, 1], [7, 0]], ("1", "0"), id="name-not-index"
    ),
    pytest.param(
        ("Käse", "猫"), {"class_cost": {"猫": 7}}, [[0, 1], [7, 0]], ("Käse", "猫"), id="unicode"
    ),
    pytest.param(PETS, {"cost": {"cat,dog": 20}}, [[0, 20], [1, 0]], PETS, id="one-cell"),
    pytest.param(
        PETS,
        {"class_cost": {"dog": 5}, "cost": {"1,0": 7, "1,dog": -2}},
        [[0, 1], [7, -2]],
        PETS,
        id="cells-over-a-cost-of-the-class",
    ),
    pytest.param(
        PETS,
        {
            "table": {"cat": {"cat": 0, "dog": 2, "ask": 1}, "dog": {"cat": 9, "dog": 0, "ask": 1}},
            "cost": {"dog,ask": 0.5},
        },
        [[0, 2, 1], [9, 0, 0.5]],
        ("cat", "dog", "ask"),
        id="cells-over-a-table",
    ),
    pytest.param(
        ("a,b", "c=d", "e"),
        {"cost": {"a,b,c=d": 2, "e,a,b": 3, "a,b,2": 4, "2,c=d": 5}},
        [[0, 2, 4], [1, 0, 1], [3, 5, 0]],
        ("a,b", "c=d", "e"),
        id="commas-in-names",
    ),
    pytest.param(("only",), {"class_cost": {"only": 7}}, [[0]], ("only",), id="one-class"),
    pytest.param(
        ("only",),
        {"table": {"only": {"only": 0, "abstain": 2}}},
        [[0, 2]],
        ("only", "abstain"),
        id="one-class-and-abstain",
    ),
]


@pytest.mark.parametrize(("classes", "given_costs", "matrix", "decisions"), MADE)
def test_costs_have_the_truth_in_rows_and_decisions_in_columns(
    classes, given_costs, matrix, decisions
):
    costs = make_costs(classes, **given_costs)
    assert_close(costs.matrix, float64(matrix), atol=0, rtol=0)
    assert (costs.classes, costs.decisions) == (classes, decisions)
    assert costs.extra == decisions[len(classes) :]


REFUSED = [
    ({"table": {"cat": {"cat": 0}}, "class_cost": {"cat": 1}}, "two forms of the same: give one"),
    ({"class_cost": {"bird": 1}}, "class_cost: no class 'bird'; the classes are cat, dog"),
    ({"class_cost": {"2": 1}}, "class_cost: no class '2'"),
    ({"class_cost": {"-1": 1}}, "class_cost: no class '-1'"),
    ({"class_cost": {"²": 1}}, "class_cost: no class '²'"),
    ({"class_cost": {"١": 1}}, "class_cost: no class '١'"),  # an Arabic 1
    ({"class_cost": {"": 1}}, "class_cost: no class ''"),
    ({"class_cost": {"dog": 1, "1": 2}}, "class_cost: class 'dog' is given twice"),
    ({"class_cost": {"1": 1, "01": 2}}, "class_cost: class 'dog' is given twice"),
    ({"class_cost": {"dog": -1}}, "class_cost dog must be finite and at least 0, got -1"),
    ({"class_cost": {"dog": float("nan")}}, "at least 0, got nan"),
    ({"class_cost": {"dog": float("inf")}}, "at least 0, got inf"),
    ({"class_cost": {"dog": "5"}}, "class_cost dog must be finite and at least 0, got 5"),
    ({"cost": {"dog": 1}}, "cost 'dog' must be a true class and a decision, as in dog,cat"),
    ({"cost": {"dog,cat,cat": 1}}, "cost 'dog,cat,cat' must be a true class and a decision"),
    ({"cost": {"dog,bird": 1}}, "cost 'dog,bird': no decision 'bird'; the decisions are cat, dog"),
    ({"cost": {"bird,cat": 1}}, "cost 'bird,cat': no class 'bird'; the classes are cat, dog"),
    ({"cost": {"dog,cat": 1, "1,0": 2}}, "cost: 'dog' decided as 'cat' is given twice"),
    ({"cost": {"dog,cat": float("nan")}}, "cost dog,cat must be a finite number, got nan"),
    ({"table": {"cat": {"cat": 0, "dog": 1}}}, "no row for class dog; every class is a row"),
    (
        {"table": table(PETS, ["cat"], [[0], [1]])},
        "no column for class dog; every class is a row",
    ),
    (
        {"table": table((*PETS, "cow"), PETS, [[0, 1], [1, 0], [1, 1]])},
        "transposed: rows are the truth and columns the decision, but it has cow as a row; swap",
    ),
    (
        {"table": table((*PETS, "cow"), (*PETS, "pig"), [[0, 1, 2]] * 3)},
        "has a row 'cow', which is no class; the classes are cat, dog",
    ),
    (
        {"table": {"cat": {"cat": 0, "dog": 1, "none": 1}, "dog": {"cat": 0, "dog": 1}}},
        "the row of dog has not the columns of the others: none",
    ),
    (
        {"table": table(PETS, PETS, [[0, float("nan")], [1, 0]])},
        "cost of deciding dog on a true cat must be a finite number, got nan",
    ),
    (
        {"table": table(PETS, PETS, [[0, 1], [float("-inf"), 0]])},
        "cost of deciding cat on a true dog must be a finite number, got -inf",
    ),
    ({"table": table(PETS, PETS, [[0, "1"], [1, 0]])}, "must be a finite number, got '1'"),
    ({"table": table(PETS, PETS, [[0, True], [1, 0]])}, "must be a finite number, got True"),
]


@pytest.mark.parametrize(("given_costs", "message"), REFUSED)
def test_costs_that_make_no_sense_are_refused(given_costs, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        make_costs(PETS, **given_costs)


def test_two_classes_of_one_name_are_refused():
    with pytest.raises(ConfigError, match="two classes are named 'cat': give each"):
        make_costs(("cat", "dog", "cat"))


@pytest.mark.parametrize(
    ("key", "classes", "index"),
    [
        ("dog", PETS, 1),
        ("1", PETS, 1),
        ("001", PETS, 1),
        ("1", ("1", "0"), 0),
        ("0", ("1", "0"), 1),
        ("10", tuple("0123456789") + ("10",), 10),
        ("猫", ("Käse", "猫"), 1),
    ],
)
def test_a_name_comes_before_an_index(key, classes, index):
    assert class_index("floor", key, classes) == index
    assert class_index("floor", key, list(classes)) == index


def test_a_cell_that_commas_leave_open_is_refused():
    with pytest.raises(ConfigError, match="'a' decided as 'b,c' or 'a,b' decided as 'c': give"):
        make_costs(("a", "b,c", "a,b", "c"), cost={"a,b,c": 2.0})


def test_where_classes_are_numbers_an_index_is_no_name():
    with pytest.raises(ConfigError, match="floor: no class '0'; the classes are 1, 2, 3"):
        class_index("floor", "0", ("1", "2", "3"))


def test_a_thousand_classes_are_named_in_part():
    classes = tuple(f"c{i}" for i in range(1000))
    costs = make_costs(classes, class_cost={name: 2 + i for i, name in enumerate(classes)})
    assert_close(costs.matrix.sum(1), 999 * (2 + torch.arange(1000).double()))
    lines = cost_sentences(costs)
    assert lines[0] == "calling a true c1 anything else costs 3"
    assert lines[20:] == [
        "979 more have costs of their own",
        "every other mistake costs 2, a right decision 0",
    ]
    with pytest.raises(ConfigError, match="the classes are c0, c1, .*, c19 and more$"):
        class_index("prior", "c1000", classes)
    full = table(classes, (*classes, "abstain"), [[1.0] * 1001] * 1000)
    assert cost_sentences(make_costs(classes, full)) == [
        "deciding abstain, whatever the truth, costs 1",
        "every mistake costs 1, a right decision 1",
    ]


def nine(**cells):
    """Return costs of digits: 1 for a mistake but for ``t9_d4=10``."""
    matrix = 1.0 - torch.eye(10, dtype=torch.float64)
    for cell, cost in cells.items():
        matrix[int(cell[1]), int(cell[-1])] = cost
    return Costs(matrix, DIGITS, DIGITS)


SAID = [
    (nine(), ["every mistake costs 1, a right decision 0"]),
    (
        nine(t9_d4=10),
        ["calling a true 9 a 4 costs 10", "every other mistake costs 1, a right decision 0"],
    ),
    (
        nine(t9_d4=1e6),
        ["calling a true 9 a 4 costs 1000000", "every other mistake costs 1, a right decision 0"],
    ),
    (
        make_costs(DIGITS, class_cost={"9": 1234567}),
        [
            "calling a true 9 anything else costs 1234567",
            "every other mistake costs 1, a right decision 0",
        ],
    ),
    (
        make_costs(PETS, table(PETS, (*PETS, "vet"), [[0, 1, 0.3], [5, 0, 0.3]])),
        [
            "deciding vet, whatever the truth, costs 0.3",
            "calling a true dog a cat costs 5",
            "every other mistake costs 1, a right decision 0",
        ],
    ),
    (
        make_costs(PETS, table(PETS, (*PETS, "vet"), [[-0.0, 1, 0.3], [1, -2, 4]])),
        [
            "deciding vet on a true dog costs 4",
            "deciding vet otherwise costs 0.3",
            "every mistake costs 1",
            "rightly deciding dog costs -2",
            "every other right decision costs 0",
        ],
    ),
    (  # most mistakes cost 1, though more rows name a 7
        make_costs(
            "abcd", table("abcd", "abcd", [[0, 1, 1, 1], [7, 0, 7, 1], [7, 7, 0, 8], [1] * 4])
        ),
        [
            "calling a true b a a costs 7",
            "calling a true b a c costs 7",
            "calling a true c a a costs 7",
            "calling a true c a b costs 7",
            "calling a true c a d costs 8",
            "every other mistake costs 1",
            "rightly deciding d costs 1",
            "every other right decision costs 0",
        ],
    ),
    (make_costs(("only",)), ["a right decision costs 0"]),
]


@pytest.mark.parametrize(("costs", "lines"), SAID)
def test_costs_in_words(costs, lines):
    assert cost_sentences(costs) == lines


def read_back(lines, classes, decisions):
    """Rebuild the cost matrix that sentences tell: what stands out first, then the rest."""
    size, matrix = len(classes), torch.full((len(classes), len(decisions)), torch.nan).double()
    wrong = ~torch.eye(size, len(decisions), dtype=torch.bool)
    wrong[:, size:] = False

    def fill(rows, columns, cost, where=True):
        cells = torch.zeros_like(wrong)
        cells[rows, columns] = True
        cells &= matrix.isnan() & where
        assert cells.any(), "a sentence that says nothing"
        matrix[cells] = float(cost)

    every = slice(None)
    for sentence in (part for line in lines for part in line.split(", a right ")):
        what, cost = sentence.rsplit(" ", 1)
        match what.removesuffix(" costs").split(" "):
            case ["deciding", d, "on", "a", "true", t]:
                fill(classes.index(t), decisions.index(d), cost)
            case ["deciding", d, "otherwise"] | ["deciding", d, "whatever", "the", "truth,"]:
                fill(every, decisions.index(d.rstrip(",")), cost)
            case ["calling", "a", "true", t, "anything", "else"]:
                fill(classes.index(t), every, cost, wrong)
            case ["calling", "a", "true", t, "a", d]:
                fill(classes.index(t), decisions.index(d), cost)
            case ["every", "mistake"] | ["every", "other", "mistake"]:
                fill(every, every, cost, wrong)
            case ["rightly", "deciding", t]:
                fill(classes.index(t), classes.index(t), cost)
            case (
                ["decision"] | ["a", "right", "decision"] | ["every", "other", "right", "decision"]
            ):
                fill(every, slice(size), cost, ~wrong)
            case other:
                pytest.fail(f"unknown sentence {other}")
    return matrix


@given(st.data(), st.integers(1, 5), st.integers(0, 2))
@settings(max_examples=300, deadline=None, derandomize=True)
def test_sentences_are_true_and_complete(data, size, extra):
    classes = ("cat", "Hund", "9", "猫", "e")[:size]
    decisions = (*classes, "abstain", "4")[: size + extra] if extra < 2 else (*classes, "f", "4")
    cost = st.sampled_from([0.0, 1.0, 5.0, -2.5, 1e7, 0.123456789])
    cells = st.lists(cost, min_size=size * len(decisions), max_size=size * len(decisions))
    matrix = float64(data.draw(cells)).reshape(size, len(decisions))
    lines = cost_sentences(Costs(matrix, classes, decisions))
    assert_close(read_back(lines, classes, decisions), matrix, atol=0, rtol=0)
