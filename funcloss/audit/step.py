"""The step that an optimiser takes as the sum of what each part of the gradient does to it."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from funcloss.optim import Optimizer, OptState, SGDState, clip_factor
from funcloss.typing import Grads, Params

DECAY, HISTORY = "weight decay", "history"


class StepParts(NamedTuple):
    """A step, ready to be split: ``u = sum(steps(parts)) + sum(own)``."""

    clip: Tensor  # factor on the gradient
    learning_rate: Tensor
    steps: Callable[[Grads], Params]  # parts of the gradient, unclipped -> parts of the step
    own: dict[str, Params]  # steps that no part of this gradient causes
    whole: Params  # u, as the optimiser itself gives it
    note: str


def split_step(
    optimizer: Optimizer,
    opt_state: OptState | None,
    params: Params,
    grads: Grads,
    learning_rate: Tensor,
    clip_norm: float,
) -> tuple[StepParts | None, str]:
    """Say how the step on a gradient is made up.

    Args:
        optimizer: What takes the step.
        opt_state: Its memory; None: not known.
        params: The parameters.
        grads: The whole gradient, unclipped.
        learning_rate: The schedule's factor included.
        clip_norm: Largest global norm of the gradient; 0 clips nothing.

    Returns:
        The parts, or None and why there are none.
    """
    if optimizer.split is None:
        return None, "this optimiser does not say how its step is made up: see the gradient's parts"
    note = ""
    state = optimizer.init(params) if opt_state is None else opt_state
    memory = optimizer.split.memory(state)
    if opt_state is None and memory:
        if not isinstance(state, SGDState):
            return (
                None,
                "the optimiser's memory is not known, and its step hangs on it: see the "
                "gradient's parts",
            )
        note = "the momentum is not known: these are the steps of this gradient alone"
    clip = clip_factor(grads, clip_norm) if clip_norm else torch.ones_like(learning_rate)
    clipped = {name: clip.to(g) * g for name, g in grads.items()}
    added, moved = optimizer.split.decay(params, learning_rate)
    whole_gradient = {name: g + added[name] for name, g in clipped.items()} if added else clipped

    def steps(parts: Grads, memory: Params) -> Params:
        found, _ = optimizer.split.steps(parts, memory, whole_gradient, state, learning_rate)
        return found

    def of_parts(parts: Grads) -> Params:
        none = {name: torch.zeros_like(parts[name]) for name in memory}
        return steps({name: clip.to(g) * g for name, g in parts.items()}, none)

    own = {}
    nothing = {name: torch.zeros_like(p) for name, p in params.items()}
    if added:
        own[DECAY] = steps(added, {name: nothing[name] for name in memory})
    if moved:
        own[DECAY] = moved
    if memory and opt_state is not None:
        own[HISTORY] = steps(nothing, memory)
    whole, _ = optimizer.update(clipped, state, params, learning_rate)
    return StepParts(clip, learning_rate, of_parts, own, whole, note), ""
