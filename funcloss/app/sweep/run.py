"""A sweep from start to report: its trials trained, one chosen, the test set read."""

import dataclasses
from collections.abc import Callable, Iterable
from datetime import datetime
from pathlib import Path
from typing import Any

from funcloss.app.choice.finish import Candidates, constraint_rows, focus_of, report_on, written
from funcloss.app.choice.words import fading_sentence, sweep_sentences
from funcloss.app.data import short_name
from funcloss.app.runs import folder
from funcloss.app.runs.evaluation import evaluated
from funcloss.app.runs.events import Note, Show, Watcher
from funcloss.app.runs.lifecycle import Outcome, write_run
from funcloss.app.runs.setup import Setup, setup_on
from funcloss.app.sweep.axes import describe
from funcloss.app.sweep.plan import Sweep, SweepSpec, seed_file, start, taken_up
from funcloss.app.sweep.seeds import STEPS, prepared, restored, run_seeds
from funcloss.app.sweep.select import (
    Record,
    baseline_of,
    chosen_of,
    faded,
    means,
    misses,
    order_of,
    points_of,
)
from funcloss.app.sweep.trials import trial_hyper, trial_state
from funcloss.constraints.bounds import held
from funcloss.decisions import Evaluation
from funcloss.errors import ConfigError, RunError
from funcloss.training import TrainState

REPORT = "sweep.html"


