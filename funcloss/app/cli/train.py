"""``funcloss train``, which is also ``funcloss-train``."""

import dataclasses
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from funcloss.app.cli.table import (
    AllowImport,
    ConfigFile,
    Recipe,
    check_resume,
    given_of,
    layers_of,
    parsed,
    with_table,
)
from funcloss.app.cli.version import Version
from funcloss.app.config import make_config


def train(
    *,
    recipe: Recipe = "",
    config: ConfigFile = None,
    run_dir: Annotated[
        Path | None, typer.Option(help="Run folder to make.", show_default="a new one under runs/")
    ] = None,
    resume: Annotated[Path | None, typer.Option(help="Run folder to go on with.")] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the run in --run-dir.")
    ] = False,
    allow_import: AllowImport = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print the result only.")] = False,
    version: Version = False,
    **options: Any,
) -> None:
    """Train a classifier and leave all of it in a run folder.

    The command line goes before the --config file, and that before the --recipe.
    """
    given = given_of(options)
    layers = layers_of(recipe, config, allow_import=allow_import)
    if resume is not None:
        others = {"recipe": recipe, "config": config, "run_dir": run_dir, "overwrite": overwrite}
        check_resume("run", given, **others)
    chosen = make_config(*layers, parsed(given))

    from funcloss.app import runs, train  # torch, from here on
    from funcloss.app.cli.console import watched

    place = run_dir
    if resume is not None:
        kept = runs.folder.read_config(resume, allow_import=allow_import)
        place, chosen = resume, dataclasses.replace(kept, data_dir=chosen.data_dir or kept.data_dir)
    start = partial(train.train, chosen, place, resume=resume is not None, overwrite=overwrite)
    watched(start, again="funcloss-train", quiet=quiet)


with_table(train)
