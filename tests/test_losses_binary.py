"""Losses of yes-or-no questions: limits, known values, refusals."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Generator, Tensor
from torch.func import grad, hessian
from torch.testing import assert_close

from funcloss.losses.binary import (
    asymmetric,
    binary_cross_entropy,
    binary_cross_entropy_with_logits,
    multilabel_soft_margin,
    sigmoid_focal,
    soft_margin,
)

CLASSES = 4
WEIGHTS = torch.tensor([1.0, 0.5, 3.0, 0.0], dtype=torch.float64)
RANDOM = 3 * torch.randn(6, CLASSES, generator=Generator().manual_seed(0), dtype=torch.float64)
BITS = (torch.rand(6, CLASSES, generator=Generator().manual_seed(1)) > 0.5).double()
SOFT = torch.rand(6, CLASSES, generator=Generator().manual_seed(2), dtype=torch.float64)
INPUTS = {
    "random": RANDOM,
    "zeros": torch.zeros_like(RANDOM),
    "tiny": 1e-30 * RANDOM,
    "large": 12 * RANDOM,
    "far": torch.where(RANDOM > 0, 1e4, -1e4).double(),
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


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("target", [0.0, 0.3, 1.0])
def test_probabilities_of_zero_and_one_cost_what_they_cost_in_torch(target, dtype):
    p = torch.tensor([0.0, 1.0, 1e-37, 1e-30, 1e-7, 0.5, 1 - 1e-6], dtype=dtype)
    t = torch.full_like(p, target)
    got = binary_cross_entropy(p, t)
    expected = F.binary_cross_entropy(p, t, reduction="none")
    assert_close(got, expected, rtol=DTYPES[dtype], atol=DTYPES[dtype])
    assert grad(lambda p: binary_cross_entropy(p, t).sum())(p).isfinite().all()


def test_the_weight_of_a_yes_may_be_one_per_class():
    got = binary_cross_entropy_with_logits(RANDOM, SOFT, pos_weight=WEIGHTS)
    expected = F.binary_cross_entropy_with_logits(
        RANDOM, SOFT, pos_weight=WEIGHTS, reduction="none"
    )
    assert_close(got, expected, rtol=0, atol=1e-11)


def bce(z: Tensor, t: Tensor) -> Tensor:
    return binary_cross_entropy_with_logits(z, t)


LIMITS = {
    "focal, gamma 0": (lambda z, t: sigmoid_focal(z, t, gamma=0.0), bce),
    "focal, tensor gamma 0": (lambda z, t: sigmoid_focal(z, t, gamma=torch.tensor(0.0)), bce),
    "focal, alpha half": (
        lambda z, t: 2 * sigmoid_focal(z, t, gamma=0.5, alpha=torch.tensor(0.5)),
        lambda z, t: sigmoid_focal(z, t, gamma=0.5),
    ),
    "asymmetric, all options 0": (
        lambda z, t: asymmetric(z, t, gamma_neg=0.0, shift=torch.tensor(0.0)),
        lambda z, t: bce(z, t).sum(-1),
    ),
    "asymmetric, equal gammas": (
        lambda z, t: asymmetric(z, t, gamma_pos=0.7, gamma_neg=0.7, shift=0.0),
        lambda z, t: sigmoid_focal(z, t, gamma=0.7).sum(-1),
    ),
    "soft_margin": (lambda z, t: soft_margin(z, (2 * t - 1).long()), bce),
    "multilabel": (multilabel_soft_margin, lambda z, t: bce(z, t).mean(-1)),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("limit", LIMITS)
def test_limits(limit, inputs, dtype):
    ours, other = (lambda z, f=f: f(z, BITS.to(z)) for f in LIMITS[limit])
    assert_agree(ours, other, INPUTS[inputs], dtype)


def at(p: float) -> Tensor:
    return torch.tensor([p], dtype=torch.float64).logit()


ONE, ZERO = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
KNOWN = {
    # Lin et al. 2017, section 3.2: at gamma = 2, p_t = 0.9 costs 100 times less.
    "focal": (sigmoid_focal(at(0.9), ONE), -0.01 * math.log(0.9)),
    "focal of 0": (sigmoid_focal(at(0.9), ZERO, alpha=0.25), -0.75 * 0.81 * math.log(0.1)),
    # Ridnik et al. 2021, eq. 5: below the shift a negative costs nothing.
    "asymmetric, easy": (asymmetric(at(0.04), ZERO), 0.0),
    "asymmetric, hard": (asymmetric(at(0.85), ZERO), -(0.8**4) * math.log(0.2)),
    "asymmetric, yes": (asymmetric(at(0.85), ONE, gamma_pos=1.0), -0.15 * math.log(0.85)),
    "soft target": (binary_cross_entropy(at(0.25).sigmoid(), 0 * ONE + 0.5), 0.8369882),
}


@pytest.mark.parametrize("case", KNOWN)
def test_known_values(case):
    got, expected = KNOWN[case]
    assert float(got) == pytest.approx(expected, rel=1e-7)


SATURATED = {
    "focal": lambda z, gamma, t: sigmoid_focal(z, t, gamma=gamma).sum(),
    "asymmetric": lambda z, gamma, t: asymmetric(z, t, gamma_pos=gamma, gamma_neg=gamma),
    "unshifted": lambda z, gamma, t: asymmetric(z, t, gamma_neg=gamma, shift=0.0),
}


@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("target", [0.0, 1.0])
@pytest.mark.parametrize("loss", SATURATED)
def test_focusing_is_smooth_where_the_sigmoid_saturates(loss, target, gamma):
    z = torch.tensor([-1e4, -100.0, -90.0, -30.0, math.log(0.05 / 0.95), 0.0, 30.0, 100.0, 1e4])
    t, gamma = torch.full_like(z, target), torch.tensor(gamma)
    for gradient in grad(SATURATED[loss], (0, 1))(z, gamma, t):
        assert gradient.isfinite().all()
    assert hessian(SATURATED[loss])(z, gamma, t).isfinite().all()


# -- label smoothing -------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", [binary_cross_entropy_with_logits, sigmoid_focal])
@pytest.mark.parametrize("targets", [BITS, SOFT], ids=["hard", "soft"])
def test_smoothing_draws_the_targets_to_a_half(loss, targets):
    got = loss(RANDOM, targets, label_smoothing=0.3)
    assert_close(got, loss(RANDOM, 0.7 * targets + 0.15))
    assert_close(loss(RANDOM, targets, label_smoothing=0.0), loss(RANDOM, targets))
    each = torch.rand(6, CLASSES, generator=Generator().manual_seed(3), dtype=torch.float64)
    expected = [[loss(*one) for one in zip(*row, strict=True)] for row in
                zip(RANDOM, targets * (1 - each) + each / 2, strict=True)]  # fmt: skip
    assert_close(loss(RANDOM, targets, label_smoothing=each), torch.tensor(expected).double())
    slope = grad(lambda s: loss(RANDOM, targets, label_smoothing=s).sum())(torch.tensor(0.3))
    step = 1e-5
    ends = [loss(RANDOM, targets, label_smoothing=0.3 + d).sum() for d in (step, -step)]
    assert float(slope) == pytest.approx(float(ends[0] - ends[1]) / (2 * step), rel=1e-4)


def test_smoothing_two_classes_is_that_of_cross_entropy():
    # torch smooths a one-hot target to (1 - s) + s / 2 and s / 2.
    z, t = RANDOM.flatten(), BITS.flatten()
    pairs = torch.stack([torch.zeros_like(z), z], -1)
    expected = F.cross_entropy(pairs, t.long(), label_smoothing=0.2, reduction="none")
    got = binary_cross_entropy_with_logits(z, t, label_smoothing=0.2)
    assert_close(got, expected, rtol=0, atol=1e-12)


# -- infinite logits -------------------------------------------------------------------------------

INF = math.inf
OF_BITS = {
    "bce": lambda z, t: binary_cross_entropy_with_logits(z, t),
    "pos_weight 2": lambda z, t: binary_cross_entropy_with_logits(z, t, pos_weight=torch.tensor(2)),
    "soft_margin": lambda z, t: soft_margin(z, 2 * t - 1),
    "multilabel": lambda z, t: multilabel_soft_margin(z[..., None], t[..., None]),
    "focal": lambda z, t: sigmoid_focal(z, t, gamma=0.5, alpha=0.25),
    "focal, gamma 0": lambda z, t: sigmoid_focal(z, t, gamma=torch.tensor(0.0)),
    "smoothed": lambda z, t: sigmoid_focal(z, t, label_smoothing=torch.tensor(0.0)),
    "asymmetric": lambda z, t: asymmetric(
        z[..., None], t[..., None], gamma_pos=0.5, gamma_neg=torch.tensor(0.0), shift=0.0
    ),
}


@pytest.mark.parametrize("loss", OF_BITS)
def test_an_infinite_logit_costs_nothing_where_it_is_right_and_all_where_it_is_wrong(loss):
    of = OF_BITS[loss]
    logits, targets = torch.tensor([INF, -INF, INF, -INF]), torch.tensor([1.0, 0.0, 0.0, 1.0])
    assert of(logits, targets).tolist() == [0.0, 0.0, INF, INF]
    slopes = grad(lambda z: of(z, targets).sum())(logits)
    assert slopes[:2].tolist() == [0.0, 0.0]
    assert slopes[2] > 0 > slopes[3] > -torch.inf
    both = of(logits[:2], torch.full((2,), 0.5)) if loss != "soft_margin" else slopes[:1] + INF
    assert both.isinf().all()


@pytest.mark.parametrize("sign", [1, -1])
def test_a_weight_of_zero_times_an_infinite_loss_is_zero(sign):
    wrong, target = torch.tensor(-sign * INF), torch.tensor(float(sign > 0))
    zero = torch.tensor(0.0)
    cases = {
        "class_weights": lambda z: multilabel_soft_margin(
            z[None], target[None], class_weights=zero[None]
        ),
        "alpha": lambda z: sigmoid_focal(z, target, alpha=1 - target),
    }
    if sign > 0:
        cases["pos_weight"] = lambda z: binary_cross_entropy_with_logits(z, target, pos_weight=zero)
    for of in cases.values():
        assert of(wrong) == 0
        assert grad(of)(wrong) == 0


def test_a_shifted_negative_of_an_infinite_logit_is_finite():
    value = asymmetric(torch.tensor([INF]), torch.zeros(1))  # q = 0.95, and 1 - q = 0.05
    assert float(value) == pytest.approx(-(0.95**4) * math.log(0.05))


def test_options_may_be_one_per_example_or_per_class():
    gammas = torch.linspace(0.2, 3, 24, dtype=torch.float64).reshape(6, CLASSES)
    each = [[sigmoid_focal(z, t, gamma=float(g)) for z, t, g in zip(*row, strict=True)]
            for row in zip(RANDOM, BITS, gammas, strict=True)]  # fmt: skip
    assert_close(sigmoid_focal(RANDOM, BITS, gamma=gammas), torch.tensor(each).double())
    alphas = torch.tensor([0.1, 0.25, 0.5, 1.0], dtype=torch.float64)
    columns = [
        sigmoid_focal(RANDOM[:, c], BITS[:, c], alpha=float(alphas[c])) for c in range(CLASSES)
    ]
    assert_close(sigmoid_focal(RANDOM, BITS, alpha=alphas), torch.stack(columns, -1))
    shifts = torch.linspace(0, 0.4, 6, dtype=torch.float64)
    rows = [asymmetric(z, t, shift=float(m)) for z, t, m in zip(RANDOM, BITS, shifts, strict=True)]
    assert_close(asymmetric(RANDOM, BITS, shift=shifts), torch.stack(rows))


NAN = float("nan")
ERRORS = [
    (lambda: binary_cross_entropy(BITS.long(), BITS), TypeError, "probabilities must be floating"),
    (
        lambda: binary_cross_entropy_with_logits(RANDOM, BITS, pos_weight=torch.ones(3)),
        ValueError,
        r"pos_weight must be a number or a scalar .* \(4,\), one per column; got shape \(3,\)",
    ),
    (
        lambda: binary_cross_entropy_with_logits(RANDOM[0], BITS[0], pos_weight=torch.ones(6, 1)),
        ValueError,
        r"pos_weight must be a number or a scalar .* got shape \(6, 1\)",
    ),
    (
        lambda: binary_cross_entropy_with_logits(RANDOM, BITS, pos_weight=-1.0),
        ValueError,
        r"pos_weight must be in \[0, inf\), got -1",
    ),
    (
        lambda: multilabel_soft_margin(RANDOM, BITS, class_weights=torch.ones(3)),
        ValueError,
        r"multilabel_soft_margin: class_weights must have shape \(4,\)",
    ),
    (lambda: soft_margin(RANDOM, BITS > 0), TypeError, "soft_margin: signs must hold"),
    (lambda: sigmoid_focal(RANDOM, BITS[0]), ValueError, "sigmoid_focal: targets must have shape"),
    (lambda: sigmoid_focal(RANDOM, BITS, gamma=NAN), ValueError, "gamma must be .* got nan"),
    (lambda: sigmoid_focal(RANDOM, BITS, alpha=-1.0), ValueError, r"alpha must be in \[0, 1\]"),
    (
        lambda: sigmoid_focal(RANDOM, BITS, gamma=torch.ones(6, 1)),
        ValueError,
        r"sigmoid_focal: gamma must be a number or a scalar .* \(6, 4\), one per example",
    ),
    (
        lambda: asymmetric(RANDOM, BITS, gamma_neg=torch.ones(CLASSES)),
        ValueError,
        r"asymmetric: gamma_neg must be .* \(6,\), one per example; got shape \(4,\)",
    ),
    (
        lambda: sigmoid_focal(RANDOM, BITS, label_smoothing=1.1),
        ValueError,
        r"sigmoid_focal: label_smoothing must be in \[0, 1\], got 1.1",
    ),
    (
        lambda: binary_cross_entropy_with_logits(RANDOM, BITS, pos_weight=[1.0] * CLASSES),
        TypeError,
        "pos_weight must be a number or a tensor, got list",
    ),
    (
        lambda: multilabel_soft_margin(RANDOM, BITS, class_weights=WEIGHTS.numpy()),
        TypeError,
        "class_weights must be a tensor, got ndarray",
    ),
    (lambda: asymmetric(RANDOM, BITS, shift=1.5), ValueError, r"shift must be in \[0, 1\]"),
    (lambda: asymmetric(RANDOM, BITS, gamma_neg=-1.0), ValueError, "asymmetric: gamma_neg must be"),
    (
        lambda: asymmetric(RANDOM, BITS, where=torch.ones(6, CLASSES, dtype=torch.bool)),
        ValueError,
        r"asymmetric: where must have shape \(6,\)",
    ),
]


@pytest.mark.parametrize(("call", "error", "match"), ERRORS)
def test_refusals(call, error, match):
    with pytest.raises(error, match=match):
        call()
