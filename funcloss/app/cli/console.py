"""What trainings and sweeps show: progress on a terminal, plain lines when piped, tables."""

import shlex
from collections.abc import Callable
from typing import Any

import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from funcloss import decisions, training
from funcloss._names import printable
from funcloss.app import runs, sweep
from funcloss.app.cli.ledger_tables import running_lines
from funcloss.app.cli.output import say, unheard
from funcloss.app.cli.stopping import INTERRUPTED, StopOnSignal
from funcloss.app.cli.tables import between, make_console, make_table, number
from funcloss.app.config import DATASETS, code_in, option_values
from funcloss.app.data import short_name
from funcloss.app.report.choice import Choice
from funcloss.app.runs.folds import OUT_OF_FOLD
from funcloss.decisions import Interval

_ANY_TWO = ("one", "two")  # classes, whose names costs of 1 do not speak


def watched(start: Callable[..., runs.Outcome], *, again: str, quiet: bool) -> None:
    """Run a training or a sweep to its end, or to the signal that stops it, and show it.

    Args:
        start: What is run, with ``show`` and ``should_stop``.
        again: The command that goes on with it.
        quiet: Whether the result alone is printed.

    Raises:
        Exit: it was told to stop.
    """
    stop = StopOnSignal()
    with TrainingConsole(quiet=quiet) as console, stop:
        outcome = start(show=console.show, should_stop=stop.asked)
    with unheard():
        if outcome.finished:
            console.result(outcome)
        else:
            folder = shlex.quote(str(outcome.folder))
            say(f"stopped and saved; go on with: {again} --resume {folder}")
        print(end="", flush=True)
    if not outcome.finished:
        raise typer.Exit(INTERRUPTED)


