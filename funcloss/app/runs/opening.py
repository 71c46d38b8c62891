"""What is said before a training."""

from funcloss.app.data.overview import overview
from funcloss.app.runs.events import Note, Show
from funcloss.app.runs.lawful import check_loss
from funcloss.app.runs.setup import Setup


def announce(setup: Setup, show: Show) -> None:
    """Show what the data holds, what was decided, and what may go wrong.

    Raises:
        ConfigError: the loss is the user's own and wrong.
    """
    lines, doubts = overview(setup.dataset)
    for line in (*lines, *setup.dataset.notes):
        show(Note(line))
    for warning in filter(None, (setup.dataset.note, *doubts, *check_loss(setup))):
        show(Note(warning, warning=True))
    for line in setup.notes:
        show(Note(line))
