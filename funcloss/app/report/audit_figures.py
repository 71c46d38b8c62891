"""The figures of an audit, drawn without a screen, in colours that the colour-blind can tell."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from torch import Tensor

from funcloss._names import short
from funcloss.app.report.kept_ledger import KeptLedger
from funcloss.app.report.pages import MOST, thinned
from funcloss.app.report.run_figures import plain_text
from funcloss.audit.ledger_words import few, largest_rows
from funcloss.audit.result import Audit, ExampleRows
from funcloss.audit.words import largest, spoken_of, unusual

_SHARE, _EXPECTED, _GREY = "#0072b2", "#d55e00", "#8a8f98"
_FOCUS = ("#d55e00", "#0072b2", "#009e73", "#cc79a7")  # Okabe and Ito
_HARM_BELOW, _HARM_ABOVE = "RdBu", "RdBu_r"  # red: what hurts


def draw_all(
    audit: Audit,
    history: Sequence[Mapping[str, Any]] = (),
    ledger: KeptLedger | None = None,
) -> dict[str, Figure]:
    """Return every figure that an audit has the numbers for, by file name without the suffix.

    Args:
        audit: The audit.
        history: Records of a training's audits, as in ``metrics.jsonl``.
        ledger: Of the training; None: none was kept.
    """
    drawn = {"audit_share": shares(audit), "audit_conflict": conflicts(audit)}
    if audit.impact:
        drawn["audit_impact"] = impacts(audit)
    if not audit.norm_quantiles.isnan().all():
        drawn["audit_norms"] = norms(audit)
    if audit.examples is not None and not audit.examples.norm.isnan().all():
        drawn["audit_examples"] = alignments(audit)
    if any(record.get("kind") == "audit" for record in history):
        drawn["audit_history"] = share_history(audit, history)
    if any(_is_matrix(audit, value) for value in audit.elasticities.values()):
        drawn["audit_elasticity"] = matrix_elasticities(audit)
    if ledger is not None and not few(ledger.ledger):
        drawn["audit_ledger"] = ledger_matrix(ledger)
    return drawn


def shares(audit: Audit) -> Figure:
    """Share of the gradient against the expected share, per class, and its share of examples."""
    shown, now = largest(audit, MOST), audit.balance
    share, expected = (100 * v[shown].numpy() for v in (now.share, now.expected_share))
    part = 100 * (audit.count / audit.count.sum())[shown].numpy()
    figure, axes = _rows(len(shown))
    rows = np.arange(len(shown))
    axes.axvline(0, color=_GREY, linewidth=0.8)
    axes.hlines(rows, expected, share, color=_GREY, linewidth=2, alpha=0.6)
    errors = audit.standard_errors
    if errors is not None:
        error = 100 * errors.share[shown].numpy()
        axes.errorbar(
            share, rows, xerr=error, fmt="none", ecolor=_SHARE, elinewidth=1, alpha=0.6, capsize=2
        )
    axes.plot(part, rows, "|", color=_GREY, markersize=12, label="fraction of the examples")
    axes.plot(expected, rows, "D", color=_EXPECTED, markerfacecolor="white", label="expected share")
    axes.plot(share, rows, "o", color=_SHARE, label="share of the gradient")
    _label_rows(axes, audit, shown)
    axes.set_xlabel("percent")
    note = ", bars: standard error" if errors is not None else ""
    axes.set_title(_title(audit, f"Share of the gradient, actual and expected{note}"))
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.06), ncols=3, frameon=False)
    axes.grid(axis="x", alpha=0.3)
    return figure


def conflicts(audit: Audit) -> Figure:
    """Cosines of the class gradients; below 0: what helps the one hurts the other."""
    shown = largest(audit, MOST)
    cosines = audit.balance.conflict[shown][:, shown]
    figure = Figure(figsize=_square(len(shown)))
    axes = figure.subplots()
    names = _names(audit, shown)
    _heat(axes, cosines, (names, names), limit=1.0, label="cosine", colors=_HARM_BELOW)
    axes.set_title(_title(audit, "Conflict of the class gradients"))
    return figure


def impacts(audit: Audit) -> Figure:
    """What each class's part of the step does to each class's loss; above 0: it pays."""
    shown = largest(audit, MOST)
    width, height = _square(len(shown))
    figure = Figure(figsize=(width * len(audit.impact), height), layout="constrained")
    grid = np.atleast_1d(figure.subplots(1, len(audit.impact)))
    columns, others = columns_of(audit)
    matrices = {part: impact.matrix[shown][:, columns] for part, impact in audit.impact.items()}
    limit = max(limit_of(matrix) for matrix in matrices.values())
    names = _names(audit, shown)
    for axes, (part, matrix) in zip(grid, matrices.items(), strict=True):
        named = (names, names + others)
        _heat(axes, matrix, named, limit=limit, label="change of the mean loss")
        axes.set_xlabel("part of the step of")
        axes.set_ylabel("loss of")
        axes.set_title(_title(audit, f"Who pays, who gains: {part.replace('_', ' ')}"))
    return figure


def ledger_matrix(found: KeptLedger) -> Figure:
    """What each part of a training's steps did to each class's mean loss, summed."""
    ledger, own = found.ledger, len(found.classes)
    shown = largest_rows(ledger, unusual(found.weights.tolist())[:MOST], MOST)
    others = [r for r in range(own, len(found.parts)) if ledger.net[:, r].nan_to_num(0.0).any()]
    matrix = ledger.net[shown][:, [*shown, *others]]
    width, height = _square(len(shown))
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    names = [short(found.classes[c]) for c in shown]
    columns = [
        name if found.weights[c] == 1 else f"{name} (w {float(found.weights[c]):.3g})"
        for name, c in zip(names, shown, strict=True)
    ]
    named = (names, [*columns, *(found.parts[r] for r in others)])
    _heat(axes, matrix, named, limit=limit_of(matrix), label="change of the mean loss")
    axes.set_xlabel("by the examples of")
    axes.set_ylabel("loss of")
    axes.set_title("Over the training: who moved whose loss")
    return figure


def norms(audit: Audit) -> Figure:
    """Lengths of the examples' gradients by class: boxes from 25 to 75 %, lines from 5 to 95 %."""
    shown = [c for c in largest(audit, MOST) if not audit.norm_quantiles[c].isnan().any()]
    figure, axes = _rows(len(shown))
    boxes: list[dict[str, Any]] = [
        dict(zip(("whislo", "q1", "med", "q3", "whishi"), row, strict=True))
        for row in audit.norm_quantiles[shown].tolist()
    ]
    if boxes:
        axes.bxp(
            boxes,
            positions=range(len(boxes)),
            orientation="horizontal",
            widths=0.55,
            showfliers=False,
            patch_artist=True,
            boxprops={"facecolor": "#cfe3f1", "edgecolor": _SHARE},
            medianprops={"color": _EXPECTED, "linewidth": 2},
            whiskerprops={"color": _SHARE},
            capprops={"color": _SHARE},
        )
    _label_rows(axes, audit, shown)
    if _wide(audit.norm_quantiles[shown]):
        axes.set_xscale("log")
        _plain_ticks(axes.xaxis)
    axes.set_xlabel("gradient norm per example")
    axes.set_title(_title(audit, "Gradient norms: 5, 25, 50, 75 and 95 % of each class"))
    axes.grid(axis="x", alpha=0.3)
    return figure