class TrainingConsole:
    """Shows the events of a training; on a terminal with a bar that moves."""

    def __init__(self, *, quiet: bool) -> None:
        """Show everything, or, when ``quiet``, warnings only."""
        self._quiet = quiet
        self._audits = 0  # since an epoch was shown, as the seconds
        self._audit_seconds = self._epoch_seconds = 0.0
        self._log_every, self._early = 1, False  # as the run that started has it
        self._before = self._of_seed = 0  # steps of a sweep: before this seed, and of each
        self._out = make_console()
        self._bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TextColumn("loss {task.fields[loss]}  {task.fields[rate]} examples/s"),
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

    def show(self, event: "runs.Event") -> None:
        """Show one event of a training, which goes on where nobody can be shown any more."""
        with unheard():
            self._show(event)

    def _show(self, event: "runs.Event") -> None:
        match event:
            case runs.Note(text, warning=True):
                say(f"warning: {text}", error=True)
            case runs.Note(text):
                self._print(text)
            case runs.Started(folder, config, step, steps):
                self._log_every, self._early = config.log_every, config.epochs == "auto"
                most = "at most " if self._early else ""
                self._print(
                    f"training {short_name(config.model)} on {short_name(config.dataset)}, "
                    f"{config.device}, "
                    f"{config.threads} threads, step {step:,} of {most}{steps:,}, into {folder}"
                )
                self._begin(config.model, None if self._early else steps, step)
            case training.Progress(step=step, loss=loss, images_per_second=rate):
                for task in self._bar.task_ids:
                    done = self._before + step
                    self._bar.update(task, completed=done, loss=f"{loss:.4f}", rate=f"{rate:,.0f}")
                if not self._out.is_terminal and not (self._early and step % self._log_every):
                    self._print(f"step {step:,}  loss {loss:.4f}  {rate:,.0f} examples/s")
            case runs.Audited(seconds=seconds):
                self._audits += 1
                self._audit_seconds += seconds
            case runs.LedgerReport():
                if not self._quiet and (not self._early or _is_round(event.epoch)):
                    line, table = running_lines(event)
                    self._out.print(line)
                    if table is not None:
                        self._out.print(table)
            case runs.EpochReport():
                self._epoch_seconds += event.seconds
                if not self._early or _is_round(event.number):
                    self._epoch(event)
            case runs.Constrained(step, record):
                self._print(f"step {step:,}  {_constrained(record)}")
            case runs.FoldReport(number, folds, seconds, epochs, found):
                self._print(
                    f"fold {number}/{folds}  {epochs} epochs  accuracy "
                    f"{found.argmax.accuracy.value:.2%}  expected cost "
                    f"{found.min_cost.expected_cost.value:.4f}  {seconds:.1f} s"
                )
            case sweep.SweepStarted(folder, trials, seeds, steps, done):
                self._print(
                    f"training {trials} trials with {_count(seeds, 'seed')} each, "
                    f"{steps:,} steps, into {folder}"
                )
                self._before, self._of_seed = done, steps
                self._begin(f"{trials} trials", seeds * steps, done)
            case sweep.SeedReport(number, seeds, seconds, records):
                self._before += self._of_seed
                lost = sum(record["diverged"] for record in records)
                diverged = f", {lost} diverged" if lost else ""
                self._print(f"seed {number}/{seeds} trained in {seconds:.1f} s{diverged}")

    def _epoch(self, report: "runs.EpochReport") -> None:
        """Show an epoch, and the audits since one was shown."""
        parts = "  ".join(
            f"{name} loss {scores.loss:.4f} accuracy {scores.argmax.accuracy.value:.2%}"
            for name, scores in report.evaluations.items()
        )
        of = "" if self._early else f"/{report.epochs}"
        audits = ""
        if self._audits:
            took = self._audit_seconds / max(self._epoch_seconds, 1e-9)
            audits = f"  {_count(self._audits, 'audit')} recorded, {took:.1%} of the time"
        self._print(
            f"epoch {report.number}{of}  training loss {report.loss:.4f}  {parts}  "
            f"{report.seconds:.1f} s{audits}"
        )
        self._audits, self._audit_seconds, self._epoch_seconds = 0, 0.0, 0.0

    def _begin(self, name: str, total: int | None, done: int) -> None:
        """Begin a bar, in the place of one that has ended."""
        for task in self._bar.task_ids:
            self._bar.remove_task(task)
        self._bar.add_task(printable(name), total=total, completed=done, loss="-", rate="-")

    def result(self, outcome: "runs.Outcome") -> None:
        """Show what a run, or a choice between models, came to, and where it is."""
        if outcome.choice is None:
            self._summary(outcome)
        else:
            self._choice(outcome, outcome.choice)

    def _choice(self, outcome: "runs.Outcome", found: Choice) -> None:
        for line in found.lines:
            self._out.print(line)
        if not self._quiet:
            self._out.print()
            if found.points:
                self._out.print(_points_table(found))
                self._out.print()
            self._out.print(_rows_table(found))
            for line in found.costs:
                self._out.print(f"cost: {line}")
        self._out.print(f"run folder: {outcome.run_dir or outcome.folder}")
        self._out.print(f"report: {outcome.files[0]}")

    def _summary(self, outcome: "runs.Outcome") -> None:
        summary = outcome.summary
        name, scores = _headline(summary)
        accuracy = scores["rules"]["argmax"]["accuracy"][0]
        say(
            f"{name} accuracy {accuracy:.2%} on {scores['n']:,} examples of "
            f"{short_name(summary['dataset'])}; run folder {outcome.folder}"
        )
        if name == "test" and OUT_OF_FOLD in summary:
            self._print(
                f"out-of-fold accuracy {summary['over_folds']['argmax']['accuracy'][0]:.2%} on "
                f"{summary[OUT_OF_FOLD]['n']:,} examples"
            )
        if self._quiet:
            return
        self._print_costs(outcome.summary)
        run = shlex.quote(str(outcome.folder))
        allowed = " --allow-import" if code_in(option_values(outcome.config)) else ""
        for line in ("next:", *_hints(outcome.summary, run, allowed)):
            say(line)
        if outcome.summary["dataset"] in DATASETS:
            say("  # train by a recipe: the tutorial's own network and steps")
            say("  funcloss-train --recipe article")
        say("  # per-class metrics; training curves are in curves.png")
        say(f"  funcloss evaluate {run}{allowed}")

    def _print_costs(self, summary: dict[str, Any]) -> None:
        """Print what mistakes cost, if it was said, and what the decisions on the test set cost."""
        if summary["costs"] != decisions.cost_sentences(decisions.make_costs(_ANY_TWO)):
            for line in summary["costs"]:
                self._print(f"cost: {line}")
            for line in summary["decisions"]:
                self._print(f"decision: {line}")
            self._print(f"calibration: {summary['calibrated']}")
        elif summary["class_weight"]:
            self._print(
                "cost: every mistake costs 1, whatever its class weighs in training; --class-cost "
                "sets others"
            )
        split, scores = _headline(summary)
        over = summary["over_folds"] if split == OUT_OF_FOLD else {}
        folds = " (95 % over the folds)" if over else ""
        for name, rule in scores["rules"].items():
            rule |= over.get(name, {})
            cost, normal = between(Interval(*rule["expected_cost"]), ".4f"), rule["normalised_cost"]
            part = "" if normal is None else f", {normal:.3f} of the best constant decision"
            self._print(
                f"decisions by {name}: expected cost {cost}{folds}{part}; "
                f"accuracy {rule['accuracy'][0]:.2%}"
            )
        if summary["caveat"]:
            self._print(f"note: {summary['caveat']}")

    def _print(self, text: str) -> None:
        if not self._quiet:
            self._out.print(text)


