"""Costs that follow their gradient while a model trains."""

from collections.abc import Iterator
from itertools import islice
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils._pytree import tree_map_only

from funcloss.choose.gradient import (
    MOST_STEPS,
    CostGradient,
    Transform,
    ValidationCost,
    cost_gradient,
)
from funcloss.training.step import TrainState, TrainStep
from funcloss.typing import Batch, Hyper


class Round(NamedTuple):
    """One round of :func:`tune`, before its update."""

    value: Float[Tensor, "*value"]
    cost: Float[Tensor, ""]  # of validation, had its steps been taken at this value
    gradient: Float[Tensor, "*value"]


class Tuned(NamedTuple):
    """What :func:`tune` came to."""

    state: TrainState
    value: Float[Tensor, "*value"]
    history: tuple[Round, ...]


def tune(
    train_step: TrainStep,
    state: TrainState,
    batch_source: Iterator[Batch],
    validation_cost: ValidationCost,
    hyper: Hyper,
    *,
    name: str = "class_weights",
    rounds: int,
    horizon: int,
    rate: float,
    transform: Transform = torch.func.grad,
) -> Tuned:
    """Train while the costs follow their gradient, ``log v -= rate * d / max|d|``, ``d = v * g``.

    Each round looks ``horizon`` steps ahead, moves the tensor by an exponentiated gradient, and
    then takes these steps on the same batches. ``d`` is the slope by the logarithm: signs stay,
    zeros stay. It is divided by its largest entry because its size is that of the costs, the
    horizon and the learning rate together, of which ``rate`` should know nothing. Of class weights
    the geometric mean is kept: a common factor is a learning rate, not a cost.

    The tuner is greedy, with the bias that :func:`cost_gradient` tells of: what pays off later
    than ``horizon`` steps is never seen, so its costs may be worse than constant ones by the end
    of a training. The validation data are fitted as well: judge the outcome on others.

    Args:
        train_step: ``(state, batch, hyper) -> (state, metrics)``, not compiled.
        state: Where to begin.
        batch_source: Gives ``rounds * horizon`` batches.
        validation_cost: ``(params, buffers) -> scalar``, to be lowered.
        hyper: What the steps take; ``hyper[name]`` is where the tensor begins.
        name: The tensor in ``hyper`` to tune.
        rounds: How many updates, at least 1.
        horizon: Steps of a round, 1 to 10.
        rate: Largest change of a logarithm in a round, positive; at 0.1 an entry moves by at most
            a tenth or so.
        transform: As in :func:`cost_gradient`.

    Returns:
        The state after all steps, the value that the last of them had, and a row for each round.

    Raises:
        ValueError: ``rounds``, ``horizon`` or ``rate`` is out of range, ``batch_source`` ends too
            early, the training diverges, or as :func:`unrolled_cost`.

    Example:
        >>> from itertools import repeat
        >>> from funcloss import class_weighted, losses, models, optim
        >>> from funcloss.training import init_state, make_train_step, mean_of, supervised
        >>> model, optimizer = models.linear((1, 2, 2), 2), optim.sgd()
        >>> objective = supervised(model, mean_of(class_weighted(losses.cross_entropy)))
        >>> train_step, state = make_train_step(objective, optimizer), init_state(model, optimizer)
        >>> hyper = {"learning_rate": torch.tensor(0.1), "class_weights": torch.ones(2)}
        >>> tuned = tune(
        ...     train_step, state, repeat(Batch(torch.ones(2, 1, 2, 2), torch.tensor([0, 1]))),
        ...     lambda params, _: params["fc.bias"][0].sigmoid(), hyper,
        ...     rounds=4, horizon=2, rate=0.1)
        >>> tuned.value
        tensor([0.6703, 1.4918])

    References:
        Kivinen and Warmuth, "Exponentiated gradient versus gradient descent for linear
        predictors", 1997; Baydin, Cornish, Rubio, Schmidt and Wood, "Online learning rate
        adaptation with hypergradient descent", 2018; Wu, Ren, Liao and Grosse, 2018, as above.
    """
    _check_rounds(rounds, horizon, rate)
    state, hyper = tree_map_only(Tensor, torch.detach, (state, dict(hyper)))
    history = []
    for number in range(1, rounds + 1):
        batches = _next_batches(batch_source, horizon, number)
        found = cost_gradient(
            train_step, state, batches, validation_cost, hyper, name=name, transform=transform
        )
        _check_finite(found, number)
        history.append(Round(hyper[name], *found))
        moved = _exponentiated(hyper[name], found.gradient, rate, centred=name == "class_weights")
        hyper = {**hyper, name: moved}
        for batch in batches:
            state, _ = train_step(state, batch, hyper)
    return Tuned(state, hyper[name], tuple(history))


def _exponentiated(value: Tensor, gradient: Tensor, rate: float, *, centred: bool) -> Tensor:
    """Return ``value * exp(-rate * d / max|d|)``; ``centred``: with its geometric mean kept."""
    slope = value * gradient
    if centred:
        moves = value != 0
        slope = torch.where(moves, slope - slope.sum() / moves.sum(), 0.0)
    largest = slope.abs().amax().clamp(min=torch.finfo(slope.dtype).tiny)
    return value * (-rate * slope / largest).exp()


def _next_batches(source: Iterator[Batch], horizon: int, number: int) -> list[Batch]:
    batches = list(islice(source, horizon))
    if len(batches) < horizon:
        raise ValueError(
            f"tune: batch_source must give {horizon} batches a round, got {len(batches)} in round "
            f"{number}; give more, repeat them or ask for fewer rounds"
        )
    return batches


def _check_finite(found: CostGradient, number: int) -> None:
    if not (found.cost.isfinite() and found.gradient.isfinite().all()):
        raise ValueError(
            f"tune: cost and gradient must be finite, those of round {number} are not; lower the "
            "learning rate or the horizon, or clip the gradients of the step"
        )


def _check_rounds(rounds: int, horizon: int, rate: float) -> None:
    if rounds < 1:
        raise ValueError(f"tune: rounds must be at least 1, got {rounds}")
    if not 1 <= horizon <= MOST_STEPS:
        raise ValueError(f"tune: horizon must be 1 to {MOST_STEPS} steps, got {horizon}")
    if not 0.0 < rate < float("inf"):
        raise ValueError(f"tune: rate must be positive and finite, got {rate}")
