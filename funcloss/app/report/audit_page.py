"""An audit as one HTML page: everything inside, nothing asked of a network."""

import base64
import math
import shlex
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup, escape
from torch import Tensor

from funcloss._names import clean, short
from funcloss.app.report.audit_figures import columns_of, history_lines, subsample
from funcloss.audit.gram import cosines
from funcloss.audit.result import QUANTILES, Audit, plain
from funcloss.audit.words import largest, passed, sentences, spoken_of

_MOST = 24  # classes in a figure
_LAYERS = 48
_POINTS = 2000
_STRIP = 8  # pictures side by side
_NOTHING = Markup("")
_OPEN, _CLOSE = "\u2068", "\u2069"  # what isolates a name from the direction of the text around it


class About(NamedTuple):
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


class Axis(NamedTuple):
    """An axis of a figure, and how a value is placed on it."""

    low: float
    high: float
    ticks: tuple[float, ...]
    log: bool = False

    def at(self, value: float | None) -> float:
        """Return where a value lies, in percent of the axis; what lies outside is at its end."""
        if value is None or math.isnan(value):
            return 0.0
        if self.log:
            value, low, high = (math.log10(max(v, 1e-300)) for v in (value, self.low, self.high))
        else:
            low, high = self.low, self.high
        return round(100 * min(max((value - low) / (high - low), 0.0), 1.0), 2)


def render_page(
    audit: Audit,
    about: About,
    *,
    history: Sequence[Mapping[str, Any]] = (),
    pictures: Mapping[int, bytes] | None = None,
    before: Markup = _NOTHING,
) -> str:
    """Return an audit as one HTML page that works without a network, and without scripts.

    Args:
        audit: The audit. Of more than 24 classes, those with the largest shares are shown.
        about: What was audited.
        history: Records of a training's audits, as in ``metrics.jsonl``: the share over the steps.
        pictures: PNG files of examples, by position in the data.
        before: Sections that come before the audit's own, already rendered.

    Returns:
        The page. Whatever the names of the classes hold, they come out as text.
    """
    shown = largest(audit, _MOST)
    now = audit.balance
    return _template().render(
        about=about,
        before=before,
        audit=audit,
        names=[audit.classes[c] for c in shown],
        name_width=max(len(short(audit.classes[c], 14)) for c in shown) + 2,
        total=len(audit.classes),
        notes=audit.notes,
        lines=sentences(
            audit,
            optimizer=about.optimizer,
            scale_invariant=about.scale_invariant,
            name=_isolated,
        ),
        rows=_class_rows(audit, shown),
        share_axis=_share_axis(audit, shown),
        what_if=_what_if(audit, shown) if audit.linear_in_weights else None,
        gradient_norm=float(now.gradient_norm),
        conflict=plain(now.conflict[shown][:, shown]),
        impacts=_impacts(audit, shown),
        norms=_norms(audit, shown),
        scatter=_scatter(audit, shown),
        history=_history(audit, history),
        strips=_strips(audit, shown, pictures or {}),
        elasticities=_elasticities(audit, shown),
        step=_step(audit, shown),
        layers=_layers(audit, shown),
        checks=[(check, passed(check)) for check in audit.checks],
    )


