"""Write the short names of an option, as ``loss``, as the table of the documentation."""

import re
from typing import Annotated

import typer

from funcloss import losses
from funcloss.app.registry import ROWS, Row
from funcloss.app.runs.options import number_options

HEAD = "| name | in Python | | options |\n|---|---|---|---|"


def names_table(option: str) -> str:
    """Return the table of an option's names, in Markdown."""
    return "\n".join([HEAD, *(_line(option, row) for row in ROWS[option].values())])


def _line(option: str, row: Row) -> str:
    thing = row.load()
    takes = number_options(thing) if option == "loss" else row.takes
    options = ", ".join(f"`{name if option == 'loss' else _typed(name)}`" for name in takes)
    return f"| `{row.name}` | `{row.address}` | {_summary(thing)} | {options} |"


def _typed(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _summary(thing: object) -> str:
    """Return the first line of a docstring, or of what is made of losses how it is."""
    if not hasattr(thing, "__name__"):
        return f"`{thing}`"
    line = (thing.__doc__ or "").partition("\n")[0].replace("``", "`").replace("|", "\\|")
    line = re.sub(r"^Return (an? |the )?", "", re.sub(r":\w+:`([^`]+)`", r"`\1`", line))
    return line[:1].upper() + line[1:]


def losses_of(family: str) -> list[str]:
    """Return the public losses of a file of ``funcloss/losses``, in its order."""
    names = vars(getattr(losses, family))
    return [n for n in names if n in losses.__all__ and names[n].__module__.endswith(family)]


def main(option: Annotated[str, typer.Argument(help=f"One of {', '.join(ROWS)}.")]) -> None:
    print(names_table(option))


if __name__ == "__main__":
    typer.run(main)
