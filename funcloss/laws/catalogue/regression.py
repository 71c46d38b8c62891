"""The rows of :mod:`funcloss.losses.regression`."""

import math
from collections.abc import Callable

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from funcloss.laws.subject import Subject, values_and_targets
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


def _counts(n: int, generator: Generator) -> Tensor:
    return torch.randint(8, (n,), generator=generator).double()


def _log_rates_and_counts(n: int, generator: Generator) -> tuple[Tensor, Tensor]:
    return torch.randn(n, generator=generator, dtype=torch.float64), _counts(n, generator)


def _rates_and_counts(n: int, generator: Generator) -> tuple[Tensor, Tensor]:
    log_rates, counts = _log_rates_and_counts(n, generator)
    return log_rates.exp(), counts


def _normals_and_targets(n: int, generator: Generator) -> tuple[Tensor, Tensor, Tensor]:
    means, targets = values_and_targets(n, generator)
    return means, torch.randn(n, generator=generator, dtype=torch.float64).exp(), targets


def _of_torch(function: Callable[..., Tensor], **options: object) -> Callable[..., Tensor]:
    def reference(predictions: Tensor, targets: Tensor, **more: object) -> Tensor:
        return function(predictions, targets, reduction="none", **options, **more)

    return reference


def _absolute_error(predictions: Tensor, targets: Tensor, weights: float = 1.0) -> Tensor:
    return weights * F.l1_loss(predictions, targets, reduction="none")


def _gaussian_nll(means: Tensor, variances: Tensor, targets: Tensor, **options: bool) -> Tensor:
    return F.gaussian_nll_loss(means, targets, variances, reduction="none", **options)


def _each(value: Callable[..., float]) -> Callable[..., Tensor]:
    """Return the loss that computes ``value(error)`` of one example after the other."""

    def reference(predictions: Tensor, targets: Tensor, **options: float) -> Tensor:
        errors = (predictions - targets).tolist()
        return torch.tensor([value(e, **options) for e in errors], dtype=torch.float64)

    return reference


def _log_cosh(error: float) -> float:
    return math.log(math.cosh(error))


def _quantile(error: float, q: float = 0.5) -> float:
    return max(-q * error, (1 - q) * error)


def _charbonnier(error: float, epsilon: float = 1e-3) -> float:
    return math.sqrt(error**2 + epsilon**2)


def _barron(error: float, alpha: float, scale: float = 1.0) -> float:
    square = (error / scale) ** 2
    if alpha == 2:
        return square / 2
    if alpha == 0:
        return math.log(square / 2 + 1)
    if alpha == -math.inf:
        return 1 - math.exp(-square / 2)
    b = abs(alpha - 2)
    return b / alpha * ((square / b + 1) ** (alpha / 2) - 1)


def _row(loss: Callable[..., Tensor], reference: Callable[..., Tensor], **options: float):
    return Subject(loss, values_and_targets, options, reference=reference)


SUBJECTS = {
    "absolute_error": _row(absolute_error, _absolute_error),
    "absolute_error, weighted": _row(absolute_error, _absolute_error, weights=2.5),
    "squared_error": _row(squared_error, _of_torch(F.mse_loss)),
    "huber": _row(huber, _of_torch(F.huber_loss), delta=0.7),
    "smooth_l1": _row(smooth_l1, _of_torch(F.smooth_l1_loss), beta=0.7),
    "smooth_l1, beta = 0": _row(smooth_l1, _of_torch(F.smooth_l1_loss), beta=0.0),
    "log_cosh": _row(log_cosh, _each(_log_cosh)),
    "quantile": _row(quantile, _each(_quantile), q=0.8),
    "poisson_nll": Subject(
        poisson_nll,
        _log_rates_and_counts,
        reference=_of_torch(F.poisson_nll_loss),
        extremes=(80.0, -1e4),  # of a log-rate: the exponential of 89 is above any float32
    ),
    "poisson_nll, of rates": Subject(
        poisson_nll,
        _rates_and_counts,
        {"log_input": False, "full": True},
        reference=_of_torch(F.poisson_nll_loss),
        extremes=(1e4, 0.0),  # a rate is not negative
    ),
    "gaussian_nll": Subject(
        gaussian_nll, _normals_and_targets, predictions=2, reference=_gaussian_nll
    ),
    "gaussian_nll, full": Subject(
        gaussian_nll,
        _normals_and_targets,
        {"full": True},
        predictions=2,
        reference=_gaussian_nll,
    ),
    "charbonnier": _row(charbonnier, _each(_charbonnier), epsilon=0.1),
    **{
        f"barron, alpha = {alpha:g}": _row(barron, _each(_barron), alpha=alpha, scale=0.6)
        for alpha in (2.0, 1.0, 0.0, -2.0, -math.inf, 1.5, 3.0)
    },
}
