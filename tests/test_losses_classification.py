"""Losses of one label: weights and ignored labels of torch, limits, known values, refusals."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Generator, Tensor
from torch.func import grad, vmap
from torch.testing import assert_close

from funcloss.combinators import channels_first, class_weights_of
from funcloss.losses.classification import (
    asymmetric_single_label,
    cross_entropy,
    nll,
    poly1,
    soft_cross_entropy,
    softmax_focal,
)
from funcloss.reduction import mean, weighted_mean

CLASSES = 4
LABELS = torch.tensor([0, 3, 1, 2, 2, 0])
WEIGHTS = torch.tensor([1.0, 0.5, 3.0, 0.0])
IGNORED = torch.tensor([0, -100, 1, 2, -100, 0])
RANDOM = 3 * torch.randn(6, CLASSES, generator=Generator().manual_seed(0), dtype=torch.float64)
FAR = torch.where(RANDOM > 0, 1e4, -1e4).double()
INPUTS = {
    "random": RANDOM,
    "zeros": torch.zeros_like(RANDOM),
    "ties": RANDOM.round(),
    "tiny": 1e-30 * RANDOM,
    "far": FAR,
}
DTYPES = {torch.float64: 1e-12, torch.float32: 2e-6}


def assert_agree(ours, theirs, x: Tensor, dtype: torch.dtype) -> None:
    """Values and gradients agree, relative to max(1, |value|, |logit|)."""
    x = x.to(dtype)
    got, expected = ours(x), theirs(x)
    size = max(1.0, float(x.abs().max()), float(expected.abs().max()))
    assert_close(got, expected, rtol=0, atol=DTYPES[dtype] * size)
    got, expected = (grad(lambda z: f(z).sum())(x) for f in (ours, theirs))  # noqa: B023
    size = max(1.0, float(expected.abs().max()))
    assert_close(got, expected, rtol=0, atol=DTYPES[dtype] * size)


def of_each(values: Tensor) -> Tensor:
    return values


REDUCTIONS = {"none": of_each, "sum": torch.sum, "mean": mean}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(
    ("ours", "theirs"), [(cross_entropy, F.cross_entropy), (nll, F.nll_loss)], ids=["ce", "nll"]
)
@pytest.mark.parametrize("labels", [LABELS, IGNORED], ids=["all", "ignored"])
def test_weight_and_ignore_index(labels, ours, theirs, reduction, inputs, dtype):
    """Torch's mean divides by the weights that count: it is weighted_mean, and no other."""
    where, weights = labels != -100, WEIGHTS.to(dtype)

    def reduced(z: Tensor) -> Tensor:
        values, factors = ours(z, labels, where=where), class_weights_of(weights, labels, where)
        if reduction == "mean":
            return weighted_mean(values, factors, where=where)
        return REDUCTIONS[reduction](factors * values)

    def of_torch(z: Tensor) -> Tensor:
        return theirs(z, labels, weight=weights, ignore_index=-100, reduction=reduction)

    assert_agree(reduced, of_torch, INPUTS[inputs], dtype)


