"""The one way out to the terminal: text as it is, and what to do when nobody reads it."""

import contextlib
import os
import sys
from collections.abc import Iterator

from funcloss._names import printable


def say(text: str, *, error: bool = False) -> None:
    """Print a line to stdout, or stderr, whatever class, file and folder names are in it."""
    print(printable(text), file=sys.stderr if error else sys.stdout)


@contextlib.contextmanager
def unheard() -> Iterator[None]:
    """Go on in silence where stdout or stderr ends: a reader that is gone, a disk that is full."""
    try:
        yield
    except OSError:
        hush()


def hush() -> None:
    """Let all that is still printed to a stream that takes no more go nowhere."""
    for stream in filter(None, (sys.stdout, sys.stderr)):
        try:
            stream.flush()
        except OSError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)
