import math

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, vmap
from torch.testing import assert_close

from funcloss.losses._shared import box_cox
from funcloss.losses.classification import cross_entropy
from funcloss.losses.robust import (
    bi_tempered,
    generalized_cross_entropy,
    mean_absolute_error,
    normalized_cross_entropy,
    symmetric_cross_entropy,
    tempered_softmax,
)

LOSSES = {
    "generalized": (generalized_cross_entropy, {"q": 0.7}),
    "symmetric": (symmetric_cross_entropy, {"alpha": 0.3, "beta": 0.8, "log_zero": -4.0}),
    "bi_tempered": (bi_tempered, {"t1": 0.8, "t2": 1.2, "label_smoothing": 0.1}),
}


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(50, 5, generator=generator, dtype=torch.float64)
    return logits, torch.randint(5, (50,), generator=generator)


def number(value):
    return torch.tensor(value, dtype=torch.float64)


# The losses that each one becomes: (loss, options, the same in other words).
LIMITS = {
    "generalized, q = 0": (generalized_cross_entropy, {"q": 0.0}, cross_entropy),
    "generalized, q a tensor of 0": (generalized_cross_entropy, {"q": number(0)}, cross_entropy),
    "generalized, q = 1": (
        generalized_cross_entropy,
        {"q": 1.0},
        lambda z, y: mean_absolute_error(z, y) / 2,
    ),
    "symmetric, beta = 0": (symmetric_cross_entropy, {"alpha": 1.0, "beta": 0.0}, cross_entropy),
    "symmetric, alpha = 0": (
        symmetric_cross_entropy,
        {"alpha": 0.0, "beta": 1.0, "log_zero": -2.0},
        mean_absolute_error,
    ),
    "bi_tempered, t1 = t2 = 1": (bi_tempered, {"t1": 1.0, "t2": 1.0}, cross_entropy),
    "bi_tempered, tensors of 1": (
        bi_tempered,
        {"t1": number(1), "t2": number(1)},
        cross_entropy,
    ),
    "bi_tempered, smoothed, t1 = t2 = 1": (
        bi_tempered,
        {"t1": 1.0, "t2": 1.0, "label_smoothing": 0.1},
        # less the entropy of a target of one 0.92 and four 0.02
        lambda z, y: (
            cross_entropy(z, y, label_smoothing=0.1)
            + 0.92 * math.log(0.92)
            + 4 * 0.02 * math.log(0.02)
        ),
    ),
}


@pytest.mark.parametrize(("loss", "options", "other"), LIMITS.values(), ids=LIMITS.keys())
def test_the_limit_is_the_other_loss(batch, loss, options, other):
    logits, labels = batch
    for z in (logits, torch.zeros_like(logits), 1e4 * logits.sign(), 1e-6 * logits):
        size = max(1.0, z.abs().max().item())
        ours, theirs = loss(z, labels, **options), other(z, labels)
        assert_close(ours, theirs, rtol=1e-12, atol=1e-12 * size)
        ours = grad(lambda z: loss(z, labels, **options).sum())(z)
        theirs = grad(lambda z: other(z, labels).sum())(z)
        assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("q", [1e-12, 1e-6, 1e-4])
def test_generalized_goes_to_cross_entropy_without_a_jump(batch, q):
    value, limit = generalized_cross_entropy(*batch, q=q), cross_entropy(*batch)
    exact = limit * (1 - q * limit / 2 + (q * limit) ** 2 / 6)  # of -expm1(-q * limit) / q
    assert_close(value, exact, rtol=1e-9, atol=0)


def test_the_gradients_are_those_of_the_docstrings(batch):
    logits, labels = batch
    probs = logits.softmax(-1)
    p = probs.gather(-1, labels[:, None])
    pull = probs - torch.eye(5, dtype=torch.float64)[labels]

    def gradient(loss, **options):
        return grad(lambda z: loss(z, labels, **options).sum())(logits)

    assert_close(gradient(generalized_cross_entropy, q=0.3), p**0.3 * pull)
    assert_close(gradient(mean_absolute_error), 2 * p * pull)
    assert_close(gradient(symmetric_cross_entropy, alpha=0.1, beta=2.0), (0.1 + 8 * p) * pull)


def test_what_sums_over_the_labels_to_a_constant():
    # The symmetry that Ghosh et al. and Ma et al. prove robust.
    logits = torch.tensor([3.0, -1.0, 0.5, 8.0], dtype=torch.float64)
    every = logits.expand(4, 4), torch.arange(4)
    assert_close(normalized_cross_entropy(*every).sum(), number(1.0))
    assert_close(mean_absolute_error(*every).sum(), number(6.0))


def test_known_values():
    logits, label = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64).log(), torch.tensor(1)
    assert_close(
        normalized_cross_entropy(logits, label), number(math.log(0.3) / math.log(0.6 * 0.3 * 0.1))
    )
    assert_close(mean_absolute_error(logits, label), number(1.4))
    assert_close(generalized_cross_entropy(logits, label, q=0.5), number(2 - 2 * 0.3**0.5))
    assert_close(symmetric_cross_entropy(logits, label), number(-math.log(0.3) + 4 * 0.7))
    # At t1 = 0 the divergence is half the squared distance: (0.6^2 + 0.7^2 + 0.1^2) / 2.
    assert_close(bi_tempered(logits, label, t1=0.0, t2=1.0), number(0.43))
    # Equal logits are equal probabilities at any temperature.
    assert_close(tempered_softmax(torch.zeros(4), t=3.0), torch.full((4,), 0.25))
    # At t = 2 two probabilities solve 1 / (1 + d) + 1 / (1 + d + 1.5) = 1, so d = 1 / 2.
    assert_close(
        tempered_softmax(torch.tensor([1.5, 0.0], dtype=torch.float64), t=2.0),
        torch.tensor([2 / 3, 1 / 3], dtype=torch.float64),
    )


