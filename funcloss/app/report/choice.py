"""The result of a sweep or of a training under floors: the numbers behind its report."""

from dataclasses import dataclass

from funcloss.decisions import Interval

OUT_OF_FOLD_EXAMPLES = "out-of-fold examples"  # that models were chosen or tested on


@dataclass(frozen=True)
class Point:
    """A trial of a sweep on validation data, intervals from seed to seed, or from fold to fold."""

    name: str  # "class_weight 9=5"
    values: dict[str, float]  # by axis: {"class_weight 9": 5.0}
    accuracy: Interval
    expected_cost: Interval  # per example, of the decisions by argmax
    rule_cost: Interval  # of the decisions of minimum expected cost
    recall: tuple[Interval, ...]  # of each class in focus
    plain: bool  # every weight at 1, every option at its default: the baseline
    chosen: bool
    feasible: bool | None  # whether every constraint holds; None: there is no constraint
    seeds: int
    diverged: int  # of the seeds


@dataclass(frozen=True)
class Row:
    """A model under a decision rule on the test set, read once, or on out-of-fold examples."""

    name: str  # "plain, minimum expected cost"
    accuracy: Interval
    expected_cost: Interval
    normalised_cost: Interval  # as a multiple of the best constant decision's
    recall: tuple[Interval, ...]  # of each class in focus
    difference: Interval | None  # expected cost minus that of plain, paired by example; None: plain


@dataclass(frozen=True)
class Quality:
    """How good the probabilities of a model are, the mean over its seeds."""

    name: str
    auc: float  # class mean, each against the rest
    average_precision: float
    log_score: float  # nats per example
    brier_score: float
    calibration_error: float
    # mean probability of the likeliest class, how often it is right, examples: of each bin
    bins: tuple[tuple[float, float, float], ...]


@dataclass(frozen=True)
class Constraint:
    """A floor or ceiling, and what was reached on validation data by the chosen model."""

    text: str  # "recall of 9 at least 0.99"
    bound: float
    reached: float
    held: bool


@dataclass(frozen=True)
class Ascent:
    """A measurement of the dual ascent."""

    step: int  # steps done
    weights: dict[str, float]  # class weights that differ from 1, by class
    reached: tuple[float, ...]  # of each constraint
    accuracy: float
    feasible: bool


@dataclass(frozen=True)
class Choice:
    """All that the report of a choice shows."""

    title: str
    lines: tuple[str, ...]  # in plain words, the answer first
    costs: tuple[str, ...]  # the costs in words
    focus: tuple[str, ...]  # classes whose recall is shown; the first spans the frontier
    axes: tuple[str, ...]  # what was swept; empty under floors
    points: tuple[Point, ...]
    constraints: tuple[Constraint, ...]
    ascent: tuple[Ascent, ...]  # empty for a sweep
    rows: tuple[Row, ...]
    gradient: dict[str, float]  # by class: change of validation cost per unit of its weight
    gradient_steps: int
    seeds: int  # or folds, of all repeats, that an interval of the points is over
    chosen_on: str = "validation data"
    tested_on: str = "test set"
    qualities: tuple[Quality, ...] = ()  # on the test set

    @property
    def over(self) -> str:
        """What the intervals of the points are over: "seed" or "fold"."""
        return "fold" if self.chosen_on == OUT_OF_FOLD_EXAMPLES else "seed"
