"""What the class weights of a run changed in recall, precision and cost: numbers and sentences."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from funcloss.decisions import Interval

_MANY = 1000  # examples of a class from which a second digit of a percentage says something
_UNKNOWN = Interval(math.nan, math.nan, math.nan)


@dataclass(frozen=True)
class Change:
    """A score of a run and of its baseline, and the difference, paired; intervals at 95 %."""

    run: Interval
    baseline: Interval = _UNKNOWN
    difference: Interval = _UNKNOWN

    @property
    def significant(self) -> bool:
        """Whether the interval of the difference leaves out 0."""
        return self.difference.low > 0 or self.difference.high < 0


@dataclass(frozen=True)
class ClassOutcome:
    """The scores of a class, by the most probable class."""

    name: str
    weight: float  # in training
    examples: int  # of the split
    recall: Change
    precision: Change


@dataclass(frozen=True)
class RunOutcome:
    """The kept model of a run beside its baseline, on the split that its summary reports."""

    run: str  # the folder, as a shell takes it
    split: str
    examples: int
    classes: tuple[ClassOutcome, ...]  # all of them
    focus: tuple[int, ...]  # of weights of their own, the most unusual first; else the costliest
    loss: str  # of the run, where the baseline has another one; else empty
    accuracy: Change
    expected_cost: Change  # per example, by the most probable class
    rule_cost: Change | None  # by minimum expected cost; None: the run does not decide so
    seeds: int = 0  # pairs of run and baseline; 0: no baseline
    paired_by: str = ""  # "example" or, where no predictions are kept, "seed"
    note: str = ""  # on a baseline that is there and is not compared; empty: none

    @property
    def where(self) -> str:
        """The examples of the scores, in words."""
        return f"{self.split} split, {self.examples:,} examples"


def outcome_sentences(
    found: RunOutcome | str, *, name: Callable[[str], str] = str, most: int = 4
) -> tuple[str, ...]:
    """Return what the weights of a run changed, the answer first.

    Args:
        found: The run beside its baseline; or the sentence that says why there is none.
        name: How a class's name is written.
        most: Classes to speak of, at most.

    Returns:
        One or two sentences each.
    """
    if isinstance(found, str):
        return (found,) if found else ()
    if not found.focus:
        return _unweighted(found, name)
    lines: list[str] = []
    for c in found.focus[:most]:
        lines += _compared(found, found.classes[c], name) if found.seeds else []
        lines += [] if found.seeds else [_alone(found.classes[c], name)]
    if more := len(found.focus) - most:
        have = "class has its weight" if more == 1 else "classes have their weights"
        lines += [f"{more:,} more {have}: see the report."] * (more > 0)
    if not found.seeds:
        cost = f"{found.expected_cost.run.value:.4f} per example ({found.where})"
        what = "the weight" if len(found.focus) == 1 else "the weights"
        if all(found.classes[c].weight == 1.0 for c in found.focus):
            what = "the costs in the loss"
        return (
            *lines,
            f"The expected cost is {cost}.",
            *filter(None, [found.note]),
            f"No baseline: what {what} changed in recall is not known; run "
            f"`funcloss audit {found.run} --baseline`.",
        )
    lines.append(_moved("The expected cost per example", found.expected_cost, _amount))
    if found.rule_cost is not None:
        what = "By decisions of minimum expected cost, the expected cost per example"
        lines.append(_moved(what, found.rule_cost, _amount))
    return (*lines, _baseline(found), _seeds(found), *filter(None, [found.note]))


def of_saved_model(class_weight: dict[str, float]) -> str:
    """Return what is known of the weights of a saved model, which has no baseline."""
    what = "what its class weights changed in recall is not known"
    return f"A saved model has no baseline: {what}." if class_weight else ""


def _unweighted(found: RunOutcome, name: Callable[[str], str]) -> tuple[str, ...]:
    known = [c for c in found.classes if not math.isnan(c.recall.run.value)]
    if not known:
        return ()
    worst = min(known, key=lambda c: c.recall.run.value)
    return (
        f"Class {name(worst.name)} has the lowest recall, {_percent(worst.recall.run)}; accuracy "
        f"{_percent(found.accuracy.run)} ({found.where}).",
    )


def _alone(found: ClassOutcome, name: Callable[[str], str]) -> str:
    weight = "" if found.weight == 1.0 else f" (weight {found.weight:.4g})"
    return (
        f"Class {name(found.name)}{weight} has a recall of {_percent(found.recall.run)} and a "
        f"precision of {_percent(found.precision.run)}."
    )


def _compared(
    found: RunOutcome, of_class: ClassOutcome, name: Callable[[str], str]
) -> tuple[str, str]:
    causes = [found.loss] if found.loss else []
    causes += [f"weight {of_class.weight:.4g}"] if of_class.weight != 1.0 else []
    cause = " and ".join(causes) or "the costs in the loss"
    recall, what = of_class.recall, f"recall of class {name(of_class.name)}"
    digits = 1 if of_class.examples < _MANY else 2
    percent, points = partial(_percent, digits=digits), partial(_points, digits=digits)
    before, now = percent(recall.baseline, bare=True), percent(recall.run, bare=True)
    change = points(recall.difference)
    if math.isnan(recall.difference.value):
        first = f"The {what} is not known: the {found.split} split has no example of it."
    elif recall.significant:
        verb = "raised" if recall.difference.value > 0 else "lowered"
        first = f"{cause[0].upper()}{cause[1:]} {verb} the {what} from {before} to {now}: {change}."
    elif recall.difference.value == 0:
        first = f"The {what} is {now} with {cause} and in the baseline: {change}."
    else:
        more = "higher" if recall.difference.value > 0 else "lower"
        first = (
            f"The {what} is {more} with {cause}, {now} instead of {before}, but "
            f"{_doubt(recall)}: {change}."
        )
    precision = of_class.precision
    if math.isnan(precision.difference.value):
        run, base = percent(precision.run), percent(precision.baseline)
        return first, f"Its precision is {run}; in the baseline {base}."
    return first, _moved("Its precision", precision, points, percent)


def _moved(
    what: str,
    change: Change,
    by: Callable[[Interval], str],
    level: Callable[..., str] | None = None,
) -> str:
    """Return how a score differs from the baseline's."""
    value = change.difference.value
    if math.isnan(value):
        return f"{what} is not known in the baseline."
    form = level or (lambda score, bare: f"{score.value:.4f}")
    before, now = form(change.baseline, bare=True), form(change.run, bare=True)
    if value == 0:
        return f"{what} is {now}, as in the baseline: {by(change.difference)}."
    if change.significant:
        verb = "rose" if value > 0 else "fell"
        return f"{what} {verb} from {before} to {now}: {by(change.difference)}."
    more = "higher" if value > 0 else "lower"
    apart = by(change.difference)
    return f"{what} is {more}, {now} instead of {before}, but {_doubt(change)}: {apart}."


