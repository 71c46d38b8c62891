"""What a sweep is: its trials, how they are run, and the file that says so."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec

from funcloss._folders import folder_replacing
from funcloss.app.config import (
    FileOptions,
    TrainConfig,
    check_code,
    make_config,
    plain_config,
    read_record,
)
from funcloss.app.decoding import from_plain
from funcloss.app.runs import folder
from funcloss.app.runs.constrained import check_measurable
from funcloss.app.runs.early import make_first_best
from funcloss.app.runs.events import Note, Show
from funcloss.app.runs.folds import make_folds, read_done
from funcloss.app.runs.opening import announce
from funcloss.app.runs.options import check_loss_options, make_hyper
from funcloss.app.runs.setup import Setup, make_setup, setup_on
from funcloss.app.sweep.axes import (
    Axis,
    TrialParams,
    by_name,
    describe,
    learning_rates,
    plain_trials,
    trial_config,
    trials_of,
)
from funcloss.app.sweep.trials import VmapGroup, choose_vmap_size, make_groups
from funcloss.constraints.bounds import Constraint, make_constraints
from funcloss.errors import ConfigError, RunError
from funcloss.typing import Hyper

SPEC = folder.SIGNS["sweep"]
_METHODS = ("auto", "vmap", "loop")
_MOST_SEEDS = 100_000
_SEEDS = 2**63  # from 0 on


@dataclass(frozen=True)
class SweepSpec:
    """What a sweep is: ``sweep.toml``."""

    config: TrainConfig  # what the trials share; the choice must keep its floors and ceilings
    axes: Sequence[Axis]
    seeds: int = 1  # how many each trial is trained with, from the configuration's on
    # vmap: all trials in one program; loop: one after another; auto: a loop for a model with
    # convolutions that is not on CUDA, else vmap.
    method: str = "auto"
    width: int = 0  # trials in one program; 0: by the method


@dataclass(frozen=True)
class _SweepTable:
    """What ``[sweep]`` of a ``sweep.toml`` says."""

    seeds: Annotated[int, msgspec.Meta(ge=1, le=_MOST_SEEDS)]
    axes: Annotated[tuple[Axis, ...], msgspec.Meta(min_length=1)]
    width: Annotated[int, msgspec.Meta(ge=0, le=4096)]


@dataclass(frozen=True, kw_only=True)
class _RunTable(folder.RunTable):
    """What its ``[run]`` says."""

    environment: dict[str, str]
    data: str = ""  # fingerprint of the data; empty: not kept


@dataclass(frozen=True)
class Trial:
    """A trial of a sweep."""

    name: str
    values: TrialParams  # by name of the axis; empty: plain training, outside of the grid
    config: TrainConfig  # that trains it alone
    plain: bool


@dataclass(frozen=True)
class Sweep:
    """All that a sweep needs, made from its specification."""

    folder: Path
    config: TrainConfig  # what the trials share
    axes: tuple[Axis, ...]
    seeds: int
    setup: Setup  # of the first trial; data, model and schedule are those of all
    trials: list[Trial]
    groups: list[VmapGroup]  # empty under cross-validation
    constraints: tuple[Constraint, ...]

    @property
    def steps(self) -> int:
        """Return how many steps each trial takes."""
        return self.setup.steps


def seed_file(out: Path, seed: int) -> Path:
    """Return where the folder of a sweep keeps the states of a seed."""
    return out / f"seed-{seed}.safetensors"


def folds_file(out: Path, number: int) -> Path:
    """Return where the folder of a sweep keeps the out-of-fold scores of a trial."""
    return out / f"folds-{number}.safetensors"


def start(spec: SweepSpec, out: Path, show: Show, *, overwrite: bool = False) -> Sweep:
    """Check a sweep, decide how to run it, and make its folder.

    Args:
        spec: What is swept.
        out: The folder to make.
        show: Called with everything that happens.
        overwrite: A sweep that is at ``out`` may be replaced.

    Returns:
        The sweep, nothing of it trained.

    Raises:
        ConfigError: the request makes no sense on this machine or data, or the folder is in use.
        DataError: the data cannot be had.
        RunError: the folder cannot be written.
    """
    folder.check_free(out, overwrite=overwrite, what="sweep")
    if spec.method not in _METHODS:
        raise ConfigError(f"method must be one of {', '.join(_METHODS)}; got {spec.method!r}")
    if not 1 <= spec.seeds <= _MOST_SEEDS:
        raise ConfigError(f"seeds must be 1 to {_MOST_SEEDS:,}, got {spec.seeds}")
    if spec.config.folds and (spec.seeds > 1 or spec.method != "auto"):
        raise ConfigError(
            f"folds {spec.config.folds} with seeds {spec.seeds} and method {spec.method}: each "
            "fold is trained by itself, with a seed of its own; leave seeds and method out, and "
            "set repeats for more of them"
        )
    if spec.config.epochs == "auto" and not spec.config.folds:
        raise ConfigError(
            "the trials of a sweep all train for the same number of epochs: set epochs to a number"
        )
    if spec.config.seed + spec.seeds > _SEEDS:
        raise ConfigError(
            f"seeds count up from seed {spec.config.seed}, which leaves no room for {spec.seeds}"
        )
    made, hypers = _assembled(spec, out)
    announce(made.setup, show)
    width = 1
    if not made.config.folds:
        width = _width(made.setup, len(hypers), spec.method, show)
        made = dataclasses.replace(made, groups=_groups(made, hypers, width))
    # With weights of the swept classes too: what reads it refuses a weighted mean without any.
    shared = dataclasses.replace(made.config, class_weight=made.trials[0].config.class_weight)
    own = {
        "seeds": made.seeds,
        "width": width,
        "axes": [dataclasses.asdict(axis) | {"values": list(axis.values)} for axis in made.axes],
    }
    run = {
        "command": folder.command_line(),
        "environment": folder.environment(),
        "data": made.setup.dataset.fingerprint,
    }
    # Another may have come while the loss was checked.
    folder.check_free(out, overwrite=overwrite, what="sweep")
    with folder_replacing(out, last=SPEC) as beside:
        folder.write_config(beside / SPEC, shared, sweep=own, run=run)
    return made


def read_spec(out: Path, *, allow_import: bool = False) -> SweepSpec:
    """Read what a sweep is from its folder.

    Args:
        out: The folder of a sweep.
        allow_import: Whether code that the sweep names may be imported.

    Returns:
        The specification, as :func:`sweep` takes it to resume.

    Raises:
        RunError: the folder is not that of a sweep, or is of a newer format.
    """
    options, own, _ = _read(out, allow_import=allow_import)
    try:
        config, _ = make_config(options), trials_of(own.axes)
    except ConfigError as error:
        raise RunError(f"cannot read {out / SPEC}: {error}") from None
    return SweepSpec(config, own.axes, own.seeds, width=own.width)


def taken_up(spec: SweepSpec, out: Path, show: Show) -> Sweep:
    """Return a sweep that is in a folder, to go on with.

    Args:
        spec: As :func:`read_spec` reads it.
        out: The folder of the sweep.
        show: Called with everything that happens.

    Returns:
        The sweep as it was started.

    Raises:
        ConfigError: a device of the sweep is not on this machine.
        DataError: the data cannot be had.
        RunError: the folder is not that of a sweep, or its data has changed.
    """
    check_code(spec.config)
    folder.check_files(out)
    *_, run = _read(out)
    for line in folder.differences(run.environment, folder.environment()):
        show(Note(f"not the same to the bit as without a stop: {line}", warning=True))
    made, hypers = _assembled(spec, out)
    data = made.setup.dataset
    if run.data and run.data != data.fingerprint:
        raise RunError(
            f"{data.name} has changed since {out} began to train on it: put the data back as it "
            "was, or begin another sweep"
        )
    if made.config.folds:
        for path in out.glob("folds-[0-9]*.safetensors"):
            read_done(path)
        return made
    return dataclasses.replace(made, groups=_groups(made, hypers, spec.width or 1))


def _read(out: Path, *, allow_import: bool = False) -> tuple[FileOptions, _SweepTable, _RunTable]:
    folder.check_is(out, "sweep")
    try:
        options, tables = read_record(out / SPEC, allow_import=allow_import)
    except ConfigError as error:
        raise RunError(f"cannot read {out / SPEC}: {error}") from None
    own, run = tables.get("sweep", {}), tables.get("run", {})
    return (
        options,
        from_plain(_SweepTable, own, f"{out / SPEC}: sweep"),
        from_plain(_RunTable, run, f"{out / SPEC}: run"),
    )


def _assembled(spec: SweepSpec, out: Path) -> tuple[Sweep, list[Hyper]]:
    """Return a sweep that has no programs yet, and what each trial of its grid is given."""
    config, axes = spec.config, spec.axes
    grid = trials_of(axes)
    first = trial_config(dataclasses.replace(config, floor={}, ceiling={}), axes, grid[0])
    # Without folds all trials end at one step.
    setup = make_setup(first, early=bool(config.folds))
    classes = setup.dataset.classes
    if config.folds:
        make_folds(setup)  # both refuse what cannot be trained on, before anything is
        make_first_best(setup)
    elif not len(setup.dataset.validation.labels):
        raise ConfigError(
            "a sweep chooses by validation data, and none is held out: set val_fraction, to 0.1 "
            "say, or folds"
        )
    axes = tuple(by_name(axes, classes))
    constraints = make_constraints(config.floor, config.ceiling, classes)
    check_measurable(constraints, setup.dataset)
    # What the first trial resolved holds for all; what is swept, and the constraints, do not.
    swept = {axis.key for axis in axes if axis.option == "class_weight"}
    options = {axis.key for axis in axes if axis.option == "loss_option"}
    base = dataclasses.replace(
        setup.config,
        learning_rate=config.learning_rate or setup.config.learning_rate,
        class_weight={k: v for k, v in setup.config.class_weight.items() if k not in swept},
        loss_option={k: v for k, v in setup.config.loss_option.items() if k not in options},
        floor=config.floor,
        ceiling=config.ceiling,
    )
    trials = _trials(base, axes)
    made = Sweep(out, base, axes, spec.seeds, setup, trials, [], constraints)
    return made, _hypers(setup, trials)


def _trials(config: TrainConfig, axes: Sequence[Axis]) -> list[Trial]:
    """Return the trials, plain training among them or, if it is none of the grid, at the end."""
    alone = dataclasses.replace(config, floor={}, ceiling={})
    grid, plain = trials_of(axes), plain_trials(axes, config)
    grid = [m for m in plain if m not in grid] + grid
    trials = [Trial(describe(m), m, trial_config(alone, axes, m), plain=m in plain) for m in grid]
    if plain:
        return trials
    rates = learning_rates(axes, config)
    for rate in rates:
        name = "plain" if len(rates) == 1 else f"plain at learning_rate={rate:g}"
        own = plain_config(dataclasses.replace(config, learning_rate=rate))
        trials.append(Trial(name, {}, own, plain=True))
    return trials


def _groups(sweep: Sweep, hypers: Sequence[Hyper], width: int) -> list[VmapGroup]:
    """Return the programs of the trials; plain training outside of the grid has its own."""
    groups = make_groups(sweep.setup.train_step, hypers, width)
    for trial in sweep.trials:
        if not trial.values:
            own = setup_on(trial.config, sweep.setup.dataset)
            groups.append(VmapGroup(own.train_step, own.hyper, 1, False))
    return groups


def _hypers(setup: Setup, trials: Sequence[Trial]) -> list[Hyper]:
    """Return what each trial of the grid is given, its options checked."""
    given = []
    for trial in trials:
        if trial.values:
            check_loss_options(trial.config, setup.costs, setup.counts)
            hyper = make_hyper(trial.config, setup.costs, setup.counts, setup.config.device)
            given.append(hyper)
    return given


def _width(setup: Setup, trials: int, method: str, show: Show) -> int:
    if method == "auto":
        chosen = choose_vmap_size(setup.model, trials)
        show(Note(chosen.note))
        return chosen.size
    return trials if method == "vmap" else 1
