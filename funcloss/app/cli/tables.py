"""Tables and numbers on the console."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

_FILE_WIDTH = 200


def make_console() -> Console:
    """Return a console; what is no terminal is as wide as any table."""
    # What classes are called is text, whatever brackets and colons it has.
    plain: dict[str, Any] = {"highlight": False, "markup": False, "emoji": False}
    out = Console(soft_wrap=True, **plain)
    wide = Console(soft_wrap=True, width=_FILE_WIDTH, **plain)
    return out if out.is_terminal else wide


def make_table(head: Sequence[str], rows: Iterable[Sequence[str]], *, left: int = 1) -> Table:
    """Return a table without lines, its first ``left`` columns flush left."""
    table = Table(box=None, pad_edge=False)
    for k, name in enumerate(head):
        table.add_column(name, justify="left" if k < left else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return table


def number(value: Any, form: str) -> str:
    """Return a number as ``form`` has it, a dash where there is none."""
    return "-" if value is None or math.isnan(float(value)) else format(float(value), form)


def between(score: Any, form: str) -> str:
    """Return a number with its interval, if one is known."""
    low, high = number(score.low, form), number(score.high, form)
    interval = "" if low == "-" else f" [{low}, {high}]"
    return number(score.value, form) + interval
