"""Tables of options as parameters of a command, and what is typed as a file would have it."""

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from funcloss.app.cli.parsing import as_number, number_or_name, pairs
from funcloss.app.config import Field, Option, Typed, fields, read_recipe, read_toml, recipe_names
from funcloss.app.options import ALLOW_IMPORT
from funcloss.errors import ConfigError

AllowImport = Annotated[bool, typer.Option(ALLOW_IMPORT.flag, help=ALLOW_IMPORT.help)]
Rule = Annotated[
    str,
    typer.Option(
        help="argmax: the most probable class; min-cost: least expected cost. "
        "Default: min-cost if the run was given costs, else argmax."
    ),
]
Recipe = Annotated[
    str, typer.Option(help=f"Options that come with funcloss: {', '.join(recipe_names())}.")
]
ConfigFile = Annotated[
    Path | None, typer.Option(help="TOML file of options, a run's config.toml say.")
]
Command = TypeVar("Command", bound=Callable[..., Any])


def _numbers(name: str, text: str, option: Option) -> list[float]:
    return [as_number(name, number) for number in text.split(",")]


def _costs(name: str, path: Path, option: Option) -> dict[str, dict[str, float]]:
    from funcloss.decisions import read_cost_matrix  # it loads torch

    return read_cost_matrix(path)


def _number_or_choice(name: str, text: str, option: Option) -> float | str:
    try:
        return float(text)
    except ValueError:  # the table says whether it is one of the choices
        return text


# By type of the field, where it is not the type on the command line: that, its metavar unless the
# option has one, and how it is read.
_WRITTEN = {
    dict[str, float]: (list[str], None, pairs),
    dict[str, float | str]: (list[str], None, partial(pairs, read_value=number_or_name)),
    dict[str, dict[str, float]]: (Path, None, _costs),
    int | str: (str, "NUMBER|auto", _number_or_choice),
    tuple[float, ...]: (str, "NUMBER,...", _numbers),
    tuple[str, ...]: (list[str], None, lambda name, texts, option: texts),
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


def parsed(given: dict[str, Any], rows: Sequence[Field] | None = None) -> Typed:
    """Return options of the command line as a TOML file would have them.

    Args:
        given: Those that were typed, by name.
        rows: Their tables; None: that of a training.
    """
    known = {row.name: row for row in rows or fields()}
    read = {name: _WRITTEN.get(known[name].type) for name in given}
    return Typed(
        (name, how[2](name, value, known[name].option) if (how := read[name]) else value)
        for name, value in given.items()
    )


def _parameter(field: Field, *, as_text: bool) -> inspect.Parameter:
    """Return a row of a table of options as a parameter of the command."""
    option = field.option
    kind, metavar, _ = _WRITTEN.get(field.type, (field.type, None, None))
    named = option.choices if field.type is str else ()  # a number or a word says so itself
    choices = f" One of {', '.join(named)}" if named else ""
    choices += f"; or {option.own}." if option.own else "." if choices else ""
    shown = typer.Option(
        *([option.flag] if option.flag else []),
        help=option.help + choices,
        metavar=option.metavar or ("VALUES" if as_text else metavar),
        show_default=not option.flag and _shown(field.default),
    )
    annotation = Annotated[(str if as_text else kind) | None, shown]
    return inspect.Parameter(
        field.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation
    )


def _shown(default: Any) -> str | bool:
    if isinstance(default, tuple):
        return ",".join(map(str, default)) or False
    return str(default) if default not in ("", {}) else False


def with_table(
    command: Command, rows: Sequence[Field] | None = None, *, as_text: Sequence[str] = ()
) -> Command:
    """Give a command a parameter for every row of a table of options, for Typer to read.

    Args:
        command: It takes them as ``**options``, None where they were not typed.
        rows: The table; None: that of a training.
        as_text: Numbers that the command reads itself.

    Returns:
        The command.
    """
    own = [p for p in inspect.signature(command).parameters.values() if p.kind != p.VAR_KEYWORD]
    made = [_parameter(row, as_text=row.name in as_text) for row in rows or fields()]
    command.__signature__ = inspect.Signature([*own, *made])  # pyright: ignore[reportFunctionMemberAccess]
    command.__annotations__ = {p.name: p.annotation for p in (*own, *made)}
    return command
