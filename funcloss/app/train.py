"""A training run from start to report: within constraints, with a baseline to compare with."""

import contextlib
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from funcloss._json import or_nan
from funcloss.app.choice.finish import Candidates, constraint_rows, report_on, written
from funcloss.app.choice.words import constraint_sentences
from funcloss.app.config import TrainConfig, plain_config
from funcloss.app.decoding import from_plain
from funcloss.app.report.choice import Ascent
from funcloss.app.runs import folder
from funcloss.app.runs.baseline import PLAIN, trained
from funcloss.app.runs.constrained import constraints_of
from funcloss.app.runs.evaluation import evaluated
from funcloss.app.runs.events import Watcher
from funcloss.app.runs.lifecycle import Outcome, kept_model, load_checkpoint, run
from funcloss.app.runs.setup import Setup, make_setup, setup_on
from funcloss.app.runs.summary import ConstrainedSummary
from funcloss.constraints.bounds import held, reached
from funcloss.errors import RunError

REPORT = "floor.html"


def train(
    config: TrainConfig,
    run_dir: str | Path | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    show: Callable[[Any], None] = lambda event: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Outcome:
    """Train as a configuration says, into a run folder.

    Under floors and ceilings the class weights follow what validation data shows; then the same
    training runs once more without them, as a baseline, and both are compared on the test set.

    Args:
        config: What to train; to resume, what :func:`funcloss.app.runs.read_config` reads from the
            folder, perhaps with another ``data_dir``.
        run_dir: The run folder; None: a new one under ``runs``.
        resume: Go on from the last checkpoint of the folder, as if the run had never stopped.
        overwrite: A run that is at ``run_dir`` may be replaced.
        show: Called with everything that happens.
        should_stop: Asked after every step; True saves and ends.

    Returns:
        The run folder and the summary; under floors and ceilings the choice too.

    Raises:
        ConfigError: the request makes no sense on this machine or data, or the folder is in use.
        DataError: the data cannot be had.
        RunError: the run folder cannot be written, its files are not of one run, or a run under
            floors that is to be resumed is finished.
    """
    watcher = Watcher(show, should_stop)
    constrained = bool(config.floor or config.ceiling)
    if constrained and resume and run_dir is not None:
        place = Path(run_dir).expanduser()
        if (place / REPORT).with_suffix(".json").exists():
            raise RunError(f"{place} is finished: its report is {place / REPORT}")
    with contextlib.ExitStack() as held:
        outcome = run(
            config, run_dir, resume=resume, overwrite=overwrite, watcher=watcher, held=held
        )
        if not (constrained and outcome.finished):
            return outcome
        path = str(outcome.folder / folder.SUMMARY)
        from_plain(ConstrainedSummary, outcome.summary, path)
        baseline = _baseline(outcome, config, watcher)
        if not baseline.finished:
            return dataclasses.replace(outcome, finished=False, summary={})
        setup = make_setup(dataclasses.replace(outcome.config, init="", pretrained=False))
        return _compared(outcome, baseline.folder, setup)


def _baseline(outcome: Outcome, asked: TrainConfig, watcher: Watcher) -> Outcome:
    """Train without constraints, if that is not done."""
    note = "training once more without constraints, to compare with,"
    # A run that was resumed has forgotten where its first weights are from.
    config = dataclasses.replace(
        plain_config(outcome.config),
        init=outcome.config.init or asked.init,
        pretrained=outcome.config.pretrained or asked.pretrained,
    )
    return trained(config, outcome.folder / PLAIN, watcher, note=note)


def _compared(outcome: Outcome, plain_dir: Path, setup: Setup) -> Outcome:
    """Report on a run within constraints beside its baseline."""
    run_dir, summary = outcome.folder, outcome.summary
    constraints = constraints_of(setup)
    plain = setup_on(plain_config(setup.config), setup.dataset)
    as_plain = evaluated(kept_model(plain_dir, plain), setup.dataset)
    found = evaluated(kept_model(run_dir, setup), setup.dataset)
    ascent = _ascent(run_dir)
    best = next((a for a in ascent if a.step == summary["best_step"]), None)
    values = [or_nan(row["reached"]) for row in summary["constraints"]]
    rows = constraint_rows(constraints, values, setup.dataset.classes)
    plain_keeps = held(constraints, reached(constraints, as_plain["validation"].argmax))
    weights = summary["weights_found"]
    candidates = Candidates([as_plain], [found], "the model under constraints")
    choice = report_on(
        setup,
        candidates,
        constraints,
        list(weights),
        load_checkpoint(run_dir, setup),
    )
    choice = dataclasses.replace(
        choice,
        title="Constraints",
        lines=(
            *constraint_sentences(rows, ascent, best, weights, plain_keeps=plain_keeps),
            *choice.lines,
        ),
        constraints=rows,
        ascent=ascent,
    )
    files = written(choice, run_dir / REPORT, run_dir, setup)
    return dataclasses.replace(outcome, choice=choice, files=tuple(files))


def _ascent(run_dir: Path) -> tuple[Ascent, ...]:
    """Return the measurements of a training under constraints."""
    return tuple(
        Ascent(
            step=r["step"],
            weights=r["weights"],
            reached=tuple(map(or_nan, r["reached"].values())),
            accuracy=r["accuracy"],
            feasible=r["feasible"],
        )
        for r in folder.records_of(run_dir)
        if r["kind"] == "constraints"
    )
