"""What the commands show: progress on a terminal, plain lines when piped, tables."""

import math
import shlex
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from funcloss import audit, training

_FILE_WIDTH = 200


def _console() -> Console:
    """Return a console; what is no terminal is as wide as any table."""
    out = Console(highlight=False, soft_wrap=True)
    wide = Console(highlight=False, soft_wrap=True, width=_FILE_WIDTH)
    return out if out.is_terminal else wide


class TrainingConsole:
    """Shows the events of a training; on a terminal with a bar that moves."""

    def __init__(self, *, quiet: bool) -> None:
        """Show everything, or, when ``quiet``, warnings only."""
        self._quiet = quiet
        self._audits: list[list[dict[str, Any]]] = []  # of the epoch
        self._audit_seconds = 0.0
        self._out = _console()
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("loss {task.fields[loss]}  {task.fields[rate]} images/s"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self._out,
            transient=True,
            disable=quiet or not self._out.is_terminal,
        )

    def __enter__(self) -> "TrainingConsole":
        """Begin to show the bar."""
        self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        """Take the bar away."""
        self._bar.stop()

    def show(self, event: "training.Event") -> None:
        """Show one event of a training."""
        match event:
            case training.Note(text, warning=True):
                print(f"warning: {text}", file=sys.stderr)
            case training.Note(text):
                self._print(text)
            case training.Started(folder, config, step, steps):
                self._print(
                    f"training {config.model} on {config.dataset}, {config.device}, "
                    f"{config.threads} threads, step {step:,} of {steps:,}, into {folder}"
                )
                self._bar.add_task(config.model, total=steps, completed=step, loss="-", rate="-")
            case training.Progress(step=step, loss=loss, images_per_second=rate):
                for task in self._bar.task_ids:
                    self._bar.update(task, completed=step, loss=f"{loss:.4f}", rate=f"{rate:,.0f}")
                if not self._out.is_terminal:
                    self._print(f"step {step:,}  loss {loss:.4f}  {rate:,.0f} images/s")
            case training.Audited(_, seconds, rows):
                self._audits.append(rows)
                self._audit_seconds += seconds
            case training.EpochReport(number, epochs, loss, seconds, evaluations):
                parts = "  ".join(
                    f"{name} loss {scores.loss:.4f} accuracy {scores.accuracy:.2%}"
                    for name, scores in evaluations.items()
                )
                self._print(
                    f"epoch {number}/{epochs}  training loss {loss:.4f}  {parts}  {seconds:.1f} s"
                )
                if self._audits and not self._quiet:
                    self._out.print(_shares_table(self._audits))
                    took = self._audit_seconds / max(seconds, 1e-9)
                    n = len(self._audits)
                    audits = "1 audit" if n == 1 else f"{n} audits"
                    self._print(f"{audits} took {took:.1%} of the epoch")
                self._audits, self._audit_seconds = [], 0.0

    def summary(self, outcome: "training.Outcome") -> None:
        """Show the result of a finished run, and what to try next."""
        test = outcome.summary["test"]
        print(
            f"test accuracy {test['accuracy']:.2%} on {test['n']:,} images of "
            f"{outcome.summary['dataset']}; run folder {outcome.folder}"
        )
        if self._quiet:
            return
        recall, hardest = min((r, c) for c, r in test["recall"].items() if r is not None)
        run = shlex.quote(str(outcome.folder))
        costly = f"--class-weight {shlex.quote(f'{hardest}=5')}"
        print(f"hardest class: {hardest}, recall {recall:.2%}")
        print("next:")
        print("  # make its mistakes cost five times")
        print(f"  funcloss-train --config {run}/config.toml {costly}")
        print("  # train by a recipe: the tutorial's own network and steps")
        print("  funcloss-train --recipe article")
        print("  # see every class in a table, and the loss while it learnt in curves.png")
        print(f"  funcloss evaluate {run}")

    def _print(self, text: str) -> None:
        if not self._quiet:
            self._out.print(text, markup=False, emoji=False)


_SHOWN, _MOST = 10, 24  # classes side by side, and below each other


