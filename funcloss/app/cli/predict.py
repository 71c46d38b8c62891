"""``funcloss predict``: a run's model on new files."""

import math
from pathlib import Path
from typing import Annotated

import typer

from funcloss.app.cli.output import say
from funcloss.app.cli.table import AllowImport, Rule


def predict(
    run: Annotated[Path, typer.Argument(help="Run folder.")],
    files: Annotated[
        list[Path],
        typer.Argument(
            metavar="FILE|FOLDER...",
            help="Image files; CSV tables, if it was trained on one; or folders of them.",
        ),
    ],
    *,
    rule: Rule = "",
    csv: Annotated[
        Path | None,
        typer.Option(
            help="Write a row per example: file, row, decision, all probabilities and expected "
            "costs."
        ),
    ] = None,
    invert: Annotated[
        bool, typer.Option(help="For dark on light: MNIST's digits are light on dark.")
    ] = False,
    allow_import: AllowImport = False,
) -> None:
    """Predict the class of each image or row; with costs, decide by least expected cost.

    Costs, temperature and prior are those kept in the run: the same rows get the same decisions
    from evaluate, predict and an export.
    """
    from funcloss.app import runs

    found = runs.predict_files(run, files, rule=rule, invert=invert, allow_import=allow_import)
    decided = found.decisions
    if csv is not None:
        runs.write_decisions(csv, decided, found.sources)
    each = zip(
        found.sources,
        decided.names,
        decided.probability.tolist(),
        decided.expected_cost.tolist(),
        strict=True,
    )
    for (file, row), name, probability, cost in each:
        place = file if row is None else f"{file}:{row}"
        known = "" if math.isnan(probability) else f"{probability:.1%}"
        costs = f"expected cost {cost:.4g}" if decided.rule == "min-cost" else ""
        say(f"{place}: {name} ({', '.join(filter(None, (known, costs)))})")
