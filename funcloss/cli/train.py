"""``funcloss train``, which is also ``funcloss-train``."""

import inspect
import shlex
import signal
import sys
from pathlib import Path
from typing import Annotated, Any, get_origin

import typer

from funcloss.cli.parsing import as_number, pairs
from funcloss.cli.version import Version
from funcloss.config import Field, fields, make_config, read_recipe, read_toml, recipe_names
from funcloss.errors import ConfigError

INTERRUPTED = 130  # what shells give a command that Ctrl-C ended


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
    chosen = make_config(*layers, _parsed(given))
    if resume is not None:
        _check_resume(given, recipe=recipe, config=config, run_dir=run_dir, overwrite=overwrite)

    from funcloss import audit, training  # torch, from here on
    from funcloss.cli.console import TrainingConsole

    stop = _StopOnSignal()
    with TrainingConsole(quiet=quiet) as console, stop:
        watch: dict[str, Any] = {"show": console.show, "should_stop": stop.asked}
        watch["observer"] = audit.observer
        if resume is None:
            outcome = training.train(chosen, run_dir, overwrite=overwrite, **watch)
        else:
            outcome = training.resume(resume, data_dir=chosen.data_dir, **watch)
    if not outcome.finished:
        folder = shlex.quote(str(outcome.folder))
        print(f"stopped and saved; go on with: funcloss-train --resume {folder}")
        raise typer.Exit(INTERRUPTED)
    console.summary(outcome)


class _StopOnSignal:
    """Let the first Ctrl-C (or SIGTERM) end the training after its step, the second at once."""

    def __init__(self) -> None:
        self._asked = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._note)

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: object) -> None:
        if self._asked:
            raise KeyboardInterrupt
        self._asked = True
        print("finishing this step, then saving (again: stop at once)", file=sys.stderr)

    def asked(self) -> bool:
        """Return whether to stop."""
        return self._asked


def _check_resume(given: dict[str, Any], **others: Any) -> None:
    """Raise if ``--resume`` comes with what the run folder decides."""
    clash = [name for name, value in others.items() if value]
    clash += [name for name in given if name != "data_dir"]
    if clash:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in clash)
        raise ConfigError(f"--resume goes on with the run as it was: leave out {flags}")


def _parsed(given: dict[str, Any]) -> dict[str, Any]:
    """Return the options of the command line as a TOML file would have them."""
    kinds = {field.name: get_origin(field.type) for field in fields()}
    parse = {dict: pairs, tuple: _numbers}
    return {
        name: parse[kinds[name]](name, value) if kinds[name] in parse else value
        for name, value in given.items()
    }


def _numbers(name: str, text: str) -> list[float]:
    return [as_number(name, part) for part in text.split(",")]


def _parameter(field: Field) -> inspect.Parameter:
    """Return a row of the table of options as a parameter of the command."""
    kind = {dict: list[str], tuple: str}.get(get_origin(field.type), field.type)
    choices = f" One of {', '.join(field.option.choices)}." if field.option.choices else ""
    option = typer.Option(
        help=field.option.help + choices,
        metavar={dict: "CLASS=WEIGHT", tuple: "NUMBER,..."}.get(get_origin(field.type)),
        show_default=_shown(field.default),
    )
    annotation = Annotated[kind | None, option]
    return inspect.Parameter(
        field.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation
    )


def _shown(default: Any) -> str | bool:
    if isinstance(default, tuple):
        return ",".join(map(str, default)) or False
    return str(default) if default not in ("", {}) else False


def _with_table(command):
    """Give the command a parameter for every row of the table of options, for Typer to read."""
    own = [p for p in inspect.signature(command).parameters.values() if p.kind != p.VAR_KEYWORD]
    parameters = [*own, *map(_parameter, fields())]
    command.__signature__ = inspect.Signature(parameters)
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    return command


_with_table(train)
