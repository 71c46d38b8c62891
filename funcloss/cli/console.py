"""What the commands show: progress on a terminal, plain lines when piped, tables."""

import shlex
import sys

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from funcloss import training


class TrainingConsole:
    """Shows the events of a training; on a terminal with a bar that moves."""

    def __init__(self, *, quiet: bool) -> None:
        """Show everything, or, when ``quiet``, warnings only."""
        self._quiet = quiet
        self._out = Console(highlight=False, soft_wrap=True)
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
            case training.EpochReport(number, epochs, loss, seconds, evaluations):
                parts = "  ".join(
                    f"{name} loss {scores.loss:.4f} accuracy {scores.accuracy:.2%}"
                    for name, scores in evaluations.items()
                )
                self._print(
                    f"epoch {number}/{epochs}  training loss {loss:.4f}  {parts}  {seconds:.1f} s"
                )

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


def class_table(scores: "training.Evaluation", classes: tuple[str, ...]) -> Table:
    """Return a table of count, recall and precision, a row a class."""
    table = Table(box=None, pad_edge=False)
    table.add_column("class")
    for name in ("count", "recall", "precision"):
        table.add_column(name, justify="right")
    rows = zip(classes, scores.support, scores.recall, scores.precision, strict=True)
    for name, count, recall, precision in rows:
        parts = ("-" if part.isnan() else f"{part:.2%}" for part in (recall, precision))
        table.add_row(escape(name), f"{int(count):,}", *parts)
    return table
