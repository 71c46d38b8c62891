"""A sweep at work: its trials side by side, each seed in turn, kept so that it can be resumed."""

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict, cast

import torch
from torch import Tensor

from funcloss._json import jsonable
from funcloss._trees import flatten
from funcloss.app.data import Examples, subset
from funcloss.app.decoding import Count, Number, from_json
from funcloss.app.runs import folder
from funcloss.app.runs.checkpoint import beneath, load_record, restore, save_tensors
from funcloss.app.runs.evaluation import (
    calibrated,
    evaluate,
    evaluate_examples,
    rescored,
)
from funcloss.app.runs.events import Note, Show, Watcher
from funcloss.app.runs.log import keep_lines, lines_of, with_steps_before
from funcloss.app.runs.rules import rule_fits
from funcloss.app.runs.setup import seeded_state, trial_batch
from funcloss.app.sweep.plan import Sweep, seed_file
from funcloss.app.sweep.select import Record
from funcloss.app.sweep.trials import (
    EnsembleState,
    init_trials,
    make_trials_step,
    trial_hyper,
    trial_state,
)
from funcloss.constraints.bounds import reached
from funcloss.errors import RunError
from funcloss.training import Compiled, Progress, TrainState, fit, prepare
from funcloss.typing import Batch

TRIALS, STEPS = "trials.jsonl", "steps.jsonl"
_TRAINING_EXAMPLES = 10_000  # that tell the training error


@dataclass(frozen=True)
class SeedReport:
    """A seed is trained, and its trials are scored on validation data."""

    number: int  # from 1
    seeds: int
    seconds: float  # of the training since this call began or went on
    records: list[Record]


@dataclass(frozen=True)
class SweepStarted:
    """Training begins, or goes on."""

    folder: Path
    trials: int
    seeds: int
    steps: int  # of each seed
    done: int  # of all seeds together


def prepared(sweep: Sweep, show: Show = lambda event: None) -> Sweep:
    """Compile the programs of a sweep if that is asked for, each checked against the eager one.

    Args:
        sweep: The sweep.
        show: Called with what came of it.

    Returns:
        The sweep with the steps to run; its configuration says whether all of them are compiled.
    """
    setup, mode = sweep.setup, sweep.config.compile if sweep.steps else "off"
    batch = trial_batch(setup)
    begun = init_trials(setup.state, sweep.groups)
    made: dict[int, Compiled] = {}
    for group, state in zip(sweep.groups, begun.groups.values(), strict=True):
        key = id(group.train_step)
        if key not in made:
            made[key] = prepare(group.train_step, mode, state, (batch, group.hyper))
    for note, warning in dict.fromkeys((m.note, m.warning) for m in made.values()):
        show(Note(f"step: {note}", warning))
    groups = [
        dataclasses.replace(g, train_step=made[id(g.train_step)].step_on) for g in sweep.groups
    ]
    compiled = "on" if all(m.on for m in made.values()) else "off"
    config = dataclasses.replace(sweep.config, compile=compiled)
    return dataclasses.replace(sweep, config=config, groups=groups)


def run_seeds(sweep: Sweep, watcher: Watcher) -> list[Record] | None:
    """Train every trial with every seed, from where the folder's files are.

    Args:
        sweep: The sweep.
        watcher: Its callbacks.

    Returns:
        A record a trial and seed, scored on validation data; None if it was told to stop.
    """
    kept = lines_of(sweep.folder / TRIALS, _trial_line, lambda text: watcher.show(Note(text, True)))
    records = _complete(sweep, [cast(Record, line) for _, line in kept])
    for seed in range(sweep.seeds):  # before anything changes
        if _scored(records, seed) or seed_file(sweep.folder, seed).exists():
            _stored(sweep, seed)
    step_on = make_trials_step(sweep.groups)
    done = sum(sweep.steps for seed in range(sweep.seeds) if _scored(records, seed))
    watcher.show(SweepStarted(sweep.folder, len(sweep.trials), sweep.seeds, sweep.steps, done))
    for seed in range(sweep.seeds):
        if _scored(records, seed):
            continue
        began = time.perf_counter()
        trials = _trained(sweep, seed, step_on, watcher)
        if trials is None:
            return None
        scores = (
            score(sweep, number, trial_state(trials, sweep.groups, number))
            for number in range(len(sweep.trials))
        )
        new = [cast(Record, {"seed": seed} | of_trial) for of_trial in scores]
        records = [*records, *new]
        keep_lines(sweep.folder / TRIALS, (folder.as_line(line).encode() for line in records))
        watcher.show(SeedReport(seed + 1, sweep.seeds, time.perf_counter() - began, new))
    return records


