"""``funcloss audit``: what a run's class weights changed, and each class's share of its updates."""

import shlex
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from funcloss.app.cli.output import say, unheard
from funcloss.app.cli.stopping import INTERRUPTED, StopOnSignal
from funcloss.app.cli.table import given_of, parsed, with_table
from funcloss.app.cli.tables import make_console, make_table, number
from funcloss.app.config import fields, make_config
from funcloss.app.options import AuditOptions
from funcloss.errors import ConfigError

if TYPE_CHECKING:  # they load torch
    from rich.table import Table

    from funcloss.app.audits import RunAudit
    from funcloss.app.runs import KeptLedger
    from funcloss.audit import Audit

_MOST = 24  # classes in the table
_HEAD = ("class", "count", "weight", "expected", "share", "±", "step", "norm", "agreement", "worst")
_CHECKPOINT = {
    "model": "Model of --checkpoint.",
    "dataset": "Data set of --checkpoint.",
    "loss": "Loss of --checkpoint.",
    "class_weight": "Training weight of a class, of --checkpoint; repeatable.",
}
_OF_CHECKPOINT = tuple(
    replace(row, option=replace(row.option, help=_CHECKPOINT[row.name]))
    for row in fields()
    if row.name in _CHECKPOINT
)
_ROWS = (*_OF_CHECKPOINT, *fields(AuditOptions))


def audit(
    run: Annotated[Path | None, typer.Argument(help="Run folder.")] = None,
    *,
    checkpoint: Annotated[
        Path | None, typer.Option(help="Audit a safetensors file of a model instead of a run.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the report.", show_default="the run folder")
    ] = None,
    baseline: Annotated[
        bool,
        typer.Option(
            "--baseline",
            help="Train the baseline first (all class weights 1, the same seed and batches), into "
            "RUN/plain, unless it is there.",
        ),
    ] = False,
    seeds: Annotated[
        int,
        typer.Option(
            help="Pairs of run and baseline for --baseline to train: the run's own seed, and the "
            "next ones into RUN/seed-N.",
            min=1,
        ),
    ] = 1,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print the summary only.")] = False,
    **typed: Any,
) -> None:
    """Report what a run's class weights changed, and each class's share of gradient and step.

    First the outcome: recall, precision and expected cost beside a baseline with all class weights
    1. Then the gradient and the step at the end of the training. Writes audit.html, audit.json, CSV
    tables and figures.
    """
    given = parsed(given_of(typed), _ROWS)
    described = {name: given.pop(name) for name in _CHECKPOINT if name in given}
    options = AuditOptions(**given)
    if (run is None) == (checkpoint is None):
        raise ConfigError("name a run folder, or a model's file with --checkpoint")
    if run is not None and described:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in described)
        raise ConfigError(f"a run says itself what it is: leave out {flags}")
    if checkpoint is not None and out is None:
        raise ConfigError("say with --out where the report of a --checkpoint goes")
    if checkpoint is not None and baseline:
        raise ConfigError("a saved model has no training to repeat: leave out --baseline")
    if seeds > 1 and not baseline:
        raise ConfigError(f"seeds {seeds} is of --baseline: add it")
    config = make_config(described)

    from funcloss.app import audits

    if run is not None:
        if baseline:
            _train_baseline(run, options, seeds, quiet=quiet)
        found = audits.audit_run(run, options)
    else:
        assert checkpoint is not None
        found = audits.audit_checkpoint(checkpoint, config, options)
    folder = out or run
    assert folder is not None
    _print_audit(found, audits.write_report(found, folder), quiet=quiet)


