"""``funcloss check``: the laws of a loss, tried on anyone's."""

import contextlib
import sys
import warnings
from dataclasses import asdict
from typing import Annotated, Any

import typer

from funcloss.app.addresses import imported
from funcloss.app.cli.parsing import pairs
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
            help="Task type; determines the generated test inputs.",
            metavar="classification|binary|regression|embedding",
            show_default="inferred from the names of its parameters",
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
            imported(loss, what="loss", refused={}),  # it is typed
            task=task,
            classes=classes,
            class_weights=weights,
            batch_size=batch_size,
        )
        findings = laws.check(adapted.case, inductor=inductor)
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


def _print_json(loss: str, adapted: Any, findings: list[Any]) -> None:
    import json

    report = {
        "loss": loss,
        "kind": adapted.kind,
        "task": adapted.task,
        "laws": [asdict(f) for f in findings],
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
