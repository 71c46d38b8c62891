"""A sweep at work: its members side by side, each seed in turn, kept so that it can be resumed."""

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from funcloss._trees import flatten
from funcloss.app.data import Examples, subset
from funcloss.app.runs import Note, beneath, folder, load_tensors, restore, save_tensors
from funcloss.app.runs.evaluation import (
    evaluate,
    evaluate_examples,
    rule_fits,
    with_fitted_rule,
)
from funcloss.app.runs.setup import seeded_state, trial_batch
from funcloss.app.sweep.members import (
    Members,
    init_members,
    make_members_step,
    member_hyper,
    member_state,
)
from funcloss.app.sweep.plan import Show, Sweep
from funcloss.constraints.limits import reached
from funcloss.training import Compiled, Progress, TrainState, fit, prepare
from funcloss.typing import Batch

MEMBERS, STEPS = "members.jsonl", "steps.jsonl"
_TRAINING_EXAMPLES = 10_000  # that tell the training error


class SeedReport(NamedTuple):
    """A seed is trained, and its members are scored on validation data."""

    number: int  # from 1
    seeds: int
    seconds: float  # of the training since this call began or went on
    records: list[dict[str, Any]]


class SweepStarted(NamedTuple):
    """Training begins, or goes on."""

    folder: Path
    members: int
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
    begun = init_members(setup.state, sweep.groups)
    made: dict[int, Compiled] = {}
    for group, state in zip(sweep.groups, begun.groups.values(), strict=True):
        key = id(group.train_step)
        if key not in made:
            made[key] = prepare(group.train_step, mode, state, (batch, group.hyper))
    for note, warning in dict.fromkeys((m.note, m.warning) for m in made.values()):
        show(Note(f"step: {note}", warning))
    groups = [g._replace(train_step=made[id(g.train_step)].step_on) for g in sweep.groups]
    compiled = "on" if all(m.on for m in made.values()) else "off"
    return sweep._replace(config=dataclasses.replace(sweep.config, compile=compiled), groups=groups)


def run_seeds(
    sweep: Sweep,
    *,
    show: Show = lambda event: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> list[dict[str, Any]] | None:
    """Train every member with every seed, from where the folder's files are.

    Args:
        sweep: The sweep.
        show: Called with everything that happens.
        should_stop: Asked after every step; True saves and ends.

    Returns:
        A record a member and seed, scored on validation data; None if it was told to stop.
    """
    records = folder.read_lines(sweep.folder / MEMBERS)
    step_on = make_members_step(sweep.groups)
    done = sum(sweep.steps for seed in range(sweep.seeds) if _scored(records, seed))
    show(SweepStarted(sweep.folder, len(sweep.entries), sweep.seeds, sweep.steps, done))
    for seed in range(sweep.seeds):
        if _scored(records, seed):
            continue
        began = time.perf_counter()
        members = _trained(sweep, seed, step_on, show, should_stop)
        if members is None:
            return None
        new = [
            {"seed": seed} | score(sweep, number, member_state(members, sweep.groups, number))
            for number in range(len(sweep.entries))
        ]
        records = records + new
        folder.write_lines(sweep.folder / MEMBERS, records)
        show(SeedReport(seed + 1, sweep.seeds, time.perf_counter() - began, new))
    return records


def score(sweep: Sweep, number: int, state: TrainState) -> dict[str, Any]:
    """Return what a member does on validation data, and its training error.

    Args:
        sweep: The sweep.
        number: Which member.
        state: Its state.

    Returns:
        A record, None for what is not defined.
    """
    entry, setup = sweep.entries[number], sweep.setup
    dataset, hyper = setup.dataset, member_hyper(sweep.groups, number)
    model = setup._replace(config=entry.config).trained(state, hyper)
    found = evaluate(model, dataset, ("validation",))
    judged = with_fitted_rule(model, found)["validation"]
    scores, train = judged.argmax, evaluate_examples(model, dataset, few_of(dataset.train))
    # With the optimiser's memory: where Adam's overflows, its steps are 0 from then on.
    finite = all(t.isfinite().all() for t in flatten(state).values())
    return folder.plain(
        {
            "member": number,
            "name": entry.name,
            "values": entry.values,
            "plain": entry.plain,
            "diverged": not (finite and bool(judged.logits.isfinite().all())),
            "accuracy": scores.accuracy.value,
            "expected_cost": scores.expected_cost.value,
            "rule_cost": judged.min_cost.expected_cost.value
            if rule_fits(entry.config)
            else math.nan,
            "temperature": judged.rule.temperature,
            "calibration_error": judged.calibration_error,
            "recall": dict(zip(dataset.classes, scores.recall.value.tolist(), strict=True)),
            "precision": dict(zip(dataset.classes, scores.precision.value.tolist(), strict=True)),
            "reached": list(reached(sweep.limits, scores)),
            "support": scores.confusion.sum(1).tolist(),
            "train_accuracy": train.argmax.accuracy.value,
        }
    )


def few_of(examples: Examples) -> Examples:
    """Return 10,000 of the examples at most, evenly spread: they may be sorted by class."""
    n = len(examples.labels)
    stride = math.ceil(n / _TRAINING_EXAMPLES)
    return subset(examples, torch.arange(0, n, stride, device=examples.labels.device))


def _trained(
    sweep: Sweep,
    seed: int,
    step_on: Callable,
    show: Show,
    should_stop: Callable[[], bool],
) -> Members | None:
    """Train all members with one seed, saving at the end of every epoch and when told to stop."""
    config, setup = sweep.config, sweep.setup
    path = sweep.seed_file(seed)
    if path.exists():
        members = restored(sweep, seed)
    else:
        members = init_members(seeded_state(setup, config.seed + seed), sweep.groups)
    up_to = int(members.step)
    lines = [
        line
        for line in folder.read_lines(sweep.folder / STEPS)
        if line["seed"] < seed or (line["seed"] == seed and line["step"] <= up_to)
    ]
    folder.write_lines(sweep.folder / STEPS, lines)
    recent: list[Tensor] = []

    def take_step(members: Members, batch: Batch):
        members, metrics = step_on(members, batch)
        recent.append(metrics["losses"])
        return members, metrics

    def on_progress(progress: Progress) -> None:
        losses = torch.stack(recent).mean(0).tolist()
        recent.clear()
        line = {"seed": seed} | progress._asdict() | {"losses": losses}
        folder.append_line(sweep.folder / STEPS, line)
        show(progress)

    for epoch in fit(
        members,
        take_step,
        len(setup.dataset.train.labels),
        feed=setup.iter_batches,
        epochs=config.epochs,
        batch_size=config.batch_size,
        log_every=config.log_every,
        on_progress=on_progress,
        should_stop=should_stop,
    ):
        members = epoch.state
        save_tensors(path, flatten({"members": members}), {"step": epoch.step, "seed": seed})
    if not path.exists():  # an empty training
        save_tensors(path, flatten({"members": members}), {"step": 0, "seed": seed})
    return members if int(members.step) == sweep.steps else None


def restored(sweep: Sweep, seed: int) -> Members:
    """Return the states of all members as a seed's file has them.

    Args:
        sweep: The sweep.
        seed: Which seed, from 0.

    Returns:
        The states; :func:`funcloss.app.sweep.members.member_state` gives that of one.
    """
    template = init_members(seeded_state(sweep.setup, sweep.config.seed + seed), sweep.groups)
    tensors, _ = load_tensors(sweep.seed_file(seed))
    return restore(template, beneath(tensors, "members"))


def _scored(records: Sequence[dict[str, Any]], seed: int) -> bool:
    return any(record["seed"] == seed for record in records)
