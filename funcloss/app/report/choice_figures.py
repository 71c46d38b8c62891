"""The picture of a choice, drawn without a screen, in colours that the colour-blind can tell."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, TwoSlopeNorm
from matplotlib.figure import Figure

from funcloss._names import short
from funcloss.app.report.choice import Choice, Point
from funcloss.app.report.pages import bare, known, ranged
from funcloss.decisions import Interval

_CHEAP, _GREY, _DEAR = "#0072b2", "#8a8f98", "#d55e00"  # Okabe and Ito
_COLOURS = LinearSegmentedColormap.from_list("cost", (_CHEAP, _GREY, _DEAR))
_POINTS = 400


@dataclass(frozen=True)
class Scale:
    """Expected costs as colours, around the cost of plain where there is one."""

    low: float
    middle: float
    high: float
    plain: bool  # whether the middle is its cost


def frontier(choice: Choice) -> Figure:
    """Recall of the first class in focus against accuracy, coloured by the expected cost.

    Args:
        choice: A choice with two points at least that :func:`placed` can place.

    Returns:
        A mark for each trial with its spread from seed to seed, hollow where it breaks a
        constraint; bounds on the two quantities are dashed.

    Raises:
        ValueError: there are fewer points.
    """
    points = placed(choice)
    if len(points) < 2:
        raise ValueError(f"frontier: two points with a recall are needed, got {len(points)}")
    figure = Figure(figsize=(7.4, 4.8), layout="constrained")
    axes = figure.subplots()
    _draw_line(axes, in_order(points, choice.axes))
    _draw_crosses(axes, points)
    _draw_marks(figure, axes, points, scale_of(points))
    _draw_names(axes, points, choice.axes)
    name = short(choice.focus[0], 24)
    dashes = {"color": _DEAR, "linestyle": "--", "linewidth": 1.2}
    for bound, said in bounds_of(choice, f"recall of {choice.focus[0]}"):
        axes.axhline(100 * bound, label=said, **dashes)
    for bound, said in bounds_of(choice, "accuracy"):
        axes.axvline(100 * bound, label=said, **dashes)
    axes.set_xlabel("accuracy, percent")
    axes.set_ylabel(f"recall of {name}, percent", parse_math=False)
    axes.set_title(f"Accuracy against recall of {name}", parse_math=False)
    figure.supxlabel(_notes(choice), fontsize=8, color=_GREY, parse_math=False)
    axes.ticklabel_format(useOffset=False)
    axes.margins(0.08)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="lower left", frameon=False)
    axes.grid(alpha=0.3)
    return figure


def percent(score: Interval) -> Interval:
    """Return a score in percent."""
    return Interval(*(100 * v for v in score))


def kept(points: Sequence[Point]) -> list[Point]:
    """Return at most some hundred points, in their order, plain and chosen among them."""
    ranked = sorted(range(len(points)), key=lambda k: not (points[k].plain or points[k].chosen))
    return [points[k] for k in sorted(ranked[:_POINTS])]


def placed(choice: Choice) -> list[Point]:
    """Return the points of which accuracy and recall of the first class in focus are known."""
    return [
        p
        for p in kept(choice.points)
        if p.recall and known(p.accuracy.value) and known(p.recall[0].value)
    ]


def in_order(points: Sequence[Point], axes: Sequence[str]) -> list[Point]:
    """Return the points in the order of the one thing that was swept; none where it is not one."""
    if len(axes) != 1:
        return []
    swept = [p for p in points if known(p.values.get(axes[0]))]
    return sorted(swept, key=lambda p: p.values[axes[0]])


def label_of(point: Point, axes: Sequence[str]) -> str:
    """Return what tells a point from the others: its values, or its name where it has none."""
    values = [f"{point.values[axis]:g}" for axis in axes if axis in point.values]
    return ", ".join(values) or bare(point.name)


def title_of(point: Point, axes: Sequence[str]) -> str:
    """Return the label of a point, after what it is."""
    label = label_of(point, axes)
    is_a = {"plain": point.plain, "chosen": point.chosen}
    words = [word for word, true in is_a.items() if true and word != label]
    return f"{' and '.join(words)}: {label}" if words else label


def bounds_of(choice: Choice, what: str) -> list[tuple[float, str]]:
    """Return the bounds of a quantity and how they are said, by the text of the constraints."""
    kinds = ("at least", "at most")
    return [
        (constraint.bound, f"{kind} {constraint.bound:g}")
        for constraint in choice.constraints
        for kind in kinds
        if bare(constraint.text).startswith(f"{what} {kind} ")
    ]


def scale_of(points: Sequence[Point]) -> Scale | None:
    """Return the colours of the points' expected costs; None where these are all the same."""
    costs = [p.expected_cost.value for p in points if known(p.expected_cost.value)]
    if not costs or min(costs) == max(costs):
        return None
    plain = [p.expected_cost.value for p in points if p.plain and known(p.expected_cost.value)]
    middle = plain[0] if plain else (min(costs) + max(costs)) / 2
    return Scale(min(costs), middle, max(costs), bool(plain))


