"""What may set a training's ``hyper`` as it goes, by what it measures on the way."""

from collections.abc import Callable
from typing import Any, NamedTuple

from funcloss.training.step import TrainState
from funcloss.typing import Buffers, Hyper, Params

Memory = Any  # NamedTuples and dicts of tensors, as checkpoints hold them


class Model(NamedTuple):
    """The tensors of a model, and what its last steps were given."""

    params: Params
    buffers: Buffers
    hyper: Hyper


class Steering(NamedTuple):
    """An init/update pair beside the optimiser's: it measures, and sets what the steps are given.

    All functions are pure; what is remembered travels in ``memory``, which checkpoints keep, so
    that a resumed training goes on to the same bits.
    """

    every: int  # steps between two measurements; one more follows the last step
    init: Callable[[TrainState], Memory]
    update: Callable[[Memory, TrainState], tuple[Memory, dict[str, Any]]]  # and a record of it
    hyper: Callable[[Memory], Hyper]
    model: Callable[[Memory], Model]  # the one to keep
    summary: Callable[[Memory], dict[str, Any]]  # for ``summary.json``
