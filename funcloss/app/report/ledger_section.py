"""The ledger of a training as a section of a page: its sentences, its matrix, and its course."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from markupsafe import Markup

from funcloss._names import clean
from funcloss.app.report.kept_ledger import KeptLedger
from funcloss.app.report.pages import (
    MOST,
    isolated,
    known,
    path,
    step_axis,
    templates,
    thinned,
    zero_axis,
)
from funcloss.audit.ledger_words import (
    certain,
    few,
    largest_rows,
    ledger_sentences,
    signed,
    spoken_columns,
)

_LINES = 24  # in a figure, four of them in colour
_COLOURS = 4
_POINTS = 200  # of a line
_TOLD = 20  # epochs in the table below a figure


class ExampleBehind(NamedTuple):
    """A training example and what it did to a class's loss, to first order."""

    what: str  # where it is: a file, a row
    effect: float
    picture: bytes  # PNG; empty: none


class Behind(NamedTuple):
    """The examples of a class that raised another's loss most."""

    loss: str  # the class whose loss
    by: str  # the class of the examples
    examples: tuple[ExampleBehind, ...]


def render(found: KeptLedger, behind: Sequence[Behind] = ()) -> Markup:
    """Return the section: what the weights did over the training, and who paid.

    Args:
        found: The ledger of a run. Of more than 24 classes, those with the largest entries are
            shown.
        behind: The examples behind some of its entries.

    Returns:
        The section. Whatever the names of the classes hold, they come out as text.
    """
    ledger, exact = found.ledger, found.exact
    spoken = spoken_columns(ledger, found.weights, exact=exact)
    shown = largest_rows(ledger, spoken, MOST)
    section = templates().get_template("ledger.html.j2")
    return Markup(
        section.render(
            lines=ledger_sentences(
                found.classes,
                found.parts,
                ledger,
                found.weights,
                exact=exact,
                judged=found.judged,
                name=isolated,
            ),
            note=found.note,
            exact=exact,
            total=len(found.classes),
            names=[found.classes[k] for k in shown],
            matrix=None if few(ledger) else _matrix(found, shown),
            course=None if few(ledger) else _course(found, spoken, shown),
            strips=[
                {
                    "loss": pair.loss,
                    "by": pair.by,
                    "items": [
                        {
                            "what": clean(example.what),
                            "effect": signed(example.effect),
                            "picture": base64.b64encode(example.picture).decode(),
                        }
                        for example in pair.examples
                    ],
                }
                for pair in behind
            ],
            seconds=found.seconds,
            training_seconds=found.training_seconds,
        )
    )


@dataclass(frozen=True)
class _Cell:
    """An entry of the matrix, as the page shows it."""

    text: str
    error: str  # its standard error; empty: it has none
    title: str
    kind: str  # "harm", "good", or empty: not surely either
    strength: float  # of its colour, 0 to 1


def _matrix(found: KeptLedger, shown: list[int]) -> dict[str, Any]:
    """Return the rows of the classes shown, by the parts that changed their loss."""
    ledger, classes = found.ledger, len(found.classes)
    net, errors = ledger.net, ledger.standard_error
    sure = certain(ledger, exact=found.exact)
    extra = [r for r in range(classes, len(found.parts)) if net[:, r].nan_to_num(0.0).any()]
    columns = [*shown, *extra]
    finite = net[shown][:, columns]
    finite = finite[finite.isfinite()].abs()
    limit = float(finite.max()) if len(finite) and finite.max() > 0 else 1.0

    def cell(k: int, r: int) -> _Cell:
        value = float(net[k, r])
        if not known(value):
            return _Cell("–", "", "not known", "", 0.0)
        error = float(errors[k, r])
        kind = ("harm" if value > 0 else "good") if sure[k, r] else ""
        of = f"{clean(found.parts[r])} on the loss of {clean(found.classes[k])}"
        if found.exact:
            up, down = float(ledger.raised[k, r]), float(ledger.lowered[k, r])
            title = f"{of}: raised {signed(up)}, lowered {signed(down)}"
            return _Cell(signed(value, largest=limit), "", title, kind, abs(value) / limit)
        spread = signed(error, largest=limit).removeprefix("+") if known(error) else "?"
        title = f"{of}: {signed(value)} ± {spread}"
        return _Cell(signed(value, largest=limit), spread, title, kind, abs(value) / limit)

    others = [c for c in range(classes) if c not in set(shown)] if found.exact else []
    rows = []
    for k in shown:
        begin, now = float(ledger.begin[k]), float(ledger.now[k])
        rest = signed(float(net[k, others].sum())) if others and known(begin) else "–"
        change = signed(now - begin) if known(now - begin) else "–"
        rows.append(
            {
                "name": found.classes[k],
                "begin": begin,
                "now": now,
                "change": change,
                "cells": [cell(k, r) for r in columns],
                "rest": rest,
            }
        )
    return {
        "columns": [found.parts[r] for r in columns],
        "own": len(shown),
        "rows": rows,
        "limit": limit,
        "others": len(others),
    }


def _course(found: KeptLedger, spoken: list[int], shown: list[int]) -> dict[str, Any] | None:
    """Return the sums of the columns spoken of after each epoch, a line per class moved."""
    if not len(found.epochs) or not len(found.nets) or not spoken:
        return None
    net, sure = found.ledger.net, certain(found.ledger, exact=found.exact)
    pairs = [(k, c) for c in spoken for k in shown if known(float(net[k, c]))]
    pairs.sort(key=lambda pair: -abs(float(net[pair])))
    pairs = pairs[:_LINES]
    focus = {pair: n + 1 for n, pair in enumerate([p for p in pairs if sure[p]][:_COLOURS])}
    start = torch.zeros_like(found.nets[:1])
    sums = torch.cat([start, found.nets])  # nothing was moved before the first step
    epochs = [0, *found.epochs.tolist()]
    kept = thinned(range(len(epochs)), _POINTS)
    x = step_axis([float(epoch) for epoch in epochs])
    y = zero_axis(float(sums[n][pair]) for n in kept for pair in pairs)

    def drawn(pair: tuple[int, int]) -> str:
        return path(((epochs[n], float(sums[n][pair])) for n in kept), x, y)

    def name(pair: tuple[int, int]) -> tuple[str, str]:
        return found.classes[pair[0]], found.classes[pair[1]]

    told = [pair for pair in pairs if pair in focus] or pairs[:_COLOURS]
    return {
        "x": x,
        "y": y,
        "lines": [(focus.get(p, 0), drawn(p)) for p in sorted(pairs, key=lambda p: p in focus)],
        "focus": [(n, *name(pair)) for pair, n in focus.items()],
        "grey": len(pairs) > len(focus),
        "names": [name(pair) for pair in told],
        "table": [
            (epochs[n], [float(sums[n][pair]) for pair in told])
            for n in thinned(range(len(epochs)), _TOLD)
        ],
    }
