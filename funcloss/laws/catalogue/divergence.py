"""The rows of :mod:`funcloss.losses.divergence`."""

import math
from collections.abc import Callable

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from funcloss.laws.subject import CLASSES, Subject, logits_and_distributions
from funcloss.losses.divergence import distillation, generalized_kl, jensen_shannon, kl_div


def log_probs_and_distributions(n: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """Return log-probabilities and distributions, both ``(n, CLASSES)``."""
    logits, targets = logits_and_distributions(n, generator)
    return logits.log_softmax(-1), targets


def log_probs_and_log_distributions(n: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """Return log-probabilities and the logs of distributions, both ``(n, CLASSES)``."""
    log_probs, targets = log_probs_and_distributions(n, generator)
    return log_probs, targets.log()


def logs_and_counts(n: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """Return logs of rates and counts, some of them 0, both ``(n, CLASSES)``."""
    logs = torch.randn(n, CLASSES, generator=generator, dtype=torch.float64)
    return logs, torch.randint(4, (n, CLASSES), generator=generator).double()


def two_logits(n: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """Return the logits of two models, both ``(n, CLASSES)``."""
    logits = 2 * torch.randn(2, n, CLASSES, generator=generator, dtype=torch.float64)
    return logits[0], logits[1]


def _each(fn: Callable[..., float], *data: Tensor, **options: float) -> Tensor:
    """Call ``fn`` on the lists of numbers of every example."""
    rows = zip(*(tensor.double().tolist() for tensor in data), strict=True)
    values = [fn(*row, **options) for row in rows]
    return torch.tensor(values, dtype=torch.float64)


def _kl_div(log_probs: Tensor, targets: Tensor, log_target: bool = False) -> Tensor:
    return F.kl_div(log_probs, targets, reduction="none", log_target=log_target).sum(-1)


def _softmax(logits: list[float], temperature: float = 1.0) -> list[float]:
    top = max(logits)
    powers = [math.exp((z - top) / temperature) for z in logits]
    return [power / sum(powers) for power in powers]


def _kl(p: list[float], q: list[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


def _generalized_kl(logs: list[float], targets: list[float]) -> float:
    predicted = [math.exp(log) for log in logs]
    return _kl(targets, predicted) - sum(targets) + sum(predicted)


def _jensen_shannon(logits: list[float], other_logits: list[float]) -> float:
    p, q = _softmax(logits), _softmax(other_logits)
    middle = [(a + b) / 2 for a, b in zip(p, q, strict=True)]
    return (_kl(p, middle) + _kl(q, middle)) / 2


def _distillation(student: list[float], teacher: list[float], temperature: float = 2.0) -> float:
    t = float(temperature)
    return t**2 * _kl(_softmax(teacher, t), _softmax(student, t))


SUBJECTS = {
    "kl_div": Subject(kl_div, log_probs_and_distributions, reference=_kl_div, shift=False),
    "kl_div, log targets": Subject(
        kl_div,
        log_probs_and_log_distributions,
        {"log_target": True},
        reference=_kl_div,
        shift=False,
    ),
    "generalized_kl": Subject(
        generalized_kl,
        logs_and_counts,
        reference=lambda *data: _each(_generalized_kl, *data),
        extremes=(-1e4, 80.0),  # beyond 88 the prediction itself overflows in float32
        shift=False,
    ),
    "jensen_shannon": Subject(
        jensen_shannon,
        two_logits,
        predictions=2,
        reference=lambda *data: _each(_jensen_shannon, *data),
        shift=True,
    ),
    "distillation": Subject(
        distillation,
        two_logits,
        reference=lambda *data: _each(_distillation, *data),
        shift=True,
    ),
    "distillation, hot": Subject(
        distillation,
        two_logits,
        {"temperature": 4.0},
        reference=lambda *data, **options: _each(_distillation, *data, **options),
        shift=True,
    ),
}
