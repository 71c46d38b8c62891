"""A choice as HTML: the sections in front of the audit of the model that was chosen."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from markupsafe import Markup

from funcloss._names import clean
from funcloss.app.report.audit_page import render_page
from funcloss.app.report.choice import Ascent, Choice, Point
from funcloss.app.report.choice_figures import (
    Scale,
    bounds_of,
    in_order,
    kept,
    label_of,
    percent,
    placed,
    scale_of,
    title_of,
)
from funcloss.app.report.pages import (
    MOST,
    About,
    Axis,
    bare,
    known,
    log_axis,
    path,
    ranged,
    round_axis,
    step_axis,
    templates,
    thinned,
    zero_axis,
)
from funcloss.audit.result import Audit
from funcloss.decisions import Interval

_STEPS = 200  # of an ascent in its figure, a tenth of that in its table
_COLOURS = 4


def render_choice_page(
    choice: Choice,
    audit: Audit | None,
    about: About,
    *,
    history: Sequence[Mapping[str, Any]] = (),
    pictures: Mapping[int, bytes] | None = None,
) -> str:
    """Return the page of a choice, and of the audit of the model that was chosen.

    Args:
        choice: What was tried and what was chosen.
        audit: The audit of the chosen model; None: the page tells of the choice alone.
        about: What was audited; its title is that of the page.
        history: Records of the training's audits, as for :func:`render_page`.
        pictures: PNG files of examples, by position in the data.

    Returns:
        One HTML page that works without a network, and without scripts.
    """
    before = _render(choice, "" if choice.title == about.title else choice.title)
    if audit is not None:
        return render_page(audit, about, history=history, pictures=pictures, before=before)
    alone = templates().get_template("alone.html.j2")
    return alone.render(about=about, before=before, name_width=10)


def render_choice(choice: Choice) -> Markup:
    """Return the sections of a choice: the answer, the constraints, the frontier, the test.

    Args:
        choice: What was tried and what was chosen. What it lacks is left out.

    Returns:
        HTML to stand in a page of :func:`render_page`. Whatever the names of the
        classes hold, they come out as text.
    """
    return _render(choice, choice.title)


def _render(choice: Choice, title: str) -> Markup:
    html = templates().get_template("choice.html.j2").render(
        title=title,
        choice=choice,
        points=kept(choice.points),
        lost=sum(0 < p.seeds <= p.diverged for p in choice.points),
        frontier=_frontier(choice),
        expected=_expected(choice),
        ascent=_ascent(choice),
        differences=_differences(choice),
        slopes=_slopes(choice.gradient),
    )  # fmt: skip
    return Markup(html)  # of a template that escapes


def _axis(scores: Iterable[Interval], *, also: Sequence[float] = (), least: float) -> Axis:
    """Return an axis of scores; intervals as wide as many a spread between them are cut short."""
    scores = [s for s in scores if known(s.value)]
    values = [*(s.value for s in scores), *also]
    low, high = min(values), max(values)
    reach = max(high - low, least)
    low = min([low, *(max(s.low, low - reach) for s in scores if known(s.low))])
    high = max([high, *(min(s.high, high + reach) for s in scores if known(s.high))])
    edge = max(0.06 * (high - low), least / 4)
    return round_axis(low - edge, high + edge)


def _percent_axis(scores: Iterable[Interval], bounds: Iterable[tuple[float, str]]) -> Axis:
    """Return an axis of parts in percent, which ends at 0 and 100."""
    axis = _axis(map(percent, scores), also=[100 * b for b, _ in bounds], least=0.2)
    ticks = tuple(t for t in axis.ticks if 0 <= t <= 100)
    return Axis(max(axis.low, 0.0), min(axis.high, 100.0), ticks)


def _frontier(choice: Choice) -> dict[str, Any] | None:
    """Return recall of the first class in focus against accuracy; None for less than two points."""
    points = placed(choice)
    if len(points) < 2:
        return None
    floors = bounds_of(choice, f"recall of {choice.focus[0]}")
    walls = bounds_of(choice, "accuracy")
    x = _percent_axis((p.accuracy for p in points), walls)
    y = _percent_axis((p.recall[0] for p in points), floors)
    scale = scale_of(points)
    marks = [_mark(p, x, y, scale) for p in points]
    _put_labels(marks, choice.axes)
    line = [_place(p, x, y) for p in in_order(points, choice.axes)]
    return {
        "x": x,
        "y": y,
        "marks": sorted(marks, key=lambda m: m["chosen"] + 2 * m["plain"]),  # the last on top
        "joins": [a + b for a, b in zip(line, line[1:], strict=False)],
        "crosses": [bar for p in points for bar in _cross(p, x, y)],
        "cut": any(_cut(p.accuracy, x) or _cut(p.recall[0], y) for p in points),
        "breaks": any(p.feasible is False for p in points),
        "bounds": [(_down(y, bound), said) for bound, said in floors],
        "uprights": [(x.at(100 * bound), said) for bound, said in walls],
        "legend": _legend(scale) if scale else [],
    }


def _place(point: Point, x: Axis, y: Axis) -> tuple[float, float]:
    return x.at(100 * point.accuracy.value), _down(y, point.recall[0].value)


def _down(axis: Axis, part: float) -> float:
    """Return where a part lies on an upright axis of percent, from the top."""
    return round(100 - axis.at(100 * part), 2)


def _mark(point: Point, x: Axis, y: Axis, scale: Scale | None) -> dict[str, Any]:
    across, down = _place(point, x, y)
    return {
        "x": across,
        "y": down,
        "point": point,
        "name": bare(point.name),
        "label": "",
        "plain": point.plain,
        "chosen": point.chosen,
        "breaks": point.feasible is False,
        "colour": _colour(scale, point.expected_cost.value),
    }


def _legend(scale: Scale) -> list[tuple[int, float, str]]:
    """Return the colours of costs: key, cost, what to add."""
    middle = (0, scale.middle, " (plain)" if scale.plain else "")
    ends = [(2, scale.low, ""), middle, (1, scale.high, "")]
    return [end for end in ends if end[0] == 0 or end[1] != scale.middle]


def _colour(scale: Scale | None, cost: float) -> str:
    """Return the colour of a cost: blue below the middle, grey at it, orange above."""
    if scale is None or not known(cost) or cost == scale.middle:
        return "var(--c0)"
    end, key = (scale.low, 2) if cost < scale.middle else (scale.high, 1)
    part = 100 * min((cost - scale.middle) / (end - scale.middle), 1.0)
    return f"color-mix(in oklab, var(--c{key}) {part:.0f}%, var(--c0))"


def _put_labels(marks: list[dict[str, Any]], axes: Sequence[str]) -> None:
    """Label plain and chosen, and of the others those that stand clear of a label."""
    named: list[dict[str, Any]] = []
    for mark in sorted(marks, key=lambda m: not (m["plain"] or m["chosen"])):
        own = mark["plain"] or mark["chosen"]
        near = any(abs(mark["x"] - m["x"]) < 14 and abs(mark["y"] - m["y"]) < 6 for m in named)
        if own or (not near and len(axes) == 1):
            mark["label"] = title_of(mark["point"], axes)
            named.append(mark)


def _cross(point: Point, x: Axis, y: Axis) -> list[tuple[float, ...]]:
    """Return the intervals of a point as lines."""
    (across, down), lines = _place(point, x, y), []
    if ranged(point.accuracy):
        low, high = (x.at(100 * end) for end in point.accuracy[1:])
        lines.append((low, down, high, down))
    if ranged(point.recall[0]):
        low, high = (_down(y, end) for end in point.recall[0][1:])
        lines.append((across, low, across, high))
    return lines


def _cut(score: Interval, axis: Axis) -> bool:
    # At 0 and 100 % there is nothing beyond the frame.
    _, low, high = percent(score)
    return ranged(score) and (low < axis.low > 0 or high > axis.high < 100)


def _expected(choice: Choice) -> dict[str, Any] | None:
    """Return the expected cost of the trials, those that cost least where there are many."""
    costed = [p for p in choice.points if known(p.expected_cost.value)]
    if len(costed) < 2:
        return None
    ranked = sorted(costed, key=lambda p: (not (p.plain or p.chosen), p.expected_cost.value))
    first = {id(p) for p in ranked[:MOST]}
    shown = [p for p in costed if id(p) in first]
    if len(choice.axes) == 1:
        shown.sort(key=lambda p: p.values.get(choice.axes[0], -math.inf))
    scores = [s for p in shown for s in (p.expected_cost, p.rule_cost)]
    rows = [{"point": p, "label": _row_label(p, choice.axes)} for p in shown]
    size = max(s.value for s in scores if known(s.value))
    return {
        "rows": rows,
        "axis": _axis(scores, least=1e-3 * abs(size) or 1.0),
        "width": max(min(16, _width(choice.axes)), _width(row["label"] for row in rows)),
        "ranged": any(ranged(p.expected_cost) for p in shown),
        "shown": len(shown),
    }


def _row_label(point: Point, axes: Sequence[str]) -> str:
    label = label_of(point, axes)
    return f"{label} (plain)" if point.plain and label != "plain" else label


def _width(names: Iterable[str]) -> int:
    """Return the width of a column of names, in characters."""
    return 2 + min(24, max((len(clean(name)) for name in names), default=0))


def _ascent(choice: Choice) -> dict[str, Any] | None:
    """Return how weights and constraints moved; None for less than two measurements."""
    if len(choice.ascent) < 2:
        return None
    rows = thinned(choice.ascent, _STEPS)
    names = list(dict.fromkeys(name for row in choice.ascent for name in row.weights))
    x = step_axis([float(row.step) for row in rows])
    return {
        "x": x,
        "names": names[:MOST],
        "moved": len(names),
        "table": thinned(rows, _STEPS // 10),
        "weights": _weight_lines(rows, names, x),
        "reached": _reached(choice, rows, x),
    }


def _weight_lines(rows: Sequence[Ascent], names: list[str], x: Axis) -> dict[str, Any] | None:
    if not names:
        return None
    lines = {name: [row.weights.get(name, 1.0) for row in rows] for name in names}
    values = [value for line in lines.values() for value in line]
    positive = [value for value in values if known(value) and value > 0]
    y = log_axis(positive) if positive else zero_axis(values)
    steps = [row.step for row in rows]
    lasting = sorted(names, key=lambda name: -abs(math.log(max(lines[name][-1], 1e-300))))
    keys = {name: k + 1 for k, name in enumerate(lasting[:_COLOURS])}
    shown = lasting[:MOST]
    drawn = [
        (keys.get(name, 0), path(zip(steps, lines[name], strict=True), x, y)) for name in shown
    ]
    return {
        "y": y,
        "lines": sorted(drawn, key=lambda line: line[0] > 0),
        "legend": [(k, name) for name, k in keys.items()]
        + [(0, "other classes")] * (len(names) > len(keys)),
    }


def _reached(choice: Choice, rows: Sequence[Ascent], x: Axis) -> list[dict[str, Any]]:
    """Return a figure for each constraint: recalls and rates need axes of their own."""
    found = []
    for k, constraint in enumerate(choice.constraints):
        values = [row.reached[k] for row in rows]
        if any(map(known, values)):
            y = _axis(map(Interval, values), also=[constraint.bound], least=2e-3)
            line = path(zip((row.step for row in rows), values, strict=True), x, y)
            bound = 1000 - 10 * y.at(constraint.bound)
            found.append({"text": constraint.text, "y": y, "path": line, "bound": bound})
    return found[:_COLOURS]


def _differences(choice: Choice) -> dict[str, Any] | None:
    rows = [r for r in choice.rows if r.difference and known(r.difference.value)]
    if not rows:
        return None
    ends = [v for r in rows if r.difference for v in r.difference if known(v)]
    return {
        "rows": rows,
        "axis": zero_axis(ends),
        "width": _width(r.name for r in rows),
    }


def _slopes(gradient: Mapping[str, float]) -> dict[str, Any] | None:
    """Return the derivatives by class, the largest where there are many."""
    slopes = {name: value for name, value in gradient.items() if known(value)}
    if not slopes:
        return None
    ranked = sorted(slopes, key=lambda name: -abs(slopes[name]))
    first = set(ranked[:MOST])
    return {
        "rows": [(name, value) for name, value in slopes.items() if name in first],
        "axis": zero_axis(slopes.values()),
        "largest": (ranked[0], slopes[ranked[0]]) if slopes[ranked[0]] else None,
        "width": _width(first),
    }