def alignments(audit: Audit, *, most: int = 2000) -> Figure:
    """Length of each example's gradient against its direction; left of 0 it resists."""
    if audit.examples is None:
        raise ValueError("alignments: the examples were not kept: audit with per_example=True")
    examples = audit.examples
    rows = subsample(examples, most)
    cosine = examples.alignment(audit.balance.gradient_norm)[rows].numpy()
    norm, label = examples.norm[rows].numpy(), examples.label[rows].numpy()
    figure = Figure(figsize=(7, 4.6))
    axes = figure.subplots()
    focus = spoken_of(audit, most=len(_FOCUS))
    rest = ~np.isin(label, focus)
    axes.axvline(0, color=_GREY, linewidth=0.8)
    axes.scatter(
        cosine[rest], norm[rest], s=6, color=_GREY, alpha=0.4, linewidths=0, label="others"
    )
    for c, color in zip(focus, _FOCUS, strict=False):
        own = label == c
        name = _names(audit, [c])[0]
        axes.scatter(cosine[own], norm[own], s=10, color=color, alpha=0.7, linewidths=0, label=name)
    if _wide(examples.norm[rows]):
        axes.set_yscale("log")
        _plain_ticks(axes.yaxis)
    axes.set_xlim(-1.02, 1.02)
    axes.set_xlabel("cosine with the whole gradient (below 0: resists)")
    axes.set_ylabel("length of the gradient")
    axes.set_title(
        f"Each example: how hard it pushes, and where ({len(rows):,} of {len(examples.norm):,})"
    )
    plain_text(axes.legend(frameon=False).get_texts())
    axes.grid(alpha=0.3)
    return figure


