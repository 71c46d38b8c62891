"""The stateless step, ``(state, batch, hyper) -> (state, metrics)``."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.func import grad_and_value

from funcloss.keys import example_keys, make_key
from funcloss.objectives.supervised import split_tensors
from funcloss.optim import Optimizer, OptState, Schedule, clip_by_global_norm
from funcloss.typing import Batch, Buffers, Hyper, Metrics, Objective, Params


class TrainState(NamedTuple):
    """All that a training is at one moment; every field is a tensor or holds only tensors."""

    params: Params
    buffers: Buffers  # and parameters that are not trained
    opt_state: OptState
    step: Int[Tensor, ""]
    key: Int[Tensor, ""]


TrainStep = Callable[[TrainState, Batch, Hyper], tuple[TrainState, Metrics]]


def init_state(model: nn.Module, optimizer: Optimizer, *, seed: int = 0) -> TrainState:
    """Return the state before the first step, a copy of the model's tensors.

    Args:
        model: Any module, initialised, on its device. Parameters that do not require a gradient
            are kept among the buffers and stay as they are.
        optimizer: What will update the parameters.
        seed: Seed of everything that the training draws.

    Returns:
        The state; four-dimensional tensors are channels-last where that is faster.

    Raises:
        ValueError: the model has no parameter to train.
    """
    params, buffers = (
        {name: preferred_layout(t.detach().clone()) for name, t in named.items()}
        for named in split_tensors(model)
    )
    if not params:
        raise ValueError("init_state: the model has no parameter that requires a gradient")
    device = next(iter(params.values())).device
    step = torch.zeros((), dtype=torch.int64, device=device)
    return TrainState(params, buffers, optimizer.init(params), step, make_key(seed, device=device))


def preferred_layout(tensor: Tensor) -> Tensor:
    """Return ``tensor`` as convolutions like it: channels-last if it has four axes."""
    if tensor.dim() == 4 and tensor.device.type in ("cpu", "cuda"):
        return tensor.contiguous(memory_format=torch.channels_last)
    return tensor.contiguous()


def make_train_step(
    objective: Objective,
    optimizer: Optimizer,
    *,
    schedule: Schedule | None = None,
    clip_norm: float = 0.0,
) -> TrainStep:
    """Return the pure training step of an objective.

    Args:
        objective: What to minimise.
        optimizer: Turns gradients into an update.
        schedule: Factor on ``hyper["learning_rate"]`` by number of the step; None: 1.
        clip_norm: Largest global norm of the gradients; 0 clips nothing.

    Raises:
        ValueError: ``clip_norm`` is negative.

    Returns:
        ``train_step(state, batch, hyper) -> (state, metrics)``. It makes new tensors and touches
        none that it is given, nor torch's generator: called twice with the same arguments it gives
        the same result. ``hyper`` holds ``learning_rate`` and what the loss takes by name, all
        tensors. Compile it with ``torch.compile(train_step, fullgraph=True, dynamic=False)``.

    Example:
        >>> from funcloss import losses, models, optim
        >>> from funcloss.objectives import mean_of, supervised
        >>> model, optimizer = models.linear((1, 2, 2), 3), optim.sgd()
        >>> objective = supervised(model, mean_of(losses.cross_entropy))
        >>> train_step = make_train_step(objective, optimizer)
        >>> state = init_state(model, optimizer)
        >>> batch = Batch(torch.ones(4, 1, 2, 2), torch.tensor([0, 1, 2, 0]))
        >>> state, metrics = train_step(state, batch, {"learning_rate": torch.tensor(0.1)})
        >>> state.step
        tensor(1)
    """
    if not clip_norm >= 0.0:
        raise ValueError(f"make_train_step: clip_norm must be at least 0, got {clip_norm}")

    def train_step(state: TrainState, batch: Batch, hyper: Hyper) -> tuple[TrainState, Metrics]:
        _check_hyper(hyper)
        keys = example_keys(state.key, state.step, batch.targets.shape[0])
        grads, (loss, (buffers, metrics)) = grad_and_value(objective, has_aux=True)(
            state.params, state.buffers, batch, keys, hyper
        )
        if clip_norm:
            grads = clip_by_global_norm(grads, clip_norm)
        learning_rate = hyper["learning_rate"]
        if schedule is not None:
            learning_rate = learning_rate * schedule(state.step)
        moves, opt_state = optimizer.update(grads, state.opt_state, state.params, learning_rate)
        params = {name: p + moves[name] for name, p in state.params.items()}
        state = TrainState(params, buffers, opt_state, state.step + 1, state.key)
        return state, {"loss": loss, **metrics}

    return train_step


def _check_hyper(hyper: Hyper) -> None:
    if "learning_rate" not in hyper:
        raise KeyError(f"train_step: hyper must hold learning_rate, got {sorted(hyper)}")
    for name, value in hyper.items():
        if not isinstance(value, Tensor):
            kind = type(value).__name__
            raise TypeError(f"train_step: hyper[{name!r}] must be a tensor, got a {kind}")
