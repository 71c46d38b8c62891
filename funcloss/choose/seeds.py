"""A sweep: many trainings side by side, each seed in turn, kept in a folder that can be resumed."""

import copy
import math
import time
import tomllib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import tomli_w
import torch
from torch import Tensor

from funcloss._files import folder_replacing, write_text
from funcloss.choose.axes import (
    Axis,
    Member,
    by_name,
    describe,
    learning_rates,
    member_config,
    members_of,
    plain_config,
    plain_members,
)
from funcloss.choose.limits import Limit, check_measurable, make_limits, reached
from funcloss.choose.members import (
    Group,
    Members,
    choose_width,
    init_members,
    make_groups,
    make_members_step,
    member_hyper,
    member_state,
)
from funcloss.config import TrainConfig, make_config
from funcloss.data import class_counts, take
from funcloss.errors import ConfigError, RunError
from funcloss.training import (
    Note,
    Progress,
    TrainState,
    beneath,
    evaluate,
    fit,
    flatten,
    folder,
    load_tensors,
    make_forward,
    prepare,
    restore,
    save_tensors,
)
from funcloss.training.judging import judge_parts, rule_caveat
from funcloss.training.objective import Forward
from funcloss.training.setup import Setup, make_hyper, make_setup, seeded_state, setup_on
from funcloss.typing import Hyper

SPEC, MEMBERS, STEPS = "sweep.toml", "members.jsonl", "steps.jsonl"
_METHODS = ("auto", "vmap", "loop")
_SEEDS = 2**63  # from 0 on
_TRAINING_EXAMPLES = 10_000  # that tell the training error


class Entry(NamedTuple):
    """A member of a sweep."""

    name: str
    values: Member  # by name of the axis; empty: plain training, outside of the grid
    config: TrainConfig  # that trains it alone
    plain: bool


class Sweep(NamedTuple):
    """All that a sweep needs, made from its specification."""

    folder: Path
    config: TrainConfig  # what the members share
    axes: tuple[Axis, ...]
    seeds: int
    width: int
    setup: Setup  # of the first member; data, model and schedule are those of all
    entries: list[Entry]
    groups: list[Group]
    limits: tuple[Limit, ...]

    @property
    def steps(self) -> int:
        """Return how many steps each member takes."""
        return self.config.epochs * self.setup.per_epoch

    def seed_file(self, seed: int) -> Path:
        """Return where the states of a seed are kept."""
        return self.folder / f"seed-{seed}.safetensors"


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


Show = Callable[[Any], None]


def start(
    config: TrainConfig,
    axes: Sequence[Axis],
    out: Path,
    *,
    seeds: int = 1,
    method: str = "auto",
    overwrite: bool = False,
    show: Show = lambda event: None,
) -> Sweep:
    """Check a sweep, decide how to run it, and make its folder.

    Args:
        config: What the members share; its floors and ceilings are what the choice must keep.
        axes: What is swept.
        out: The folder to make.
        seeds: How many seeds each member is trained with, from the configuration's on.
        method: ``vmap``: all members in one program; ``loop``: one after another; ``auto``: what a
            few steps show to be faster.
        overwrite: A sweep that is at ``out`` may be replaced.
        show: Called with everything that happens.

    Returns:
        The sweep, nothing of it trained.

    Raises:
        ConfigError: the request makes no sense on this machine or data, or the folder is in use.
        DataError: the data cannot be had.
        RunError: the folder cannot be written.
    """
    check_free(out, overwrite=overwrite)
    if method not in _METHODS:
        raise ConfigError(f"method must be one of {', '.join(_METHODS)}; got {method!r}")
    if seeds < 1:
        raise ConfigError(f"seeds must be at least 1, got {seeds}")
    if config.seed + seeds > _SEEDS:
        raise ConfigError(
            f"seeds count up from seed {config.seed}, which leaves no room for {seeds}"
        )
    made = _assembled(config, axes, out, seeds, width=1)
    if made.setup.dataset.note:
        show(Note(made.setup.dataset.note, warning=True))
    width = _width(made, method, show)
    made = made._replace(width=width, groups=_groups(made.setup, made.entries, width))
    # With weights of the swept classes too: what reads it refuses a weighted mean without any.
    shared = made.config._replace(class_weight=made.entries[0].config.class_weight)
    spec = {
        **{k: list(v) if isinstance(v, tuple) else v for k, v in shared._asdict().items()},
        "sweep": {
            "seeds": seeds,
            "width": width,
            "axes": [axis._asdict() | {"values": list(axis.values)} for axis in made.axes],
        },
        "run": {"command": folder.command_line(), "environment": folder.environment()},
    }
    check_free(out, overwrite=overwrite)  # another may have come while this one was timed
    with folder_replacing(out, last=SPEC) as beside:
        write_text(beside / SPEC, tomli_w.dumps(spec))
    return made


