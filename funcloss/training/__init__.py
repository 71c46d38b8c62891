"""The stateless step, and the loop around it."""

from funcloss.training.compilation import Compiled, prepare
from funcloss.training.evaluation import evaluate
from funcloss.training.loop import (
    Epoch,
    Progress,
    epoch_order,
    fit,
    oversampled_counts,
    oversampled_order,
)
from funcloss.training.step import TrainState, init_state, make_train_step

__all__ = [
    "Compiled",
    "Epoch",
    "Progress",
    "TrainState",
    "epoch_order",
    "evaluate",
    "fit",
    "init_state",
    "make_train_step",
    "oversampled_counts",
    "oversampled_order",
    "prepare",
]
