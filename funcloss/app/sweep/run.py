"""A sweep from start to report: its trials trained, one chosen, the test set read."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from funcloss._folders import holding, settle
from funcloss.app.choice.finish import Candidates, constraint_rows, focus_of, report_on, written
from funcloss.app.choice.words import fading_sentence, sweep_sentences
from funcloss.app.data import short_name
from funcloss.app.report.choice import OUT_OF_FOLD_EXAMPLES, Choice, Point
from funcloss.app.runs import folder
from funcloss.app.runs.evaluation import evaluated
from funcloss.app.runs.events import Note, Show, Watcher
from funcloss.app.runs.folds import OutOfFold
from funcloss.app.runs.lifecycle import Outcome, load_checkpoint, write_run
from funcloss.app.runs.setup import Setup, setup_on
from funcloss.app.sweep import folded
from funcloss.app.sweep.axes import describe
from funcloss.app.sweep.plan import SPEC, Sweep, SweepSpec, start, taken_up
from funcloss.app.sweep.seeds import prepared, restored, run_seeds, steps_of
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

    Under cross-validation the choice is by out-of-fold predictions, the chosen trial is trained on
    all of the data at the end, and the report is on the out-of-fold examples where the data has no
    test split of its own.

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
        with holding(path):
            return _swept_through(made, watcher)
    if out is None:
        raise ConfigError("resume needs the folder of a sweep")
    with holding(path):
        _check_unfinished(path)
        made = taken_up(spec, path, show)
        settle(path, last=SPEC)
        return _swept_through(made, watcher)


def _swept_through(made: Sweep, watcher: Watcher) -> Outcome:
    """Train all trials, choose one and report on it."""
    if made.config.folds:
        found = folded.run_folds(made, watcher)
        stopped = Outcome(made.folder, False, made.config)
        return stopped if found is None else _on_all_data(made, found, watcher)
    made = prepared(made, watcher.show)
    records = run_seeds(made, watcher)
    if records is None:
        return Outcome(made.folder, False, made.config)
    return _reported(made, records, watcher.show)


def _new_folder(spec: SweepSpec) -> Path:
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    name = f"{short_name(spec.config.dataset)}-{short_name(spec.config.model)}-{stamp}"
    return folder.fresh_name(Path("sweeps"), folder.as_name(name))


def _check_unfinished(path: Path) -> None:
    if (path / REPORT).with_suffix(".json").exists():
        _tidy(path)  # what a kill at the very end left
        raise RunError(f"{path} is finished: its report is {path / REPORT}")


def _tidy(path: Path) -> None:
    """Remove the states and scores of all trials, which nothing reads after the end."""
    for kept in (*path.glob("seed-[0-9]*.safetensors"), *path.glob("folds-[0-9]*.safetensors")):
        kept.unlink(missing_ok=True)


def _reported(made: Sweep, records: list[Record], show: Show) -> Outcome:
    """Choose a trial, read the test set, and write the chosen run and the report."""
    classes = made.setup.dataset.classes
    focus = [classes[c] for c in focus_of(made.setup.costs, made.constraints, _swept(made))]
    points = points_of(records, made.constraints, focus, made.setup.costs)
    number, plain = _pick(made, points, misses(records, made.constraints))
    own = [r for r in records if r["trial"] == number]
    show(Note("reading the test set"))
    base = number if plain is None else plain
    found = [_evaluated(made, s, {base, number}) for s in range(made.seeds)]
    run_dir = made.folder / "chosen"
    seed = _best_seed(made, own)
    setup, state, summary = _write_chosen(made, seed, number, found[seed][number], run_dir)
    for text in summary["warnings"]:
        show(Note(text, warning=True))
    candidates = _candidates(
        made, number, plain, {n: [of_seed[n] for of_seed in found] for n in (base, number)}
    )
    choice = report_on(setup, candidates, made.constraints, _swept(made), (state, setup.hyper))
    choice = dataclasses.replace(
        choice,
        constraints=constraint_rows(made.constraints, means([r["reached"] for r in own]), classes),
    )
    more = []
    if (error := faded(records, made.axes)) is not None:
        even = float(setup.counts.max()) < 1.1 * float(setup.counts.min())
        more.append(fading_sentence(error, even=even))
    choice = _with_points(made, choice, points, plain, more)
    files = written(choice, made.folder / REPORT, run_dir, setup)
    _tidy(made.folder)
    return Outcome(made.folder, True, made.config, summary, choice, tuple(files), run_dir)


def _on_all_data(made: Sweep, found: Mapping[int, OutOfFold], watcher: Watcher) -> Outcome:
    """Choose a trial by its out-of-fold scores, train it on all data, and write the report.

    Where the data has a test split of its own, plain training is trained on all data too, and both
    are compared on it; else they are compared on the out-of-fold examples.
    """
    swept = _swept(made)
    points = folded.points_of(made, found, focus_of(made.setup.costs, (), swept))
    number, plain = _pick(made, points, [])
    base = number if plain is None else plain
    tested = bool(len(made.setup.dataset.test.labels))
    runs: dict[int, Outcome] = {}
    evaluations: dict[int, list[dict[str, Evaluation]]] = {}
    for n, name in {base: "plain", number: "chosen"}.items():
        setup = folded.setup_of(made, made.trials[n])
        if tested or n == number:
            runs[n] = folded.run_trial(made, n, name, watcher)
            if not runs[n].finished:
                return Outcome(made.folder, False, made.config)
        evaluations[n] = (
            folded.on_test(runs[n], setup, found[n])
            if tested
            else folded.on_repeats(setup, found[n])
        )
    chosen = runs[number]
    setup = setup_on(chosen.config, made.setup.dataset)
    candidates = dataclasses.replace(
        _candidates(made, number, plain, evaluations),
        chosen_on=OUT_OF_FOLD_EXAMPLES,
        tested_on="test set" if tested else OUT_OF_FOLD_EXAMPLES,
    )
    choice = report_on(setup, candidates, (), swept, load_checkpoint(chosen.folder, setup))
    choice = dataclasses.replace(choice, seeds=made.config.folds * made.config.repeats)
    choice = _with_points(made, choice, points, plain, [])
    files = written(choice, made.folder / REPORT, chosen.folder, setup)
    _tidy(made.folder)
    return Outcome(
        made.folder, True, made.config, chosen.summary, choice, tuple(files), chosen.folder
    )


def _swept(made: Sweep) -> list[str]:
    """Return the classes whose weight is swept."""
    return [axis.key for axis in made.axes if axis.option == "class_weight"]


def _pick(made: Sweep, points: list[Point], missed: Sequence[float]) -> tuple[int, int | None]:
    """Mark the chosen trial among the points; return its number and that of plain training."""
    number = chosen_of(points, made.axes, made.constraints, missed)
    if number is None:
        raise RunError(
            f"every trial of {made.folder} diverged: sweep smaller values, or lower learning_rate"
        )
    points[number] = dataclasses.replace(points[number], chosen=True)
    return number, baseline_of(points)


def _candidates(
    made: Sweep,
    number: int,
    plain: int | None,
    evaluations: Mapping[int, Sequence[Mapping[str, Evaluation]]],
) -> Candidates:
    """Return the chosen trial beside plain training, by number of the trial.

    Where every plain training diverged, the chosen trial stands alone, under its own name.
    """
    name, base = made.trials[number].name, number if plain is None else plain
    return Candidates(
        plain=evaluations[base],
        chosen=None if number == base else evaluations[number],
        name=name,
        plain_name=name if plain is None else "plain",
    )


def _with_points(
    made: Sweep, choice: Choice, points: Sequence[Point], plain: int | None, more: Sequence[str]
) -> Choice:
    """Return a choice with the trials that it was made between, and what is to be said of them."""
    chosen = next(p for p in points if p.chosen)
    compared = None if plain is None else points[plain]
    lines = sweep_sentences(
        points, chosen, compared, choice.constraints, order_of(made.axes), choice.chosen_on
    )
    return dataclasses.replace(
        choice,
        title=f"Sweep of {', '.join(axis.name for axis in made.axes)}",
        lines=(*lines, *more, *choice.lines),
        axes=tuple(axis.name for axis in made.axes),
        points=tuple(points),
    )


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
    for line in steps_of(made, seed):
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
