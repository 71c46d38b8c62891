"""What a sweep or a training under constraints came to, in plain words."""

import math
import shlex
from collections.abc import Sequence

from funcloss.app.report.choice import OUT_OF_FOLD_EXAMPLES, Ascent, Constraint, Point, Row
from funcloss.decisions import Interval


def sweep_sentences(
    points: Sequence[Point],
    chosen: Point,
    plain: Point | None,
    constraints: Sequence[Constraint],
    by: str,
    on: str = "validation data",
) -> list[str]:
    """Return what a sweep chose, and what must be known of it.

    Args:
        points: Its trials.
        chosen: The one that was chosen.
        plain: The plain training that it is compared with; None: it diverged.
        constraints: What had to hold, and what it reaches.
        by: What the chosen one is among those that keep the constraints: "the smallest weight".
        on: What it was chosen on.

    Returns:
        Sentences, the answer first.
    """
    lines = [_answer(chosen, plain, constraints, by, on)]
    lost = [p for p in points if p.diverged]
    if lost:
        seeds = "" if on == OUT_OF_FOLD_EXAMPLES else " on {p.diverged} of {p.seeds} seeds"
        names = ", ".join(p.name + seeds.format(p=p) for p in lost[:5])
        more = f" and {len(lost) - 5} more" if len(lost) > 5 else ""
        lines.append(f"Diverged, and out of the choice: {names}{more}.")
    return lines


def fading_sentence(error: Interval, *, even: bool) -> str:
    """Return what to know where no training example is wrong any more.

    Args:
        error: The training error of the trials.
        even: All classes have as many training examples, so that adjusting by counts does nothing.

    Returns:
        A sentence.
    """
    told = (
        f"The training error is {100 * error.value:.2f} %: where no training example is wrong, "
        "class weights fade (Byrd and Lipton 2019)"
    )
    if even:
        return f"{told}; decisions of minimum expected cost do not."
    return (
        f"{told}. Logit adjustment and vector scaling do not: sweep tau, as in --loss "
        "vector_scaling --loss-option tau=0:2:5."
    )


def constraint_sentences(
    constraints: Sequence[Constraint],
    ascent: Sequence[Ascent],
    best: Ascent | None,
    found: dict[str, float],
    *,
    plain_keeps: bool,
) -> list[str]:
    """Return what a training under constraints came to on validation data.

    Args:
        constraints: What had to hold, and what was reached at the best moment.
        ascent: All measurements.
        best: The one whose model is kept.
        found: The class weights found, those that are not 1.
        plain_keeps: Plain training keeps every constraint on validation data.

    Returns:
        Sentences, the answer first.
    """
    missed = [constraint for constraint in constraints if not constraint.held]
    at = f" after {best.step:,} steps" if best else ""
    kept = sum(a.feasible for a in ascent)
    of = f"the best of {len(ascent)} measurements, at {kept} of which every constraint held"
    if not missed:
        told = "; ".join(
            f"{constraint.text}: {_four(constraint.reached)}" for constraint in constraints
        )
        lines = [f"Every constraint is kept on validation data{at}, {of}. {told}."]
    else:
        told = "; ".join(map(_missed, missed))
        lines = [
            f"Not every constraint could be kept on validation data. Nearest{at}, {of}: {told}."
        ]
    if plain_keeps:
        lines.append("Plain training keeps every constraint on validation data as it is.")
    weights = " ".join(
        f"--class-weight {shlex.quote(f'{name}={w:g}')}" for name, w in found.items()
    )
    if weights and missed:
        lines.append(f"Weights that it came to, which keep not every constraint: {weights}")
    elif weights:
        lines.append(f"Weights found, to be used plainly: {weights}")
    return lines


