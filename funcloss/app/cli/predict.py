"""``funcloss predict``: a run's model on image files."""

from pathlib import Path
from typing import Annotated

import typer

from funcloss.app.cli.table import AllowImport


def predict(
    run: Annotated[Path, typer.Argument(help="Run folder.")],
    files: Annotated[
        list[Path],
        typer.Argument(
            metavar="FILE...", help="Image files; or CSV tables, where it was trained on one."
        ),
    ],
    *,
    invert: Annotated[
        bool, typer.Option(help="For dark on light: MNIST's digits are light on dark.")
    ] = False,
    allow_import: AllowImport = False,
) -> None:
    """Say which class each image or row is, and how sure the model is."""
    from funcloss.app import runs

    how = {"invert": invert, "allow_import": allow_import}
    for guess in runs.predict_files(run, files, **how):
        print(f"{guess.example}: {guess.label} ({guess.probability:.1%})")
