"""When a training run is said not to have learned anything."""

import math

import pytest
import torch

from funcloss.app.runs.learned import learning_warnings

FALLING = [(2.3, 10), (1.9, 10), (1.2, 10), (0.8, 10)]


def told(rows, losses=FALLING, classes="abc", *, trained=True):
    rows = torch.tensor(rows)
    return learning_warnings(rows, classes[: len(rows)], losses, trained=trained)


FINE = [[8, 2, 0], [1, 9, 0], [0, 0, 10]]
CONSTANT = [[0, 10, 0], [0, 12, 0], [0, 10, 0]]


def test_a_fine_training_is_told_nothing():
    assert told(FINE) == []


def test_a_broken_training_at_chance_is_compared_with_the_constant_answer():
    (warning,) = told(CONSTANT)
    assert warning.startswith(
        "test accuracy 37.50% is no higher than that of always predicting b (37.50%): try a "
        "smaller learning_rate, more epochs"
    )
    (below,) = told([[3, 7, 0], [5, 5, 2], [0, 9, 1]])
    assert "28.12% is no higher than that of always predicting b (37.50%)" in below


def test_an_untrained_model_is_told_to_be_trained():
    (warning,) = told(CONSTANT, [], trained=False)
    assert warning.endswith("the model was not trained, set epochs to 1 or more")
    assert told(FINE, [], trained=False) == []  # begun from good weights


@pytest.mark.parametrize(
    ("rows", "warns"),
    [
        ([[950, 0], [50, 0]], True),  # the constant answer itself: 95 %
        ([[920, 30], [20, 30]], True),  # as accurate; recall may have been the aim
        ([[920, 30], [19, 31]], False),  # one right more
        ([[940, 10], [20, 30]], False),
    ],
)
def test_on_imbalanced_data_the_constant_answer_is_a_high_bar(rows, warns):
    found = told(rows)
    assert len(found) == warns
    if warns:
        assert "always predicting a (95.00%)" in found[0]
        assert "traded for recall or cost on purpose" in found[0]


def test_the_constant_answer_is_that_of_the_test_set():
    assert len(told([[0, 0], [1, 99]])) == 1
    assert told([[1, 0], [0, 99]]) == []
    assert told([[0, 0], [0, 0]]) == []  # no examples


@pytest.mark.parametrize(
    "losses",
    [
        [(2.3, 10), (math.nan, 10)],
        [(2.3, 10), (2.0, 10), (1.9, 10), (math.inf, 10)],
        [(math.nan, 10)] * 5,
        [(2.0, 1), (1.0, 1), (1.0, 1), (1.0, 1), (math.nan, 1), (1.0, 1)],
    ],
)
def test_a_loss_that_is_not_finite_is_named(losses):
    (warning,) = told(FINE, losses)
    assert warning.startswith("the training loss is not a finite number at the end: try a smaller")


@pytest.mark.parametrize(
    ("losses", "ends"),
    [
        ([(2.3, 10), (2.4, 10)], ("2.3", "2.4")),
        ([(2.3, 10), (2.3, 10)], ("2.3", "2.3")),
        ([(2.0, 10), (2.0, 10), (9.0, 10), (3.0, 10), (1.5, 10), (3.5, 10)], ("2", "2.5")),
        ([(-3.0, 10), (-1.0, 10)], ("-3", "-1")),
    ],
)
def test_a_loss_that_does_not_fall_is_told_with_its_ends(losses, ends):
    (warning,) = told(FINE, losses)
    first, last = ends
    assert f"did not fall, from {first} at the start to {last} at the end: try" in warning


@pytest.mark.parametrize(
    "losses",
    [
        [],
        [(2.3, 10)],
        FALLING,
        [(math.nan, 10), (2.0, 10), (1.0, 10)],  # there is nothing to compare with
        [(-1.0, 10), (-3.0, 10)],
        [(2.0, 10)] * 3 + [(1.0, 10)] * 2 + [(5.0, 1)],  # a last report of one step
    ],
)
def test_a_loss_that_falls_or_is_not_known_is_no_sign(losses):
    assert told(FINE, losses) == []


def test_every_sign_is_told_and_long_names_are_cut():
    found = told(CONSTANT, [(2.3, 1), (2.4, 1)], classes=["a", "b" * 1000, "c"])
    assert len(found) == 2
    assert f"always predicting {'b' * 39}… (" in found[1]