@pytest.mark.parametrize("ours", [cross_entropy, nll])
def test_the_mean_of_what_is_not_ignored(ours):
    where = IGNORED != -100
    theirs = {cross_entropy: F.cross_entropy, nll: F.nll_loss}[ours]
    got = mean(ours(RANDOM, IGNORED, where=where), where=where)
    assert_close(got, theirs(RANDOM, IGNORED, ignore_index=-100), rtol=0, atol=1e-12)
    other = IGNORED.where(where, 2)  # any index may be the one that is ignored
    got = mean(ours(RANDOM, other, where=other != 2), where=other != 2)
    assert_close(got, theirs(RANDOM, other, ignore_index=2), rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_weight_with_smoothing_is_a_weighted_distribution(reduction, dtype):
    """Torch weighs every class of the smoothed target, and divides by the labels' weights."""
    weights = WEIGHTS.to(dtype)
    smoothed = 0.9 * F.one_hot(LABELS, CLASSES).to(dtype) + 0.1 / CLASSES

    def reduced(z: Tensor) -> Tensor:
        values = soft_cross_entropy(z, smoothed * weights)
        if reduction == "mean":
            return values.sum() / class_weights_of(weights, LABELS).sum()
        return REDUCTIONS[reduction](values)

    def of_torch(z: Tensor) -> Tensor:
        return F.cross_entropy(z, LABELS, weights, reduction=reduction, label_smoothing=0.1)

    assert_agree(reduced, of_torch, RANDOM, dtype)


@pytest.mark.parametrize(("ours", "theirs"), [(cross_entropy, F.cross_entropy), (nll, F.nll_loss)])
def test_channels_first_takes_the_images_of_torch(ours, theirs):
    images = torch.randn(2, CLASSES, 3, 5, generator=Generator().manual_seed(1)).double()
    labels = torch.randint(CLASSES, (2, 3, 5), generator=Generator().manual_seed(2))
    labels[0, 0, :2] = -100
    got = channels_first(ours)(images, labels, where=labels != -100)
    assert_close(got, theirs(images, labels, reduction="none"), rtol=0, atol=1e-12)
    last = ours(images.movedim(1, -1), labels, where=labels != -100)
    assert torch.equal(got, last)


def test_channels_first_takes_the_distributions_of_torch():
    images = torch.randn(2, CLASSES, 3, 5, generator=Generator().manual_seed(1)).double()
    targets = images.flip(0).softmax(1)
    got = channels_first(soft_cross_entropy)(images, targets)
    expected = F.cross_entropy(images, targets, reduction="none")
    assert_close(got, expected, rtol=0, atol=1e-12)


LIMITS = {
    "focal, gamma 0": (lambda z: softmax_focal(z, LABELS, gamma=0.0), cross_entropy),
    "focal, tensor gamma 0": (
        lambda z: softmax_focal(z, LABELS, gamma=torch.tensor(0.0)),
        cross_entropy,
    ),
    "poly1, epsilon 0": (lambda z: poly1(z, LABELS, epsilon=0.0), cross_entropy),
    "asymmetric, both gammas 0": (
        lambda z: asymmetric_single_label(z, LABELS, gamma_neg=0.0),
        lambda z, y: cross_entropy(z, y, label_smoothing=0.1),
    ),
    "asymmetric, no smoothing": (
        lambda z: asymmetric_single_label(z, LABELS, gamma_pos=0.5, label_smoothing=0.0),
        lambda z, y: softmax_focal(z, y, gamma=0.5),
    ),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("limit", LIMITS)
def test_limits(limit, inputs, dtype):
    ours, other = LIMITS[limit]
    assert_agree(ours, lambda z: other(z, LABELS), INPUTS[inputs], dtype)


GRADIENTS = {
    "focal": (
        lambda z, y: softmax_focal(z, y, gamma=0.5),
        lambda p: (1 - p) ** 0.5 - 0.5 * p * (1 - p) ** -0.5 * math.log(p),
    ),
    "poly1": (lambda z, y: poly1(z, y, epsilon=2.0), lambda p: 1 + 2 * p),
}


@pytest.mark.parametrize("loss", GRADIENTS)
def test_gradients_are_those_of_the_docstrings(loss):
    ours, factor = GRADIENTS[loss]
    got = vmap(grad(ours))(RANDOM, LABELS)
    probs = RANDOM.softmax(-1)
    for i, label in enumerate(LABELS.tolist()):
        expected = factor(float(probs[i, label])) * (probs[i] - F.one_hot(LABELS[i], CLASSES))
        assert_close(got[i], expected, rtol=1e-10, atol=1e-12)


KNOWN = {
    # Lin et al. 2017, section 3.2: at gamma = 2, p = 0.9 costs 100 times less, 0.968 1000 times.
    "focal 0.9": (softmax_focal(torch.tensor([0.9, 0.1]).log(), torch.tensor(0)), 0.00105361),
    "focal 0.968": (
        softmax_focal(torch.tensor([0.968, 0.032], dtype=torch.float64).log(), torch.tensor(0)),
        0.032**2 * -math.log(0.968),
    ),
    "poly1 0.25": (poly1(torch.zeros(4), torch.tensor(1)), math.log(4) + 0.75),
    # By hand, p = 1/2 twice: 0.95 * log 2 / 2 + 0.05 * log 2 / 16.
    "asymmetric": (
        asymmetric_single_label(torch.zeros(2), torch.tensor(1), gamma_pos=1.0),
        (0.95 / 2 + 0.05 / 16) * math.log(2),
    ),
}


@pytest.mark.parametrize("case", KNOWN)
def test_known_values(case):
    got, expected = KNOWN[case]
    assert float(got) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0, 5.0])
@pytest.mark.parametrize("lead", [20.0, 50.0, 200.0, 1e4])
def test_focusing_is_smooth_where_the_probability_rounds_to_one(lead, gamma):
    logits = torch.tensor([lead, 0.0, 0.0, 0.0])

    def value(z: Tensor, g: Tensor) -> Tensor:
        return softmax_focal(z, torch.tensor(0), gamma=g)

    first, of_gamma = grad(value, (0, 1))(logits, torch.tensor(gamma))
    assert first.isfinite().all()
    assert of_gamma.isfinite()
    assert torch.func.hessian(value)(logits, torch.tensor(gamma)).isfinite().all()


ERRORS = [
    (lambda: softmax_focal(RANDOM, LABELS, gamma=-1.0), r"softmax_focal: gamma must be in \[0"),
    (
        lambda: softmax_focal(RANDOM, LABELS, alpha=torch.ones(3)),
        r"softmax_focal: alpha must have shape \(4,\) .* got \(3,\)",
    ),
    (lambda: poly1(RANDOM, LABELS, epsilon=-2.0), r"poly1: epsilon must be in \[-1, inf\)"),
    (lambda: poly1(RANDOM, LABELS[:3]), r"poly1: labels must have shape \(6,\)"),
    (
        lambda: asymmetric_single_label(RANDOM, LABELS, gamma_neg=-1.0),
        "asymmetric_single_label: gamma_neg must be",
    ),
    (
        lambda: asymmetric_single_label(RANDOM, LABELS, label_smoothing=1.5),
        r"label_smoothing must be in \[0, 1\], got 1.5",
    ),
    (lambda: cross_entropy(RANDOM, LABELS, label_smoothing=-0.1), r"must be in \[0, 1\]"),
]


@pytest.mark.parametrize(("call", "match"), ERRORS)
def test_refusals(call, match):
    with pytest.raises(ValueError, match=match):
        call()


def test_labels_that_are_no_integers_are_refused():
    with pytest.raises(TypeError, match=r"softmax_focal: labels must hold integer classes, got"):
        softmax_focal(RANDOM, LABELS.double())
