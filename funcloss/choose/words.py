"""What a sweep or a training under limits came to, in plain words."""

import math
from collections.abc import Sequence

from funcloss.choose.axes import Axis
from funcloss.choose.result import Ascent, Limit, Point, Row, Score


def sweep_sentences(
    points: Sequence[Point],
    chosen: Point,
    limits: Sequence[Limit],
    axes: Sequence[Axis],
    faded: Score | None,
) -> list[str]:
    """Return what a sweep chose on validation data, and what must be known of it.

    Args:
        points: Its members.
        chosen: The one that was chosen.
        limits: What had to hold, and what it reaches.
        axes: What was swept.
        faded: The training error, where class weights have nothing left to weigh.

    Returns:
        Sentences, the answer first.
    """
    lines = [_answer(points, chosen, limits, axes)]
    lost = [p for p in points if p.diverged]
    if lost:
        names = ", ".join(
            f"{p.name or 'plain'} on {p.diverged} of {p.seeds} seeds" for p in lost[:5]
        )
        more = f" and {len(lost) - 5} more" if len(lost) > 5 else ""
        lines.append(f"Diverged, and out of the choice: {names}{more}.")
    if faded is not None:
        lines.append(
            f"The training error is {100 * faded.value:.2f} %: where no training example is wrong, "
            "class weights fade (Byrd and Lipton 2019). Margins and logit adjustment do not: sweep "
            "tau of logit_adjusted or vector_scaling, as in --loss vector_scaling --loss-option "
            "tau=0:2:5."
        )
    return lines


def limit_sentences(
    limits: Sequence[Limit], ascent: Sequence[Ascent], best: Ascent | None, found: dict[str, float]
) -> list[str]:
    """Return what a training under limits came to on validation data.

    Args:
        limits: What had to hold, and what was reached at the best moment.
        ascent: All measurements.
        best: The one whose model is kept.
        found: The class weights found, those that are not 1.

    Returns:
        Sentences, the answer first.
    """
    missed = [limit for limit in limits if not limit.held]
    at = f" after {best.step:,} steps" if best else ""
    weights = " ".join(f"--class-weight {name}={w:g}" for name, w in found.items())
    if not missed:
        told = "; ".join(f"{limit.text}: {_four(limit.reached)}" for limit in limits)
        lines = [f"Every limit is kept on validation data{at}. {told}."]
    else:
        told = "; ".join(
            f"{limit.text} is missed by {_four(abs(limit.bound - limit.reached))}, at "
            f"{_four(limit.reached)}"
            for limit in missed
        )
        lines = [f"Not every limit could be kept on validation data; nearest{at}: {told}."]
    if weights:
        lines.append(f"Weights found, to be used plainly: {weights}")
    else:
        lines.append("The limits needed no weights: plain training keeps them.")
    kept = sum(a.feasible for a in ascent)
    lines.append(f"All limits held at {kept} of {len(ascent)} measurements.")
    return lines


def tested_sentences(rows: Sequence[Row], focus: Sequence[str]) -> list[str]:
    """Return what the test set, read once, says of the model beside its cheap alternatives.

    Args:
        rows: What was tested: plain training first, by argmax and by minimum expected cost, the
            chosen model last but for its own rule.
        focus: Classes whose recall is told.

    Returns:
        Sentences.
    """
    plain = rows[0]
    others = [row for row in rows[1:] if not row.name.startswith("plain")]
    cheap = [row for row in rows[1:] if row.name.startswith("plain")]
    lines = []
    if others:
        lines.append(
            f"On the test set, read once: {_row(others[0], focus)}; plain: {_row(plain, focus)}."
        )
        lines.append(f"Expected cost of {others[0].name} against plain: {_difference(others[0])}.")
    else:
        lines.append(f"On the test set, read once: {_row(plain, focus)}.")
    for row in cheap:
        lines.append(f"Without training anew, {row.name}: {_row(row, focus)}; {_difference(row)}.")
    if others and cheap:
        best = min(cheap, key=lambda row: row.expected_cost.value)
        gain = plain.expected_cost.value - others[0].expected_cost.value
        share = (
            (plain.expected_cost.value - best.expected_cost.value) / gain if gain > 0 else math.nan
        )
        if share >= 1:
            lines.append(
                "The decision rule alone costs no more than the costs in training: prefer it."
            )
        elif share >= 0.5:
            lines.append(
                f"The decision rule alone gives {100 * share:.0f} % of what the costs in training "
                "give."
            )
    return lines


def _answer(
    points: Sequence[Point], chosen: Point, limits: Sequence[Limit], axes: Sequence[Axis]
) -> str:
    name = chosen.name or "plain training"
    if not limits:
        plain = next((p for p in points if p.plain), None)
        if plain is None or plain is chosen or plain.values == chosen.values:
            against = "no other member costs less"
        else:
            against = f"plain training costs {_four(plain.expected_cost.value)}"
        return (
            f"{name} has the least expected cost on validation data, "
            f"{_four(chosen.expected_cost.value)} an example; {against}."
        )
    told = "; ".join(f"{limit.text}: {_four(limit.reached)}" for limit in limits)
    if not chosen.feasible:
        return f"No member keeps every limit on validation data; nearest is {name}. {told}."
    weighted = len(axes) == 1 and axes[0].option == "class_weight"
    by = "the smallest weight" if weighted else "the member of least expected cost"
    return f"{name} is {by} that keeps every limit on validation data. {told}."


def _row(row: Row, focus: Sequence[str]) -> str:
    recalls = [f"recall of {c} {_with(r, 100)} %" for c, r in zip(focus, row.recall, strict=True)]
    parts = [f"accuracy {_with(row.accuracy, 100)} %", *recalls[:1]]
    return f"{', '.join(parts)}, expected cost {_with(row.expected_cost)}"


def _difference(row: Row) -> str:
    if row.difference is None:
        return "the same"
    value, low, high = row.difference
    told = f"{value:+.4f} an example"
    if math.isnan(low):
        return told
    sure = "" if low > 0 or high < 0 else ", which may be chance"
    return f"{told} [{low:+.4f}, {high:+.4f}]{sure}"


def _with(score: Score, factor: float = 1.0) -> str:
    value, low, high = (factor * v for v in score)
    digits = 2 if factor != 1.0 else 4
    if math.isnan(low):
        return f"{value:.{digits}f}"
    return f"{value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def _four(value: float) -> str:
    return "undefined" if math.isnan(value) else f"{value:.4f}"