def environment(*folders: Path) -> Environment:
    """Return what renders the templates of pages: those in the folders, and those of this room.

    Args:
        folders: Where further templates lie. They may extend ``page.html.j2``, the head and the
            look of every page, and import the figures of ``macros.html.j2``.

    Returns:
        The environment: it escapes whatever is not ``Markup``.
    """
    made = Environment(
        loader=FileSystemLoader([*folders, Path(__file__).parent / "templates"]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {
        "bdi": lambda name: Markup("<bdi>{}</bdi>").format(clean(name)),
        "clean": clean,
        "marked": _marked,
        "short": lambda name, most=14: short(name, most),
        "pct": lambda part: "–" if _missing(part) else f"{round(100 * part, 1) + 0.0:.1f}",
        "num": lambda value: "–" if _missing(value) else f"{value + 0.0:.3g}",
        "two": lambda value: "–" if _missing(value) else f"{value + 0.0:.2g}",
        "tip": lambda value: "not defined" if _missing(value) else f"{value + 0.0:.3g}",
        "unit": lambda limit: 10.0 ** (math.ceil(math.log10(limit)) - 2),
        "cell": lambda value, unit: f"{round(value / unit)}",
    }
    return made


@cache
def _template() -> Template:
    return environment().get_template("audit.html.j2")


def _isolated(name: str) -> str:
    return f"{_OPEN}{clean(name)}{_CLOSE}"  # clean leaves no such marks inside


def _marked(text: str) -> Markup:
    """Return a sentence as HTML, its names in elements that keep their direction to themselves."""
    return Markup(str(escape(text)).replace(_OPEN, "<bdi>").replace(_CLOSE, "</bdi>"))


def _missing(value: float | None) -> bool:
    return value is None or not math.isfinite(value)


def _class_rows(audit: Audit, shown: list[int]) -> list[dict[str, Any]]:
    now = audit.balance
    columns = {
        "weight": audit.class_weights,
        "count": audit.count,
        "part": audit.count / audit.count.sum(),
        "loss": audit.loss,
        "share": now.share,
        "spread": audit.spread.share if audit.spread else torch.full_like(now.share, math.nan),
        "budget": now.budget,
        "elasticity": now.elasticity,
        "norm": now.norm,
        "coherence": audit.coherence,
        "alignment": audit.alignment,
    }
    return [
        {"name": audit.classes[c]} | {key: plain(values[c]) for key, values in columns.items()}
        for c in shown
    ]


def _share_axis(audit: Audit, shown: list[int]) -> Axis:
    now, part = audit.balance, audit.count / audit.count.sum()
    return zero_axis(torch.cat([v[shown].double() for v in (now.share, now.budget, part)]))


def _what_if(audit: Audit, shown: list[int]) -> dict[str, Any]:
    """Return what the sliders need: the classes shown, and all others as one that stays."""
    others = [c for c in range(len(audit.classes)) if c not in set(shown)]
    weights, count = audit.class_weights.double(), audit.count.double()
    lift = torch.zeros(len(shown) + bool(others), len(audit.classes), dtype=torch.float64)
    lift[torch.arange(len(shown)), shown] = 1.0
    if others:
        lift[-1, others] = weights[others]
    fixed = [
        f"--class-weight {shlex.quote(f'{audit.classes[c]}={weights[c].item():.6g}')}"
        for c in others
        if weights[c] != 1
    ]
    return {
        "names": [audit.classes[c] for c in shown],
        "weights": weights[shown].tolist() + [1.0] * bool(others),
        "count": (lift @ count).tolist(),
        "gram": plain(lift @ audit.gram.double() @ lift.T),
        "n": float(count.sum()),
        "reduction": audit.reduction,
        "fixed": " ".join(fixed),
        "others": len(others),
    }


def _impacts(audit: Audit, shown: list[int]) -> list[dict[str, Any]]:
    if not audit.impact:
        return []
    columns, extra = columns_of(audit)
    classes = len(audit.classes)
    others = [c for c in range(classes) if c not in set(shown)]
    found = []
    for part, impact in audit.impact.items():
        matrix = impact.matrix[shown][:, columns]
        names = [audit.classes[c] for c in shown] + extra
        if others:
            matrix = torch.cat([matrix, impact.matrix[shown][:, others].sum(1, keepdim=True)], 1)
            names = [*names, "other classes"]
        changes = torch.stack([impact.predicted[shown], impact.measured[shown]], 1)
        found.append(
            {
                "part": part.replace("_", "-"),
                "columns": names,
                "matrix": plain(matrix),
                "limit": _limit(matrix),
                "changes": plain(changes),
                "axis": zero_axis(changes.flatten()),
            }
        )
    return found


def _norms(audit: Audit, shown: list[int]) -> dict[str, Any] | None:
    quantiles = audit.norm_quantiles[shown]
    finite = quantiles[quantiles.isfinite()]
    if not len(finite):
        return None
    # A loss with a hinge has gradients of length 0: then no logarithm.
    axis = log_axis(finite) if float(finite.min()) > 0 else zero_axis(finite)
    return {
        "axis": axis,
        "heads": [f"{100 * q:g} %" for q in QUANTILES],
        "rows": [
            {"name": audit.classes[c], "at": row, "coherence": plain(audit.coherence[c])}
            for c, row in zip(shown, plain(quantiles), strict=True)
        ],
    }


def _scatter(audit: Audit, shown: list[int]) -> dict[str, Any] | None:
    examples = audit.examples
    if examples is None or examples.norm.isnan().all():
        return None
    cosine = examples.alignment(audit.balance.gradient_norm)
    kept = subsample(examples, _POINTS)
    kept = kept[cosine[kept].isfinite()]
    if not len(kept):
        return None
    norm = examples.norm[kept]
    lengths = log_axis(norm) if float(norm.min()) > 0 else zero_axis(norm)
    sideways = Axis(-1.0, 1.0, (-1.0, -0.5, 0.0, 0.5, 1.0))
    paths: dict[int, list[str]] = {}
    focus = {c: k + 1 for k, c in enumerate(spoken_of(audit))}
    for label, x, y in zip(
        examples.label[kept].tolist(), cosine[kept].tolist(), norm.tolist(), strict=True
    ):
        point = f"M{10 * sideways.at(x):.0f} {1000 - 10 * lengths.at(y):.0f}h0"
        paths.setdefault(focus.get(label, 0), []).append(point)
    table = []
    for c in shown:
        own = examples.label == c
        own &= cosine.isfinite()
        if own.any():
            table.append(
                {
                    "name": audit.classes[c],
                    "count": int(own.sum()),
                    "norm": float(examples.norm[own].median()),
                    "alignment": float(cosine[own].median()),
                    "resist": float((cosine[own] < 0).double().mean()),
                }
            )
    return {
        "x": sideways,
        "y": lengths,
        "kept": len(kept),
        "all": len(examples.norm),
        "paths": [(key, "".join(points)) for key, points in sorted(paths.items())],
        "focus": [(k, audit.classes[c]) for c, k in focus.items()],
        "table": table,
    }


def _history(audit: Audit, history: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    lines = history_lines(audit, history)
    if not lines:
        return None
    values = torch.tensor([point for line in lines.values() for point in line])
    steps, shares = step_axis(values[:, 0]), zero_axis(values[:, 1:].flatten())
    focus = {c: k + 1 for k, c in enumerate(spoken_of(audit))}

    def path(line: list[tuple[int, float, float]], column: int) -> str:
        drawn, pen = [], "M"
        for point in line:
            if math.isnan(point[column]):
                pen = "M"  # a gap
                continue
            x, y = 10 * steps.at(point[0]), 1000 - 10 * shares.at(point[column])
            drawn.append(f"{pen}{x:.0f} {y:.0f}" + ("h0" if pen == "M" else ""))
            pen = "L"
        return "".join(drawn)

    all_steps = sorted({point[0] for line in lines.values() for point in line})
    every = -(-len(all_steps) // 20)
    told = sorted({*all_steps[::every], all_steps[-1]})
    by_step = {c: {point[0]: point[1] for point in line} for c, line in lines.items()}
    return {
        "x": steps,
        "y": shares,
        "lines": [
            (focus.get(c, 0), path(line, 1), path(line, 2))
            for c, line in sorted(lines.items(), key=lambda item: item[0] in focus)
        ],
        "focus": [(k, audit.classes[c]) for c, k in focus.items() if c in lines],
        "names": [audit.classes[c] for c in lines],
        "table": [(step, [by_step[c].get(step) for c in lines]) for step in told],
    }


def _strips(audit: Audit, shown: list[int], pictures: Mapping[int, bytes]) -> list[dict[str, Any]]:
    """Return the examples that resist most and push most, the classes spoken of first."""
    examples = audit.examples
    if examples is None or examples.norm.isnan().all():
        return []
    row = {index: k for k, index in enumerate(examples.index.tolist())}
    cosine = examples.alignment(audit.balance.gradient_norm)
    focus = spoken_of(audit)

    def strip(indices: list[int], values: Tensor) -> list[dict[str, Any]]:
        return [
            {
                "index": index,
                "value": plain(values[row[index]]),
                "picture": base64.b64encode(pictures[index]).decode() if index in pictures else "",
            }
            for index in indices
        ]

    return [
        {
            "name": audit.classes[c],
            "open": c in focus,
            "resist": strip(audit.most_opposed(c, _STRIP), cosine),
            "push": strip(audit.most_dominant(c, _STRIP), examples.norm),
        }
        for c in sorted(shown, key=lambda c: c not in focus)
        if audit.count[c]
    ]


def _elasticities(audit: Audit, shown: list[int]) -> list[dict[str, Any]]:
    classes, found = len(audit.classes), []
    for option, values in audit.elasticities.items():
        if values.shape == (classes, classes):
            part = values[shown][:, shown]
            found.append({"name": option, "matrix": plain(part), "limit": _limit(part)})
            continue
        flat = values.flatten()
        if values.shape == (classes,):
            rows = [(audit.classes[c], plain(flat[c])) for c in shown]
        else:
            first = sorted(flat.abs().nan_to_num(-1.0).argsort(descending=True)[:_MOST].tolist())
            index = [torch.unravel_index(torch.tensor(k), values.shape) for k in first]
            entries = [", ".join(str(int(i)) for i in at) or option for at in index]
            rows = [(name, plain(flat[k])) for name, k in zip(entries, first, strict=True)]
        found.append({"name": option, "rows": rows, "more": flat.numel() - len(rows)})
    return found


def _step(audit: Audit, shown: list[int]) -> dict[str, Any] | None:
    if audit.step is None:
        return None
    step, classes = audit.step, len(audit.classes)
    kept = shown + list(range(classes, len(step.rows)))
    rows = [(step.rows[r], plain(step.share[r]), plain(step.norm[r])) for r in kept]
    others = [c for c in range(classes) if c not in set(shown)]
    if others:
        length = step.gram[others][:, others].sum().clamp(min=0.0).sqrt()
        rows.append(("other classes", plain(step.share[others].sum()), plain(length)))
    return {"rows": rows, "norm": plain(step.update_norm), "audit": step}


def _layers(audit: Audit, shown: list[int]) -> dict[str, Any] | None:
    if not audit.layers:
        return None
    weights = audit.class_weights.to(audit.layer_gram)
    size = (audit.layer_gram @ weights) @ weights  # |g|^2 within each layer
    kept = sorted(size.abs().nan_to_num(-1.0).argsort(descending=True)[:_LAYERS].tolist())
    share = audit.layer_share
    rows = []
    for k in kept:
        conflict = cosines(audit.layer_gram[k]).nan_to_num(math.inf)
        a, b = divmod(int(conflict.argmin()), len(audit.classes))
        lowest = float(conflict[a, b])
        rows.append(
            {
                "name": audit.layers[k],
                "size": audit.layer_sizes[k],
                "part": plain(size[k] / size.sum()),
                "pair": (audit.classes[a], audit.classes[b]) if lowest < math.inf else None,
                "cosine": plain(lowest),
            }
        )
    part = share[kept][:, shown]
    return {"rows": rows, "matrix": plain(part), "limit": _limit(part), "total": len(audit.layers)}


def _limit(values: Tensor) -> float:
    finite = values[values.isfinite()].abs()
    return float(finite.max()) if len(finite) and finite.max() > 0 else 1.0


def step_axis(steps: Tensor) -> Axis:
    """Return an axis from the first step to the last, with round ticks."""
    low, high = float(steps.min()), float(steps.max())
    high = high if high > low else low + 1.0
    return Axis(low, high, tuple(t for t in zero_axis(steps).ticks if low <= t <= high))


def zero_axis(values: Tensor) -> Axis:
    """Return an axis with about five round ticks, from and to a tick, and 0 on it."""
    finite = values[values.isfinite()].double()
    low, high = (float(finite.min()), float(finite.max())) if len(finite) else (0.0, 1.0)
    return round_axis(min(low, 0.0), max(high, 0.0))


def round_axis(low: float, high: float) -> Axis:
    """Return an axis that holds ``low`` and ``high``, with about five round ticks, two its ends."""
    ticks = _round_ticks(low, high)
    return Axis(ticks[0], ticks[-1], ticks)


def _round_ticks(low: float, high: float) -> tuple[float, ...]:
    """Return two to seven round numbers, from ``low`` or below to ``high`` or above."""
    if high <= low:
        high = low + max(abs(low), 1.0)
    power = 10.0 ** math.floor(math.log10((high - low) / 4))
    pitch = next(power * m for m in (1, 2, 5, 10) if (high - low) / (power * m) <= 5)
    first, last = math.floor(low / pitch + 1e-9), math.ceil(high / pitch - 1e-9)
    return tuple(float(f"{k * pitch:.12g}") for k in range(first, last + 1))


def log_axis(values: Tensor) -> Axis:
    """Return a logarithmic axis from the least value to the largest; all must be above 0."""
    low, high = float(values.min()), float(values.max())
    if high < 4 * low:  # too short for two of 1, 2, 5: even steps, which do not reach 0
        ticks = tuple(t for t in _round_ticks(low, high) if t > low / 2)
        return Axis(min(low, ticks[0]), max(high, ticks[-1]), ticks, log=True)
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    multiples = (1, 2, 5) if len(decades) <= 4 else (1,)
    every = -(-len(decades) // 6)
    marks = [m * 10.0**d for d in decades[::every] for m in multiples]
    ticks = tuple(float(f"{t:.6g}") for t in marks if low <= t <= high)
    return Axis(low, high, ticks, log=True)