def _doubt(change: Change) -> str:
    known = not math.isnan(change.difference.low)
    return "not significantly" if known else "how surely is not known"


def _baseline(found: RunOutcome) -> str:
    loss = "the cross-entropy and " if found.loss else ""
    paired = f"95 % intervals, paired by {found.paired_by}"
    if found.paired_by == "seed" and found.seeds == 1:
        paired = "no intervals: a sweep keeps no predictions"
    return (
        f"Baseline: the same seed, first weights and batches, with {loss}all class weights 1 "
        f"({found.where}; {paired})."
    )


def _seeds(found: RunOutcome) -> str:
    if found.seeds == 1:
        return (
            "One training seed: another may give another difference; try `funcloss audit "
            f"{found.run} --baseline --seeds 5`."
        )
    over = "seeds" if found.paired_by == "seed" else "examples and seeds"
    return f"Means over {found.seeds} seeds; the intervals are over {over}."


def _percent(score: Interval, digits: int = 1, *, bare: bool = False) -> str:
    if math.isnan(score.value):
        return "not defined (the class is never predicted)"
    value, low, high = (f"{100 * v:.{digits}f}" for v in score)
    return f"{value} %" if bare or math.isnan(score.low) else f"{value} % [{low}, {high}]"


def _points(difference: Interval, digits: int = 1) -> str:
    return _signed([100 * v for v in difference], digits) + " percentage points"


def _amount(difference: Interval) -> str:
    return _signed(difference, 4)


def _signed(difference: Sequence[float], digits: int) -> str:
    value, low, high = (f"{round(v, digits) + 0.0:+.{digits}f}" for v in difference)
    return value if math.isnan(difference[1]) else f"{value} [{low}, {high}]"