def share_history(audit: Audit, history: Sequence[Mapping[str, Any]]) -> Figure:
    """Share of the gradient of each class over the training steps, the spoken of in colour."""
    lines = history_lines(audit, history)
    focus = dict(zip(spoken_of(audit, most=len(_FOCUS)), _FOCUS, strict=False))
    figure = Figure(figsize=(7, 4.2))
    axes = figure.subplots()
    axes.axhline(0, color=_GREY, linewidth=0.8)
    for c, points in sorted(lines.items(), key=lambda item: item[0] in focus):
        steps, values, expected = (
            np.array(column, dtype=float) for column in zip(*points, strict=True)
        )
        color = focus.get(c, _GREY)
        name = _names(audit, [c])[0]
        (line,) = axes.plot(steps, 100 * values, color=color, marker="." if len(steps) < 40 else "")
        line.set(linewidth=2 if c in focus else 0.8, alpha=1.0 if c in focus else 0.6)
        if c in focus:
            line.set_label(name)
            axes.plot(steps, 100 * expected, color=color, linestyle=":", linewidth=1.2)
    axes.set_xlabel("step")
    axes.set_ylabel("share of the gradient, percent")
    axes.set_title(_title(audit, "Share over the training (dotted: expected share)"))
    if any(c in focus for c in lines):
        plain_text(axes.legend(frameon=False).get_texts())
    axes.grid(alpha=0.3)
    return figure


def matrix_elasticities(audit: Audit) -> Figure:
    """How much longer the gradient gets per percent of each entry of a cost matrix."""
    matrices = {k: v for k, v in audit.elasticities.items() if _is_matrix(audit, v)}
    shown = largest(audit, MOST)
    width, height = _square(len(shown))
    figure = Figure(figsize=(width * len(matrices), height), layout="constrained")
    names = _names(audit, shown)
    for axes, (option, values) in zip(
        np.atleast_1d(figure.subplots(1, len(matrices))), matrices.items(), strict=True
    ):
        part = values[shown][:, shown]
        _heat(axes, part, (names, names), limit=limit_of(part), label="elasticity")
        axes.set_xlabel("predicted class")
        axes.set_ylabel("true class")
        axes.set_title(_title(audit, f"Elasticity of the gradient in {option}"))
        plain_text([axes.title])
    return figure


