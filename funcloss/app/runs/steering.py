"""What may set a training's ``hyper`` as it goes, by what it measures on the way."""

from collections.abc import Callable
from typing import Any, NamedTuple

from funcloss.app.runs.model import TrainedModel
from funcloss.training.step import TrainState
from funcloss.typing import Hyper

Memory = Any  # NamedTuples and dicts of tensors, as checkpoints hold them


class Steering(NamedTuple):
    """An init/update pair beside the optimiser's: it measures, and sets what the steps are given.

    All functions are pure; what is remembered travels in ``memory``, which checkpoints keep, so
    that a resumed training goes on to the same bits.
    """

    every: int  # steps between two measurements; one more follows the last step
    init: Callable[[TrainState], Memory]
    update: Callable[[Memory, TrainState], tuple[Memory, dict[str, Any]]]  # and a record of it
    hyper: Callable[[Memory], Hyper]
    model: Callable[[Memory], TrainedModel]  # the one to keep
    summary: Callable[[Memory], dict[str, Any]]  # for ``summary.json``
