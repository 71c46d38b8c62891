import inspect
import math

import pytest
import torch
import torch.nn.functional as F
from torch.func import grad, vmap
from torch.testing import assert_close

from funcloss import mean, weighted_mean
from funcloss.losses.regression import (
    absolute_error,
    barron,
    charbonnier,
    gaussian_nll,
    huber,
    log_cosh,
    poisson_nll,
    quantile,
    smooth_l1,
    squared_error,
)


def number(value):
    return torch.tensor(value, dtype=torch.float64)


@pytest.mark.skipif(
    "weight" not in inspect.signature(F.l1_loss).parameters, reason="this torch has no weights"
)
@pytest.mark.parametrize(
    ("ours", "theirs", "divides"),
    [
        (absolute_error, F.l1_loss, weighted_mean),
        (squared_error, F.mse_loss, weighted_mean),
        # torch divides the mean of huber by the number of values.
        (huber, F.huber_loss, lambda values, weights: mean(weights * values)),
    ],
)
def test_torchs_weights_multiply_the_values_and_divide_the_mean(ours, theirs, divides):
    generator = torch.Generator().manual_seed(0)
    predictions, targets = torch.randn(2, 60, generator=generator, dtype=torch.float64)
    weights = torch.rand(60, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    values = ours(predictions, targets)
    for reduction, exact in {
        "none": weights * values,
        "sum": (weights * values).sum(),
        "mean": divides(values, weights),
    }.items():
        assert_close(theirs(predictions, targets, weight=weights, reduction=reduction), exact)


def test_the_weights_of_absolute_error_and_their_gradient():
    predictions, targets = torch.randn(2, 3, 4, dtype=torch.float64).unbind()
    error = (predictions - targets).abs()
    for weights in (number(2.0), torch.rand(4).double(), torch.rand(3, 4).double()):
        assert_close(absolute_error(predictions, targets, weights=weights), weights * error)
    weights = torch.rand(3, 4, dtype=torch.float64)
    gradient = grad(lambda w: absolute_error(predictions, targets, weights=w).sum())(weights)
    assert_close(gradient, error)
    where = torch.rand(3, 4) > 0.5
    spoilt = torch.where(where, weights, math.nan)

    def masked(p, w):
        return absolute_error(p, targets, weights=w, where=where).sum()

    by_prediction, by_weight = grad(masked, (0, 1))(predictions, spoilt)
    assert_close(by_prediction, torch.where(where, weights * (predictions - targets).sign(), 0.0))
    assert_close(by_weight, torch.where(where, error, 0.0))


ERRORS = torch.tensor([0.0, 1e-8, 1e-3, 0.3, 1.0, -1.0, -0.7, 5.0, -40.0], dtype=torch.float64)
ZEROS = torch.zeros_like(ERRORS)
SQUARE = ERRORS.square()
INF = math.inf

# Of errors of every size: the loss, its options, and what it becomes.
LIMITS = {
    "smooth_l1, beta = 0": (smooth_l1, {"beta": 0.0}, ERRORS.abs()),
    "smooth_l1, beta a tensor of 0": (smooth_l1, {"beta": number(0)}, ERRORS.abs()),
    "smooth_l1 is huber over beta": (
        smooth_l1,
        {"beta": 0.4},
        huber(ERRORS, ZEROS, delta=0.4) / 0.4,
    ),
    "huber, delta large": (huber, {"delta": 1e3}, SQUARE / 2),
    "quantile, q = 1 / 2": (quantile, {"q": 0.5}, ERRORS.abs() / 2),
    "quantile, q = 1": (quantile, {"q": 1.0}, (-ERRORS).clamp(min=0)),
    "charbonnier, epsilon small": (charbonnier, {"epsilon": 1e-14}, ERRORS.abs()),
    "log_cosh": (log_cosh, {}, torch.logaddexp(ERRORS, -ERRORS) - math.log(2)),
    "barron, L2": (barron, {"alpha": 2.0}, SQUARE / 2),
    "barron, Charbonnier": (barron, {"alpha": 1.0}, charbonnier(ERRORS, ZEROS, epsilon=1.0) - 1),
    "barron, Cauchy": (barron, {"alpha": 0.0}, (SQUARE / 2).log1p()),
    "barron, Geman-McClure": (barron, {"alpha": -2.0}, 2 * SQUARE / (SQUARE + 4)),
    "barron, Welsch": (barron, {"alpha": -INF}, -(-SQUARE / 2).expm1()),
}


@pytest.mark.parametrize(("loss", "options", "expected"), LIMITS.values(), ids=LIMITS.keys())
def test_the_limit_is_the_other_loss(loss, options, expected):
    assert_close(loss(ERRORS, ZEROS, **options), expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(
    ("near", "limit"), [(2 - 1e-9, 2.0), (2 + 1e-9, 2.0), (1e-9, 0.0), (-1e-9, 0.0), (-1e9, -INF)]
)
def test_barron_has_no_jump_at_its_singular_shapes(near, limit):
    error = ERRORS[:-1]  # the slope in alpha grows with the error
    value = barron(error, ZEROS[:-1], alpha=near)
    assert_close(value, barron(error, ZEROS[:-1], alpha=limit), rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("alpha", [2.0, 1.5, 1.0, 1e-5, 0.0, -2.0, -1e3, -INF, 4.0])
def test_barrons_derivatives_are_finite_and_those_of_the_docstring(alpha):
    scale, b = 0.5, abs(alpha - 2)
    x = ERRORS / scale
    bend = 1.0 if alpha == 2 else (x.square() / b + 1) ** (alpha / 2 - 1)
    bend = (-x.square() / 2).exp() if alpha == -INF else bend

    def of(error, alpha, scale):
        return barron(error, ZEROS, alpha=alpha, scale=scale).sum()

    gradients = grad(of, (0, 1, 2))(ERRORS, number(alpha), number(scale))
    assert_close(gradients[0], x / scale * bend, rtol=1e-12, atol=1e-13)
    assert_close(gradients[2], -(x.square() / scale * bend).sum(), rtol=1e-12, atol=1e-13)
    assert all(g.isfinite().all() for g in gradients)
    second = grad(lambda a: grad(of, 1)(ERRORS, a, number(scale)))(number(alpha))
    assert second.isfinite()


OPTIONS = [
    (huber, "delta", 0.6),
    (smooth_l1, "beta", 0.6),
    (quantile, "q", 0.3),
    (charbonnier, "epsilon", 0.2),
    (absolute_error, "weights", 2.0),
    *[(barron, "alpha", alpha) for alpha in (1.0, 0.0, -2.0, 3.0)],
]


@pytest.mark.parametrize(("loss", "name", "value"), OPTIONS)
def test_options_may_be_mapped_over(loss, name, value):
    def of(option):
        return loss(ERRORS[2:], ZEROS[2:], **{name: option})

    several = torch.tensor([value, value / 2], dtype=torch.float64)
    assert_close(vmap(of)(several), torch.stack([of(value), of(value / 2)]))


def test_options_of_one_entry_a_value():
    several = torch.linspace(0.1, 0.9, 9, dtype=torch.float64)
    for loss, name in ((quantile, "q"), (barron, "alpha"), (absolute_error, "weights")):
        each = [
            loss(e, number(0.0), **{name: o}) for e, o in zip(ERRORS, several.tolist(), strict=True)
        ]
        assert_close(loss(ERRORS, ZEROS, **{name: several}), torch.stack(each))


def test_the_second_derivative_is_right_where_there_is_no_error():
    for loss, options, curvature in [
        (huber, {"delta": 0.5}, 1.0),
        (smooth_l1, {"beta": 0.5}, 2.0),
        (log_cosh, {}, 1.0),
        (charbonnier, {"epsilon": 0.1}, 10.0),
        (barron, {"alpha": 0.3, "scale": 0.5}, 4.0),
    ]:
        first = grad(lambda p: loss(p, number(0.0), **options))  # noqa: B023
        assert first(number(0.0)) == 0
        assert_close(grad(first)(number(0.0)), number(curvature))


@pytest.mark.parametrize("q", [0.1, 0.5, 0.8])
def test_the_quantile_minimises_the_quantile_loss(q):
    targets = torch.randn(101, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sums = torch.stack([quantile(c.expand(101), targets, q=q).sum() for c in targets])
    assert_close(targets[sums.argmin()], targets.quantile(q), rtol=0, atol=0.05)


def test_a_variance_below_eps_counts_as_eps_and_can_grow_again():
    args = number(1.0), number(3.0)

    def of(variance):
        return gaussian_nll(args[0], variance, args[1], eps=1e-2)

    assert of(number(1e-9)) == of(number(1e-2)) == of(number(-1.0))
    assert_close(grad(of)(number(1e-9)), number((1 / 1e-2 - 4 / 1e-4) / 2))


def test_tiny_errors_are_exact_in_single_precision():
    errors = torch.tensor([1e-3, 1e-6, 1e-15])
    for loss, options in ((log_cosh, {}), (barron, {"alpha": 1.0}), (barron, {"alpha": 0.0})):
        value = loss(errors, torch.zeros(3), **options)
        assert_close(value, errors.square() / 2, rtol=1e-6, atol=0)


PAIR = torch.zeros(2, 3), torch.zeros(2, 3)
REFUSED = [
    (absolute_error, (torch.zeros(2, 1), torch.zeros(2)), {}, r"targets must have shape \(2, 1\)"),
    (
        absolute_error,
        PAIR,
        {"weights": torch.ones(2)},
        "weights must be a number .*one per column",
    ),
    (quantile, PAIR, {"q": torch.ones(4, 2, 3)}, r"q must be a number .* got shape \(4, 2, 3\)"),
    (quantile, PAIR, {"q": 1.5}, r"q must be in \[0, 1\], got 1.5"),
    (huber, PAIR, {"delta": 0.0}, r"delta must be in \(0, inf\), got 0.0"),
    (smooth_l1, PAIR, {"beta": -1.0}, r"beta must be in \[0, inf\), got -1.0"),
    (log_cosh, (torch.zeros(2), torch.zeros(1)), {}, r"targets must have shape \(2,\)"),
    (poisson_nll, PAIR, {"eps": 0.0}, r"eps must be in \(0, inf\), got 0.0"),
    (gaussian_nll, (PAIR[0], torch.ones(2, 1), PAIR[1]), {}, r"variances must have shape \(2, 3\)"),
    (gaussian_nll, (PAIR[0], *PAIR), {"eps": 0.0}, r"eps must be in \(0, inf\), got 0.0"),
    (charbonnier, PAIR, {"epsilon": 0.0}, r"epsilon must be in \(0, inf\), got 0.0"),
    (barron, PAIR, {"alpha": math.inf}, r"alpha must be in .* got inf"),
    (barron, PAIR, {"alpha": 1.0, "scale": 0.0}, r"scale must be in \(0, inf\), got 0.0"),
    (barron, PAIR, {"alpha": torch.ones(2)}, "alpha must be a number"),
]


@pytest.mark.parametrize(("loss", "args", "options", "match"), REFUSED)
def test_a_wrong_request_says_what_was_expected(loss, args, options, match):
    with pytest.raises(ValueError, match=f"{loss.__name__}: {match}"):
        loss(*args, **options)


def test_integers_are_refused():
    with pytest.raises(TypeError, match="gaussian_nll: variances must be floating point"):
        gaussian_nll(torch.zeros(2), torch.ones(2).long(), torch.zeros(2))
    with pytest.raises(TypeError, match="huber: targets must be floating point, got torch.int64"):
        huber(torch.zeros(2), torch.zeros(2).long())
