"""From the trials' scores on validation data to the one that is chosen, and why."""

import math
from collections.abc import Sequence
from functools import partial
from typing import TypedDict

import torch

from funcloss._json import or_nan
from funcloss.app.decoding import Count, Number
from funcloss.app.report.choice import Point
from funcloss.app.sweep.axes import Axis
from funcloss.constraints.bounds import Constraint, held, violations
from funcloss.decisions import Costs, Interval, seed_interval

_FADED = 0.001  # training error below which class weights have nothing left to weigh


class Record(TypedDict):
    """A trial at the end of a seed's training: a line of ``trials.jsonl``."""

    seed: Count
    trial: Count
    name: str
    values: dict[str, float]
    plain: bool
    diverged: bool
    accuracy: float
    expected_cost: float
    rule_cost: Number
    temperature: Number
    calibration_error: Number
    recall: dict[str, Number]
    precision: dict[str, Number]
    reached: list[Number]
    support: list[Count]
    train_accuracy: float


def points_of(
    records: Sequence[Record],
    constraints: Sequence[Constraint],
    focus: Sequence[str],
    costs: Costs,
) -> list[Point]:
    """Return the trials of a sweep on validation data, over their seeds, none chosen yet.

    Args:
        records: The trials at the end of each seed's training.
        constraints: What is to hold; it does where it holds of the mean over the seeds.
        focus: Classes whose recall is told.
        costs: What decisions cost: no interval goes beyond the least and the largest of them.

    Returns:
        A point a trial, in their order.
    """
    numbers = sorted({record["trial"] for record in records})
    possible = (float(costs.matrix.min()), float(costs.matrix.max()))
    return [
        _point([r for r in records if r["trial"] == n], constraints, focus, possible)
        for n in numbers
    ]


def chosen_of(
    points: Sequence[Point],
    axes: Sequence[Axis],
    constraints: Sequence[Constraint],
    missed: Sequence[float],
) -> int | None:
    """Return which trial to choose, by validation data alone.

    Under constraints the one that keeps them with the class weight nearest to 1, or, where more
    than one option or another is swept, with the least expected cost; if none keeps them, the one
    that comes nearest. Without constraints the one of least expected cost. Plain training is a
    trial as any other; one that diverged on a seed is out.

    Args:
        points: The trials.
        axes: What was swept.
        constraints: What is to hold.
        missed: How far each trial is from its constraints: :func:`misses`.

    Returns:
        Its position among the points; None if all diverged.
    """
    sound = [i for i, p in enumerate(points) if not p.diverged]
    if not sound:
        return None
    if not constraints:
        return min(sound, key=lambda i: points[i].expected_cost.value)
    feasible = [i for i in sound if points[i].feasible]
    if not feasible:
        return min(sound, key=lambda i: missed[i])
    if len(axes) == 1 and axes[0].option == "class_weight":
        return min(feasible, key=lambda i: _tilt(points[i].values.get(axes[0].name, 1.0)))
    return min(feasible, key=lambda i: points[i].expected_cost.value)


def order_of(axes: Sequence[Axis]) -> str:
    """Return what :func:`chosen_of` takes among the trials that keep the constraints, in words."""
    if len(axes) > 1 or axes[0].option != "class_weight":
        return "the trial of least expected cost"
    return "the smallest weight" if min(axes[0].values) >= 1 else "the weight nearest to 1"


def baseline_of(points: Sequence[Point]) -> int | None:
    """Return which plain training to compare with: that of least expected cost on validation data.

    Args:
        points: The trials; plain training is there once for each learning rate.

    Returns:
        Its position among the points; None if all plain trainings diverged.
    """
    plain = [i for i, p in enumerate(points) if p.plain and not p.diverged]
    return min(plain, key=lambda i: points[i].expected_cost.value, default=None)


def misses(records: Sequence[Record], constraints: Sequence[Constraint]) -> list[float]:
    """Return how far each trial is from keeping the constraints, the worst of them, over its seeds.

    Args:
        records: The trials at the end of each seed's training.
        constraints: What is to hold.

    Returns:
        A number a trial, in the units of :func:`funcloss.constraints.bounds.violations`.
    """
    worst = []
    for number in sorted({record["trial"] for record in records}):
        own = [r for r in records if r["trial"] == number]
        values = means([r["reached"] for r in own])
        support = torch.tensor(own[0]["support"])
        far = violations(constraints, values, support) if constraints else torch.zeros(1)
        undefined = any(math.isnan(v) for v in values)
        worst.append(math.inf if undefined else float(far.max()))
    return worst


def means(rows: Sequence[Sequence[float | None]]) -> list[float]:
    """Return the mean of each column; NaN where a value of it is not defined."""
    columns = zip(*rows, strict=True)
    return [sum(or_nan(v) for v in column) / len(rows) for column in columns]


def faded(records: Sequence[Record], axes: Sequence[Axis]) -> Interval | None:
    """Return the training error where class weights are swept and nothing is left to weigh.

    Once no training example is wrong, class weights hardly move the boundary any more.

    Args:
        records: The trials at the end of each seed's training.
        axes: What was swept.

    Returns:
        Mean, least and largest training error, if the mean is below 0.1 %; else None.

    References:
        Byrd and Lipton, "What is the effect of importance weighting in deep learning?", 2019;
        Kini, Paraskevas, Oymak and Thrampoulidis, "Label-imbalanced and group-sensitive
        classification under overparameterization", 2021.
    """
    errors = [1.0 - r["train_accuracy"] for r in records if not r["diverged"]]
    if not errors or not any(axis.option == "class_weight" for axis in axes):
        return None
    mean = sum(errors) / len(errors)
    return Interval(mean, min(errors), max(errors)) if mean < _FADED else None


def _point(
    own: list[Record],
    constraints: Sequence[Constraint],
    focus: Sequence[str],
    possible: tuple[float, float],
) -> Point:
    sound = [r for r in own if not r["diverged"]]
    of_part = partial(seed_interval, within=(0.0, 1.0))
    of_cost = partial(seed_interval, within=possible)
    values = means([r["reached"] for r in sound])
    return Point(
        name=own[0]["name"],
        values=own[0]["values"],
        accuracy=of_part([r["accuracy"] for r in sound]),
        expected_cost=of_cost([r["expected_cost"] for r in sound]),
        rule_cost=of_cost([or_nan(r["rule_cost"]) for r in sound]),
        recall=tuple(of_part([or_nan(r["recall"][name]) for r in sound]) for name in focus),
        plain=own[0]["plain"],
        chosen=False,
        feasible=(bool(sound) and held(constraints, values)) if constraints else None,
        seeds=len(own),
        diverged=len(own) - len(sound),
    )


def _tilt(weight: float) -> float:
    return abs(math.log(weight)) if weight > 0 else math.inf
