"""What every page has: axes, lines as SVG, names and numbers as text, where it comes from."""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from funcloss._names import clean, short
from funcloss.decisions import Interval

MOST = 24  # classes, or rows, in a figure
ISOLATED = re.compile("\u2068([^\u2068\u2069]*)\u2069")  # a name, kept from the text around it


@dataclass(frozen=True)
class About:
    """What was audited, and how it came about."""

    title: str
    model: str
    parameters: int
    loss: str
    dataset: str
    note: str  # on the data; empty: none
    split: str  # of the data: train, validation, test
    examples: int
    step: int | None  # of the training; None: not known
    mode: str  # of the model: "train" or "eval"
    optimizer: str  # empty: not known
    scale_invariant: bool  # whether its steps stay when all gradients are scaled, as Adam's do
    command: str  # that made it
    versions: dict[str, str]
    made: str  # ISO time
    log_loss: bool = False  # whether the loss is the cross-entropy


# Numbers and names


def known(value: float | None) -> bool:
    """Return whether a value is there and finite."""
    return value is not None and math.isfinite(value)


def ranged(score: Interval) -> bool:
    """Return whether both ends of the interval around a score are known."""
    return known(score.low) and known(score.high)


def bare(text: str) -> str:
    """Return a text without the marks that isolate names in it."""
    return ISOLATED.sub(r"\1", text)


def isolated(name: str) -> str:
    """Return a name between marks that isolate it from the direction of the text around it."""
    return f"\u2068{clean(name)}\u2069"  # clean leaves no such marks inside


def _said(text: str) -> Markup:
    """Return a text as HTML; names between isolates keep their direction to themselves."""
    found = ISOLATED.split(text)  # every other one a name
    return Markup("").join(
        Markup("<bdi>{}</bdi>" if k % 2 else "{}").format(clean(part))
        for k, part in enumerate(found)
    )


def _formatted(form: str, missing: str = "–") -> Any:
    """Return a filter that writes a number as ``form``, never as -0."""
    return lambda value: format(value + 0.0, form) if known(value) else missing


@cache
def templates() -> Environment:
    """Return what renders the templates of pages; it escapes whatever is not ``Markup``."""
    made = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {
        "bdi": lambda name: Markup("<bdi>{}</bdi>").format(clean(name)),
        "clean": clean,
        "bare": bare,
        "said": _said,
        "short": lambda name, most=14: short(name, most),
        "pct": lambda part: f"{round(100 * part, 1) + 0.0:.1f}" if known(part) else "–",
        "percent": lambda part: f"{100 * part + 0.0:.2f}" if known(part) else "–",
        "num": _formatted(".3g"),
        "two": _formatted(".2g"),
        "four": _formatted(".4g"),
        "tip": _formatted(".3g", "not defined"),
        "unit": lambda limit: 10.0 ** (math.ceil(math.log10(limit)) - 2),
        "cell": lambda value, unit: f"{round(value / unit)}",
    }
    made.tests |= {"known": known, "ranged": ranged}
    return made


# Axes and lines


@dataclass(frozen=True)
class Axis:
    """An axis of a figure, and how a value is placed on it."""

    low: float
    high: float
    ticks: tuple[float, ...]
    log: bool = False

    def at(self, value: float | None) -> float:
        """Return where a value lies, in percent of the axis; what lies outside is at its end."""
        if value is None or math.isnan(value):
            return 0.0
        low, high = self.low, self.high
        if self.log:
            value, low, high = (math.log10(max(v, 1e-300)) for v in (value, low, high))
        return round(100 * min(max((value - low) / (high - low), 0.0), 1.0), 2)


def zero_axis(values: Iterable[float]) -> Axis:
    """Return an axis with about five round ticks, from and to a tick, and 0 on it."""
    finite = [float(v) for v in values if known(v)] or [0.0, 1.0]
    return round_axis(min(*finite, 0.0), max(*finite, 0.0))


def round_axis(low: float, high: float) -> Axis:
    """Return an axis that holds ``low`` and ``high``, with about five round ticks, two its ends."""
    ticks = _round_ticks(low, high)
    return Axis(ticks[0], ticks[-1], ticks)


def step_axis(steps: Sequence[float]) -> Axis:
    """Return an axis from the first step to the last, with round ticks."""
    low, high = min(steps), max(steps)
    high = high if high > low else low + 1.0
    return Axis(low, high, tuple(t for t in zero_axis(steps).ticks if low <= t <= high))


def length_axis(values: Iterable[float]) -> Axis:
    """Return a logarithmic axis, or one from 0 where some value is 0 (a loss with a hinge)."""
    finite = [float(v) for v in values if known(v)]
    return log_axis(finite) if min(finite) > 0 else zero_axis(finite)


def log_axis(values: Iterable[float]) -> Axis:
    """Return a logarithmic axis from the least value to the largest; all must be above 0."""
    values = [float(v) for v in values]
    low, high = min(values), max(values)
    if high < 4 * low:  # too short for two of 1, 2, 5: even steps, which do not reach 0
        ticks = tuple(t for t in _round_ticks(low, high) if t > low / 2)
        return Axis(min(low, ticks[0]), max(high, ticks[-1]), ticks, log=True)
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    multiples = (1, 2, 5) if len(decades) <= 4 else (1,)
    every = -(-len(decades) // 6)
    marks = [m * 10.0**d for d in decades[::every] for m in multiples]
    ticks = tuple(float(f"{t:.6g}") for t in marks if low <= t <= high)
    return Axis(low, high, ticks, log=True)


def _round_ticks(low: float, high: float) -> tuple[float, ...]:
    """Return two to seven round numbers, from ``low`` or below to ``high`` or above."""
    if high <= low:
        high = low + max(abs(low), 1.0)
    power = 10.0 ** math.floor(math.log10((high - low) / 4))
    pitch = next(power * m for m in (1, 2, 5, 10) if (high - low) / (power * m) <= 5)
    first, last = math.floor(low / pitch + 1e-9), math.ceil(high / pitch - 1e-9)
    return tuple(float(f"{k * pitch:.12g}") for k in range(first, last + 1))


def path(points: Iterable[tuple[float, float]], x: Axis, y: Axis) -> str:
    """Return a line on a canvas of 1000 by 1000, with a gap where a value is not known."""
    drawn, pen = [], "M"
    for across, up in points:
        if known(up):
            at = f"{10 * x.at(across):.0f} {1000 - 10 * y.at(up):.0f}"
            drawn.append(f"{pen}{at}" + ("h0" if pen == "M" else ""))
        pen = "L" if known(up) else "M"
    return "".join(drawn)


def thinned(items: Sequence[Any], most: int) -> list[Any]:
    """Return about ``most`` of the items at even distances, the first and the last among them."""
    every = -(-len(items) // most)
    return [item for k, item in enumerate(items) if k % every == 0 or k == len(items) - 1]
