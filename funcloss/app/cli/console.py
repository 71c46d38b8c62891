"""What the commands show: progress on a terminal, plain lines when piped, tables."""

import math
import shlex
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from funcloss import audit, decisions, training
from funcloss.app import audits, runs, sweep
from funcloss.app.config import DATASETS, code_in, option_values
from funcloss.app.data import short_name
from funcloss.app.report import choice

_FILE_WIDTH = 200


def _console() -> Console:
    """Return a console; what is no terminal is as wide as any table."""
    # What classes are called is text, whatever brackets and colons it has.
    plain: dict[str, Any] = {"highlight": False, "markup": False, "emoji": False}
    out = Console(soft_wrap=True, **plain)
    wide = Console(soft_wrap=True, width=_FILE_WIDTH, **plain)
    return out if out.is_terminal else wide


class TrainingConsole:
    """Shows the events of a training; on a terminal with a bar that moves."""

    def __init__(self, *, quiet: bool) -> None:
        """Show everything, or, when ``quiet``, warnings only."""
        self._quiet = quiet
        self._audits: list[list[dict[str, Any]]] = []  # of the epoch
        self._audit_seconds = 0.0
        self._before = self._of_seed = 0  # steps of a sweep: before this seed, and of each
        self._out = _console()
        self._bar = Progress(
            TextColumn("{task.description}"),
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
        """Show one event of a training."""
        match event:
            case runs.Note(text, warning=True):
                print(f"warning: {text}", file=sys.stderr)
            case runs.Note(text):
                self._print(text)
            case runs.Started(folder, config, step, steps):
                self._print(
                    f"training {short_name(config.model)} on {short_name(config.dataset)}, "
                    f"{config.device}, "
                    f"{config.threads} threads, step {step:,} of {steps:,}, into {folder}"
                )
                self._begin(config.model, steps, step)
            case training.Progress(step=step, loss=loss, images_per_second=rate):
                for task in self._bar.task_ids:
                    done = self._before + step
                    self._bar.update(task, completed=done, loss=f"{loss:.4f}", rate=f"{rate:,.0f}")
                if not self._out.is_terminal:
                    self._print(f"step {step:,}  loss {loss:.4f}  {rate:,.0f} examples/s")
            case runs.Audited(_, seconds, rows):
                self._audits.append(rows)
                self._audit_seconds += seconds
            case runs.EpochReport(number, epochs, loss, seconds, evaluations):
                parts = "  ".join(
                    f"{name} loss {scores.loss:.4f} accuracy {scores.argmax.accuracy.value:.2%}"
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
            case runs.Steered(step, record):
                self._print(f"step {step:,}  {_steered(record)}")
            case sweep.SweepStarted(folder, members, seeds, steps, done):
                self._print(
                    f"training {members} members with {_count(seeds, 'seed')} each, "
                    f"{steps:,} steps, into {folder}"
                )
                self._before, self._of_seed = done, steps
                self._begin(f"{members} members", seeds * steps, done)
            case sweep.SeedReport(number, seeds, seconds, records):
                self._before += self._of_seed
                lost = sum(record["diverged"] for record in records)
                diverged = f", {lost} diverged" if lost else ""
                self._print(f"seed {number}/{seeds} trained in {seconds:.1f} s{diverged}")

    def _begin(self, name: str, total: int, done: int) -> None:
        """Begin a bar, in the place of one that has ended."""
        for task in self._bar.task_ids:
            self._bar.remove_task(task)
        self._bar.add_task(name, total=total, completed=done, loss="-", rate="-")

    def choice(self, ended: "sweep.Chosen") -> None:
        """Show what a sweep or a training under limits came to, and where it is."""
        choice = ended.choice
        assert choice is not None
        for line in choice.lines:
            self._out.print(line)
        if not self._quiet:
            self._out.print()
            if choice.points:
                self._out.print(_points_table(choice))
                self._out.print()
            self._out.print(_rows_table(choice))
            for line in choice.costs:
                self._out.print(f"cost: {line}")
        self._out.print(f"run folder: {ended.run_dir}")
        self._out.print(f"report: {ended.files[0]}")

    def summary(self, outcome: "runs.Outcome") -> None:
        """Show the result of a finished run, and what to try next."""
        test = outcome.summary["test"]
        argmax = test["rules"]["argmax"]
        print(
            f"test accuracy {argmax['accuracy'][0]:.2%} on {test['n']:,} examples of "
            f"{short_name(outcome.summary['dataset'])}; run folder {outcome.folder}"
        )
        if self._quiet:
            return
        self._print_costs(outcome.summary)
        run = shlex.quote(str(outcome.folder))
        allowed = " --allow-import" if code_in(option_values(outcome.config)) else ""
        hints = []
        if not outcome.summary.get("warnings"):  # else no class is harder than the others
            recall, hardest = min(
                (r, c) for c, (r, *_) in argmax["recall"].items() if r is not None
            )
            print(f"hardest class: {hardest}, recall {recall:.2%}")
            weight = 5 * outcome.summary["class_weight"].get(hardest, 1.0)
            costly = f"--class-weight {shlex.quote(f'{hardest}={weight:g}')}"
            hints = [
                "  # make its mistakes cost five times",
                f"  funcloss-train --config {run}/config.toml {costly}{allowed}",
            ]
        print("next:", *hints, sep="\n")
        if outcome.summary["dataset"] in DATASETS:
            print("  # train by a recipe: the tutorial's own network and steps")
            print("  funcloss-train --recipe article")
        print("  # see every class in a table, and the loss while it learnt in curves.png")
        print(f"  funcloss evaluate {run}{allowed}")

    def _print_costs(self, summary: dict[str, Any]) -> None:
        """Print what mistakes cost, if it was said, and what the decisions on the test set cost."""
        if summary["costs"] != decisions.cost_sentences(decisions.make_costs(_ANY_TWO)):
            for line in summary["costs"]:
                self._print(f"cost: {line}")
        elif summary["class_weight"]:
            self._print(
                "cost: every mistake costs 1, whatever its class weighs in training; --class-cost "
                "sets others"
            )
        for name, rule in summary["test"]["rules"].items():
            cost, low, high = rule["expected_cost"]
            normal = rule["normalised_cost"]
            part = "" if normal is None else f", {normal:.3f} of the best constant decision"
            self._print(
                f"decisions by {name}: expected cost {cost:.4f} [{low:.4f}, {high:.4f}]{part}; "
                f"accuracy {rule['accuracy'][0]:.2%}"
            )
        if summary["caveat"]:
            self._print(f"note: {summary['caveat']}")

    def _print(self, text: str) -> None:
        if not self._quiet:
            self._out.print(text)


_SHOWN, _MOST = 10, 24  # classes side by side, and below each other
_SQUARE = 20  # decisions in a printed matrix
_ANY_TWO = ("one", "two")  # classes, whose names costs of 1 do not speak


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
    table.add_row("class", *(audits[0][c]["class"] for c in shown))
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


def print_audit(found: "audits.RunAudit", files: list[Path], *, quiet: bool) -> None:
    """Print what an audit found, in words and in a table, and where its report is."""
    out = _console()
    about = found.about
    for line in audit.sentences(
        found.audit, optimizer=about.optimizer, scale_invariant=about.scale_invariant
    ):
        out.print(line)
    if quiet:
        return
    out.print()
    out.print(_audit_table(found.audit))
    method = found.audit.method
    out.print(
        f"{found.about.examples:,} examples of {found.about.dataset}, {found.about.split}; "
        f"{method.name}, {method.seconds:.1f} s",
        markup=False,
    )
    for check in found.audit.checks:
        held = "" if check.tolerance is None else f" (at most {check.tolerance:.1e})"
        out.print(f"check {check.name}: off by {check.error:.1e}{held}")
    for note in (found.about.note, *found.audit.notes):
        if note:
            out.print(f"note: {note}")
    out.print(f"report: {files[0]}")


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
            f"{float(rivals[c, rival]):+.2f} {found.classes[rival]}"
            if float(rivals[c, rival]) <= 1.0
            else "-",
        ]
        if impact is not None:
            cells.append(_number(impact.predicted[c], "+.1g"))
        table.add_row(found.classes[c], *cells)
    return table


def _percent(part: Any) -> str:
    return "-" if part is None else _number(part, ".1%")


def _number(value: Any, form: str) -> str:
    return "-" if math.isnan(float(value)) else format(float(value), form)


def _steered(record: dict[str, Any]) -> str:
    weights = ", ".join(f"{name}={w:g}" for name, w in record["weights"].items()) or "all 1"
    reached = ", ".join(
        f"{text}: {'-' if v is None else f'{v:.4f}'}" for text, v in record["reached"].items()
    )
    return f"{reached}  accuracy {record['accuracy']:.2%}  class weights {weights}"


def _points_table(choice: "choice.Choice") -> Table:
    """Return a row a member of a sweep, on validation data."""
    table = Table(box=None, pad_edge=False)
    table.add_column("on validation data", no_wrap=True)
    recalls = [f"recall {name}" for name in choice.focus]
    for name in ("accuracy", *recalls, "expected cost", "by the rule", "note"):
        table.add_column(name, justify="left" if name == "note" else "right", no_wrap=True)
    for p in choice.points:
        notes = ["chosen"] * p.chosen + ["plain"] * p.plain + ["misses"] * (p.feasible is False)
        notes += [f"diverged on {p.diverged} of {p.seeds}"] * bool(p.diverged)
        cells = [_ranged(p.accuracy, ".2%"), *(_ranged(r, ".2%") for r in p.recall)]
        cells += [_ranged(p.expected_cost, ".4f"), _ranged(p.rule_cost, ".4f"), ", ".join(notes)]
        table.add_row(p.name, *cells)
    return table


def _rows_table(choice: "choice.Choice") -> Table:
    """Return a row a model and rule, on the test set."""
    table = Table(box=None, pad_edge=False)
    table.add_column("on the test set, 95 %", no_wrap=True)
    recalls = [f"recall {name}" for name in choice.focus]
    for name in ("accuracy", *recalls, "expected cost", "against plain, paired"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in choice.rows:
        cells = [_between(row.accuracy, ".2%"), *(_between(r, ".2%") for r in row.recall)]
        cells.append(_between(row.expected_cost, ".4f"))
        cells.append("-" if row.difference is None else _between(row.difference, "+.4f"))
        table.add_row(row.name, *cells)
    return table


def _ranged(score: "choice.Score", form: str) -> str:
    """Return a mean over seeds and half of its interval."""
    if math.isnan(score.low):
        return _number(score.value, form)
    half = format((score.high - score.low) / 2, form)
    return f"{_number(score.value, form)} ± {half}"


def _between(score: "choice.Score", form: str) -> str:
    if math.isnan(score.low):
        return _number(score.value, form)
    return f"{score.value:{form}} [{score.low:{form}}, {score.high:{form}}]"


def _count(n: int, what: str) -> str:
    return f"{n} {what}" if n == 1 else f"{n} {what}s"


def print_evaluation(found: "runs.EvaluationReport") -> None:
    """Print what a model's decisions cost, by rule, class by class and pair by pair."""
    out, judged, costs = _console(), found.evaluation, found.evaluation.rule.costs
    for line in decisions.cost_sentences(costs):
        out.print(f"cost: {line}")
    fitted = f"fitted on {found.temperature_on}" if found.temperature_on else "no validation split"
    out.print(
        f"calibration error {judged.calibration_error:.4f}, {judged.calibrated_error:.4f} at "
        f"temperature {judged.rule.temperature:.3f} ({fitted})",
        markup=False,
    )
    for name, scores in judged.rules.items():
        out.print()
        out.print(_rule_line(name, scores))
        out.print(_class_table(scores, costs.classes))
        if len(costs.decisions) <= _SQUARE:
            for title, matrix in (("counts", scores.confusion), ("cost", scores.cost)):
                out.print(_confusion_table(f"{title}, rows the truth", matrix, costs))


def _rule_line(name: str, scores: "decisions.DecisionScores") -> str:
    cost, accuracy = scores.expected_cost, scores.accuracy
    part = scores.normalised_cost
    normal = "" if math.isnan(part) else f", {part:.3f} of the best constant decision"
    return (
        f"decisions by {name}: accuracy {accuracy.value:.2%} [{accuracy.low:.2%}, "
        f"{accuracy.high:.2%}], expected cost {cost.value:.4f} [{cost.low:.4f}, {cost.high:.4f}]"
        f"{normal}"
    )


def _confusion_table(title: str, matrix: Any, costs: "decisions.Costs") -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column(title, no_wrap=True)
    for name in costs.decisions:
        table.add_column(name, justify="right", no_wrap=True)
    for name, row in zip(costs.classes, matrix.tolist(), strict=True):
        table.add_row(name, *("." if v == 0 else f"{v:g}" for v in row))
    return table


def _class_table(scores: "decisions.DecisionScores", classes: tuple[str, ...]) -> Table:
    """Return a table of count, recall and precision with their intervals, a row a class."""
    table = Table(box=None, pad_edge=False)
    table.add_column("class")
    for name in ("count", "recall", "95 %", "precision", "95 %"):
        table.add_column(name, justify="right", no_wrap=True)
    columns = (
        scores.recall,
        scores.precision,
    )
    for c, (name, count) in enumerate(zip(classes, scores.confusion.sum(1).tolist(), strict=True)):
        cells = []
        for part, low, high in columns:
            known = not math.isnan(float(part[c]))
            between = f"{float(low[c]):.2%} to {float(high[c]):.2%}" if known else "-"
            cells += [_number(part[c], ".2%"), between]
        table.add_row(name, f"{count:,}", *cells)
    return table
