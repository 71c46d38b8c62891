"""What a sweep is: its members, how they are run, and the file that says so."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from funcloss._files import folder_replacing
from funcloss.app.config import TrainConfig, check_code, make_config, read_record
from funcloss.app.runs import Note, folder
from funcloss.app.runs.constrained import check_measurable
from funcloss.app.runs.lawful import check_loss
from funcloss.app.runs.setup import Setup, make_hyper, make_setup, setup_on
from funcloss.app.sweep.axes import (
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
from funcloss.app.sweep.members import Group, choose_width, make_groups
from funcloss.constraints.limits import Limit, make_limits
from funcloss.errors import ConfigError, RunError
from funcloss.typing import Hyper

SPEC = folder.SIGNS["sweep"]
_METHODS = ("auto", "vmap", "loop")
_SEEDS = 2**63  # from 0 on

Show = Callable[[Any], None]


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
        return seed_file(self.folder, seed)


def seed_file(out: Path, seed: int) -> Path:
    """Return where the folder of a sweep keeps the states of a seed."""
    return out / f"seed-{seed}.safetensors"


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
        method: ``vmap``: all members in one program; ``loop``: one after another; ``auto``: a
            loop for a model with convolutions that is not on CUDA, else ``vmap``.
        overwrite: A sweep that is at ``out`` may be replaced.
        show: Called with everything that happens.

    Returns:
        The sweep, nothing of it trained.

    Raises:
        ConfigError: the request makes no sense on this machine or data, or the folder is in use.
        DataError: the data cannot be had.
        RunError: the folder cannot be written.
    """
    folder.check_free(out, overwrite=overwrite, what="sweep")
    if method not in _METHODS:
        raise ConfigError(f"method must be one of {', '.join(_METHODS)}; got {method!r}")
    if seeds < 1:
        raise ConfigError(f"seeds must be at least 1, got {seeds}")
    if config.seed + seeds > _SEEDS:
        raise ConfigError(
            f"seeds count up from seed {config.seed}, which leaves no room for {seeds}"
        )
    made = _assembled(config, axes, out, seeds, width=1)
    for note in filter(None, (made.setup.dataset.note, *check_loss(made.setup))):
        show(Note(note, warning=True))
    for note in made.setup.notes:
        show(Note(note))
    width = _width(made, method, show)
    made = made._replace(width=width, groups=_groups(made.setup, made.entries, width))
    # With weights of the swept classes too: what reads it refuses a weighted mean without any.
    shared = dataclasses.replace(made.config, class_weight=made.entries[0].config.class_weight)
    own = {
        "seeds": seeds,
        "width": width,
        "axes": [axis._asdict() | {"values": list(axis.values)} for axis in made.axes],
    }
    run = {"command": folder.command_line(), "environment": folder.environment()}
    # Another may have come while the loss was checked.
    folder.check_free(out, overwrite=overwrite, what="sweep")
    with folder_replacing(out, last=SPEC) as beside:
        folder.write_config(beside / SPEC, shared, sweep=own, run=run)
    return made


class Spec(NamedTuple):
    """What ``sweep.toml`` says."""

    config: TrainConfig
    axes: list[Axis]
    seeds: int
    width: int
    environment: dict[str, Any]


def read_spec(out: Path, *, allow_import: bool = False) -> Spec:
    """Read what a sweep is from its folder.

    Raises:
        RunError: the folder is not that of a sweep, or is of a newer format.
    """
    if not (out / SPEC).is_file():
        raise RunError(f"{out} is not the folder of a sweep: it has no {SPEC}")
    try:
        options, tables = read_record(out / SPEC, allow_import=allow_import)
        own, run = tables["sweep"], tables["run"]
        axes = [Axis(a["option"], a["key"], tuple(a["values"])) for a in own["axes"]]
        return Spec(make_config(options), axes, own["seeds"], own["width"], run["environment"])
    except (KeyError, TypeError, ConfigError) as error:
        raise RunError(f"cannot read {out / SPEC}: {error}") from None


def taken_up(
    out: Path,
    *,
    data_dir: str = "",
    allow_import: bool = False,
    show: Show = lambda event: None,
) -> Sweep:
    """Return a sweep that is in a folder, to go on with.

    Args:
        out: The folder of a sweep.
        data_dir: Where the data is now, if it has moved.
        allow_import: Whether code that the sweep names may be imported.
        show: Called with everything that happens.

    Returns:
        The sweep as it was started.

    Raises:
        ConfigError: a device of the sweep is not on this machine.
        DataError: the data cannot be had.
        RunError: the folder is not that of a sweep.
    """
    config, axes, seeds, width, before = read_spec(out, allow_import=allow_import)
    check_code(config)
    for line in folder.differences(before, folder.environment()):
        show(Note(f"not the same to the bit as without a stop: {line}", warning=True))
    config = dataclasses.replace(config, data_dir=data_dir or config.data_dir)
    return _assembled(config, axes, out, seeds, width=width)


def _assembled(
    config: TrainConfig, axes: Sequence[Axis], out: Path, seeds: int, *, width: int
) -> Sweep:
    grid = members_of(axes)
    first = member_config(dataclasses.replace(config, floor={}, ceiling={}), axes, grid[0])
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
    base = dataclasses.replace(
        setup.config,
        learning_rate=config.learning_rate,
        class_weight={k: v for k, v in setup.config.class_weight.items() if k not in swept},
        loss_option={k: v for k, v in setup.config.loss_option.items() if k not in options},
        floor=config.floor,
        ceiling=config.ceiling,
    )
    made = Sweep(out, base, axes, seeds, width, setup, [], [], limits)
    entries = _entries(base, axes)
    return made._replace(entries=entries, groups=_groups(setup, entries, width))


def _entries(config: TrainConfig, axes: Sequence[Axis]) -> list[Entry]:
    """Return the members, plain training among them or, if it is none of the grid, at the end."""
    alone = dataclasses.replace(config, floor={}, ceiling={})
    grid, plain = members_of(axes), plain_members(axes, config)
    grid = [m for m in plain if m not in grid] + grid
    entries = [Entry(describe(m), m, member_config(alone, axes, m), plain=m in plain) for m in grid]
    if plain:
        return entries
    rates = learning_rates(axes, config)
    for rate in rates:
        name = "plain" if len(rates) == 1 else f"plain at learning_rate={rate:g}"
        own = plain_config(dataclasses.replace(config, learning_rate=rate))
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
    device = setup.config.device
    return [make_hyper(e.config, setup.costs, setup.counts, device) for e in entries if e.values]


def _width(sweep: Sweep, method: str, show: Show) -> int:
    members = len(_hypers(sweep.setup, sweep.entries))
    if method == "auto":
        width, note = choose_width(sweep.setup.model, members)
        show(Note(note))
        return width
    return members if method == "vmap" else 1
