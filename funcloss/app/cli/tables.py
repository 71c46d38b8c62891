"""Tables and numbers on the console."""

import errno
import math
from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from funcloss._names import printable

_FILE_WIDTH = 200


class PlainConsole(Console):
    """A console whose texts are text: control characters in them are escaped."""

    def print(self, *objects: Any, **how: Any) -> None:
        """Print texts and tables."""
        super().print(*(printable(o) if isinstance(o, str) else o for o in objects), **how)

    def on_broken_pipe(self) -> None:
        """Leave it to whoever prints what a reader that is gone means."""
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")


def make_console() -> PlainConsole:
    """Return a console; what is no terminal is as wide as any table."""
    # What classes are called is text, whatever brackets and colons it has.
    plain: dict[str, Any] = {"highlight": False, "markup": False, "emoji": False}
    out = PlainConsole(soft_wrap=True, **plain)
    wide = PlainConsole(soft_wrap=True, width=_FILE_WIDTH, **plain)
    return out if out.is_terminal else wide


def make_table(head: Sequence[str], rows: Iterable[Sequence[str]], *, left: int = 1) -> Table:
    """Return a table without lines, its first ``left`` columns flush left."""
    table = Table(box=None, pad_edge=False)
    for k, name in enumerate(head):
        table.add_column(printable(name), justify="left" if k < left else "right", no_wrap=True)
    for row in rows:
        table.add_row(*map(printable, row))
    return table


def number(value: Any, form: str) -> str:
    """Return a number as ``form`` has it, a dash where there is none."""
    return "-" if value is None or math.isnan(float(value)) else format(float(value), form)


def between(score: Any, form: str) -> str:
    """Return a number with its interval, if one is known."""
    low, high = number(score.low, form), number(score.high, form)
    interval = "" if low == "-" else f" [{low}, {high}]"
    return number(score.value, form) + interval