def tested_sentences(
    plain: Row,
    chosen: Row | None,
    cheap: Row,
    gap: Interval | None,
    reached: Sequence[tuple[str, float]],
    focus: Sequence[str],
    on: str,
) -> list[str]:
    """Return what held-out examples say of the model beside its cheap alternative.

    Args:
        plain: Plain training by argmax.
        chosen: The chosen model by argmax; None: it is plain training.
        cheap: What needs no training: plain training under another rule.
        gap: Expected cost of the chosen model less that of ``cheap``, paired.
        reached: Each constraint in words, and what the chosen model reaches of it there.
        focus: Classes whose recall is told.
        on: The examples of the rows: the test set, read once, or those of the choice again.

    Returns:
        Sentences.
    """
    lines = []
    of_choice = on == OUT_OF_FOLD_EXAMPLES
    where = f"On the {on}{', which the choice was made on too' if of_choice else ', read once'}"
    if chosen is None:
        lines.append(f"{where}: {_row(plain, focus)}.")
    else:
        told = f"{_row(chosen, focus)}; plain: {_row(plain, focus)}"
        lines.append(f"{where}: {told}.")
        lines.append(
            f"Expected cost of {chosen.name} against plain: {_difference(chosen.difference)}."
        )
    if reached:
        told = "; ".join(f"{text}: {_four(value)}" for text, value in reached)
        lines.append(f"The constraints on the {on}: {told}.")
    told = f"{_row(cheap, focus)}; {_difference(cheap.difference)}"
    lines.append(f"Without training anew, {cheap.name}: {told}.")
    if gap is not None and not math.isnan(gap.low):
        lines.append(f"{_verdict(gap)} ({_difference(gap)}).")
    if of_choice:
        lines.append(
            "The chosen trial is the best of several on the same examples, so its cost is on the "
            "low side: judge it on data of its own."
        )
    return lines


def slope_sentences(gradient: dict[str, float], steps: int) -> list[str]:
    """Return what the class weight that matters most would do, if there are class weights.

    Args:
        gradient: Change of the validation cost per unit of each class's weight.
        steps: How many steps it looks ahead.

    Returns:
        A sentence, or none.
    """
    known = {name: slope for name, slope in gradient.items() if math.isfinite(slope)}
    if not known:
        return []
    name = max(known, key=lambda c: abs(known[c]))
    return [
        f"One more unit of weight on {name} would change the validation cost by "
        f"{known[name]:+.2g}, to first order, {steps} steps on."
    ]


def _answer(
    chosen: Point, plain: Point | None, constraints: Sequence[Constraint], by: str, on: str
) -> str:
    if not constraints:
        if plain is None or chosen.plain:
            against = "no trial that was swept costs less" if chosen.plain else "plain diverged"
        else:
            against = f"plain training costs {_four(plain.expected_cost.value)}"
        return (
            f"{chosen.name} has the least expected cost on {on}, "
            f"{_four(chosen.expected_cost.value)} an example; {against}."
        )
    told = "; ".join(
        f"{constraint.text}: {_four(constraint.reached)}" for constraint in constraints
    )
    if not chosen.feasible:
        return f"No trial keeps every constraint on {on}; nearest is {chosen.name}. {told}."
    return f"{chosen.name} is {by} that keeps every constraint on {on}. {told}."


def _missed(constraint: Constraint) -> str:
    if math.isnan(constraint.reached):
        return f"{constraint.text} is missed: it is not defined, as the class is never decided"
    gap = abs(constraint.bound - constraint.reached)
    return f"{constraint.text} is missed by {_four(gap)}, at {_four(constraint.reached)}"


def _verdict(gap: Interval) -> str:
    if gap.low > 0:
        return "The decision rule alone costs less than the costs in training: prefer it"
    if gap.high < 0:
        return "The costs in training save more than the decision rule alone"
    return "Between the costs in training and the decision rule alone no difference can be told"


def _row(row: Row, focus: Sequence[str]) -> str:
    recalls = [f"recall of {c} {_with(r, 100)}" for c, r in zip(focus, row.recall, strict=True)]
    parts = [f"accuracy {_with(row.accuracy, 100)}", *recalls[:1]]
    return f"{', '.join(parts)}, expected cost {_with(row.expected_cost)}"


def _difference(difference: Interval | None) -> str:
    if difference is None or difference == (0.0, 0.0, 0.0):
        return "the same decisions"
    value, low, high = difference
    told = f"{value:+.4f} an example"
    if math.isnan(low):
        return told
    sure = "" if low > 0 or high < 0 else ", which may be chance"
    return f"{told} [{low:+.4f}, {high:+.4f}]{sure}"


def _with(score: Interval, factor: float = 1.0) -> str:
    """Return a number with its interval; ``factor`` 100: in percent."""
    value, low, high = (factor * v for v in score)
    digits, unit = (2, " %") if factor != 1.0 else (4, "")
    if math.isnan(value):
        return "not defined"
    if math.isnan(low):
        return f"{value:.{digits}f}{unit}"
    return f"{value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]{unit}"


def _four(value: float) -> str:
    return "not defined" if math.isnan(value) else f"{value:.4f}"
