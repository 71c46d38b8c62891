"""``funcloss check``: the laws of a loss, tried on anyone's."""

import contextlib
import difflib
import importlib
import importlib.util
import sys
import warnings
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import typer

from funcloss.cli.parsing import pairs
from funcloss.errors import ConfigError, FunclossError


class LawsBrokenError(FunclossError):
    """A loss that breaks a law."""


def check(
    loss: Annotated[
        str,
        typer.Argument(
            metavar="MODULE:NAME",
            help="The loss: module:name or file.py:name. It is imported, so its code runs.",
        ),
    ],
    *,
    task: Annotated[
        str,
        typer.Option(
            help="What the loss is fed.",
            metavar="classification|binary|regression|embedding",
            show_default="classification",
        ),
    ] = "",
    classes: Annotated[int, typer.Option(help="Number of classes.", min=2, max=1000)] = 10,
    class_weight: Annotated[
        list[str] | None,
        typer.Option(
            help="What a true class is said to weigh, by index; repeatable.", metavar="CLASS=WEIGHT"
        ),
    ] = None,
    batch_size: Annotated[
        int, typer.Option(help="Size of the random batches of the cost effect.", min=2, max=4096)
    ] = 32,
    inductor: Annotated[
        bool, typer.Option("--inductor", help="Try the default compiler too, which takes longer.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Try the laws of a loss on yours: a function, a module or an autograd.Function.

    Prints a line a law and exits with 0 only if all that apply hold.
    """
    weights = _indexed(pairs("class_weight", class_weight or []))

    from funcloss import laws  # before what is to be tried, whose folder may have a torch.py

    with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
        warnings.simplefilter("ignore")  # of the loss, at inputs that it was not made for
        adapted = laws.adapt(
            _find(loss), task=task, classes=classes, class_weights=weights, batch_size=batch_size
        )
        findings = laws.check(adapted.subject, inductor=inductor)
    if as_json:
        _print_json(loss, adapted, findings)
    else:
        _print_lines(loss, adapted, findings)
    broken = [f.law for f in findings if f.verdict == "fail"]
    if broken:
        raise LawsBrokenError(f"{loss} breaks {len(broken)} of {len(findings)} laws")


def _indexed(weights: dict[str, float]) -> dict[int, float]:
    for key, weight in weights.items():
        if not key.isdecimal() or not 0 <= weight < float("inf"):
            raise ConfigError(
                f"class_weight must be an index and a weight of 0 or more, as in 9=2; "
                f"got {key}={weight:g}"
            )
    return {int(key): weight for key, weight in weights.items()}


def _find(address: str) -> Any:
    """Return what ``module:name`` or ``file.py:name`` names."""
    place, _, name = address.rpartition(":")
    if not place or not name:
        raise ConfigError(f"a loss is named module:name or file.py:name; got {address!r}")
    found: Any = _imported(place)
    for part in name.split("."):
        if not hasattr(found, part):
            near = difflib.get_close_matches(part, dir(found), n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ConfigError(f"{place} has no {name!r}{hint}")
        found = getattr(found, part)
    return found


def _imported(place: str) -> ModuleType:
    """Import a module by name, from here too, or a file by path."""
    try:
        if not place.endswith(".py"):
            sys.path.append(str(Path.cwd()))
            return importlib.import_module(place)
        path = Path(place).resolve()
        if not path.is_file():
            raise ConfigError(f"no file {place}")
        sys.path.append(str(path.parent))
        name = f"_tried_{path.stem}"  # a file may be called as a module that is in use
        loaded = sys.modules.get(name)
        if loaded is not None and loaded.__file__ == str(path):
            return loaded  # a second copy under one name confuses the compiler
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
        return module
    except FunclossError:
        raise
    except (Exception, SystemExit) as error:
        raise ConfigError(f"cannot import {place}: {type(error).__name__}: {error}") from error


def _print_json(loss: str, adapted: Any, findings: list[Any]) -> None:
    import json

    report = {
        "loss": loss,
        "kind": adapted.kind,
        "task": adapted.task,
        "laws": [f._asdict() for f in findings],
    }
    print(json.dumps(report, indent=2))


def _print_lines(loss: str, adapted: Any, findings: list[Any]) -> None:
    from rich.console import Console
    from rich.markup import escape

    out = Console(highlight=False, soft_wrap=True)
    out.print(f"{loss}: {adapted.kind}; task: {adapted.task}", markup=False, emoji=False)
    colours = {"pass": "green", "fail": "red", "not applicable": "dim"}
    for f in findings:
        verdict = f"[{colours[f.verdict]}]{f.verdict:<14}[/]"
        detail = f": {escape(f.detail)}" if f.detail else ""
        out.print(f"{verdict}  {f.law}{detail}", emoji=False)
        if f.advice:
            out.print(f"{'':14}  -> {escape(f.advice)}", emoji=False)
