"""Early stopping: the model of the lowest validation loss."""

import math
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from funcloss.app import length
from funcloss.app.runs.setup import Setup
from funcloss.errors import ConfigError
from funcloss.training import TrainState
from funcloss.typing import Buffers, Params


class Best(NamedTuple):
    """What early stopping remembers: the model after the epoch of the lowest validation loss."""

    params: Params
    buffers: Buffers
    loss: Float[Tensor, ""]  # on validation data; inf before the first epoch, and where it is NaN
    step: Int[Tensor, ""]  # after which it was; 0 before the first epoch


def first_best(state: TrainState) -> Best:
    """Return the memory before the first epoch."""
    loss = torch.tensor(math.inf, dtype=torch.float64)
    return Best(state.params, state.buffers, loss, step=torch.zeros_like(state.step).cpu())


def better(best: Best, state: TrainState, loss: float) -> Best:
    """Return the memory after an epoch.

    Args:
        best: The memory before it.
        state: The state after it.
        loss: Its loss on validation data.

    Returns:
        The model of ``state`` if its loss is lower by 1e-4 at least, or if it is the first; else
        ``best``.
    """
    now = torch.tensor(math.inf if math.isnan(loss) else loss, dtype=torch.float64)
    if best.step > 0 and not now < best.loss - length.LEAST:
        return best
    return Best(state.params, state.buffers, now, state.step.cpu())


def make_first_best(setup: Setup) -> Best | None:
    """Return the memory of a run before its first epoch; None if its epochs are a number.

    Raises:
        ConfigError: nothing is held out to measure the validation loss on.
    """
    if setup.config.epochs != "auto":
        return None
    if not len(setup.dataset.validation.labels):
        raise ConfigError(
            "epochs auto stops by the loss on validation data, and none is held out: set "
            "val_fraction, to 0.1 say, or a number of epochs"
        )
    return first_best(setup.state)


def summary_of(best: Best, setup: Setup) -> dict[str, Any]:
    """Return what ``summary.json`` says of the epoch that was kept."""
    step = int(best.step)
    return {"best_epoch": step // setup.per_epoch, "best_step": step}


def sentence_on(best: Best, setup: Setup, step: int) -> str:
    """Return why a run ended after a step, and which model it kept."""
    epoch, at = step // setup.per_epoch, int(best.step) // setup.per_epoch
    waited = epoch - at
    if waited >= length.patience(epoch, setup.per_epoch):
        why = f"the validation loss has not fallen for {waited} epochs"
    else:
        why = "the most that epochs auto takes; a number of epochs may train longer"
    return (
        f"stopped after epoch {epoch}, {step:,} steps: {why}; the model kept is that of epoch {at},"
        f" at validation loss {float(best.loss):.4f}"
    )
