"""The rows of losses of values and of distributions."""

import math

from torch import Generator, Tensor
from torch.nn import functional as F

from catalogue.rows import VALUES, OfTorch, each, number, row, softmax, wide
from funcloss import losses
from funcloss.laws.feed import Feed

Row = list[float]


def log_rates_and_counts(n: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """Return logs of rates and counts, both ``(n)``."""
    log_rates, counts = VALUES(n, generator)
    return log_rates, (3 * counts).abs().round()


def rates_and_counts(n: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """Return rates and counts, both ``(n)``."""
    log_rates, counts = log_rates_and_counts(n, generator)
    return log_rates.exp(), counts


def log_distributions(n: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """Return log-probabilities and the logs of distributions."""
    log_probs, targets = wide("log_probs", "targets")(n, generator)
    return log_probs, targets.log()


def _gaussian_nll(means: Tensor, variances: Tensor, targets: Tensor, **options) -> Tensor:
    return F.gaussian_nll_loss(means, targets, variances, **options)


def _kl_div(log_probs: Tensor, targets: Tensor, *, reduction: str, **options) -> Tensor:
    """Torch's is a value a class, and its mean divides by the classes too."""
    values = F.kl_div(
        log_probs, targets, reduction=reduction.replace("mean", "batchmean"), **options
    )
    return values.sum(-1) if reduction == "none" else values


def _of_error(value):
    return each(lambda prediction, target, **options: value(prediction - target, **options))


def _quantile(error: float, q: float = 0.5) -> float:
    return max(-q * error, (1 - q) * error)


def _charbonnier(error: float, epsilon: float = 1e-3) -> float:
    return math.sqrt(error**2 + epsilon**2)


def _barron(error: float, alpha: float, scale: float = 1.0) -> float:
    square = (error / scale) ** 2
    if alpha == 2:
        return square / 2
    if alpha == 0:
        return math.log1p(square / 2)
    if alpha == -math.inf:
        return -math.expm1(-square / 2)
    b = abs(alpha - 2)
    return b / alpha * ((square / b + 1) ** (alpha / 2) - 1)


def _kl(p: Row, q: Row) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


def _generalized_kl(logs: Row, targets: Row) -> float:
    predicted = [math.exp(log) for log in logs]
    return _kl(targets, predicted) - sum(targets) + sum(predicted)


def _jensen_shannon(logits: Row, other_logits: Row) -> float:
    p, q = softmax(logits), softmax(other_logits)
    middle = [(a + b) / 2 for a, b in zip(p, q, strict=True)]
    return (_kl(p, middle) + _kl(q, middle)) / 2


def _distillation(student: Row, teacher: Row, temperature: float = 2.0) -> float:
    return temperature**2 * _kl(softmax(teacher, temperature), softmax(student, temperature))


_NORMAL = Feed(("predictions", "variances", "targets"))
_TEACHER = wide("student_logits", "teacher_logits")

CASES = {
    "absolute_error": row(losses.absolute_error, VALUES, OfTorch(F.l1_loss)),
    "absolute_error, weighted": row(
        losses.absolute_error,
        VALUES,
        _of_error(lambda e, weights: weights * abs(e)),
        {"weights": number(2.5)},
    ),
    "squared_error": row(losses.squared_error, VALUES, OfTorch(F.mse_loss)),
    "huber": row(losses.huber, VALUES, OfTorch(F.huber_loss), {"delta": number(0.7)}),
    "smooth_l1": row(losses.smooth_l1, VALUES, OfTorch(F.smooth_l1_loss), {"beta": number(0.7)}),
    "smooth_l1, beta = 0": row(losses.smooth_l1, VALUES, OfTorch(F.smooth_l1_loss), {"beta": 0.0}),
    "log_cosh": row(losses.log_cosh, VALUES, _of_error(lambda e: math.log(math.cosh(e)))),
    "quantile": row(losses.quantile, VALUES, _of_error(_quantile), {"q": number(0.8)}),
    "poisson_nll": row(
        losses.poisson_nll,
        log_rates_and_counts,
        OfTorch(F.poisson_nll_loss),
        extremes=(80.0, -1e4),  # of a log-rate: the exponential of 89 is above any float32
        names=VALUES.names,
    ),
    "poisson_nll, of rates": row(
        losses.poisson_nll,
        rates_and_counts,
        OfTorch(F.poisson_nll_loss),
        {"log_input": False, "full": True},
        extremes=(1e4, 0.0),  # a rate is not negative
        names=VALUES.names,
    ),
    "gaussian_nll": row(losses.gaussian_nll, _NORMAL, OfTorch(_gaussian_nll)),
    "gaussian_nll, full": row(losses.gaussian_nll, _NORMAL, OfTorch(_gaussian_nll), {"full": True}),
    "charbonnier": row(
        losses.charbonnier, VALUES, _of_error(_charbonnier), {"epsilon": number(0.1)}
    ),
    **{
        f"barron, alpha = {alpha:g}": row(
            losses.barron,
            VALUES,
            _of_error(_barron),
            # No difference quotient reaches across 2, nor to minus infinity.
            {"alpha": alpha if alpha in (2, -math.inf) else number(alpha), "scale": number(0.6)},
        )
        for alpha in (2.0, 1.0, 0.0, -2.0, -math.inf, 1.5, 3.0)
    },
    "kl_div": row(losses.kl_div, wide("log_probs", "targets"), OfTorch(_kl_div), shift=False),
    "kl_div, log targets": row(
        losses.kl_div,
        log_distributions,
        OfTorch(_kl_div),
        {"log_target": True},
        extremes=(-1e4, 0.0),
        shift=False,
        names=("log_probs", "log_targets"),
    ),
    "generalized_kl": row(
        losses.generalized_kl,
        wide("log_predictions", "targets"),
        each(_generalized_kl),
        shift=False,
    ),
    "jensen_shannon": row(
        losses.jensen_shannon, wide("logits", "other_logits"), each(_jensen_shannon), shift=True
    ),
    "distillation": row(losses.distillation, _TEACHER, each(_distillation), shift=True),
    "distillation, hot": row(
        losses.distillation, _TEACHER, each(_distillation), {"temperature": number(4.0)}, shift=True
    ),
}