def _draw_line(axes: Axes, points: Sequence[Point]) -> None:
    places = [(100 * p.accuracy.value, 100 * p.recall[0].value) for p in points]
    axes.plot(*np.array(places).reshape(-1, 2).T, color=_GREY, linewidth=1.2, alpha=0.7, zorder=1)


def _draw_crosses(axes: Axes, points: Sequence[Point]) -> None:
    for p in points:
        x, y = map(percent, (p.accuracy, p.recall[0]))
        thin = {"color": _GREY, "linewidth": 0.8, "alpha": 0.8, "zorder": 1}
        if ranged(x):
            axes.plot((x.low, x.high), (y.value, y.value), **thin)
        if ranged(y):
            axes.plot((x.value, x.value), (y.low, y.high), **thin)


def _draw_marks(figure: Figure, axes: Axes, points: Sequence[Point], scale: Scale | None) -> None:
    """Draw squares for plain, rings around chosen, others as dots; hollow: breaks a constraint."""
    norm = None
    if scale is not None:
        reach = 1e-9 * max(abs(scale.low), abs(scale.high))  # the ends must differ from the middle
        low, high = min(scale.low, scale.middle - reach), max(scale.high, scale.middle + reach)
        norm = TwoSlopeNorm(scale.middle, low, high)
        figure.colorbar(ScalarMappable(norm, _COLOURS), ax=axes, label="expected cost per example")
    for p in points:
        cost = p.expected_cost.value
        colour = _GREY if norm is None or not known(cost) else _COLOURS(float(norm(cost)))
        face = "white" if p.feasible is False else colour
        at = (100 * p.accuracy.value, 100 * p.recall[0].value)
        marker = "s" if p.plain else "o"
        axes.plot(*at, marker, markersize=8, color=colour, markerfacecolor=face, markeredgewidth=2)
        if p.chosen:
            axes.plot(*at, "o", markersize=15, color="black", markerfacecolor="none")


def _draw_names(axes: Axes, points: Sequence[Point], swept: Sequence[str]) -> None:
    for p in points:
        if p.plain or p.chosen or (len(swept) == 1 and len(points) <= 12):
            at = (100 * p.accuracy.value, 100 * p.recall[0].value)
            low, high = axes.get_xlim()
            left = at[0] > low + 0.8 * (high - low)  # of the mark: to its right is the frame
            axes.annotate(
                short(title_of(p, swept), 24), at, (-9 if left else 9, 5), fontsize=8,
                textcoords="offset points", ha="right" if left else "left", parse_math=False,
            )  # fmt: skip


def _notes(choice: Choice) -> str:
    notes = []
    if len(choice.axes) == 1:
        notes.append(f"joined in the order of {short(choice.axes[0], 40)}")
    if any(ranged(p.accuracy) for p in choice.points):
        notes.append(f"thin lines: 95 % from {choice.over} to {choice.over}")
    if any(p.feasible is False for p in choice.points):
        notes.append("hollow: breaks a constraint")
    return "; ".join(notes)
