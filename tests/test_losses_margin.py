"""Losses of a margin: limits, known values, refusals."""

import pytest
import torch
import torch.nn.functional as F
from torch import Generator, Tensor
from torch.func import grad
from torch.testing import assert_close

from funcloss.losses.margin import (
    hinge,
    multi_margin,
    multiclass_hinge,
    multilabel_margin,
    perceptron,
    squared_hinge,
)

CLASSES = 4
LABELS = torch.tensor([0, 3, 1, 2, 2, 0])
WEIGHTS = torch.tensor([1.0, 0.5, 3.0, 0.0])
BITS = torch.tensor(
    [[1, 0, 0, 1], [0, 0, 0, 0], [1, 1, 1, 1], [0, 1, 0, 0], [1, 0, 1, 1], [0, 0, 0, 1]]
).double()
SIGNS = torch.tensor([1, -1, 1, 1, -1, -1])
RANDOM = 3 * torch.randn(6, CLASSES, generator=Generator().manual_seed(0), dtype=torch.float64)
INPUTS = {
    "random": RANDOM,
    "tiny": 1e-30 * RANDOM,
    "far": torch.where(RANDOM > 0, 1e4, -1e4).double(),
}
DTYPES = {torch.float64: 1e-12, torch.float32: 2e-6}


def slope(f, x: Tensor) -> Tensor:
    """Return the gradient of a sum; torch 2.6's multilabel_margin_loss fails under torch.func."""
    x = x.clone().requires_grad_()
    return torch.autograd.grad(f(x).sum(), x)[0]


def assert_agree(ours, theirs, x: Tensor, dtype: torch.dtype) -> None:
    """Values and gradients agree, relative to max(1, |value|, |logit|)."""
    x = x.to(dtype)
    got, expected = ours(x), theirs(x)
    size = max(1.0, float(x.abs().max()), float(expected.abs().max()))
    assert_close(got, expected, rtol=0, atol=DTYPES[dtype] * size)
    got, expected = slope(ours, x), slope(theirs, x)
    size = max(1.0, float(expected.abs().max()))
    assert_close(got, expected, rtol=0, atol=DTYPES[dtype] * size)


