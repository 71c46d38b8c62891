"""What a training run tells of itself as it goes."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from funcloss.app.config import TrainConfig
from funcloss.audit import Ledger
from funcloss.decisions import Evaluation
from funcloss.training.loop import Progress


@dataclass(frozen=True)
class Note:
    """One line that the user should read."""

    text: str
    warning: bool = False


@dataclass(frozen=True)
class Started:
    """Training begins, or goes on, at ``step`` of ``steps``."""

    folder: Path
    config: TrainConfig
    step: int
    steps: int  # at most, if it stops early


@dataclass(frozen=True)
class EpochReport:
    """A finished epoch, stops within it included, and the evaluations after it."""

    number: int  # from 1
    epochs: int  # how many there will be; at most, if it stops early
    loss: float  # mean over its steps
    seconds: float  # of its steps
    evaluations: dict[str, Evaluation]  # by split


@dataclass(frozen=True)
class Audited:
    """The class shares of a step's gradient, measured before the step was taken."""

    step: int  # its number, from 1
    seconds: float  # that measuring took
    rows: list[dict[str, Any]]  # one per class


@dataclass(frozen=True, eq=False)
class LedgerReport:
    """The sums of the ledger after an epoch."""

    epoch: int
    classes: tuple[str, ...]
    parts: tuple[str, ...]  # names of the columns
    ledger: Ledger
    exact: bool  # every step was measured
    seconds: float  # that it took so far
    training_seconds: float  # that the steps took without it
    weights: Tensor  # of the classes in the training, (classes,)


@dataclass(frozen=True)
class Constrained:
    """A measurement of the constraints, after ``step`` steps."""

    step: int
    record: dict[str, Any]


Event = Note | Started | Progress | EpochReport | Audited | LedgerReport | Constrained
Show = Callable[[Any], None]


@dataclass(frozen=True)
class Watcher:
    """The callbacks of a training run."""

    show: Show = lambda event: None  # called with everything that happens
    should_stop: Callable[[], bool] = lambda: False  # asked after every step; True saves and ends
