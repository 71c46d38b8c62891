"""When a training run is said not to have learned anything."""

import math

import pytest
import torch

from funcloss.app.runs.learned import learning_warnings, no_better_than_constant, underfitted

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


SHARES = {  # counts, and whether the mean recall is that of a constant prediction at most
    "constant": (CONSTANT, True),
    "fine": (FINE, False),
    "a few of the rare class, wrongly": ([[90, 2], [8, 0]], True),
    "one of the rare class": ([[90, 2], [7, 1]], False),  # recalls 0.978 and 0.125
    "weighted to the rare class": ([[60, 40], [0, 8]], False),
    "a class without examples": ([[9, 0, 0], [5, 0, 0], [0, 0, 0]], True),
    "no examples": ([[0, 0], [0, 0]], False),
}


@pytest.mark.parametrize("case", SHARES)
def test_a_constant_prediction_has_recall_on_one_class_only(case):
    rows, expected = SHARES[case]
    assert no_better_than_constant(torch.tensor(rows)) == expected


def reports(*losses, steps=50):
    return [(loss, steps) for loss in losses]


def short(losses, validation=(), *, constant=False):
    return underfitted(losses, validation, epochs=3, constant=constant)


SLOW = reports(2.3, 2.2, 2.1, 2.0, 1.9, 1.8, 1.7, 1.6, 1.5)
FELL = (2.3, 2.1, 1.8, 1.5)


@pytest.mark.parametrize(
    ("losses", "validation"),
    [
        (SLOW, FELL),
        (SLOW, (2.3, 2.5, 2.1, 1.8, 1.5)),  # the last three falls count
        (SLOW, ()),
        (SLOW, (1.5,)),  # of a sweep's trial
        (SLOW[:3], FELL),
        (reports(0.69, 0.65, 0.61, steps=2), (0.7, 0.66, 0.62, 0.6)),
        # linear, on 4,000 digits at a rate of 0.0001: 36 % right
        ([(2.456, 31), (2.3, 19), (2.017, 12), (1.926, 31)], (2.544, 2.276, 1.975, 1.918)),
    ],
)
def test_a_loss_that_still_falls_at_the_end_is_told_to_train_longer(losses, validation):
    (warning,) = short(losses, validation)
    first, last = losses[0][0], losses[-1][0]
    assert warning == (
        f"underfitted: the training loss was still falling at the end, from {first:.4g} in the "
        f"first report to {last:.4g} in the last: train longer (--epochs 6, or auto)"
    )


@pytest.mark.parametrize(
    ("losses", "validation"),
    [
        ([], FELL),
        (SLOW[:2], FELL),
        (SLOW[:8], ()),  # too few to tell without validation data
        (SLOW, (2.3, 2.1, 1.8, 1.85)),
        (SLOW, (2.3, 1.5, 1.8, 1.4)),
        (SLOW, (2.3, 2.1, 1.8, math.nan)),
        (reports(2.3, 1.9, 1.5, 1.35, 1.3, 1.28, 1.27, 1.265, 1.26), FELL),  # flat at the end
        (reports(2.3, 2.0, 1.7, 1.5, 1.3, 1.2, 1.1, 1.05, 1.0), FELL),  # learned
        (reports(2.3, 2.2, 2.1, 2.0, 1.9, 1.8, 1.7, 1.95, 1.5), FELL),  # noise
        (reports(2.3, 2.2, 2.1, 2.0, 1.9, 1.8, 1.7, 1.6, math.nan), FELL),
        (reports(1.5, 1.6, 1.7, 1.8, 1.9, 2.0, 2.1, 2.2, 2.3), FELL),
        (reports(-1.0, -2.0, -3.0), FELL),  # of no lowest value
        # the defaults on MNIST's 4,000 and 54,000 digits, and linear there
        ([(0.997, 31), (0.2, 19), (0.13, 12), (0.048, 31)], (2.318, 0.235, 0.107, 0.098)),
        (reports(1.11, 0.28, 0.12, 0.08, 0.06, 0.04, 0.02, 0.018, 0.012), (2.3, 0.15, 0.07, 0.05)),
        ([(1.119, 31), (0.4, 19), (0.352, 12), (0.246, 31)], (2.544, 0.464, 0.393, 0.372)),
    ],
)
def test_a_loss_that_does_not_fall_any_more_is_no_sign(losses, validation):
    assert short(losses, validation) == []


@pytest.mark.parametrize("n", [3, 4, 6, 9, 12, 30])
@pytest.mark.parametrize("epochs", [0, 3])
def test_noise_is_not_told_to_train_longer(n, epochs):
    """In less than one run of a hundred."""
    draw = torch.Generator().manual_seed(n)
    found = 0
    for _ in range(1000):
        losses = 1 + 0.1 * torch.randn(n, generator=draw, dtype=torch.float64)
        validation = torch.randn(epochs + 1, generator=draw) if epochs else torch.zeros(0)
        found += len(short(reports(*losses.tolist()), validation.tolist()))
    assert found <= 15


def test_a_constant_prediction_in_training_is_told_to_train_longer():
    (warning,) = short(FALLING, constant=True)
    assert warning.startswith(
        "underfitted: on its training data the model does no better than a constant prediction: "
        "train longer (--epochs 6, or auto); if that does not help, its inputs"
    )
    assert short([(0.7, 10), (0.8, 10)], constant=True) == []  # a smaller rate comes first