SKEW = torch.tensor([0.5, 0.0])  # off the ties, where the perceptron learns and a hinge does not
PAIRS = torch.tensor([0, 1, 0, 0, 1, 1])  # labels of two classes, as SIGNS
LIMITS = {
    "two classes": (
        lambda z: multiclass_hinge(z[:, :2], PAIRS),
        lambda z: hinge(z[:, 0] - z[:, 1], SIGNS),
    ),
    "one wrong class": (
        lambda z: 2 * multi_margin(z[:, :2], PAIRS, margin=0.5),
        lambda z: multiclass_hinge(z[:, :2], PAIRS, margin=0.5),
    ),
    "no margin": (
        lambda z: multiclass_hinge(z[:, :2] + SKEW.to(z), PAIRS, margin=0.0),
        lambda z: perceptron(z[:, 0] + 0.5 - z[:, 1], SIGNS),
    ),
    "one label": (
        lambda z: multilabel_margin(z, F.one_hot(LABELS, CLASSES).to(z)),
        lambda z: multi_margin(z, LABELS),
    ),
    "float signs": (
        lambda z: hinge(z[:, 0], SIGNS.to(z)),
        lambda z: F.relu(1 - SIGNS * z[:, 0]),
    ),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("limit", LIMITS)
def test_limits(limit, inputs, dtype):
    assert_agree(*LIMITS[limit], INPUTS[inputs], dtype)


TENTHS = torch.tensor([0.1, 0.2, 0.4, 0.8])
KNOWN = {
    "hinge": (hinge(torch.tensor([1.0, -2.0, 0.25]), torch.tensor([1, 1, -1])), [0.0, 3.0, 1.25]),
    "squared_hinge": (
        squared_hinge(torch.tensor([1.0, -2.0, 0.25]), torch.tensor([1, 1, -1])),
        [0.0, 9.0, 1.5625],
    ),
    "perceptron": (
        perceptron(torch.tensor([1.0, -2.0, 0.25]), torch.tensor([1, 1, -1])),
        [0.0, 2.0, 0.25],
    ),
    # 1 - (0.8 - 0.4) for the worst of three wrong classes.
    "multiclass_hinge": (multiclass_hinge(TENTHS, torch.tensor(3)), 0.6),
    # The example in torch's documentation of MultiMarginLoss: (0.3 + 0.4 + 0.6) / 4.
    "multi_margin": (multi_margin(TENTHS, torch.tensor(3)), 0.325),
    # The example in torch's documentation of MultiLabelMarginLoss.
    "multilabel_margin": (multilabel_margin(TENTHS, torch.tensor([1.0, 0.0, 0.0, 1.0])), 0.85),
    "one class": (multiclass_hinge(torch.tensor([3.0]), torch.tensor(0)), 0.0),
}


@pytest.mark.parametrize("case", KNOWN)
def test_known_values(case):
    got, expected = KNOWN[case]
    assert_close(got, torch.tensor(expected))


TIED = torch.tensor([1.0, 1.0, 1.0, 0.0])
SUBGRADIENTS = {
    # A tie of wrong classes shares the gradient.
    "tie": (lambda z: multiclass_hinge(z, torch.tensor(3)), TIED, [1 / 3, 1 / 3, 1 / 3, -1.0]),
    "label tied": (lambda z: multiclass_hinge(z, torch.tensor(0)), TIED, [-1.0, 0.5, 0.5, 0.0]),
    # At the margin itself nothing is learnt; at a score of 0 the perceptron learns.
    "hinge": (lambda z: hinge(z, torch.ones(4)).sum(), TIED, [0.0, 0.0, 0.0, -1.0]),
    "squared_hinge": (lambda z: squared_hinge(z, torch.ones(4)).sum(), TIED, [0.0, 0.0, 0.0, -2.0]),
    "perceptron": (lambda z: perceptron(z, torch.ones(4)).sum(), TIED, [0.0, 0.0, 0.0, -1.0]),
}


@pytest.mark.parametrize("case", SUBGRADIENTS)
def test_gradients_at_ties(case):
    loss, at, expected = SUBGRADIENTS[case]
    assert_close(grad(loss)(at), torch.tensor(expected))


def test_no_negative_zero():
    assert not torch.signbit(perceptron(torch.tensor([0.0, 3.0]), torch.tensor([1, 1]))).any()


ERRORS = [
    (lambda: hinge(RANDOM[:, 0], SIGNS > 0), TypeError, r"hinge: signs must hold -1 and \+1, got"),
    (lambda: hinge(SIGNS, SIGNS), TypeError, "hinge: scores must be floating point, got"),
    (
        lambda: perceptron(RANDOM[:, 0], SIGNS[:3]),
        ValueError,
        r"perceptron: signs must have shape \(6,\) to match scores \(6,\), got \(3,\)",
    ),
    (
        lambda: squared_hinge(RANDOM[:, 0], SIGNS, where=torch.ones(6)),
        TypeError,
        "squared_hinge: where must be boolean",
    ),
    (
        lambda: multiclass_hinge(RANDOM, LABELS, margin=-1.0),
        ValueError,
        r"multiclass_hinge: margin must be in \[0, inf\), got -1.0",
    ),
    (lambda: multi_margin(RANDOM, LABELS, margin=-1.0), ValueError, "multi_margin: margin must be"),
    (lambda: multi_margin(RANDOM, LABELS, p=3), ValueError, "multi_margin: p must be 1 or 2, got"),
    (
        lambda: multi_margin(RANDOM, LABELS, class_weights=torch.ones(3)),
        ValueError,
        r"multi_margin: class_weights must have shape \(4,\)",
    ),
    (
        lambda: multilabel_margin(RANDOM, BITS.long()),
        TypeError,
        "multilabel_margin: targets must be floating point, got torch.int64",
    ),
]


@pytest.mark.parametrize(("call", "error", "match"), ERRORS)
def test_refusals(call, error, match):
    with pytest.raises(error, match=match):
        call()
