"""What a user asks for: a sweep, or a training under limits, from start to report."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from funcloss.app.config import TrainConfig
from funcloss.app.data import short_name
from funcloss.app.report.choice import Ascent, Choice
from funcloss.app.report.choice import Limit as Reached
from funcloss.app.runs import (
    Note,
    Outcome,
    folder,
    kept_model,
    load_checkpoint,
    resume,
    train,
    write_run,
)
from funcloss.app.runs.constrained import limits_of, steer_by_limits
from funcloss.app.runs.setup import Setup, make_setup, setup_on
from funcloss.app.sweep.axes import Axis, describe, plain_config
from funcloss.app.sweep.finish import (
    focus_of,
    gradient_of,
    judged,
    on_test,
    write_choice,
)
from funcloss.app.sweep.members import member_hyper, member_state
from funcloss.app.sweep.plan import Sweep, read_spec, seed_file, start, taken_up
from funcloss.app.sweep.seeds import STEPS, prepared, restored, run_seeds
from funcloss.app.sweep.select import baseline_of, chosen_of, faded, misses, points_of
from funcloss.app.sweep.words import (
    fading_sentence,
    limit_sentences,
    slope_sentences,
    sweep_sentences,
)
from funcloss.constraints.limits import Limit, held, limit_text, reached
from funcloss.decisions import Evaluation, cost_sentences
from funcloss.errors import RunError

Show = Callable[[Any], None]


class Chosen(NamedTuple):
    """How a choice ended."""

    folder: Path
    run_dir: Path  # of the chosen model
    choice: Choice | None  # None: it was told to stop
    files: list[Path]  # of the report, the page first

    @property
    def finished(self) -> bool:
        """Return whether it came to its end, and was not told to stop."""
        return self.choice is not None


def sweep(
    config: TrainConfig,
    axes: Sequence[Axis],
    out: str | Path | None = None,
    *,
    seeds: int = 1,
    method: str = "auto",
    overwrite: bool = False,
    show: Show = lambda event: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Chosen:
    """Train every member of a sweep, choose one by validation data, and report on the test set.

    Args:
        config: What the members share; its floors and ceilings are what the choice must keep.
        axes: What is swept: class weights, options of the loss, the learning rate.
        out: The folder to make; None: a new one under ``sweeps``.
        seeds: How many seeds each member is trained with, from the configuration's on.
        method: ``vmap``: all members in one program; ``loop``: one after another; ``auto``: a
            loop for a model with convolutions that is not on CUDA, else ``vmap``.
        overwrite: A sweep that is at ``out`` may be replaced.
        show: Called with everything that happens.
        should_stop: Asked after every step; True saves and ends.

    Returns:
        The folder, with the run folder of the chosen member in it, and the choice.

    Raises:
        ConfigError: the request makes no sense on this machine or data, or the folder is in use.
        DataError: the data cannot be had.
        RunError: the folder cannot be written, or every member diverged.
    """
    if out is None:
        stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
        name = f"{short_name(config.dataset)}-{short_name(config.model)}-{stamp}"
        out = folder.fresh_name(Path("sweeps"), folder.as_name(name))
    path = Path(out).expanduser()
    made = start(config, axes, path, seeds=seeds, method=method, overwrite=overwrite, show=show)
    return _swept(made, show, should_stop)


def resume_sweep(
    out: str | Path,
    *,
    data_dir: str = "",
    allow_import: bool = False,
    show: Show = lambda event: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Chosen:
    """Take up a sweep where its files are, as if it had never stopped.

    Args:
        out: The folder of a sweep.
        data_dir: Where the data is now, if it has moved.
        allow_import: Whether code that the folder names may be imported.
        show: Called with everything that happens.
        should_stop: Asked after every step; True saves and ends.

    Returns:
        As :func:`sweep` does.

    Raises:
        DataError: the data cannot be had.
        RunError: the folder is not that of a sweep, is finished, or cannot be written.
    """
    path = Path(out).expanduser()
    seeds = read_spec(path).seeds
    if (path / "sweep.json").exists():
        for seed in range(seeds):  # left by a kill at the very end
            seed_file(path, seed).unlink(missing_ok=True)
        raise RunError(f"{path} is finished: its report is {path / 'sweep.html'}")
    made = taken_up(path, data_dir=data_dir, allow_import=allow_import, show=show)
    return _swept(made, show, should_stop)


def train_under_limits(
    config: TrainConfig,
    run_dir: str | Path | None = None,
    *,
    overwrite: bool = False,
    show: Show = lambda event: None,
    should_stop: Callable[[], bool] = lambda: False,
    observer: Any = None,
) -> Chosen:
    """Train within floors and ceilings, then once more plainly to compare with, and report.

    Args:
        config: The training; its ``floor`` and ``ceiling`` are the limits.
        run_dir: The run folder to make; None: a new one under ``runs``.
        overwrite: A run that is at ``run_dir`` may be replaced.
        show: Called with everything that happens.
        should_stop: Asked after every step; True saves and ends.
        observer: As for :func:`funcloss.app.runs.train`.

    Returns:
        The run folder, whose model is the best moment of the training, and the choice.

    Raises:
        ConfigError: the request makes no sense on this machine or data, or the folder is in use.
        DataError: the data cannot be had.
        RunError: the folder cannot be written.
    """
    watch: dict[str, Any] = {"show": show, "should_stop": should_stop, "observer": observer}
    outcome = train(config, run_dir, overwrite=overwrite, steer=steer_by_limits, **watch)
    return _compared(outcome, watch)


def resume_under_limits(
    run_dir: str | Path,
    *,
    data_dir: str = "",
    allow_import: bool = False,
    show: Show = lambda event: None,
    should_stop: Callable[[], bool] = lambda: False,
    observer: Any = None,
) -> Chosen:
    """Take up a training under limits, or the plain one after it, where its files are.

    Args:
        run_dir: A run folder with limits.
        data_dir: Where the data is now, if it has moved.
        allow_import: Whether code that the folder names may be imported.
        show: Called with everything that happens.
        should_stop: Asked after every step; True saves and ends.
        observer: As for :func:`funcloss.app.runs.train`.

    Returns:
        As :func:`train_under_limits` does.

    Raises:
        ConfigError: a device of the run is not on this machine.
        DataError: the data cannot be had.
        RunError: the folder is not that of a run, is finished, or cannot be written.
    """
    path = Path(run_dir).expanduser()
    if (path / "floor.json").exists():
        raise RunError(f"{path} is finished: its report is {path / 'floor.html'}")
    watch: dict[str, Any] = {"show": show, "should_stop": should_stop, "observer": observer}
    where = {"data_dir": data_dir, "allow_import": allow_import}
    outcome = resume(path, steer=steer_by_limits, **where, **watch)
    return _compared(outcome, watch, **where)


def _swept(made: Sweep, show: Show, should_stop: Callable[[], bool]) -> Chosen:
    made = prepared(made, show)
    records = run_seeds(made, show=show, should_stop=should_stop)
    run_dir = made.folder / "chosen"
    if records is None:
        return Chosen(made.folder, run_dir, None, [])
    classes, costs = made.setup.dataset.classes, made.setup.costs
    swept = [axis.key for axis in made.axes if axis.option == "class_weight"]
    focus = focus_of(costs, made.limits, swept)
    names = tuple(classes[c] for c in focus)
    points = points_of(records, made.limits, names)
    number = chosen_of(points, made.axes, made.limits, misses(records, made.limits))
    if number is None:
        raise RunError(
            f"every member of {made.folder} diverged: sweep smaller values, or lower learning_rate"
        )
    points[number] = dataclasses.replace(points[number], chosen=True)
    own = [r for r in records if r["member"] == number]
    show(Note("reading the test set"))
    # Where every plain training diverged, the chosen member stands alone, under its own name.
    plain = baseline_of(points)
    base = number if plain is None else plain
    found = [_judged(made, s, {base, number}) for s in range(made.seeds)]
    entry = made.entries[number]
    test = on_test(
        made.setup._replace(config=entry.config),
        [of_seed[base] for of_seed in found],
        None if number == base else [of_seed[number] for of_seed in found],
        entry.name,
        made.limits,
        focus,
        plain_name=entry.name if plain is None else "plain",
    )
    seed = min(
        own, key=lambda r: (not held(made.limits, _defined(r["reached"])), r["expected_cost"])
    )["seed"]
    setup, state, summary = _write_chosen(made, seed, number, found[seed][number], run_dir)
    for text in summary["warnings"]:
        show(Note(text, warning=True))
    limit_rows = _limits(made.limits, _mean([r["reached"] for r in own]), classes)
    compared = None if plain is None else points[plain]
    lines = sweep_sentences(points, points[number], compared, limit_rows, made.axes)
    if (error := faded(records, made.axes)) is not None:
        even = float(setup.counts.max()) < 1.1 * float(setup.counts.min())
        lines.append(fading_sentence(error, even=even))
    gradient, horizon = gradient_of(setup, state, setup.hyper)
    choice = Choice(
        title=f"Sweep of {', '.join(axis.name for axis in made.axes)}",
        lines=(*lines, *test.lines, *slope_sentences(gradient, horizon)),
        costs=tuple(cost_sentences(costs)),
        focus=names,
        axes=tuple(axis.name for axis in made.axes),
        points=tuple(points),
        limits=limit_rows,
        ascent=(),
        rows=test.rows,
        gradient=gradient,
        gradient_steps=horizon,
        seeds=made.seeds,
    )
    files = write_choice(choice, made.folder, run_dir, setup, "sweep.html")
    for s in range(made.seeds):  # every member of every seed: nothing reads them any more
        made.seed_file(s).unlink(missing_ok=True)
    return Chosen(made.folder, run_dir, choice, files)


def _judged(made: Sweep, seed: int, numbers: Iterable[int]) -> dict[int, dict[str, Evaluation]]:
    """Judge members of a seed, whose file is read once."""
    members, found = restored(made, seed), {}
    for number in numbers:
        entry, state = made.entries[number], member_state(members, made.groups, number)
        # The network, its optimiser and its data are those of every member; the loss may differ.
        own = made.setup._replace(config=entry.config)
        setup = own if entry.values else setup_on(entry.config, made.setup.dataset)
        hyper = member_hyper(made.groups, number)
        found[number] = judged(setup, setup.trained(state, hyper))
    return found


def _write_chosen(made: Sweep, seed: int, number: int, evaluations, run_dir: Path):
    """Write the run folder of a member, as its training alone would have."""
    entry = made.entries[number]
    seed, compiled = made.config.seed + seed, made.config.compile
    config = dataclasses.replace(entry.config, seed=seed, compile=compiled)
    setup, state = (
        setup_on(config, made.setup.dataset),
        member_state(restored(made, seed), made.groups, number),
    )
    per_epoch = setup.per_epoch
    records = []
    for line in folder.read_lines(made.folder / STEPS):
        if line["seed"] == seed:
            kept = {k: v for k, v in line.items() if k not in ("seed", "losses", "loss")}
            place = {"kind": "step", "epoch": (line["step"] - 1) // per_epoch + 1}
            records.append(place | kept | {"loss": line["losses"][number]})
    run = {
        "command": folder.command_line(),
        "dataset_note": setup.dataset.note,
        "sweep": f"{describe(entry.values) or 'plain'}, beside {len(made.entries) - 1} others",
        "environment": folder.environment(),
    }
    return setup, state, write_run(run_dir, setup, state, records, evaluations, run)


def _compared(
    outcome: Outcome, watch: dict[str, Any], *, data_dir: str = "", allow_import: bool = False
) -> Chosen:
    """Train plainly, if that is not done, and report on both."""
    run_dir = outcome.folder
    if not outcome.finished:
        return Chosen(run_dir, run_dir, None, [])
    config = outcome.config
    config = dataclasses.replace(config, data_dir=data_dir or config.data_dir)
    plain_dir = run_dir / "plain"
    if folder.read_summary(plain_dir) is None:
        text = f"training once more without limits, to compare with, into {plain_dir}"
        watch["show"](Note(text))
        if (plain_dir / folder.CONFIG).is_file():
            where = {"data_dir": config.data_dir, "allow_import": allow_import}
            plain = resume(plain_dir, test_once=True, **where, **watch)
        else:
            plain = train(plain_config(config), plain_dir, test_once=True, **watch)
        if not plain.finished:
            return Chosen(run_dir, run_dir, None, [])
    setup = make_setup(dataclasses.replace(config, init=""))
    return _reported(run_dir, setup, plain_dir, outcome.summary)


def _reported(run_dir: Path, setup: Setup, plain_dir: Path, summary: dict[str, Any]) -> Chosen:
    dataset, costs = setup.dataset, setup.costs
    classes, limits = dataset.classes, limits_of(setup)
    focus = focus_of(costs, limits, list(summary["weights_found"]))
    plain = setup_on(plain_config(setup.config), dataset)
    as_plain = judged(plain, kept_model(plain_dir, plain))
    found = judged(setup, kept_model(run_dir, setup))
    test = on_test(setup, [as_plain], [found], "the model under limits", limits, focus)
    ascent = _ascent(run_dir)
    best = next((a for a in ascent if a.step == summary["best_step"]), None)
    limit_rows = _limits(limits, _defined([row["reached"] for row in summary["limits"]]), classes)
    plain_keeps = held(limits, reached(limits, as_plain["validation"].argmax))
    weights = summary["weights_found"]
    lines = limit_sentences(limit_rows, ascent, best, weights, plain_keeps=plain_keeps)
    gradient, horizon = gradient_of(setup, *load_checkpoint(run_dir, setup))
    choice = Choice(
        title=f"Limits of {run_dir.name}",
        lines=(*lines, *test.lines, *slope_sentences(gradient, horizon)),
        costs=tuple(cost_sentences(costs)),
        focus=tuple(classes[c] for c in focus),
        axes=(),
        points=(),
        limits=limit_rows,
        ascent=ascent,
        rows=test.rows,
        gradient=gradient,
        gradient_steps=horizon,
        seeds=1,
    )
    files = write_choice(choice, run_dir, run_dir, setup, "floor.html")
    return Chosen(run_dir, run_dir, choice, files)


def _ascent(run_dir: Path) -> tuple[Ascent, ...]:
    """Return the measurements of a training under limits."""
    return tuple(
        Ascent(
            step=r["step"],
            weights=r["weights"],
            reached=tuple(_defined(list(r["reached"].values()))),
            accuracy=r["accuracy"],
            feasible=r["feasible"],
        )
        for r in folder.read_records(run_dir)
        if r["kind"] == "steering"
    )


def _limits(
    limits: Sequence[Limit], values: Sequence[float], classes: Sequence[str]
) -> tuple[Reached, ...]:
    return tuple(
        Reached(limit_text(limit, classes), limit.bound, value, held([limit], [value]))
        for limit, value in zip(limits, values, strict=True)
    )


def _mean(rows: list[list[float | None]]) -> list[float]:
    return [sum(column) / len(rows) for column in zip(*map(_defined, rows), strict=True)]


def _defined(values: Sequence[float | None]) -> list[float]:
    return [float("nan") if v is None else v for v in values]
