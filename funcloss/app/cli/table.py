"""The table of options as parameters of a command, and what is typed as a file would have it."""

import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from funcloss.app.cli.parsing import as_number, pairs
from funcloss.app.config import Field, fields, read_recipe, read_toml, recipe_names
from funcloss.errors import ConfigError

AllowImport = Annotated[
    bool,
    typer.Option(
        "--allow-import", help="Import the code of yours that the folder or file names, and run it."
    ),
]
Recipe = Annotated[
    str, typer.Option(help=f"Options that come with funcloss: {', '.join(recipe_names())}.")
]
ConfigFile = Annotated[
    Path | None, typer.Option(help="TOML file of options, a run's config.toml say.")
]
Command = TypeVar("Command", bound=Callable[..., Any])


def _numbers(name: str, text: str) -> list[float]:
    return [as_number(name, part) for part in text.split(",")]


def _texts(name: str, values: list[str]) -> list[str]:
    return values


def _table(name: str, path: Path) -> dict[str, dict[str, float]]:
    from funcloss.decisions import read_cost_matrix  # loads torch

    return read_cost_matrix(path)


# By type of the field, where it is not the type on the command line: that, its metavar unless the
# option has one, and how it is read.
_WRITTEN = {
    dict[str, float]: (list[str], None, pairs),
    dict[str, dict[str, float]]: (Path, None, _table),
    tuple[float, ...]: (str, "NUMBER,...", _numbers),
    tuple[str, ...]: (list[str], None, _texts),
}


def given_of(options: dict[str, Any]) -> dict[str, Any]:
    """Return the options of the table that were typed."""
    return {name: value for name, value in options.items() if value is not None and value != []}


def layers_of(recipe: str, config: Path | None, *, allow_import: bool) -> list[dict[str, Any]]:
    """Return the options of a recipe and of a file, the later one to win.

    Raises:
        ConfigError: one cannot be read.
    """
    return [
        read_recipe(recipe) if recipe else {},
        read_toml(config, allow_import=allow_import) if config else {},
    ]


def check_resume(what: str, given: dict[str, Any], **others: Any) -> None:
    """Raise ``ConfigError`` if ``--resume`` comes with what the folder decides."""
    clash = [name for name, value in others.items() if value]
    clash += [name for name in given if name != "data_dir"]
    if clash:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in clash)
        raise ConfigError(f"--resume goes on with the {what} as it was: leave out {flags}")


def parsed(given: dict[str, Any]) -> dict[str, Any]:
    """Return the options of the command line as a TOML file would have them."""
    kinds = {field.name: field.type for field in fields()}
    return {
        name: _WRITTEN[kinds[name]][2](name, value) if kinds[name] in _WRITTEN else value
        for name, value in given.items()
    }


def _parameter(field: Field, *, as_text: bool) -> inspect.Parameter:
    """Return a row of the table of options as a parameter of the command."""
    kind, metavar, _ = _WRITTEN.get(field.type, (field.type, None, None))
    choices = f" One of {', '.join(field.option.choices)}" if field.option.choices else ""
    choices += f"; or {field.option.own}." if field.option.own else "." if choices else ""
    option = typer.Option(
        help=field.option.help + choices,
        metavar=field.option.metavar or ("VALUES" if as_text else metavar),
        show_default=_shown(field.default),
    )
    annotation = Annotated[(str if as_text else kind) | None, option]
    return inspect.Parameter(
        field.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation
    )


def _shown(default: Any) -> str | bool:
    if isinstance(default, tuple):
        return ",".join(map(str, default)) or False
    return str(default) if default not in ("", {}) else False


def with_table(command: Command, *, as_text: Sequence[str] = ()) -> Command:
    """Give a command a parameter for every row of the table of options, for Typer to read.

    Args:
        command: It takes them as ``**options``.
        as_text: Numbers that it reads itself.

    Returns:
        The command.
    """
    own = [p for p in inspect.signature(command).parameters.values() if p.kind != p.VAR_KEYWORD]
    parameters = [*own, *(_parameter(f, as_text=f.name in as_text) for f in fields())]
    command.__signature__ = inspect.Signature(parameters)  # pyright: ignore[reportFunctionMemberAccess]
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    return command