def _shares_table(audits: list[list[dict[str, Any]]]) -> Table:
    """Return mean share and budget of each class over some audits, a column a class."""
    means = [
        {
            name: _mean([rows[c][name] for rows in audits])
            for name in ("share", "update_share", "budget")
        }
        for c in range(len(audits[0]))
    ]
    order = sorted(range(len(means)), key=lambda c: -(means[c]["share"] or 0.0))
    shown = sorted(order[:_SHOWN])
    table = Table(box=None, pad_edge=False, show_header=False)
    for _ in range(len(shown) + 1):
        table.add_column(justify="right", no_wrap=True)
    table.add_row("class", *(escape(audits[0][c]["class"]) for c in shown))
    for name, title in (
        ("share", "share of the gradient"),
        ("update_share", "share of the step"),
        ("budget", "cost x count"),
    ):
        cells = (means[c][name] for c in shown)
        table.add_row(title, *("-" if cell is None else f"{cell:.0%}" for cell in cells))
    return table


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def print_audit(found: "audit.RunAudit", files: list[Path], *, quiet: bool) -> None:
    """Print what an audit found, in words and in a table, and where its report is."""
    out = _console()
    for line in audit.sentences(found.audit, optimizer=found.about.optimizer):
        out.print(line, markup=False, emoji=False)
    if quiet:
        return
    out.print()
    out.print(_audit_table(found.audit))
    method = found.audit.method
    out.print(
        f"{found.about.examples:,} examples of {found.about.dataset}, {found.about.part}; "
        f"{method.name}, {method.seconds:.1f} s",
        markup=False,
    )
    for check in found.audit.checks:
        held = "" if check.tolerance is None else f" (at most {check.tolerance:.1e})"
        out.print(f"check {check.name}: off by {check.error:.1e}{held}", markup=False)
    for note in (found.about.note, *found.audit.notes):
        if note:
            out.print(f"note: {note}", markup=False)
    out.print(f"report: {files[0]}", markup=False)


def _audit_table(found: "audit.Audit") -> Table:
    """Return a row a class, the largest shares first beyond two dozen classes."""
    now, step, impact = found.balance, found.step, found.impact.get("held_out")
    table = Table(box=None, pad_edge=False)
    table.add_column("class", no_wrap=True)
    for name in ("count", "cost", "budget", "share", "±", "step", "norm", "agree", "worst"):
        table.add_column(name, justify="right", no_wrap=True)
    if impact is not None:
        table.add_column("held-out", justify="right", no_wrap=True)
    order = range(len(found.classes))
    if len(order) > _MOST:
        order = now.share.nan_to_num(-1.0).argsort(descending=True)[:_MOST].tolist()
    rivals = now.conflict.clone().fill_diagonal_(2.0).nan_to_num(2.0)
    for c in order:
        rival = int(rivals[c].argmin())
        spread = found.spread
        cells = [
            f"{int(found.count[c]):,}",
            f"{float(found.class_weights[c]):g}",
            _percent(now.budget[c]),
            _percent(now.share[c]),
            _percent(None if spread is None else spread.share[c] / spread.batches**0.5),
            _percent(None if step is None else step.share[c]),
            _number(now.norm[c], ".2g"),
            _number(found.coherence[c], ".2f"),
            f"{float(rivals[c, rival]):+.2f} {escape(found.classes[rival])}"
            if float(rivals[c, rival]) <= 1.0
            else "-",
        ]
        if impact is not None:
            cells.append(_number(impact.predicted[c], "+.1g"))
        table.add_row(escape(found.classes[c]), *cells)
    return table


def _percent(part: Any) -> str:
    return "-" if part is None else _number(part, ".1%")


def _number(value: Any, form: str) -> str:
    return "-" if math.isnan(float(value)) else format(float(value), form)


def class_table(scores: "training.Evaluation", classes: tuple[str, ...]) -> Table:
    """Return a table of count, recall and precision, a row a class."""
    table = Table(box=None, pad_edge=False)
    table.add_column("class")
    for name in ("count", "recall", "precision"):
        table.add_column(name, justify="right")
    rows = zip(classes, scores.support, scores.recall, scores.precision, strict=True)
    for name, count, recall, precision in rows:
        parts = (_number(part, ".2%") for part in (recall, precision))
        table.add_row(escape(name), f"{int(count):,}", *parts)
    return table
