"""``funcloss evaluate``: a run's model on any data set, and what its decisions cost."""

from pathlib import Path
from typing import Annotated, Any

import typer

from funcloss.app.cli.parsing import pairs
from funcloss.app.cli.table import AllowImport
from funcloss.app.config import DATASETS, did_you_mean, make_config, names_own
from funcloss.errors import ConfigError

_SPLITS = ("test", "validation", "train")


def evaluate(
    run: Annotated[Path, typer.Argument(help="Run folder.")],
    *,
    dataset: Annotated[
        str,
        typer.Option(
            help="Data set, torchvision:NAME, or a path to your own.",
            metavar="|".join(DATASETS),
            show_default="the one trained on",
        ),
    ] = "",
    split: Annotated[str, typer.Option(help="Its split.", metavar="|".join(_SPLITS))] = "test",
    cost_matrix: Annotated[
        Path | None,
        typer.Option(
            help="CSV table of what decisions cost, rows the truth; else the run's costs.",
            metavar="FILE",
        ),
    ] = None,
    class_cost: Annotated[
        list[str] | None,
        typer.Option(help="What every mistake on a true class costs.", metavar="CLASS=COST"),
    ] = None,
    prior: Annotated[
        list[str] | None,
        typer.Option(help="Part of a class where the model is used.", metavar="CLASS=PART"),
    ] = None,
    data_dir: Annotated[str, typer.Option(help="Folder of the data.")] = "",
    device: Annotated[
        str, typer.Option(help="Where to run.", metavar="auto|cpu|cuda|mps")
    ] = "auto",
    allow_import: AllowImport = False,
    csv: Annotated[
        Path | None, typer.Option(help="Write a line an example: truth, prediction, probability.")
    ] = None,
    json: Annotated[Path | None, typer.Option(help="Write all scores, matrices included.")] = None,
) -> None:
    """Evaluate a run's model, class by class, and say what its decisions cost.

    Twice: the likeliest class, and the decision of minimum expected cost at probabilities whose
    temperature is fitted on validation data.
    """
    if split not in _SPLITS:
        raise ConfigError(f"split must be one of {', '.join(_SPLITS)}; got {split!r}")
    if dataset == "auto" or not (dataset in ("", *DATASETS) or names_own(dataset)):
        there = ", ".join(DATASETS)
        guess = did_you_mean(dataset, DATASETS)
        raise ConfigError(f"dataset must be one of {there}, or a path; got {dataset!r}{guess}")
    judge_by: dict[str, Any] = {}
    if cost_matrix is not None:
        from funcloss.decisions import read_cost_matrix  # loads torch

        judge_by["cost_matrix"] = read_cost_matrix(cost_matrix)
    for name, texts in (("class_cost", class_cost), ("prior", prior)):
        if texts:
            judge_by[name] = pairs(name, texts)
    make_config(judge_by)

    from funcloss.app import runs
    from funcloss.app.cli.console import print_evaluation

    found = runs.evaluate_run(
        run,
        dataset=dataset,
        split=split,
        data_dir=data_dir,
        device=device,
        allow_import=allow_import,
        judge_by=judge_by,
    )
    if csv is not None:
        runs.write_predictions(csv, found.evaluation)
    if json is not None:
        runs.write_evaluation(json, found)
    print_evaluation(found)
    scores = found.evaluation
    print(
        f"accuracy {scores.argmax.accuracy.value:.2%}  loss {scores.loss:.4f}  "
        f"on {len(scores.labels):,} examples of {found.dataset}, {split}"
    )
    if found.note:
        print(f"note: {found.note}")