def sweep(
    spec: SweepSpec,
    out: str | Path | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    show: Callable[[Any], None] = lambda event: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Outcome:
    """Train every trial of a sweep, choose one by validation data, and report on the test set.

    Args:
        spec: What is swept; to resume, what :func:`read_spec` reads from the folder, perhaps with
            another ``data_dir``.
        out: The folder; None: a new one under ``sweeps``.
        resume: Go on from where the folder's files are, as if the sweep had never stopped.
        overwrite: A sweep that is at ``out`` may be replaced.
        show: Called with everything that happens.
        should_stop: Asked after every step; True saves and ends.

    Returns:
        The folder, with the run folder of the chosen trial in it, and the choice.

    Raises:
        ConfigError: the request makes no sense on this machine or data, or the folder is in use.
        DataError: the data cannot be had.
        RunError: the folder cannot be written, every trial diverged, or a sweep that is to be
            resumed is finished.
    """
    watcher = Watcher(show, should_stop)
    path = _new_folder(spec) if out is None else Path(out).expanduser()
    if not resume:
        made = start(spec, path, show, overwrite=overwrite)
    elif out is None:
        raise ConfigError("resume needs the folder of a sweep")
    else:
        _check_unfinished(spec, path)
        made = taken_up(spec, path, show)
    made = prepared(made, show)
    records = run_seeds(made, watcher)
    if records is None:
        return Outcome(made.folder, False, made.config)
    return _reported(made, records, show)


def _new_folder(spec: SweepSpec) -> Path:
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    name = f"{short_name(spec.config.dataset)}-{short_name(spec.config.model)}-{stamp}"
    return folder.fresh_name(Path("sweeps"), folder.as_name(name))


def _check_unfinished(spec: SweepSpec, path: Path) -> None:
    if (path / REPORT).with_suffix(".json").exists():
        for seed in range(spec.seeds):  # left by a kill at the very end
            seed_file(path, seed).unlink(missing_ok=True)
        raise RunError(f"{path} is finished: its report is {path / REPORT}")


def _reported(made: Sweep, records: list[Record], show: Show) -> Outcome:
    """Choose a trial, read the test set, and write the chosen run and the report."""
    classes = made.setup.dataset.classes
    swept = [axis.key for axis in made.axes if axis.option == "class_weight"]
    focus = [classes[c] for c in focus_of(made.setup.costs, made.constraints, swept)]
    points = points_of(records, made.constraints, focus, made.setup.costs)
    number = chosen_of(points, made.axes, made.constraints, misses(records, made.constraints))
    if number is None:
        raise RunError(
            f"every trial of {made.folder} diverged: sweep smaller values, or lower learning_rate"
        )
    points[number] = dataclasses.replace(points[number], chosen=True)
    own = [r for r in records if r["trial"] == number]
    show(Note("reading the test set"))
    # Where every plain training diverged, the chosen trial stands alone, under its own name.
    plain = baseline_of(points)
    base = number if plain is None else plain
    found = [_evaluated(made, s, {base, number}) for s in range(made.seeds)]
    trial = made.trials[number]
    run_dir = made.folder / "chosen"
    seed = _best_seed(made, own)
    setup, state, summary = _write_chosen(made, seed, number, found[seed][number], run_dir)
    for text in summary["warnings"]:
        show(Note(text, warning=True))
    candidates = Candidates(
        plain=[of_seed[base] for of_seed in found],
        chosen=None if number == base else [of_seed[number] for of_seed in found],
        name=trial.name,
        plain_name=trial.name if plain is None else "plain",
    )
    choice = report_on(setup, candidates, made.constraints, swept, (state, setup.hyper))
    rows = constraint_rows(made.constraints, means([r["reached"] for r in own]), classes)
    compared = None if plain is None else points[plain]
    lines = sweep_sentences(points, points[number], compared, rows, order_of(made.axes))
    if (error := faded(records, made.axes)) is not None:
        even = float(setup.counts.max()) < 1.1 * float(setup.counts.min())
        lines.append(fading_sentence(error, even=even))
    choice = dataclasses.replace(
        choice,
        title=f"Sweep of {', '.join(axis.name for axis in made.axes)}",
        lines=(*lines, *choice.lines),
        axes=tuple(axis.name for axis in made.axes),
        points=tuple(points),
        constraints=rows,
    )
    files = written(choice, made.folder / REPORT, run_dir, setup)
    for s in range(made.seeds):  # every trial of every seed: nothing reads them any more
        seed_file(made.folder, s).unlink(missing_ok=True)
    return Outcome(made.folder, True, made.config, summary, choice, tuple(files), run_dir)


def _best_seed(made: Sweep, own: list[Record]) -> int:
    """Return the seed of a trial that keeps the constraints at the least cost."""

    def order(record: Record) -> tuple[bool, float]:
        return not held(made.constraints, means([record["reached"]])), record["expected_cost"]

    return min(own, key=order)["seed"]


def _evaluated(made: Sweep, seed: int, numbers: Iterable[int]) -> dict[int, dict[str, Evaluation]]:
    """Evaluate trials of a seed, whose file is read once."""
    trials, found = restored(made, seed), {}
    for number in numbers:
        trial, state = made.trials[number], trial_state(trials, made.groups, number)
        # The network, its optimiser and its data are those of every trial; the loss may differ.
        own = dataclasses.replace(made.setup, config=trial.config)
        setup = own if trial.values else setup_on(trial.config, made.setup.dataset)
        hyper = trial_hyper(made.groups, number)
        found[number] = evaluated(setup.trained(state, hyper), setup.dataset)
    return found


def _write_chosen(
    made: Sweep, seed: int, number: int, evaluations: dict[str, Evaluation], run_dir: Path
) -> tuple[Setup, TrainState, dict[str, Any]]:
    """Write the run folder of a trial, as its training alone would have."""
    trial = made.trials[number]
    config = dataclasses.replace(
        trial.config, seed=made.config.seed + seed, compile=made.config.compile
    )
    setup = setup_on(config, made.setup.dataset)
    state = trial_state(restored(made, seed), made.groups, number)
    records = []
    for line in folder.read_lines(made.folder / STEPS):
        if line["seed"] == seed:
            kept = {k: v for k, v in line.items() if k not in ("seed", "losses", "loss")}
            place = {"kind": "step", "epoch": (line["step"] - 1) // setup.per_epoch + 1}
            records.append(place | kept | {"loss": line["losses"][number]})
    about = {
        "command": folder.command_line(),
        "dataset_note": setup.dataset.note,
        "sweep": f"{describe(trial.values) or 'plain'}, beside {len(made.trials) - 1} others",
        "environment": folder.environment(),
    }
    return setup, state, write_run(run_dir, setup, state, records, evaluations, about)
