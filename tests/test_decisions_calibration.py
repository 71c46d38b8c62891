import math

import numpy as np
import pytest
import torch
from scipy import optimize
from sklearn.metrics import log_loss
from torch.testing import assert_close

from funcloss.decisions import calibration_error, fit_temperature


def calibrated(classes, n=400, sharp=1.0, seed=0):
    """Return logits that are ``sharp`` times those that labels were drawn from."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(n, classes, generator=generator, dtype=torch.float64)
    labels = torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(-1)
    return sharp * logits, labels


FITTED = [
    (2, 1.0, None),
    (3, 5.0, None),
    (10, 0.2, None),
    (3, 2.0, [0.0, 1.0, -1.0]),
    (10, 3.0, [-2.0] * 5 + [1.0] * 5),
]


@pytest.mark.parametrize(("classes", "sharp", "shift"), FITTED)
def test_the_temperature_is_that_of_least_log_loss(classes, sharp, shift):
    logits, labels = calibrated(classes, sharp=sharp)
    log_shift = None if shift is None else torch.tensor(shift)

    def loss(log_temperature):
        scores = logits.numpy() / math.exp(log_temperature) + np.asarray(shift or 0.0)
        probs = np.exp(scores - scores.max(-1, keepdims=True))
        probs /= probs.sum(-1, keepdims=True)
        return log_loss(labels.numpy(), probs, labels=range(classes))

    got = fit_temperature(logits, labels, log_shift=log_shift)
    low, high = math.log(0.05), math.log(20)
    best = optimize.minimize_scalar(loss, bounds=(low, high), method="bounded").x
    assert math.log(got) == pytest.approx(best, abs=1e-4)
    grid = [loss(t) for t in np.linspace(low, high, 200)]
    assert loss(math.log(got)) <= min(grid) + 1e-14


def test_sharpness_is_undone_and_the_temperature_grows_with_it():
    fitted = [fit_temperature(*calibrated(5, n=4000, sharp=s)) for s in (0.5, 1.0, 2.0, 4.0)]
    assert fitted[1] == pytest.approx(1.0, abs=0.1)
    assert_close(torch.tensor(fitted) / fitted[1], torch.tensor([0.5, 1.0, 2.0, 4.0]))


LABELS = torch.arange(6) % 3
EXTREMES = [
    pytest.param(torch.eye(3)[LABELS], 0.05, id="all-right"),
    pytest.param(1e6 * torch.eye(3)[LABELS], 0.05, id="all-right-by-far"),
    pytest.param(1e6 + 8 * torch.eye(3)[LABELS], 0.05, id="a-common-offset"),
    pytest.param(torch.eye(3)[(LABELS + 1) % 3], 20.0, id="all-wrong"),
    pytest.param(-1e6 * torch.eye(3)[LABELS], 20.0, id="all-wrong-by-far"),
    pytest.param(torch.full((6, 3), 0.1), 1.0, id="says-nothing"),
    pytest.param(torch.full((6, 3), math.nan), 1.0, id="nan"),
    pytest.param(torch.eye(3)[LABELS] * math.inf, 1.0, id="inf"),
    pytest.param(torch.zeros(6, 3) - torch.eye(3)[LABELS] / 0.0, 1.0, id="minus-inf"),
]


@pytest.mark.parametrize("shift", [None, torch.tensor([0.0, 1.0, -1.0])])
@pytest.mark.parametrize(("logits", "temperature"), EXTREMES)
def test_temperatures_of_extremes(logits, temperature, shift):
    assert fit_temperature(logits, LABELS, log_shift=shift) == pytest.approx(temperature)


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.int16])
def test_labels_may_be_any_integers_and_logits_of_a_model_in_training(dtype):
    logits, labels = calibrated(3)
    expected = fit_temperature(logits, labels)
    assert fit_temperature(logits.requires_grad_(), labels.to(dtype)) == expected
    assert fit_temperature(logits.half(), labels) == pytest.approx(expected, rel=1e-2)
    assert fit_temperature(logits[:0], labels[:0]) == 1.0


def textbook_ece(probs, labels, weights):
    """Return the calibration error of bins ``((m - 1) / 15, m / 15]`` by a loop."""
    edges, total = [m / 15 for m in range(16)], 0.0
    for low, high in zip(edges[:-1], edges[1:], strict=True):
        inside = [i for i, p in enumerate(probs) if low < max(p) <= high]
        part = sum(weights[i] for i in inside)
        if part:
            right = sum(weights[i] * (np.argmax(probs[i]) == labels[i]) for i in inside) / part
            sure = sum(weights[i] * max(probs[i]) for i in inside) / part
            total += part / sum(weights) * abs(right - sure)
    return total


@pytest.mark.parametrize("classes", [2, 10, 30])
@pytest.mark.parametrize("weighted", [False, True])
def test_calibration_error_is_the_textbooks(classes, weighted):
    logits, labels = calibrated(classes, n=200)
    weights = torch.rand(200, generator=torch.Generator().manual_seed(0)) if weighted else None
    each = [1.0] * 200 if weights is None else weights.tolist()
    expected = textbook_ece(logits.softmax(-1).tolist(), labels.tolist(), each)
    got = calibration_error(logits.log_softmax(-1), labels, weights)
    assert got == pytest.approx(expected, abs=1e-12)


def test_bins_hold_their_upper_edge():
    def error(first, second):
        """Return the error of a right and a wrong decision of two confidences."""
        probs = torch.tensor([[first, 1 - first], [second, 1 - second]], dtype=torch.float64)
        return calibration_error(probs.log(), torch.tensor([0, 1]))

    apart = error(8 / 15, 8 / 15 + 1e-9)  # an error of 7/15 in one bin, of 8/15 in the next
    assert apart == pytest.approx(0.5, abs=1e-8)
    assert error(8 / 15 - 1e-9, 8 / 15) == pytest.approx(1 / 30, abs=1e-8)  # in one: they cancel
    uniform = torch.full((30, 15), 1 / 15, dtype=torch.float64).log()
    assert calibration_error(uniform, torch.arange(30) % 15) == pytest.approx(0.0, abs=1e-12)
    sure = torch.tensor([[0.0, -math.inf]] * 4)
    assert calibration_error(sure, torch.tensor([0, 0, 0, 1])) == 0.25