def _headline(summary: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return the split that a summary is told by, and its scores."""
    name = "test" if "test" in summary else OUT_OF_FOLD
    return name, summary[name]


def _hints(summary: dict[str, Any], run: str, allowed: str) -> list[str]:
    """Return what to try next, by the user's costs; else by a class that is surely harder."""
    if summary["costs"] != decisions.cost_sentences(decisions.make_costs(_ANY_TWO)):
        return [
            "  # decide new data by these costs",
            f"  funcloss predict {run} FILE{allowed}",
        ]
    argmax = _headline(summary)[1]["rules"]["argmax"]
    known = [(*row, name) for name, row in argmax["recall"].items() if row[0] is not None]
    if not known:
        return []
    recall, _, high, hardest = min(known)
    if summary["warnings"] or not high < argmax["accuracy"][1]:  # no difference beyond chance
        return []
    weights = summary["class_weight"]  # the command line replaces all of them
    weights = weights | {hardest: 5 * weights.get(hardest, 1.0)}
    weighted = " ".join(
        f"--class-weight {shlex.quote(f'{name}={weight:g}')}" for name, weight in weights.items()
    )
    return [
        f"  # {hardest} has a lower recall, {recall:.2%}: give it 5 times the weight in the loss",
        f"  funcloss-train --config {run}/config.toml {weighted}{allowed}",
    ]


def _is_round(number: int) -> bool:
    """Return whether a number is 1 to 9, or 10, 20 and so on, or 100, 200 and so on."""
    return len(str(number).rstrip("0")) == 1


def _constrained(record: dict[str, Any]) -> str:
    weights = ", ".join(f"{name}={w:g}" for name, w in record["weights"].items()) or "all 1"
    reached = ", ".join(f"{text}: {number(v, '.4f')}" for text, v in record["reached"].items())
    return f"{reached}  accuracy {record['accuracy']:.2%}  class weights {weights}"


def _points_table(choice: Choice) -> Table:
    """Return a row per trial of a sweep, on what it was chosen on."""
    recalls = (f"recall {name}" for name in choice.focus)
    what = f"on {choice.chosen_on}" + f", 95 % over the {choice.over}s" * (choice.seeds > 1)
    head = (what, "accuracy", *recalls, "expected cost", "by the rule", "note")
    rows = []
    for p in choice.points:
        notes = ["chosen"] * p.chosen + ["plain"] * p.plain + ["misses"] * (p.feasible is False)
        notes += [f"diverged on {p.diverged} of {p.seeds}"] * bool(p.diverged)
        cells = [between(score, ".2%") for score in (p.accuracy, *p.recall)]
        cells += [between(p.expected_cost, ".4f"), between(p.rule_cost, ".4f")]
        rows.append((p.name, *cells, ", ".join(notes)))
    table = make_table(head, rows)
    table.columns[-1].justify = "left"
    return table


def _rows_table(choice: Choice) -> Table:
    """Return a row per model and rule, on what they were tested on."""
    recalls = (f"recall {name}" for name in choice.focus)
    what = f"on the {choice.tested_on}, 95 %"
    head = (what, "accuracy", *recalls, "expected cost", "against plain, paired")
    rows = []
    for row in choice.rows:
        cells = [between(score, ".2%") for score in (row.accuracy, *row.recall)]
        difference = "-" if row.difference is None else between(row.difference, "+.4f")
        rows.append((row.name, *cells, between(row.expected_cost, ".4f"), difference))
    return make_table(head, rows)


def _count(n: int, what: str) -> str:
    return f"{n} {what}" if n == 1 else f"{n} {what}s"
