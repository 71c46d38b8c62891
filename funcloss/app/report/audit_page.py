"""An audit as one HTML page: everything inside, nothing asked of a network."""

import base64
import math
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from markupsafe import Markup
from torch import Tensor

from funcloss._json import jsonable
from funcloss._names import short
from funcloss.app.report.audit_figures import columns_of, history_lines, limit_of, subsample
from funcloss.app.report.outcome import RunOutcome, outcome_sentences
from funcloss.app.report.pages import (
    MOST,
    About,
    Axis,
    isolated,
    length_axis,
    path,
    step_axis,
    templates,
    zero_axis,
)
from funcloss.audit.gram import cosines
from funcloss.audit.result import QUANTILES, Audit
from funcloss.audit.words import largest, sentences, spoken_of

_LAYERS = 48
_POINTS = 2000
_STRIP = 8  # pictures side by side
_NOTHING = Markup("")


def render_page(
    audit: Audit,
    about: About,
    *,
    history: Sequence[Mapping[str, Any]] = (),
    pictures: Mapping[int, bytes] | None = None,
    before: Markup = _NOTHING,
    outcome: RunOutcome | str = "",
    ledger_section: str = "",
) -> str:
    """Return an audit as one HTML page that works without a network, and without scripts.

    Args:
        audit: The audit. Of more than 24 classes, those with the largest shares are shown.
        about: What was audited.
        history: Records of a training's audits, as in ``metrics.jsonl``: the share over the steps.
        pictures: PNG files of examples, by position in the data.
        before: Sections that come before the audit's own, already rendered.
        outcome: What the class weights changed in recall, or why that is not known.
        ledger_section: What the ledger of the training says, already rendered.

    Returns:
        The page. Whatever the names of the classes hold, they come out as text.
    """
    shown = largest(audit, MOST)
    now = audit.balance
    return (
        templates()
        .get_template("audit.html.j2")
        .render(
            about=about,
            before=before,
            outcome=outcome if isinstance(outcome, RunOutcome) else None,
            outcome_lines=outcome_sentences(outcome, name=isolated),
            ledger_section=Markup(ledger_section),
            audit=audit,
            names=[audit.classes[c] for c in shown],
            name_width=max(len(short(audit.classes[c], 14)) for c in shown) + 2,
            total=len(audit.classes),
            notes=audit.notes,
            lines=sentences(
                audit,
                optimizer=about.optimizer,
                scale_invariant=about.scale_invariant,
                log_loss=about.log_loss,
                name=isolated,
            ),
            rows=_class_rows(audit, shown),
            share_axis=_share_axis(audit, shown),
            what_if=_what_if(audit, shown) if audit.linear_in_weights else None,
            gradient_norm=float(now.gradient_norm),
            conflict=jsonable(now.conflict[shown][:, shown]),
            impacts=_impacts(audit, shown),
            norms=_norms(audit, shown),
            scatter=_scatter(audit, shown),
            history=_history(audit, history),
            strips=_strips(audit, shown, pictures or {}),
            elasticities=_elasticities(audit, shown),
            step=_step(audit, shown),
            layers=_layers(audit, shown),
            checks=[(check, check.holds) for check in audit.checks],
        )
    )


def _class_rows(audit: Audit, shown: list[int]) -> list[dict[str, Any]]:
    now, errors = audit.balance, audit.standard_errors
    columns = {
        "weight": audit.class_weights,
        "count": audit.count,
        "part": audit.count / audit.count.sum(),
        "loss": audit.loss,
        "share": now.share,
        "error": errors.share if errors else torch.full_like(now.share, math.nan),
        "expected": now.expected_share,
        "elasticity": now.elasticity,
        "norm": now.norm,
        "agreement": audit.agreement,
        "alignment": audit.alignment,
    }
    return [
        {"name": audit.classes[c]} | {key: jsonable(values[c]) for key, values in columns.items()}
        for c in shown
    ]


def _share_axis(audit: Audit, shown: list[int]) -> Axis:
    now, part = audit.balance, audit.count / audit.count.sum()
    return zero_axis(
        v for values in (now.share, now.expected_share, part) for v in values[shown].tolist()
    )


def _what_if(audit: Audit, shown: list[int]) -> dict[str, Any]:
    """Return what the sliders need: the classes shown, and all others as one that stays."""
    others = _others(audit, shown)
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
        "gram": jsonable(lift @ audit.gram.double() @ lift.T),
        "n": float(count.sum()),
        "reduction": audit.reduction,
        "fixed": " ".join(fixed),
        "others": len(others),
    }


