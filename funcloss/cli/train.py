"""``funcloss train``, which is also ``funcloss-train``."""

import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from funcloss.cli.stopping import INTERRUPTED, StopOnSignal
from funcloss.cli.table import parsed, with_table
from funcloss.cli.version import Version
from funcloss.config import make_config, read_recipe, read_toml, recipe_names
from funcloss.errors import ConfigError


def train(
    *,
    recipe: Annotated[
        str, typer.Option(help=f"Options that come with funcloss: {', '.join(recipe_names())}.")
    ] = "",
    config: Annotated[
        Path | None, typer.Option(help="TOML file of options, a run's config.toml say.")
    ] = None,
    run_dir: Annotated[
        Path | None, typer.Option(help="Run folder to make.", show_default="a new one under runs/")
    ] = None,
    resume: Annotated[Path | None, typer.Option(help="Run folder to go on with.")] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the run in --run-dir.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print the result only.")] = False,
    version: Version = False,
    **options: Any,
) -> None:
    """Train a classifier and leave all of it in a run folder.

    The command line goes before the --config file, and that before the --recipe.
    """
    given = {name: value for name, value in options.items() if value is not None and value != []}
    layers = [read_recipe(recipe) if recipe else {}, read_toml(config) if config else {}]
    chosen = make_config(*layers, parsed(given))
    if resume is not None:
        _check_resume(given, recipe=recipe, config=config, run_dir=run_dir, overwrite=overwrite)

    from funcloss import audit, choose, training  # torch, from here on
    from funcloss.cli.console import TrainingConsole

    stop = StopOnSignal()
    with TrainingConsole(quiet=quiet) as console, stop:
        watch: dict[str, Any] = {"show": console.show, "should_stop": stop.asked}
        watch["observer"] = audit.observer
        asked = chosen if resume is None else training.folder.read_config(resume)
        ended: Any
        if asked.floor or asked.ceiling:
            ended = (
                choose.train_under_limits(asked, run_dir, overwrite=overwrite, **watch)
                if resume is None
                else choose.resume_under_limits(resume, data_dir=chosen.data_dir, **watch)
            )
        elif resume is None:
            ended = training.train(asked, run_dir, overwrite=overwrite, **watch)
        else:
            ended = training.resume(resume, data_dir=chosen.data_dir, **watch)
    if not ended.finished:
        folder = shlex.quote(str(ended.folder))
        print(f"stopped and saved; go on with: funcloss-train --resume {folder}")
        raise typer.Exit(INTERRUPTED)
    if asked.floor or asked.ceiling:
        console.choice(ended)
    else:
        console.summary(ended)


def _check_resume(given: dict[str, Any], **others: Any) -> None:
    """Raise if ``--resume`` comes with what the run folder decides."""
    clash = [name for name, value in others.items() if value]
    clash += [name for name in given if name != "data_dir"]
    if clash:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in clash)
        raise ConfigError(f"--resume goes on with the run as it was: leave out {flags}")


with_table(train)