def check_free(out: Path, *, overwrite: bool) -> None:
    """Raise ``ConfigError`` unless a new sweep may be made at ``out``.

    Args:
        out: The folder to make.
        overwrite: A sweep that is there already may go; anything else never.
    """
    folder.check_free(out, overwrite=overwrite, sign=SPEC, what="sweep")
    if not (out / SPEC).is_file():
        return
    try:
        made_here = "axes" in tomllib.loads((out / SPEC).read_text(encoding="utf-8"))["sweep"]
    except (OSError, ValueError, KeyError, TypeError):
        made_here = False
    if not made_here:
        raise ConfigError(f"{out} is there and is not a sweep folder: name another one")


def taken_up(out: Path, *, data_dir: str = "", show: Show = lambda event: None) -> Sweep:
    """Return a sweep that is in a folder, to go on with.

    Args:
        out: The folder of a sweep.
        data_dir: Where the data is now, if it has moved.
        show: Called with everything that happens.

    Returns:
        The sweep as it was started.

    Raises:
        ConfigError: a device of the sweep is not on this machine.
        DataError: the data cannot be had.
        RunError: the folder is not that of a sweep.
    """
    if not (out / SPEC).is_file():
        raise RunError(f"{out} is not the folder of a sweep: it has no {SPEC}")
    try:
        spec = tomllib.loads((out / SPEC).read_text(encoding="utf-8"))
        own, run = spec.pop("sweep"), spec.pop("run")
        axes = [Axis(a["option"], a["key"], tuple(a["values"])) for a in own["axes"]]
        seeds, width, before = own["seeds"], own["width"], run["environment"]
        config = make_config(spec)
    except (OSError, ValueError, KeyError, TypeError, ConfigError) as error:
        raise RunError(f"cannot read {out / SPEC}: {error}") from None
    for line in folder.differences(before, folder.environment()):
        show(Note(f"not the same to the bit as without a stop: {line}", warning=True))
    config = config._replace(data_dir=data_dir or config.data_dir)
    return _assembled(config, axes, out, seeds, width=width)


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
    records = _read(sweep.folder / MEMBERS)
    step_on = _ready(sweep, show)
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


