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


class WrongLossError(FunclossError):
    """A loss that is wrong."""


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

    The first line is the verdict: "works everywhere", "works on batches" (it trains; not all
    transforms take it) or "wrong", with its root cause. Then comes a line per property ("law").
    Exits with 1 if the loss is wrong.
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
    verdict = laws.verdict_of(findings)
    root = verdict.causes[0] if verdict.causes else None
    if as_json:
        found = {
            "loss": loss,
            "verdict": verdict.degree,
            "law": root.law if root else "",
            "cause": root.detail if root else "",
            "cure": root.advice if root else "",
            "kind": adapted.kind,
            "task": adapted.task,
            "causes": [f.law for f in verdict.causes],
            "laws": [asdict(f) for f in findings],
        }
        print(json.dumps(found, indent=2))
    else:
        _print_lines(f"{loss}: {adapted.kind}; task: {adapted.task}", verdict, findings)
    if verdict.degree == laws.WRONG:
        raise WrongLossError(f"{loss} is wrong: {verdict.causes[0].law}")


def _indexed(weights: dict[str, float]) -> dict[int, float]:
    for key, weight in weights.items():
        if not key.isdecimal() or weight < 0:
            raise ConfigError(
                f"class_weight must be an index and a weight of 0 or more, as in 9=2; "
                f"got {key}={weight:g}"
            )
    return {int(key): weight for key, weight in weights.items()}


def _print_lines(head: str, verdict: Any, findings: list[Any]) -> None:
    from rich.markup import escape

    from funcloss.app.cli.tables import PlainConsole

    out = PlainConsole(highlight=False, soft_wrap=True)
    own = {f.law for f in verdict.causes}
    out.print(verdict.sentence, markup=False, emoji=False)
    for f in verdict.causes[:1]:
        out.print(f"  -> {f.advice}", markup=False, emoji=False)
    out.print(head, markup=False, emoji=False)
    for f in (*verdict.causes, *(f for f in findings if f.law not in own)):
        if f.verdict == "fail" and f.law not in own:
            out.print(f"[dim]{'follows':<14}[/]  {f.law}")  # from a cause above
            continue
        colour = {"pass": "green", "fail": "red", "not applicable": "dim"}[f.verdict]
        detail = f": {escape(f.detail)}" if f.detail else ""
        out.print(f"[{colour}]{f.verdict:<14}[/]  {f.law}{detail}", emoji=False)
        if f.advice:
            out.print(f"{'':14}  -> {escape(f.advice)}", emoji=False)


with_table(check, fields(CheckOptions))