def score(sweep: Sweep, number: int, state: TrainState) -> dict[str, Any]:
    """Return what a trial does on validation data, and its training error.

    Args:
        sweep: The sweep.
        number: Which trial.
        state: Its state.

    Returns:
        A :class:`Record` but for its seed, None for what is not defined.
    """
    trial, setup = sweep.trials[number], sweep.setup
    dataset, hyper = setup.dataset, trial_hyper(sweep.groups, number)
    model = dataclasses.replace(setup, config=trial.config).trained(state, hyper)
    found = evaluate(model, dataset, ("validation",))
    model = calibrated(model, found["validation"], cut=dataset.cut)
    judged = rescored(model, found)["validation"]
    scores, train = judged.argmax, evaluate_examples(model, dataset, few_of(dataset.train))
    # With the optimiser's memory: where Adam's overflows, its steps are 0 from then on.
    finite = all(t.isfinite().all() for t in flatten(state).values())
    return jsonable(
        {
            "trial": number,
            "name": trial.name,
            "values": trial.values,
            "plain": trial.plain,
            "diverged": not (finite and bool(judged.logits.isfinite().all())),
            "accuracy": scores.accuracy.value,
            "expected_cost": scores.expected_cost.value,
            "rule_cost": judged.min_cost.expected_cost.value
            if rule_fits(trial.config)
            else math.nan,
            "temperature": judged.rule.temperature,
            "calibration_error": judged.calibration_error,
            "recall": dict(zip(dataset.classes, scores.recall.value.tolist(), strict=True)),
            "precision": dict(zip(dataset.classes, scores.precision.value.tolist(), strict=True)),
            "reached": list(reached(sweep.constraints, scores)),
            "support": scores.confusion.sum(1).tolist(),
            "train_accuracy": train.argmax.accuracy.value,
        }
    )


def few_of(examples: Examples) -> Examples:
    """Return 10,000 of the examples at most, evenly spread: they may be sorted by class."""
    n = len(examples.labels)
    stride = math.ceil(n / _TRAINING_EXAMPLES)
    return subset(examples, torch.arange(0, n, stride, device=examples.labels.device))


def _trained(sweep: Sweep, seed: int, step_on: Callable, watcher: Watcher) -> EnsembleState | None:
    """Train all trials with one seed, saving at the end of every epoch and when told to stop."""
    config, setup = sweep.config, sweep.setup
    path, log = seed_file(sweep.folder, seed), sweep.folder / STEPS
    recent: list[Tensor] = []  # of each step since the last line: mean loss, and that of each trial
    seconds = 0.0  # of those of them that were taken before a stop
    if path.exists():
        trials, before, seconds = _stored(sweep, seed)
        recent += before
    else:
        trials = init_trials(seeded_state(setup, config.seed + seed), sweep.groups)
    up_to = int(trials.step)
    kept = (
        text
        for text, line in lines_of(log, _step_line, lambda text: watcher.show(Note(text, True)))
        if (line["seed"], line["step"]) <= (seed, up_to)
    )
    keep_lines(log, kept)

    def take_step(trials: EnsembleState, batch: Batch):
        trials, metrics = step_on(trials, batch)
        recent.append(torch.cat((metrics["loss"][None], metrics["losses"])))
        return trials, metrics

    def on_progress(progress: Progress) -> None:
        nonlocal seconds
        each = [row[0] for row in recent]
        progress = with_steps_before(progress, each, seconds, config.batch_size)
        seconds = progress.seconds
        if progress.step % config.log_every == 0 or progress.step % setup.per_epoch == 0:
            losses = torch.stack(recent)[:, 1:].mean(0).tolist()
            line = {"seed": seed} | dataclasses.asdict(progress) | {"losses": losses}
            folder.append_line(log, line)
            recent.clear()
            seconds = 0.0
        watcher.show(progress)

    def save(trials: EnsembleState, step: int) -> None:
        unreported = {"unreported": torch.stack(recent)} if recent else {}
        header = {"step": step, "seed": seed, "seconds": seconds}
        save_tensors(path, flatten({"trials": trials} | unreported), header)

    for epoch in fit(
        trials,
        take_step,
        setup.drawn,
        order=setup.order,
        iter_batches=setup.iter_batches,
        epochs=setup.epochs,
        batch_size=config.batch_size,
        log_every=config.log_every,
        on_progress=on_progress,
        should_stop=watcher.should_stop,
    ):
        trials = epoch.state
        save(trials, epoch.step)
    if not path.exists():  # an empty training
        save(trials, 0)
    return trials if int(trials.step) == sweep.steps else None