def _train_baseline(run: Path, options: AuditOptions, seeds: int, *, quiet: bool) -> None:
    """Train what a run is compared with, to its end or to the signal that stops it."""
    from funcloss.app.cli.console import TrainingConsole
    from funcloss.app.outcome import train_baseline

    stop = StopOnSignal()
    with TrainingConsole(quiet=quiet) as console, stop:
        finished = train_baseline(
            run, options, seeds=seeds, show=console.show, should_stop=stop.asked
        )
    if finished:
        return
    with unheard():
        more = f" --seeds {seeds}" if seeds > 1 else ""
        again = f"funcloss audit {shlex.quote(str(run))} --baseline{more}"
        say(f"stopped and saved; go on with: {again}")
        print(end="", flush=True)
    raise typer.Exit(INTERRUPTED)


def _print_audit(found: "RunAudit", files: list[Path], *, quiet: bool) -> None:
    """Print outcome, ledger and gradient of an audit, its table, and where its report is."""
    from funcloss.app.cli.ledger_tables import ledger_table
    from funcloss.app.report.outcome import outcome_sentences
    from funcloss.audit import sentences

    out, about, audited = make_console(), found.about, found.audit
    now = sentences(
        audited,
        optimizer=about.optimizer,
        scale_invariant=about.scale_invariant,
        log_loss=about.log_loss,
    )
    told = {
        "Outcome.": outcome_sentences(found.outcome),
        "Ledger: what each class's examples did over the training.": _on_ledger(found.ledger),
        "Now: one gradient and one step, a diagnostic of this moment, not of the training.": now,
    }
    for heading, lines in ((heading, lines) for heading, lines in told.items() if lines):
        out.print(heading)
        for line in lines:
            out.print(line)
    if quiet:
        return
    out.print()
    if found.ledger is not None:
        out.print(ledger_table(found.ledger))
        out.print()
    out.print(_class_table(audited))
    out.print(
        f"{about.examples:,} examples of {about.dataset}, {about.split}; "
        f"{audited.method.name}, {audited.method.seconds:.1f} s"
    )
    for check in audited.checks:
        limit = "informational" if check.tolerance is None else f"tolerance {check.tolerance:.1e}"
        out.print(f"check {check.name}: relative error {check.error:.1e} ({limit})")
    for note in filter(None, (about.note, *audited.notes)):
        out.print(f"note: {note}")
    out.print(f"report: {files[0]}")


def _on_ledger(found: "KeptLedger | None") -> tuple[str, ...]:
    """Return what a ledger says, in sentences."""
    from funcloss.audit import ledger_sentences

    if found is None:
        return ()
    lines = ledger_sentences(
        found.classes,
        found.parts,
        found.ledger,
        found.weights,
        exact=found.exact,
        judged=found.judged,
    )
    return (*lines, f"The ledger is not whole: {found.note}.") if found.note else lines


def _class_table(found: "Audit") -> "Table":
    """Return a row per class, the largest shares first beyond two dozen classes."""
    now, step, errors = found.balance, found.step, found.standard_errors
    impact = found.impact.get("held_out")
    order = range(len(found.classes))
    if len(order) > _MOST:
        order = now.share.nan_to_num(-1.0).argsort(descending=True)[:_MOST].tolist()
    conflict = now.conflict.clone().fill_diagonal_(2.0).nan_to_num(2.0)
    rows = []
    for c in order:
        lowest, rival = conflict[c].min(0)
        cells = [
            found.classes[c],
            f"{int(found.count[c]):,}",
            f"{float(found.class_weights[c]):g}",
            number(now.expected_share[c], ".1%"),
            number(now.share[c], ".1%"),
            number(None if errors is None else errors.share[c], ".1%"),
            number(None if step is None else step.share[c], ".1%"),
            number(now.norm[c], ".2g"),
            number(found.agreement[c], ".2f"),
            "-" if lowest > 1 else f"{float(lowest):+.2f} {found.classes[int(rival)]}",
        ]
        rows.append(cells if impact is None else [*cells, number(impact.predicted[c], "+.1g")])
    return make_table(_HEAD if impact is None else (*_HEAD, "held-out"), rows)


with_table(audit, _ROWS)
