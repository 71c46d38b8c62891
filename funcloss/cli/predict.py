"""``funcloss predict``: a run's model on image files."""

from pathlib import Path
from typing import Annotated

import typer


def predict(
    run: Annotated[Path, typer.Argument(help="Run folder.")],
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE...", help="Image files.")],
    *,
    invert: Annotated[
        bool, typer.Option(help="For dark on light: MNIST's digits are light on dark.")
    ] = False,
) -> None:
    """Say which class each image is, and how sure the model is."""
    from funcloss import training

    for path, guess in zip(images, training.predict_files(run, images, invert=invert), strict=True):
        print(f"{path}: {guess.label} ({guess.probability:.1%})")