def restored(sweep: Sweep, seed: int) -> EnsembleState:
    """Return the states of all trials as a seed's file has them.

    Args:
        sweep: The sweep.
        seed: Which seed, from 0.

    Returns:
        The states; :func:`funcloss.app.sweep.trials.trial_state` gives that of one.
    """
    return _stored(sweep, seed)[0]


@dataclass(frozen=True)
class _Header:
    """The header of a seed's file."""

    step: Count
    seconds: float = 0.0


def _stored(sweep: Sweep, seed: int) -> tuple[EnsembleState, list[Tensor], float]:
    """Return the states of a seed's file, and the losses and seconds since the last line."""
    path = seed_file(sweep.folder, seed)
    template = init_trials(seeded_state(sweep.setup, sweep.config.seed + seed), sweep.groups)
    tensors, header = load_record(path, _Header)
    trials = restore(template, beneath(tensors, "trials"), of=path)
    steps, width = int(trials.step), 1 + len(sweep.trials)
    recent = tensors.get("unreported", torch.zeros(0, width))
    fits = recent.dim() == 2 and recent.shape[1] == width and len(recent) <= steps
    if header.step != steps or steps > sweep.steps or not fits:
        raise RunError(f"{path} is damaged: it is not of {steps} steps of these trials")
    return trials, list(recent.to(sweep.setup.config.device)), header.seconds


class _StepLine(TypedDict):
    """The training of all trials since the report before: a line of ``steps.jsonl``."""

    seed: Count
    step: Count
    examples: Count
    steps: Count
    loss: Number
    seconds: float
    images_per_second: Number
    losses: list[Number]


def _trial_line(text: bytes, where: str) -> dict[str, Any]:
    return cast(dict[str, Any], from_json(Record, text, where))


def _step_line(text: bytes, where: str) -> dict[str, Any]:
    return cast(dict[str, Any], from_json(_StepLine, text, where))


def steps_of(sweep: Sweep, seed: int) -> list[dict[str, Any]]:
    """Return the lines of ``steps.jsonl`` of a seed, each with a loss for every trial."""
    lines = (line for _, line in lines_of(sweep.folder / STEPS, _step_line))
    return [n for n in lines if n["seed"] == seed and len(n["losses"]) == len(sweep.trials)]


def _complete(sweep: Sweep, records: Sequence[Record]) -> list[Record]:
    """Return the records of those seeds of which every trial is there; others are scored anew."""
    classes, limits = set(sweep.setup.dataset.classes), len(sweep.constraints)
    names = [trial.name for trial in sweep.trials]
    complete = []
    for seed in range(sweep.seeds):
        own = {r["trial"]: r for r in records if r["seed"] == seed}
        if [r["name"] for _, r in sorted(own.items())] == names and all(
            r["recall"].keys() == classes and len(r["reached"]) == limits for r in own.values()
        ):
            complete += [own[number] for number in range(len(names))]
    return complete


def _scored(records: Sequence[Record], seed: int) -> bool:
    return any(record["seed"] == seed for record in records)
