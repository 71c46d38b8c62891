"""The ledger of a training on the console: while it trains, and afterwards."""

import math
from typing import TYPE_CHECKING

import torch
from rich.cells import cell_len
from rich.table import Table
from torch import Tensor

from funcloss._names import short
from funcloss.app.cli.tables import make_table, number
from funcloss.app.runs.events import LedgerReport
from funcloss.audit.ledger_words import (
    certain,
    closes,
    few,
    largest_rows,
    signed,
    spoken_columns,
)
from funcloss.audit.words import unusual

if TYPE_CHECKING:
    from funcloss.app.runs.ledger import KeptLedger

_SHOWN = 10  # classes side by side
_MOST = 24  # classes one below the other
_WIDTH = 80
_NAME = 12  # characters of a class's name
_SPOKEN = 4  # weighted classes
_UNSURE = "n.s."


def running_lines(report: LedgerReport) -> tuple[str, Table | None]:
    """Return the ledger so far in one line, with a table of it where there is something to show.

    The rows of the table add up to its last, the measured change: what a class's own examples did,
    what is due to the weights of weighted classes, (w - 1) / w of their entries, and all the rest.
    """
    ledger, exact = report.ledger, report.exact
    head = f"ledger: {report.seconds:.1f} s beside {report.training_seconds:.1f} s of training"
    if exact and not closes(ledger):
        return f"{head}; the parts do not add up (off by {ledger.residual:.0%})", None
    if few(ledger):
        return f"{head}; too few of its steps were drawn so far to tell", None
    head += "; change of each class's mean loss since the first step"
    return (head if exact else f"{head} ({_UNSURE}: not significant)"), _running_table(report)


def _running_table(report: LedgerReport) -> Table:
    """Return a column per class: which parts changed its loss by how much."""
    ledger, exact, weights = report.ledger, report.exact, report.weights
    net, error, due = ledger.net, ledger.standard_error, ledger.due_to(weights)
    sure, changed = certain(ledger, exact=exact) | exact, ledger.now - ledger.begin
    spoken = [c for c in unusual(weights.tolist())[:_SPOKEN] if weights[c] > 0]
    own = net.diagonal().clone()
    own[spoken] -= due[spoken, spoken]
    # Of samples: what is missing from the change, whose error is at most the sum of the errors.
    others = (net.sum(1) if exact else changed) - own - due[:, spoken].sum(1)
    part = 1.0 - 1.0 / weights[spoken].to(net)
    bound = error.diagonal() + (error[:, spoken] * part.abs()).sum(1)
    lines = [
        ("own examples", own, sure.diagonal()),
        *(
            (f"class {short(report.classes[c], _NAME)}'s weight", due[:, c], sure[:, c])
            for c in spoken
        ),
        ("all others", others, (others.abs() > 2.0 * bound) | exact),
        ("in all", changed, torch.ones_like(changed, dtype=torch.bool)),
    ]
    shown = largest_rows(ledger, spoken, _SHOWN)
    largest = _largest(torch.stack([values for _, values, _ in lines]))
    room = max(6, 60 // len(shown) - 2)
    rows = [("class", *(short(report.classes[k], room) for k in shown))]
    for title, values, surely in lines:
        cells = [
            _cell(float(values[k]), largest) if surely[k] or values[k].isnan() else _UNSURE
            for k in shown
        ]
        rows.append((title, *cells))
    table = make_table([""] * (1 + len(shown)), rows, left=0)
    table.show_header = False
    return table


def ledger_table(found: "KeptLedger") -> Table:
    """Return a row per class: its loss before and after, and what moved it, in between.

    At most 80 columns wide: the classes spoken of have a column each, as many as there is room for.
    Of more than 24 classes, those with the largest entries. Of too few samples, the losses only.
    """
    spoken = spoken_columns(found.ledger, found.weights, exact=found.exact)
    while True:
        head, rows = _columns(found, spoken)
        wide = [max(cell_len(row[k]) for row in (head, *rows)) for k in range(len(head))]
        if sum(wide) + 2 * (len(wide) - 1) <= _WIDTH or not spoken:
            return make_table(head, rows)
        spoken = spoken[:-1]


def _columns(found: "KeptLedger", spoken: list[int]) -> tuple[list[str], list[list[str]]]:
    """Return head and rows of a table with a column for each of these classes."""
    ledger = found.ledger
    net, error = ledger.net, ledger.standard_error
    by = [f"by {short(found.classes[c], _NAME)} (w {float(found.weights[c]):.3g})" for c in spoken]
    by = [] if few(ledger) else ["own", *by]
    head = ["class", "before", "after", *by, *["others"] * found.exact, "in all"]

    largest = _largest(net)

    def entry(k: int, c: int) -> str:
        text = _cell(float(net[k, c]), largest)
        if found.exact or not error[k, c].isfinite():
            return text
        return f"{text} ± {_cell(float(error[k, c]), largest).removeprefix('+')}"

    rows = []
    for k in largest_rows(ledger, spoken, _MOST):
        begin, now = ledger.begin[k], ledger.now[k]
        row = [short(found.classes[k], _NAME), number(begin, ".3g"), number(now, ".3g")]
        if not few(ledger):
            row += [entry(k, k), *("" if c == k else entry(k, c) for c in spoken)]
        if found.exact:  # the error of a sum is not known
            rest = net[k].sum() - net[k, sorted({k, *spoken})].sum()
            row.append(_cell(float(rest), largest))
        rows.append([*row, _cell(float(now - begin))])
    return head, rows


def _cell(value: float, largest: float = 0.0) -> str:
    return signed(value, largest=largest) if math.isfinite(value) else "-"


def _largest(values: Tensor) -> float:
    finite = values[values.isfinite()]
    return float(finite.abs().max()) if len(finite) else 0.0