def subsample(examples: ExampleRows, most: int) -> Tensor:
    """Return about ``most`` measured rows, spread evenly over each class's, always the same."""
    rows = (~examples.norm.isnan()).nonzero().squeeze(1)
    if len(rows) <= most:
        return rows
    kept = []
    for label in examples.label[rows].unique():
        own = rows[examples.label[rows] == label]
        count = max(1, len(own) * most // len(rows))
        kept.append(own[torch.linspace(0, len(own) - 1, count).round().long()])
    return torch.cat(kept).sort().values


def history_lines(
    audit: Audit, history: Iterable[Mapping[str, Any]], *, most: int = 200
) -> dict[int, list[tuple[int, float, float]]]:
    """Return ``(step, share, expected share)`` of each class shown at about ``most`` steps."""
    labels = {audit.classes[c]: c for c in largest(audit, MOST)}
    points: dict[int, dict[int, tuple[int, float, float]]] = {}
    for record in history:
        label = labels.get(str(record.get("class")))
        if record.get("kind") != "audit" or label is None:
            continue
        share, expected = (
            float("nan") if record.get(key) is None else float(record[key])
            for key in ("share", "expected_share")
        )
        points.setdefault(label, {})[int(record["step"])] = (int(record["step"]), share, expected)
    return {
        label: thinned([by_step[step] for step in sorted(by_step)], most)
        for label, by_step in sorted(points.items())
    }


def columns_of(audit: Audit) -> tuple[list[int], list[str]]:
    """Return the columns of an impact matrix to show, and the names of those that are no class."""
    classes, matrix = len(audit.classes), next(iter(audit.impact.values())).matrix
    extra = list(range(classes, matrix.shape[1]))
    rows = audit.step.rows if audit.step is not None else ()
    names = [rows[k] if k < len(rows) else f"part {k + 1}" for k in extra]
    return largest(audit, MOST) + extra, names


def _wide(values: Tensor) -> bool:
    """Return whether values need a logarithm; those of a loss with a hinge have none, being 0."""
    return len(values) > 0 and float(values.min()) > 0 and float(values.max() / values.min()) >= 10


def _plain_ticks(axis: Axis) -> None:
    """Write the ticks of a logarithmic axis as numbers, at 1, 2 and 5."""
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _rows(count: int) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(7, 1.6 + 0.3 * max(count, 2)))
    return figure, figure.subplots()


def _label_rows(axes: Axes, audit: Audit, shown: list[int]) -> None:
    axes.set_yticks(range(len(shown)), _names(audit, shown))
    plain_text(axes.get_yticklabels())
    axes.set_ylim(len(shown) - 0.4, -0.6)


def _heat(
    axes: Axes,
    matrix: Tensor,
    names: tuple[list[str], list[str]],
    *,
    limit: float,
    label: str,
    colors: str = _HARM_ABOVE,
) -> None:
    """Draw a matrix in colours that are even around 0, its rows and columns named; NaN is grey."""
    axes.set_facecolor("#e3e5e8")
    (rows, columns), values = names, matrix.numpy()
    image = axes.imshow(values, cmap=colors, vmin=-limit, vmax=limit)
    turned = 90 if len(columns) > 12 else 45
    axes.set_xticks(range(len(columns)), columns, rotation=turned, ha="center")
    axes.set_yticks(range(len(rows)), rows)
    plain_text([*axes.get_xticklabels(), *axes.get_yticklabels()])
    axes.figure.colorbar(image, ax=axes, label=label, shrink=0.8)
    if len(rows) <= 12:
        for r, c in np.argwhere(np.isfinite(values)):
            color = "white" if abs(values[r, c]) > 0.6 * limit else "black"
            text = f"{values[r, c]:.0f}" if limit >= 10.0 else f"{values[r, c]:.1g}"
            axes.text(c, r, text, ha="center", va="center", color=color, fontsize=7)


def _names(audit: Audit, labels: list[int]) -> list[str]:
    return [short(audit.classes[c]) for c in labels]


def _title(audit: Audit, text: str) -> str:
    classes = len(audit.classes)
    return text if classes <= MOST else f"{text}\nthe {MOST} largest shares of {classes:,} classes"


def _square(count: int) -> tuple[float, float]:
    size = 2.8 + 0.34 * count
    return size + 1.0, size


def limit_of(matrix: Tensor) -> float:
    """Return the largest size of a finite entry, 1 where there is none above 0."""
    finite = matrix[matrix.isfinite()].abs()
    return float(finite.max()) if len(finite) and finite.max() > 0 else 1.0


def _is_matrix(audit: Audit, value: Tensor) -> bool:
    classes = len(audit.classes)
    return value.shape == (classes, classes)
