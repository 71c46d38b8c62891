"""Ctrl-C in a long command: the first ends it well, the second at once."""

import signal
from typing import Any

from funcloss.app.cli.output import say, unheard

INTERRUPTED = 130  # what shells give a command that Ctrl-C ended


class StopOnSignal:
    """Let the first Ctrl-C (or SIGTERM) end the training after its step, the second at once."""

    def __init__(self) -> None:
        """Listen to nothing yet."""
        self._asked = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> None:
        """Take over the signals."""
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._note)

    def __exit__(self, *exception: object) -> None:
        """Give them back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: object) -> None:
        if self._asked:
            raise KeyboardInterrupt
        self._asked = True
        with unheard():
            say("finishing this step, then saving (again: stop at once)", error=True)

    def asked(self) -> bool:
        """Return whether to stop."""
        return self._asked
