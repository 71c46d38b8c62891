"""``funcloss evaluate``: a run's model on any data set."""

from pathlib import Path
from typing import Annotated

import typer

from funcloss.config import DATASETS
from funcloss.errors import ConfigError

_PARTS = ("test", "validation", "train")


def evaluate(
    run: Annotated[Path, typer.Argument(help="Run folder.")],
    *,
    dataset: Annotated[
        str,
        typer.Option(
            help="Data set.", metavar="|".join(DATASETS), show_default="the one trained on"
        ),
    ] = "",
    split: Annotated[str, typer.Option(help="Part of it.", metavar="|".join(_PARTS))] = "test",
    data_dir: Annotated[str, typer.Option(help="Folder of the data.")] = "",
    device: Annotated[
        str, typer.Option(help="Where to run.", metavar="auto|cpu|cuda|mps")
    ] = "auto",
    csv: Annotated[
        Path | None, typer.Option(help="Write a line an example: truth, prediction, probability.")
    ] = None,
) -> None:
    """Evaluate a run's model, class by class."""
    for name, value, known in (("dataset", dataset, ("", *DATASETS)), ("split", split, _PARTS)):
        if value not in known:
            raise ConfigError(
                f"{name} must be one of {', '.join(filter(None, known))}; got {value!r}"
            )

    from rich.console import Console

    from funcloss import training
    from funcloss.cli.console import class_table

    judged = training.evaluate_run(
        run, dataset=dataset, part=split, data_dir=data_dir, device=device
    )
    if csv is not None:
        training.write_predictions(csv, judged)
    scores = judged.evaluation
    out = Console(highlight=False, soft_wrap=True)
    out.print(class_table(scores, judged.classes))
    out.print(
        f"accuracy {scores.accuracy:.2%}  loss {scores.loss:.4f}  "
        f"on {int(scores.confusion.sum()):,} images of {judged.dataset}, {split}",
        markup=False,
    )
    if judged.note:
        out.print(f"note: {judged.note}", markup=False)
