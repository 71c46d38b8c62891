"""Optimisers, schedules and clipping, each a pure function with a twin in ``torch.optim``."""

from funcloss.optim.clipping import clip_by_global_norm, clip_factor, global_norm
from funcloss.optim.optimizers import (
    AdamState,
    Optimizer,
    OptState,
    SGDState,
    Split,
    adam,
    adamw,
    sgd,
)
from funcloss.optim.schedules import Schedule, constant, cosine, one_cycle, step_decay

__all__ = [
    "AdamState",
    "OptState",
    "Optimizer",
    "SGDState",
    "Schedule",
    "Split",
    "adam",
    "adamw",
    "clip_by_global_norm",
    "clip_factor",
    "constant",
    "cosine",
    "global_norm",
    "one_cycle",
    "sgd",
    "step_decay",
]
