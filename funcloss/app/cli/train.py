"""``funcloss train``, which is also ``funcloss-train``."""

import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from funcloss.app.cli.stopping import INTERRUPTED, StopOnSignal
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

    from funcloss.app import audits, runs, sweep  # torch, from here on
    from funcloss.app.cli.console import TrainingConsole

    stop = StopOnSignal()
    with TrainingConsole(quiet=quiet) as console, stop:
        watch: dict[str, Any] = {"show": console.show, "should_stop": stop.asked}
        watch["observer"] = audits.observer
        where = {"data_dir": chosen.data_dir, "allow_import": allow_import}
        asked = chosen
        if resume is not None:
            asked = runs.folder.read_config(resume, allow_import=allow_import)
        ended: Any
        if asked.floor or asked.ceiling:
            ended = (
                sweep.train_under_limits(asked, run_dir, overwrite=overwrite, **watch)
                if resume is None
                else sweep.resume_under_limits(resume, **where, **watch)
            )
        elif resume is None:
            ended = runs.train(asked, run_dir, overwrite=overwrite, **watch)
        else:
            ended = runs.resume(resume, **where, **watch)
    if not ended.finished:
        folder = shlex.quote(str(ended.folder))
        print(f"stopped and saved; go on with: funcloss-train --resume {folder}")
        raise typer.Exit(INTERRUPTED)
    if asked.floor or asked.ceiling:
        console.choice(ended)
    else:
        console.summary(ended)


with_table(train)
