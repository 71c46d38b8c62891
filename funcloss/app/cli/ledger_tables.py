"""The ledger of a training on the console: while it trains, and afterwards."""

import math
from typing import TYPE_CHECKING

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
    weighted_columns,
)

if TYPE_CHECKING:
    from funcloss.app.runs.ledger import KeptLedger

_SHOWN = 10  # classes side by side
_MOST = 24  # classes one below the other
_WIDTH = 80
_NAME = 12  # characters of a class's name
_UNSURE = "n.s."


def running_lines(report: LedgerReport) -> tuple[str, Table | None]:
    """Return the ledger so far in one line, with a table of it where there is something to show.

    The rows of the table add up to its last, the measured change: what a class's own examples did,
    what is due to the weights of weighted classes, (w - 1) / w of their entries, and all the rest.
    """
    ledger, exact = report.ledger, report.exact
    took = report.seconds / max(report.training_seconds, 1e-9)
    head = f"ledger: {took:.1%} of the time of the training"
    if exact and not closes(ledger):
        return f"{head}; the parts do not add up (off by {ledger.residual:.0%})", None
    if few(ledger):
        return f"{head}; too few of its steps were drawn so far to tell", None
    head += "; change of each class's mean held-out loss since the first step"
    return (head if exact else f"{head} ({_UNSURE}: not significant)"), _running_table(report)


def _running_table(report: LedgerReport) -> Table:
    """Return a column per class: which parts changed its held-out loss by how much."""
    ledger, exact, weights = report.ledger, report.exact, report.weights
    net = ledger.net
    sure = certain(ledger, exact=exact) | exact
    error, due = ledger.standard_error, ledger.due_to(weights)
    spoken = [c for c in weighted_columns(weights)[:4] if weights[c] > 0]
    shown = largest_rows(ledger, spoken, _SHOWN)

    def row(title: str, cells: list[str]) -> tuple[str, ...]:
        return title, *cells

    def known(value: float | Tensor, surely: bool | Tensor) -> str:
        return _cell(float(value)) if surely or math.isnan(float(value)) else _UNSURE

    names = [short(report.classes[c], _NAME) for c in shown]
    rows = [row("class", names)]
    own = {k: net[k, k] - (due[k, k] if k in spoken else 0.0) for k in shown}
    rows.append(row("own examples", [known(own[k], sure[k, k]) for k in shown]))
    for c in spoken:
        title = f"class {short(report.classes[c], _NAME)}'s weight"
        rows.append(row(title, [known(due[k, c], sure[k, c]) for k in shown]))
    changed = ledger.now - ledger.begin
    # Of samples, what is missing from the change; its error is at most the sum of the errors.
    part = 1.0 - 1.0 / weights[spoken].to(net)
    whole = net.sum(1) if exact else changed
    others = {k: whole[k] - own[k] - due[k, spoken].sum() for k in shown}
    bound = {k: error[k, k] + (part.abs() * error[k, spoken]).sum() for k in shown}
    surely = {k: exact or bool(others[k].abs() > 2.0 * bound[k]) for k in shown}
    rows.append(row("all others", [known(others[k], surely[k]) for k in shown]))
    rows.append(row("in all", [_cell(float(changed[k])) for k in shown]))
    table = make_table([""] * (1 + len(shown)), rows, left=0)
    table.show_header = False
    return table


def ledger_table(found: "KeptLedger") -> Table:
    """Return a row per class: its held-out loss before and after, and what moved it, in between.

    At most 80 columns wide: the classes spoken of have a column each, as many as there is room for.
    Of more than 24 classes, those with the largest entries.
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
    head = ["class", "before", "after", "own", *by, *["others"] * found.exact, "in all"]

    def entry(k: int, c: int) -> str:
        text = _cell(float(net[k, c]))
        if found.exact or not error[k, c].isfinite():
            return text
        return f"{text} ± {signed(float(error[k, c])).removeprefix('+')}"

    rows = []
    for k in largest_rows(ledger, spoken, _MOST):
        begin, now = ledger.begin[k], ledger.now[k]
        row = [short(found.classes[k], _NAME), number(begin, ".3g"), number(now, ".3g")]
        row += [entry(k, k), *("" if c == k else entry(k, c) for c in spoken)]
        if found.exact:  # the error of a sum is not known
            row.append(_cell(float(net[k].sum() - net[k, sorted({k, *spoken})].sum())))
        rows.append([*row, _cell(float(now - begin))])
    return head, rows


def _cell(value: float) -> str:
    return signed(value) if math.isfinite(value) else "-"