def _impacts(audit: Audit, shown: list[int]) -> list[dict[str, Any]]:
    if not audit.impact:
        return []
    columns, extra = columns_of(audit)
    others, found = _others(audit, shown), []
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
                "matrix": jsonable(matrix),
                "limit": limit_of(matrix),
                "changes": jsonable(changes),
                "axis": zero_axis(changes.flatten().tolist()),
            }
        )
    return found


def _norms(audit: Audit, shown: list[int]) -> dict[str, Any] | None:
    quantiles = audit.norm_quantiles[shown]
    finite = quantiles[quantiles.isfinite()].tolist()
    if not finite:
        return None
    return {
        "axis": length_axis(finite),
        "heads": [f"{100 * q:g} %" for q in QUANTILES],
        "rows": [
            {"name": audit.classes[c], "at": row, "agreement": jsonable(audit.agreement[c])}
            for c, row in zip(shown, jsonable(quantiles), strict=True)
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
    norm = examples.norm[kept].tolist()
    lengths = length_axis(norm)
    sideways = Axis(-1.0, 1.0, (-1.0, -0.5, 0.0, 0.5, 1.0))
    paths: dict[int, list[str]] = {}
    focus = {c: k + 1 for k, c in enumerate(spoken_of(audit))}
    for label, *point in zip(
        examples.label[kept].tolist(), cosine[kept].tolist(), norm, strict=True
    ):
        dot = path([(point[0], point[1])], sideways, lengths)
        paths.setdefault(focus.get(label, 0), []).append(dot)
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
    points = [point for line in lines.values() for point in line]
    steps = step_axis([float(step) for step, _, _ in points])
    shares = zero_axis(value for _, *values in points for value in values)
    focus = {c: k + 1 for k, c in enumerate(spoken_of(audit))}

    def drawn(line: list[tuple[int, float, float]], column: int) -> str:
        return path(((point[0], point[column]) for point in line), steps, shares)

    all_steps = sorted({point[0] for line in lines.values() for point in line})
    every = -(-len(all_steps) // 20)
    told = sorted({*all_steps[::every], all_steps[-1]})
    by_step = {c: {point[0]: point[1] for point in line} for c, line in lines.items()}
    return {
        "x": steps,
        "y": shares,
        "lines": [
            (focus.get(c, 0), drawn(line, 1), drawn(line, 2))
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
                "value": jsonable(values[row[index]]),
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
            found.append({"name": option, "matrix": jsonable(part), "limit": limit_of(part)})
            continue
        flat = values.flatten()
        if values.shape == (classes,):
            rows = [(audit.classes[c], jsonable(flat[c])) for c in shown]
        else:
            first = sorted(flat.abs().nan_to_num(-1.0).argsort(descending=True)[:MOST].tolist())
            index = [torch.unravel_index(torch.tensor(k), values.shape) for k in first]
            entries = [", ".join(str(int(i)) for i in at) or option for at in index]
            rows = [(name, jsonable(flat[k])) for name, k in zip(entries, first, strict=True)]
        found.append({"name": option, "rows": rows, "more": flat.numel() - len(rows)})
    return found


def _step(audit: Audit, shown: list[int]) -> dict[str, Any] | None:
    if audit.step is None:
        return None
    step, classes = audit.step, len(audit.classes)
    kept = shown + list(range(classes, len(step.rows)))
    rows = [(step.rows[r], jsonable(step.share[r]), jsonable(step.norm[r])) for r in kept]
    others = _others(audit, shown)
    if others:
        length = step.gram[others][:, others].sum().clamp(min=0.0).sqrt()
        rows.append(("other classes", jsonable(step.share[others].sum()), jsonable(length)))
    return {"rows": rows, "norm": jsonable(step.update_norm), "audit": step}


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
                "part": jsonable(size[k] / size.sum()),
                "pair": (audit.classes[a], audit.classes[b]) if lowest < math.inf else None,
                "cosine": jsonable(lowest),
            }
        )
    part = share[kept][:, shown]
    return {
        "rows": rows,
        "matrix": jsonable(part),
        "limit": limit_of(part),
        "total": len(audit.layers),
    }


def _others(audit: Audit, shown: list[int]) -> list[int]:
    return [c for c in range(len(audit.classes)) if c not in set(shown)]
