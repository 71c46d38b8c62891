"""Optimisers as pure functions: memory travels in the arguments.

An optimiser is a pair: ``init(params)`` gives the memory of step 0, ``update(grads, memory, params,
learning_rate)`` gives what to add to the params and the memory of the next step. Nothing is written
in place, so a step can be mapped over learning rates, compiled, and differentiated through. Each
takes the same steps as its twin in ``torch.optim``, and says how a step is the sum of what each
part of the gradient does to it (``split``).
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from funcloss.optim.clipping import safe_sqrt
from funcloss.typing import Grads, Params

OptState = Any  # a NamedTuple of tensors and dicts of tensors, each optimiser's own


class Split(NamedTuple):
    """How a step is the sum of steps, one for each part of the gradient, decay and history.

    Parts lie side by side along a first axis that every tensor gains.
    """

    # state -> what of it is a sum over the parts of earlier gradients; empty: nothing
    memory: Callable[[OptState], Params]
    # (params, learning_rate) -> (what decay adds to the gradient, what it adds to the step)
    decay: Callable[[Params, Tensor], tuple[Grads, Params]]
    # (parts, their memory, the whole gradient, state, learning_rate) -> (steps, their memory)
    steps: Callable[[Grads, Params, Grads, OptState, Tensor], tuple[Params, Params]]
    keeps: float = 0.0  # what part of the memory a step keeps, a factor on all of it


class Optimizer(NamedTuple):
    """An init/update pair; ``update`` gives the step to add and the memory after it."""

    init: Callable[[Params], OptState]
    update: Callable[[Grads, OptState, Params, Tensor], tuple[Params, OptState]]
    split: Split | None = None  # None: an audit tells the gradient's parts, not the step's
    scale_invariant: bool = False  # whether a factor on all gradients leaves the steps as they are


class SGDState(NamedTuple):
    """What :func:`sgd` remembers between steps."""

    step: Int[Tensor, ""]
    velocity: Params  # keys and shapes of params; empty without momentum


def sgd(
    *,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
) -> Optimizer:
    """Stochastic gradient descent, step for step ``torch.optim.SGD``.

    With ``d = g + weight_decay * p``: ``v = d`` at the first step, then ``v = momentum * v +
    (1 - dampening) * d``; the step is ``-learning_rate * v``, with Nesterov ``-learning_rate *
    (d + momentum * v)``.

    Args:
        momentum: Part of the velocity that survives a step, in ``[0, 1)``; 0 keeps no velocity.
        dampening: Part of the gradient that does not enter the velocity.
        weight_decay: L2 penalty on the params, added to the gradient.
        nesterov: Look ahead; needs momentum and no dampening.

    Returns:
        The init/update pair.

    Raises:
        ValueError: ``momentum`` is not in ``[0, 1)``, ``weight_decay`` is negative, or ``nesterov``
            is asked for without momentum or with dampening.

    Example:
        >>> params = {"w": torch.tensor([1.0])}
        >>> optimizer = sgd(momentum=0.9)
        >>> grads = {"w": torch.tensor([2.0])}
        >>> step, memory = optimizer.update(
        ...     grads, optimizer.init(params), params, torch.tensor(0.1))
        >>> step["w"]
        tensor([-0.2000])

    References:
        Sutskever, Martens, Dahl and Hinton, "On the importance of initialization and momentum in
        deep learning", 2013.
    """
    _check_range("sgd", "momentum", momentum, 1.0)
    _check_range("sgd", "weight_decay", weight_decay)
    if nesterov and (momentum == 0.0 or dampening != 0.0):
        raise ValueError("sgd: nesterov needs momentum above 0 and dampening 0")

    def init(params: Params) -> SGDState:
        velocity = {name: torch.zeros_like(p) for name, p in params.items()} if momentum else {}
        return SGDState(_first_step(params), velocity)

    def update(
        grads: Grads, state: SGDState, params: Params, learning_rate: Tensor
    ) -> tuple[Params, SGDState]:
        if weight_decay:
            grads = {name: g + weight_decay * params[name] for name, g in grads.items()}
        moves, velocity = steps(grads, state.velocity, grads, state, learning_rate)
        return moves, SGDState(state.step + 1, velocity)

    def steps(
        parts: Grads, velocity: Params, grads: Grads, state: SGDState, learning_rate: Tensor
    ) -> tuple[Params, Params]:
        # Linear in parts and velocity, and the same for every part: ``grads`` is not needed.
        directions, moved = parts, {}
        if momentum:
            fresh = parts
            if dampening:  # from the second step on: torch's first velocity is the whole gradient
                later = state.step > 0
                fresh = {name: (1.0 - dampening * later.to(g)) * g for name, g in parts.items()}
            moved = {name: g + momentum * velocity[name] for name, g in fresh.items()}
            directions = moved
        if nesterov:
            directions = {name: g + momentum * moved[name] for name, g in parts.items()}
        down = -learning_rate
        return {name: down.to(d) * d for name, d in directions.items()}, moved

    split = Split(lambda state: state.velocity, _added_decay(weight_decay), steps, momentum)
    return Optimizer(init, update, split)


class AdamState(NamedTuple):
    """What :func:`adam` and :func:`adamw` remember between steps."""

    step: Int[Tensor, ""]
    first: Params  # running mean of the gradients
    second: Params  # running mean of their squares


def adam(
    *, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8, weight_decay: float = 0.0
) -> Optimizer:
    """Adam, step for step ``torch.optim.Adam``.

    ``m = b1 * m + (1 - b1) * g``, ``v = b2 * v + (1 - b2) * g^2``; the step is ``-learning_rate *
    m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps)``.

    Args:
        betas: Decay of the two running means, each in ``[0, 1)``.
        eps: Added to the denominator.
        weight_decay: L2 penalty on the params, added to the gradient.

    Returns:
        The init/update pair.

    Raises:
        ValueError: a beta is not in ``[0, 1)``, or ``eps`` or ``weight_decay`` is negative.

    Example:
        >>> params = {"w": torch.tensor([1.0])}
        >>> optimizer = adam()
        >>> grads = {"w": torch.tensor([2.0])}
        >>> step, memory = optimizer.update(
        ...     grads, optimizer.init(params), params, torch.tensor(0.1))
        >>> step["w"]
        tensor([-0.1000])

    References:
        Kingma and Ba, "Adam: a method for stochastic optimization", 2015.
    """
    _check_adam("adam", betas, eps, weight_decay)

    def update(
        grads: Grads, state: AdamState, params: Params, learning_rate: Tensor
    ) -> tuple[Params, AdamState]:
        if weight_decay:
            grads = {name: g + weight_decay * params[name] for name, g in grads.items()}
        return _adam_update(grads, state, learning_rate, betas, eps)

    split = Split(_adam_memory, _added_decay(weight_decay), _adam_split(betas, eps), betas[0])
    return Optimizer(_adam_init, update, split, scale_invariant=True)


def adamw(
    *, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8, weight_decay: float = 0.01
) -> Optimizer:
    """Adam with decoupled weight decay, step for step ``torch.optim.AdamW``.

    The step is Adam's plus ``-learning_rate * weight_decay * p``: the decay does not pass through
    the running means.

    Args:
        betas: Decay of the two running means, each in ``[0, 1)``.
        eps: Added to the denominator.
        weight_decay: Part of the params taken away per unit of learning rate.

    Returns:
        The init/update pair.

    Raises:
        ValueError: a beta is not in ``[0, 1)``, or ``eps`` or ``weight_decay`` is negative.

    Example:
        >>> params = {"w": torch.tensor([1.0])}
        >>> optimizer = adamw(weight_decay=0.5)
        >>> grads = {"w": torch.tensor([2.0])}
        >>> step, memory = optimizer.update(
        ...     grads, optimizer.init(params), params, torch.tensor(0.1))
        >>> step["w"]
        tensor([-0.1500])

    References:
        Loshchilov and Hutter, "Decoupled weight decay regularization", 2019.
    """
    _check_adam("adamw", betas, eps, weight_decay)

    def update(
        grads: Grads, state: AdamState, params: Params, learning_rate: Tensor
    ) -> tuple[Params, AdamState]:
        moves, state = _adam_update(grads, state, learning_rate, betas, eps)
        if weight_decay:
            _, decay = decayed(params, learning_rate)
            moves = {name: move + decay[name] for name, move in moves.items()}
        return moves, state

    def decayed(params: Params, learning_rate: Tensor) -> tuple[Grads, Params]:
        rate = -learning_rate * weight_decay
        return {}, {name: rate.to(p) * p for name, p in params.items()} if weight_decay else {}

    split = Split(_adam_memory, decayed, _adam_split(betas, eps), betas[0])
    return Optimizer(_adam_init, update, split, scale_invariant=True)


def _adam_init(params: Params) -> AdamState:
    zeros = {name: torch.zeros_like(p) for name, p in params.items()}
    return AdamState(_first_step(params), zeros, {name: z.clone() for name, z in zeros.items()})


def _adam_memory(state: AdamState) -> Params:
    return state.first


def _adam_split(betas: tuple[float, float], eps: float):
    def steps(
        parts: Grads, memory: Params, grads: Grads, state: AdamState, learning_rate: Tensor
    ) -> tuple[Params, Params]:
        moves, first, _ = _adam_steps(parts, memory, grads, state, learning_rate, betas, eps)
        return moves, first

    return steps


def _adam_update(
    grads: Grads, state: AdamState, learning_rate: Tensor, betas: tuple[float, float], eps: float
) -> tuple[Params, AdamState]:
    moves, first, second = _adam_steps(grads, state.first, grads, state, learning_rate, betas, eps)
    return moves, AdamState(state.step + 1, first, second)


def _adam_steps(
    parts: Grads,
    memory: Params,
    grads: Grads,
    state: AdamState,
    learning_rate: Tensor,
    betas: tuple[float, float],
    eps: float,
) -> tuple[Params, Params, Params]:
    """Return steps and first moments of the parts, over the second moment of the whole."""
    b1, b2 = betas
    step = state.step + 1
    size = -learning_rate / _bias(b1, step, learning_rate.dtype)
    spread = _bias(b2, step, learning_rate.dtype).rsqrt()
    first = {name: torch.lerp(memory[name], part, 1.0 - b1) for name, part in parts.items()}
    second = {
        name: b2 * v + (1.0 - b2) * grads[name] * grads[name] for name, v in state.second.items()
    }
    moves = {
        name: size.to(m) * m / (safe_sqrt(second[name]) * spread.to(m) + eps)
        for name, m in first.items()
    }
    return moves, first, second


def _added_decay(weight_decay: float) -> Callable[[Params, Tensor], tuple[Grads, Params]]:
    """Return decay that goes through the gradient, as L2 does."""

    def decay(params: Params, learning_rate: Tensor) -> tuple[Grads, Params]:
        return {name: weight_decay * p for name, p in params.items()} if weight_decay else {}, {}

    return decay


def _bias(beta: float, step: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``1 - beta^step`` to full precision, which the difference has not in float32."""
    return -torch.expm1(step.to(dtype) * (math.log(beta) if beta else -math.inf))


def _first_step(params: Params) -> Tensor:
    device = next((p.device for p in params.values()), None)
    return torch.zeros((), dtype=torch.int64, device=device)


def _check_range(name: str, what: str, value: float, below: float = math.inf) -> None:
    if not 0.0 <= value < below:
        raise ValueError(f"{name}: {what} must be in [0, {below}), got {value}")


def _check_adam(name: str, betas: tuple[float, float], eps: float, weight_decay: float) -> None:
    for beta in betas:
        _check_range(name, "betas", beta, 1.0)
    _check_range(name, "eps", eps)
    _check_range(name, "weight_decay", weight_decay)
