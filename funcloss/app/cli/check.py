"""``funcloss check``: the laws of a loss, tried on anyone's."""

import contextlib
import json
import sys
import warnings
from dataclasses import asdict
from typing import Annotated, Any

import typer

from funcloss.app.addresses import imported
from funcloss.app.cli.table import given_of, parsed, with_table
from funcloss.app.config import fields
from funcloss.app.options import CheckOptions
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
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    **typed: Any,
) -> None:
    """Run property checks on a custom loss: a function, a module or an autograd.Function.

    Prints a line per property ("law") and exits with 0 only if all that apply hold.
    """
    options = CheckOptions(**parsed(given_of(typed), fields(CheckOptions)))
    weights = _indexed(options.class_weight)

    from funcloss import laws  # before what is to be tried, whose folder may have a torch.py

    with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
        warnings.simplefilter("ignore")  # of the loss, at inputs that it was not made for
        adapted = laws.adapt(
            imported(loss, what="loss", refused={}),  # it is typed
            task=options.task,
            classes=options.classes,
            class_weights=weights,
            batch_size=options.batch_size,
        )
        findings = laws.check(adapted.case, inductor=options.inductor)
    if as_json:
        found = {"kind": adapted.kind, "task": adapted.task, "laws": [asdict(f) for f in findings]}
        print(json.dumps({"loss": loss, **found}, indent=2))
    else:
        _print_lines(f"{loss}: {adapted.kind}; task: {adapted.task}", findings)
    broken = [f.law for f in findings if f.verdict == "fail"]
    if broken:
        raise LawsBrokenError(f"{loss} breaks {len(broken)} of {len(findings)} laws")


def _indexed(weights: dict[str, float]) -> dict[int, float]:
    for key, weight in weights.items():
        if not key.isdecimal() or weight < 0:
            raise ConfigError(
                f"class_weight must be an index and a weight of 0 or more, as in 9=2; "
                f"got {key}={weight:g}"
            )
    return {int(key): weight for key, weight in weights.items()}


def _print_lines(head: str, findings: list[Any]) -> None:
    from rich.console import Console
    from rich.markup import escape

    out = Console(highlight=False, soft_wrap=True)
    out.print(head, markup=False, emoji=False)
    colours = {"pass": "green", "fail": "red", "not applicable": "dim"}
    for f in findings:
        verdict = f"[{colours[f.verdict]}]{f.verdict:<14}[/]"
        detail = f": {escape(f.detail)}" if f.detail else ""
        out.print(f"{verdict}  {f.law}{detail}", emoji=False)
        if f.advice:
            out.print(f"{'':14}  -> {escape(f.advice)}", emoji=False)


with_table(check, fields(CheckOptions))
