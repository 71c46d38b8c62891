"""The learning rate over time: factors by number of the step, as pure functions of it."""

import math
from collections.abc import Callable

import torch
from jaxtyping import Int
from torch import Tensor

Schedule = Callable[[Int[Tensor, ""]], Tensor]  # number of the step -> factor on the learning rate


def constant() -> Schedule:
    """Return the schedule that leaves the learning rate as it is, factor 1.

    Example:
        >>> constant()(torch.tensor(7))
        tensor(1.)
    """
    return lambda step: torch.ones((), device=step.device)


def step_decay(*, every: int, factor: float = 0.1) -> Schedule:
    """Return ``factor ** (step // every)``, as ``torch.optim.lr_scheduler.StepLR``.

    Args:
        every: Steps between two decays, at least 1.
        factor: What each decay multiplies the learning rate by.

    Returns:
        The schedule, from the number of the step to a factor.

    Raises:
        ValueError: ``every`` is less than 1.

    Example:
        >>> step_decay(every=10, factor=0.5)(torch.tensor(25))
        tensor(0.2500)
    """
    if every < 1:
        raise ValueError(f"step_decay: every must be at least 1, got {every}")
    return lambda step: factor ** (step // every).to(torch.float32)


def cosine(*, steps: int, final: float = 0.0) -> Schedule:
    """Return half a cosine from 1 to ``final``, as ``torch.optim.lr_scheduler.CosineAnnealingLR``.

    ``final + (1 - final) * (1 + cos(pi * step / steps)) / 2``, and ``final`` after ``steps``.

    Args:
        steps: Length of the training in steps, at least 1.
        final: Factor at the end.

    Returns:
        The schedule, from the number of the step to a factor.

    Raises:
        ValueError: ``steps`` is less than 1.

    Example:
        >>> cosine(steps=10)(torch.tensor(5))
        tensor(0.5000)

    References:
        Loshchilov and Hutter, "SGDR: stochastic gradient descent with warm restarts", 2017.
    """
    if steps < 1:
        raise ValueError(f"cosine: steps must be at least 1, got {steps}")

    def schedule(step: Tensor) -> Tensor:
        return _anneal(1.0, final, (step / steps).clamp(max=1.0))

    return schedule


def one_cycle(
    *, steps: int, warmup: float = 0.3, start: float = 1 / 25, final: float = 1 / 250_000
) -> Schedule:
    """Return a warm-up from ``start`` to 1, then a decay to ``final``, each half a cosine.

    As ``torch.optim.lr_scheduler.OneCycleLR(max_lr=learning_rate, cycle_momentum=False)``.

    Args:
        steps: Length of the training in steps, at least 2.
        warmup: Part of the steps that warms up, in ``(0, 1)``.
        start: Factor at the first step.
        final: Factor at the last step.

    Returns:
        The schedule, from the number of the step to a factor.

    Raises:
        ValueError: ``steps`` is less than 2, or ``warmup`` is not between 0 and 1.

    Example:
        >>> schedule = one_cycle(steps=100, warmup=0.5)
        >>> [round(schedule(torch.tensor(step)).item(), 4) for step in (0, 49, 99)]
        [0.04, 1.0, 0.0]

    References:
        Smith and Topin, "Super-convergence: very fast training of neural networks using large
        learning rates", 2018.
    """
    if steps < 2:
        raise ValueError(f"one_cycle: steps must be at least 2, got {steps}")
    if not 0.0 < warmup < 1.0:
        raise ValueError(f"one_cycle: warmup must be between 0 and 1, got {warmup}")
    # A peak off the ends, so that neither half has length 0 in a run of a few steps.
    peak = min(max(warmup * steps - 1.0, 0.5), steps - 1.5)

    def schedule(step: Tensor) -> Tensor:
        rise = _anneal(start, 1.0, (step / peak).clamp(max=1.0))
        fall = _anneal(1.0, final, ((step - peak) / (steps - 1.0 - peak)).clamp(0.0, 1.0))
        return torch.where(step <= peak, rise, fall)

    return schedule


def _anneal(begin: float, end: float, part: Tensor) -> Tensor:
    """Return half a cosine from ``begin`` at ``part`` 0 to ``end`` at 1."""
    return end + (begin - end) * (1.0 + torch.cos(math.pi * part)) / 2.0
