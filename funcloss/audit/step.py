"""The step that an optimiser takes as the sum of what each part of the gradient does to it."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from funcloss.optim import Optimizer, OptState, SGDState, clip_factor
from funcloss.typing import Grads, Params

OWN_ROWS = ("weight decay", "history")  # what moves beside the parts of this gradient


class StepParts(NamedTuple):
    """A step, ready to be split, ``u = sum(steps(parts)) + sum(own)``."""

    clip: Tensor  # factor on the gradient
    learning_rate: Tensor
    whole: Params  # u, as the optimiser itself gives it
    # (parts of the gradient, unclipped, side by side; memory) -> (steps, memory), in rows: the
    # parts and then ``OWN_ROWS``. Without memory, all that the optimiser remembers is history.
    split: Callable[[Grads, Params | None], tuple[Params, Params]]
    note: str  # what is not known; empty: nothing

    def of_parts(self, parts: Grads) -> Params:
        """Return the steps of parts of the gradient alone."""
        rows, _ = self.split(parts, None)
        return {name: row[: -len(OWN_ROWS)] for name, row in rows.items()}

    def own(self) -> Params:
        """Return the steps that no part of this gradient causes, in the order of ``OWN_ROWS``."""
        none = {name: move.new_zeros(0, *move.shape) for name, move in self.whole.items()}
        rows, _ = self.split(none, None)
        return rows


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
        The parts; or None, and why there are none.
    """
    parting = optimizer.split
    if parting is None:
        return None, "this optimiser does not say how its step is made up: see the gradient's parts"
    state = optimizer.init(params) if opt_state is None else opt_state
    remembered = parting.memory(state)
    note = ""
    if opt_state is None and remembered:
        if not isinstance(state, SGDState):
            why = "the optimiser's memory is not known, and every part of its step hangs on it: "
            return None, why + "see the gradient's parts"
        note = "the momentum is not known: these are the steps of this gradient alone"
    clip = clip_factor(grads, clip_norm) if clip_norm else torch.ones_like(learning_rate)
    clipped = {name: clip.to(g) * g for name, g in grads.items()}
    added, moved = parting.decay(params, learning_rate)
    gradient = {name: g + added[name] for name, g in clipped.items()} if added else clipped

    def split(parts: Grads, memory: Params | None) -> tuple[Params, Params]:
        rows = {}
        for name, part in parts.items():
            nothing = torch.zeros_like(params[name])
            own = torch.stack([added.get(name, nothing), nothing])
            rows[name] = torch.cat([clip.to(part) * part, own])
        if memory is None:
            memory = {
                name: torch.cat([torch.zeros_like(rows[name][:-1]), m[None]])
                for name, m in remembered.items()
            }
        steps, memory = parting.steps(rows, memory, gradient, state, learning_rate)
        decayed = -len(OWN_ROWS)
        for name, move in moved.items():
            steps[name][decayed] += move
        return steps, memory

    whole, _ = optimizer.update(clipped, state, params, learning_rate)
    return StepParts(clip, learning_rate, whole, split, note), ""