@pytest.mark.parametrize("t", [1.0, 1.0 + 1e-9, 1.05, 1.5, 2.0, 4.0])
@pytest.mark.parametrize("classes", [1, 2, 10, 1000])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
def test_the_tempered_softmax_sums_to_one(t, classes, dtype, tolerance):
    generator = torch.Generator().manual_seed(0)
    for scale in (0.0, 1.0, 30.0, 1e4):
        logits = scale * torch.randn(20, classes, generator=generator, dtype=dtype)
        probs = tempered_softmax(logits, t=t)
        assert (probs.sum(-1) - 1).abs().max() < tolerance
        if t == 1:
            assert_close(probs, logits.softmax(-1))


def test_a_hopeless_example_costs_bi_tempered_a_bounded_amount():
    logits = torch.tensor([-1e4, 1e4, 0.0])
    value = bi_tempered(logits, torch.tensor(0), t1=0.5, t2=1.5)
    assert 1.9 < value <= 1 / (1 - 0.5)
    assert cross_entropy(logits, torch.tensor(0)) == 2e4


@pytest.mark.parametrize(("loss", "options"), LOSSES.values(), ids=LOSSES.keys())
def test_options_may_be_mapped_over(batch, loss, options):
    logits, labels = batch[0][:4], batch[1][:4]
    for name, value in options.items():
        several = value * torch.tensor([0.5, 0.8, 1.0], dtype=torch.float64)
        if name == "t2":
            several = several + 1
        mapped = vmap(lambda v, name=name: loss(logits, labels, **{**options, name: v}))(several)
        each = [loss(logits, labels, **{**options, name: float(v)}) for v in several]
        assert_close(mapped, torch.stack(each))


@pytest.mark.parametrize(("t1", "t2"), [(1.0, 1.0), (0.5, 1.0), (1.0, 1.6)])
def test_temperatures_of_one_are_ordinary_points(batch, t1, t2):
    logits, labels = batch[0][:3], batch[1][:3]
    # Central differences reach below 1, where the tail is finite but these logits still fit.
    small = 0.05 * logits

    def of(z, t1, t2):
        return bi_tempered(z, labels, t1=t1, t2=t2)

    point = small.requires_grad_(), number(t1).requires_grad_(), number(t2).requires_grad_()
    assert gradcheck(of, point)
    assert gradgradcheck(of, point)


@pytest.mark.parametrize("exponent", [0.0, 1e-9, 9.99e-3, 1.001e-2, 0.5, -0.5, -30.0])
def test_box_cox_agrees_with_higher_precision_and_its_derivatives_too(exponent):
    log_x = number(exponent / 0.5 if exponent else 0.3)
    power = number(0.5 if exponent else 0.0)
    exact = math.expm1(exponent) / 0.5 if exponent else 0.3
    assert_close(box_cox(log_x, power), number(exact), rtol=1e-14, atol=0)
    inputs = log_x.requires_grad_(), power.requires_grad_()
    assert gradcheck(box_cox, inputs)
    assert gradgradcheck(box_cox, inputs)


ERRORS = [
    (generalized_cross_entropy, {"q": 1.5}, r"q must be in \[0, 1\], got 1.5"),
    (symmetric_cross_entropy, {"alpha": -1}, r"alpha must be in \[0, inf\), got -1"),
    (symmetric_cross_entropy, {"beta": -1}, r"beta must be in \[0, inf\), got -1"),
    (symmetric_cross_entropy, {"log_zero": 2}, r"log_zero must be in \(-inf, 0\], got 2"),
    (bi_tempered, {"t1": 1.2}, r"t1 must be in \[0, 1\], got 1.2"),
    (bi_tempered, {"t2": 0.8}, r"t2 must be in \[1, inf\), got 0.8"),
    (bi_tempered, {"label_smoothing": 2}, r"label_smoothing must be in \[0, 1\], got 2"),
    (bi_tempered, {"iterations": 0}, r"iterations must be in \[1, inf\), got 0"),
]


@pytest.mark.parametrize(("loss", "options", "match"), ERRORS)
def test_an_option_out_of_range_is_refused(batch, loss, options, match):
    with pytest.raises(ValueError, match=f"{loss.__name__}: {match}"):
        loss(*batch, **options)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (
            lambda: normalized_cross_entropy(torch.zeros(2, 1), torch.zeros(2).long()),
            ValueError,
            r"normalized_cross_entropy: logits must have 2 classes or more, got shape \(2, 1\)",
        ),
        (
            lambda: mean_absolute_error(torch.zeros(2, 3), torch.zeros(2, 3)),
            TypeError,
            "mean_absolute_error: labels must hold integer classes, got torch.float32",
        ),
        (
            lambda: tempered_softmax(torch.zeros(3).long()),
            TypeError,
            "tempered_softmax: logits must be floating point, got torch.int64",
        ),
        (
            lambda: tempered_softmax(torch.zeros(3), t=0.5),
            ValueError,
            r"tempered_softmax: t must be in \[1, inf\), got 0.5",
        ),
    ],
)
def test_a_wrong_request_says_what_was_expected(call, error, match):
    with pytest.raises(error, match=match):
        call()