def state_of(sweep: Sweep, seed: int, number: int) -> TrainState:
    """Return the state of a member at the end of a seed's training.

    Args:
        sweep: The sweep, trained.
        seed: Which seed, from 0.
        number: Which member.

    Returns:
        Its state, as its training alone would have it.
    """
    return member_state(_restored(sweep, seed), sweep.groups, number)


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
    forward = make_forward(copy.deepcopy(setup.model).eval())
    dataset, hyper = setup.dataset, member_hyper(sweep.groups, number)
    found = evaluate_part(sweep, forward, state, "validation")
    labels = dataset.validation.labels.cpu()
    judged = judge_parts(
        {"validation": found},
        {"validation": labels},
        config=entry.config,
        costs=setup.costs,
        counts=class_counts(dataset.train, len(dataset.classes)).cpu(),
        class_weights=hyper.get("class_weights"),
    )["validation"]
    scores = judged.argmax
    # With the optimiser's memory: where Adam's overflows, its steps are 0 from then on.
    finite = all(t.isfinite().all() for t in flatten(state).values())
    return folder.plain(
        {
            "member": number,
            "name": entry.name,
            "values": entry.values,
            "plain": entry.plain,
            "diverged": not (finite and bool(found.logits.isfinite().all())),
            "accuracy": scores.accuracy.value,
            "expected_cost": scores.expected_cost.value,
            "rule_cost": judged.min_cost.expected_cost.value
            if not rule_caveat(entry.config)
            else math.nan,
            "temperature": judged.temperature,
            "calibration_error": judged.calibration_error,
            "recall": dict(zip(dataset.classes, scores.recall.tolist(), strict=True)),
            "precision": dict(zip(dataset.classes, scores.precision.tolist(), strict=True)),
            "reached": list(reached(sweep.limits, scores)),
            "support": scores.confusion.sum(1).tolist(),
            "train_accuracy": evaluate_part(sweep, forward, state, "train").accuracy,
        }
    )


def evaluate_part(sweep: Sweep, forward: Forward, state: TrainState, part: str):
    """Evaluate a member on a part of the data, of the training set on 10,000 examples at most."""
    dataset = sweep.setup.dataset
    examples = getattr(dataset, part)
    n = len(examples.labels)
    # Every so many: the training set may be sorted by class.
    stride = math.ceil(n / _TRAINING_EXAMPLES) if part == "train" else 1

    def batch(index: Tensor):
        return take(dataset, examples, index * stride)

    return evaluate(
        forward,
        state.params,
        state.buffers,
        batch,
        n // stride,
        lambda logits, batch, hyper: logits.new_zeros(()),  # members have losses of their own
        {},
    )


def _assembled(
    config: TrainConfig, axes: Sequence[Axis], out: Path, seeds: int, *, width: int
) -> Sweep:
    grid = members_of(axes)
    first = member_config(config._replace(floor={}, ceiling={}), axes, grid[0])
    setup = make_setup(first)
    classes = setup.dataset.classes
    if not len(setup.dataset.validation.labels):
        raise ConfigError(
            "a sweep chooses by validation data, and none is held out: set val_fraction, to 0.1 say"
        )
    axes = tuple(by_name(axes, classes))
    limits = make_limits(config.floor, config.ceiling, classes)
    check_measurable(limits, setup.dataset)
    # What the first member resolved holds for all; what is swept, and the limits, do not.
    swept = {axis.key for axis in axes if axis.option == "class_weight"}
    options = {axis.key for axis in axes if axis.option == "loss_option"}
    base = setup.config._replace(
        learning_rate=config.learning_rate,
        class_weight={k: v for k, v in setup.config.class_weight.items() if k not in swept},
        loss_option={k: v for k, v in setup.config.loss_option.items() if k not in options},
        floor=config.floor,
        ceiling=config.ceiling,
        compile="on" if config.compile == "on" else "off",  # nothing tries whether it pays
    )
    made = Sweep(out, base, axes, seeds, width, setup, [], [], limits)
    entries = _entries(base, axes)
    return made._replace(entries=entries, groups=_groups(setup, entries, width))


def _entries(config: TrainConfig, axes: Sequence[Axis]) -> list[Entry]:
    """Return the members, plain training among them or, if it is none of the grid, at the end."""
    alone = config._replace(floor={}, ceiling={})
    grid, plain = members_of(axes), plain_members(axes, config)
    grid = [m for m in plain if m not in grid] + grid
    entries = [Entry(describe(m), m, member_config(alone, axes, m), plain=m in plain) for m in grid]
    if plain:
        return entries
    rates = learning_rates(axes, config)
    for rate in rates:
        name = "plain" if len(rates) == 1 else f"plain at learning_rate={rate:g}"
        own = plain_config(config._replace(learning_rate=rate))
        entries.append(Entry(name, {}, own, plain=True))
    return entries


