"""The option that every command answers."""

from typing import Annotated

import typer

from funcloss import __version__


def _show(wanted: bool) -> None:
    if wanted:
        print(f"funcloss {__version__}")
        raise typer.Exit


Version = Annotated[
    bool, typer.Option("--version", callback=_show, is_eager=True, help="Show the version.")
]