def _groups(setup: Setup, entries: Sequence[Entry], width: int) -> list[Group]:
    """Return the programs of the members; plain training outside of the grid has its own."""
    groups = make_groups(setup.train_step, _hypers(setup, entries), width)
    for entry in entries:
        if not entry.values:
            own = setup_on(entry.config, setup.dataset)
            groups.append(Group(own.train_step, own.hyper, 1, False))
    return groups


def _hypers(setup: Setup, entries: Sequence[Entry]) -> list[Hyper]:
    """Return what each member of the grid is given."""
    counts = class_counts(setup.dataset.train, len(setup.dataset.classes)).cpu()
    device = setup.config.device
    return [make_hyper(e.config, setup.costs, counts, device) for e in entries if e.values]


def _width(sweep: Sweep, method: str, show: Show) -> int:
    setup = sweep.setup
    hypers = _hypers(setup, sweep.entries)
    if method != "auto":
        return len(hypers) if method == "vmap" else 1
    if not sweep.steps or not hypers:
        return 1
    index = torch.arange(setup.config.batch_size, device=setup.config.device)
    batch_at = partial(take, setup.dataset, setup.dataset.train)
    found = choose_width(setup.train_step, setup.state, hypers, batch_at, index)
    show(Note(found.note))
    return found.width


def _ready(sweep: Sweep, show: Show) -> Callable:
    """Return the step of all members, each program compiled if that is asked for."""
    setup = sweep.setup
    batch_at = partial(take, setup.dataset, setup.dataset.train)
    if setup.config.compile != "on" or not sweep.steps:
        return make_members_step(sweep.groups, batch_at)
    index = torch.arange(setup.config.batch_size, device=setup.config.device)
    begun = init_members(setup.state, sweep.groups)
    compiled: dict[int, Callable] = {}
    groups = []
    for group, state in zip(sweep.groups, begun.groups.values(), strict=True):
        key = id(group.train_step)
        if key not in compiled:
            inputs = (batch_at(index), group.hyper)
            made = prepare(group.train_step, "on", state, inputs, sweep.steps)
            show(Note(f"step: {made.note}"))
            compiled[key] = made.step_on
        groups.append(group._replace(train_step=compiled[key]))
    return make_members_step(groups, batch_at)


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
        members = _restored(sweep, seed)
    else:
        members = init_members(seeded_state(setup, config.seed + seed), sweep.groups)
    up_to = int(members.step)
    lines = [
        line
        for line in _read(sweep.folder / STEPS)
        if line["seed"] < seed or (line["seed"] == seed and line["step"] <= up_to)
    ]
    folder.write_lines(sweep.folder / STEPS, lines)
    recent: list[Tensor] = []

    def take_step(members: Members, index: Tensor):
        members, metrics = step_on(members, index)
        recent.append(metrics["losses"])
        return members, metrics

    def on_progress(progress: Progress) -> None:
        losses = torch.stack(recent).mean(0).tolist()
        recent.clear()
        line = {"seed": seed} | progress._asdict() | {"losses": losses}
        lines.append(line)
        folder.append_line(sweep.folder / STEPS, line)
        show(progress)

    for epoch in fit(
        members,
        take_step,
        len(setup.dataset.train.labels),
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


def _restored(sweep: Sweep, seed: int) -> Members:
    template = init_members(seeded_state(sweep.setup, sweep.config.seed + seed), sweep.groups)
    tensors, _ = load_tensors(sweep.seed_file(seed))
    return restore(template, beneath(tensors, "members"))


def _scored(records: Sequence[dict[str, Any]], seed: int) -> bool:
    return any(record["seed"] == seed for record in records)


def _read(path: Path) -> list[dict[str, Any]]:
    return folder.read_lines(path)
