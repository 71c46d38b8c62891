"""A run: a training with a folder that holds all of it, made, taken up again, read."""

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import torch

from funcloss._files import folder_replacing
from funcloss._trees import flatten
from funcloss.app.config import TrainConfig, option_values
from funcloss.app.data import short_name
from funcloss.app.runs import folder, report
from funcloss.app.runs.checkpoint import beneath, load_tensors, restore, save_tensors
from funcloss.app.runs.evaluation import evaluate
from funcloss.app.runs.lawful import check_loss
from funcloss.app.runs.model import TrainedModel, save_model
from funcloss.app.runs.setup import Setup, make_setup, trial_batch
from funcloss.app.runs.steering import Memory, Steering
from funcloss.errors import AuditError, ConfigError
from funcloss.training.compilation import AnyStep, prepare
from funcloss.training.evaluation import Evaluation
from funcloss.training.loop import Progress, fit
from funcloss.training.step import TrainState
from funcloss.typing import Batch, Hyper, Metrics


class Note(NamedTuple):
    """One line that the user should read."""

    text: str
    warning: bool = False


class Started(NamedTuple):
    """Training begins, or goes on, at ``step`` of ``steps``."""

    folder: Path
    config: TrainConfig
    step: int
    steps: int


class EpochReport(NamedTuple):
    """A finished epoch, stops within it included, and the evaluations after it."""

    number: int  # from 1
    epochs: int  # how many there will be
    loss: float  # mean over its steps
    seconds: float  # of its steps
    evaluations: dict[str, Evaluation]  # by split of the data set


class Audited(NamedTuple):
    """Who owned the gradient of a step, looked at before it was taken."""

    step: int  # its number, from 1
    seconds: float  # that looking took
    rows: list[dict[str, Any]]  # one a class


class Steered(NamedTuple):
    """A measurement by what steers the training, after ``step`` steps."""

    step: int
    record: dict[str, Any]


Event = Note | Started | Progress | EpochReport | Audited | Steered
Show = Callable[[Event], None]
# what looks at the step on a batch: a record a class
Observe = Callable[[TrainState, Batch, Hyper], list[dict[str, Any]]]


class Outcome(NamedTuple):
    """How a run ended."""

    folder: Path
    finished: bool  # False when it was told to stop
    summary: dict[str, Any]  # what ``summary.json`` holds; empty unless finished
    config: TrainConfig  # what ``config.toml`` holds, and whether its code may be imported


def train(
    config: TrainConfig,
    run_dir: str | Path | None = None,
    *,
    overwrite: bool = False,
    show: Show = lambda event: None,
    should_stop: Callable[[], bool] = lambda: False,
    observer: Callable[[Setup], Observe] | None = None,
    steer: Callable[[Setup], Steering] | None = None,
    test_once: bool = False,
) -> Outcome:
    """Train as a configuration says, into a new run folder.

    Args:
        config: What to train.
        run_dir: The run folder to make; None: a new one under ``runs``.
        overwrite: A run that is at ``run_dir`` may be replaced.
        show: Called with everything that happens.
        should_stop: Asked after every step; True saves and ends.
        observer: What audits a step every ``audit_every`` steps, ``funcloss.app.audits.observer``;
            None: nothing does.
        steer: What sets ``hyper`` as the training goes, such as
            ``funcloss.app.runs.constrained.steer_by_limits``, which floors and ceilings need;
            None: nothing does.
        test_once: Read the test set at the end only, not after each epoch too. So it is where
            something steers.

    Returns:
        The run folder and the summary.

    Raises:
        ConfigError: the request makes no sense on this machine or data, or the folder is in use.
        DataError: the data cannot be had.
        RunError: the run folder cannot be written.
    """
    if run_dir is not None:
        run_dir = Path(run_dir).expanduser()
        folder.check_free(run_dir, overwrite=overwrite)
    report.check_tensorboard(config)
    _check_steered(config, steer)
    setup = make_setup(config)
    hooks = Hooks(observer, steer and steer(setup), test_once)
    for note in filter(None, (setup.dataset.note, *check_loss(setup))):
        show(Note(note, warning=True))
    for note in setup.notes:
        show(Note(note))
    step, setup = _prepared(setup, config.compile, setup.state, show)
    if run_dir is None:
        stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
        name = f"{setup.dataset.name}-{short_name(setup.config.model)}-{stamp}"
        run_dir = folder.fresh_name(Path("runs"), folder.as_name(name))
    run = {
        "command": folder.command_line(),
        "dataset_note": setup.dataset.note,
        "requested": {name: getattr(config, name) for name in ("dataset", "device", "compile")},
        "environment": folder.environment(),
    }
    memory = hooks.steering.init(setup.state) if hooks.steering else None
    folder.check_free(run_dir, overwrite=overwrite)  # another may have come meanwhile
    with folder_replacing(run_dir, last=folder.CONFIG) as beside:
        folder.write_config(beside / folder.CONFIG, setup.config, run=run)
        _save(beside, setup, setup.state, memory, hooks.steering)
        folder.write_records(beside, [])
    return _run_from(setup, setup.state, memory, step, run_dir, show, should_stop, hooks)


def resume(
    run_dir: str | Path,
    *,
    data_dir: str = "",
    allow_import: bool = False,
    show: Show = lambda event: None,
    should_stop: Callable[[], bool] = lambda: False,
    observer: Callable[[Setup], Observe] | None = None,
    steer: Callable[[Setup], Steering] | None = None,
    test_once: bool = False,
) -> Outcome:
    """Take up a run where its last checkpoint is, as if it had never stopped.

    Args:
        run_dir: A run folder.
        data_dir: Where the data is now, if it has moved.
        allow_import: Whether code that the run names, a model of yours say, may be imported.
        show: Called with everything that happens.
        should_stop: Asked after every step; True saves and ends.
        observer: As for :func:`train`.
        steer: As for :func:`train`.
        test_once: As for :func:`train`.

    Returns:
        The run folder and the summary.

    Raises:
        ConfigError: a device of the run is not on this machine.
        DataError: the data cannot be had.
        RunError: the folder is not a run folder, or its files are not of one run.
    """
    run_dir = Path(run_dir).expanduser()
    config = folder.read_config(run_dir, allow_import=allow_import)
    if (summary := folder.read_summary(run_dir)) is not None:
        show(Note(f"{run_dir} is finished: there is nothing to resume"))
        return _finished(run_dir, summary, config, show)
    tensors, header = load_tensors(run_dir / folder.CHECKPOINT, needs=("environment",))
    for line in folder.differences(header["environment"], folder.environment()):
        show(Note(f"not the same to the bit as without a stop: {line}", warning=True))
    _check_steered(config, steer)
    # Its weights come from the checkpoint.
    setup = make_setup(dataclasses.replace(config, data_dir=data_dir or config.data_dir, init=""))
    hooks = Hooks(observer, steer and steer(setup), test_once)
    state = restore(setup.state, beneath(tensors, "state"))
    memory = None
    if hooks.steering is not None:
        memory = restore(hooks.steering.init(setup.state), beneath(tensors, "steering"))
    step, setup = _prepared(setup, config.compile, state, show)
    # What was logged after the checkpoint is about to be logged again.
    folder.write_records(run_dir, folder.read_records(run_dir, up_to_step=int(state.step)))
    outcome = _run_from(setup, state, memory, step, run_dir, show, should_stop, hooks)
    return outcome._replace(config=config)


def write_run(
    run_dir: Path,
    setup: Setup,
    state: TrainState,
    records: Sequence[dict[str, Any]],
    evaluations: dict[str, Evaluation],
    run: dict[str, Any],
) -> dict[str, Any]:
    """Write the folder of a run that was trained elsewhere, whole or not at all.

    Args:
        run_dir: The run folder to make or replace.
        setup: The training.
        state: The state after its last step.
        records: What was logged of its steps, for ``metrics.jsonl``.
        evaluations: The model on validation and test set.
        run: What else ``config.toml`` says of it.

    Returns:
        The summary.

    Raises:
        ConfigError: what is there is not a run alone.
        RunError: it cannot be written; what was there is as it was.
    """
    folder.check_free(run_dir, overwrite=True)
    step = int(state.step)
    epochs = []
    for epoch in range(1, step // setup.per_epoch + 1):
        loss, seconds = report.of_epoch(list(records), epoch)
        line = {"kind": "epoch", "epoch": epoch, "step": epoch * setup.per_epoch}
        examples = epoch * setup.per_epoch * setup.config.batch_size
        epochs.append(line | {"examples": examples, "loss": loss, "seconds": seconds})
    first = {"kind": "epoch", "epoch": 0, "step": 0, "examples": 0}
    epochs = epochs or [first]  # of an empty training
    epochs[-1] |= report.scores(evaluations, setup.dataset.classes)
    with folder_replacing(run_dir, last=folder.CONFIG) as beside:
        folder.write_config(beside / folder.CONFIG, setup.config, run=run)
        _save(beside, setup, state)
        folder.write_records(beside, [*records, *epochs])
        return report.sum_up(beside, setup, state, setup.trained(state), evaluations, {})


def load_checkpoint(run_dir: Path, setup: Setup) -> tuple[TrainState, Hyper]:
    """Return the state of a run's last checkpoint, and what the step after it is given.

    Args:
        run_dir: A run folder.
        setup: Its training.

    Returns:
        Both on the device of ``setup``.

    Raises:
        RunError: the checkpoint cannot be read, or is of another model.
    """
    tensors, _ = load_tensors(run_dir / folder.CHECKPOINT)
    given = beneath(tensors, "hyper").items()  # where something steers
    hyper = setup.hyper | {name: t.to(setup.config.device) for name, t in given}
    return restore(setup.state, beneath(tensors, "state")), hyper


def kept_model(run_dir: Path, setup: Setup) -> TrainedModel:
    """Return the model that a run kept, whatever its ``config.toml`` names.

    Args:
        run_dir: A run folder.
        setup: Its training, or one of the same network.

    Returns:
        The model, on the device of ``setup``.

    Raises:
        RunError: the model cannot be read, or is another one.
    """
    tensors, header = load_tensors(run_dir / folder.MODEL, needs=("class_weights",))
    kept = restore(setup.state.params | setup.state.buffers, tensors)
    weights = header["class_weights"]
    return dataclasses.replace(
        setup.trained(setup.state),
        params={name: kept[name] for name in setup.state.params},
        buffers={name: kept[name] for name in setup.state.buffers},
        class_weights=None if weights is None else torch.tensor(weights, dtype=torch.float32),
    )


def _check_steered(config: TrainConfig, steer: object) -> None:
    if (config.floor or config.ceiling) and steer is None:
        raise ConfigError(
            "floors and ceilings need what steers by them: funcloss.app.sweep.train_under_limits, "
            "or steer=funcloss.app.runs.constrained.steer_by_limits"
        )


def _prepared(setup: Setup, mode: str, state: TrainState, show: Show) -> tuple[AnyStep, Setup]:
    """Return the step to run and the setup with the decision on compilation."""
    config = setup.config
    if int(state.step) == config.epochs * setup.per_epoch:
        return setup.train_step, setup
    made = prepare(setup.train_step, mode, state, (trial_batch(setup), setup.hyper))
    show(Note(f"step: {made.note}", made.warning))
    config = dataclasses.replace(config, compile="on" if made.on else "off")
    return made.step_on, setup._replace(config=config)


class Hooks(NamedTuple):
    """What goes along with a training."""

    observer: Callable[[Setup], Observe] | None
    steering: Steering | None
    test_once: bool

    @property
    def parts(self) -> tuple[str, ...]:
        """Return the parts of the data that are evaluated on the way."""
        once = self.test_once or self.steering is not None
        return ("validation",) if once else ("validation", "test")


def _run_from(
    setup: Setup,
    state: TrainState,
    memory: Memory,
    train_step: AnyStep,
    run_dir: Path,
    show: Show,
    should_stop: Callable[[], bool],
    hooks: Hooks,
) -> Outcome:
    """Train from ``state`` to the end, keeping the folder up to date, and sum up."""
    config, n, steering = setup.config, len(setup.dataset.train.labels), hooks.steering
    steps = config.epochs * setup.per_epoch
    show(Started(run_dir, config, int(state.step), steps))
    done, diverged = int(state.step), False  # a state's own counter may be on a busy device
    with report.scalars(run_dir, config.tensorboard) as add_scalars:

        def record(line: dict[str, Any]) -> None:
            folder.append_record(run_dir, line)
            add_scalars(line)

        def on_progress(progress: Progress) -> None:
            epoch = (progress.step - 1) // setup.per_epoch + 1
            record({"kind": "step", "epoch": epoch} | progress._asdict())
            show(progress)
            nonlocal diverged
            if not diverged and not math.isfinite(progress.loss):
                diverged = True
                text = f"the loss is {progress.loss} at step {progress.step:,}"
                show(Note(f"{text}: a smaller learning_rate may help", warning=True))

        def steer(memory: Memory, state: TrainState) -> Memory:
            assert steering is not None
            memory, line = steering.update(memory, state)
            epoch = max(done - 1, 0) // setup.per_epoch + 1
            record({"kind": "steering", "step": done, "epoch": epoch} | line)
            show(Steered(done, line))
            return memory

        def take_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
            nonlocal memory, done
            if steering is not None and done and done % steering.every == 0:
                memory = steer(memory, state)
            hyper = setup.hyper if steering is None else steering.hyper(memory)
            if observe is not None and done % config.audit_every == 0:
                observe(state, batch, hyper)
            done += 1
            return train_step(state, batch, hyper)

        observe = _observed(hooks.observer, setup, record, show) if done < steps else None
        evaluations: dict[str, Evaluation] = {}
        if not folder.read_records(run_dir):
            evaluations = evaluate(setup.trained(state), setup.dataset, hooks.parts)
            line = {"kind": "epoch", "epoch": 0, "step": 0, "examples": 0}
            record(line | report.scores(evaluations, setup.dataset.classes))
        for epoch in fit(
            state,
            take_step,
            n,
            feed=setup.iter_batches,
            epochs=config.epochs,
            batch_size=config.batch_size,
            log_every=config.log_every,
            on_progress=on_progress,
            should_stop=should_stop,
        ):
            state = epoch.state
            if epoch.finished:
                evaluations = evaluate(setup.trained(state), setup.dataset, hooks.parts)
                loss, seconds = report.of_epoch(folder.read_records(run_dir), epoch.number)
                line = {"kind": "epoch", "epoch": epoch.number, "step": epoch.step}
                line |= {"examples": epoch.examples, "loss": loss, "seconds": seconds}
                record(line | report.scores(evaluations, setup.dataset.classes))
                show(EpochReport(epoch.number, config.epochs, loss, seconds, evaluations))
            _save(run_dir, setup, state, memory, steering)
        if int(state.step) < steps:
            return Outcome(run_dir, False, {}, config)
        # The checkpoint keeps the memory from before the last measurement: a run that is killed
        # from here on makes it again.
        last = memory if steering is None else steer(memory, state)
    model = setup.trained(state) if steering is None else steering.model(last)
    more = {} if steering is None else steering.summary(last)
    # A kill may have parted the model from its checkpoint.
    _save(run_dir, setup, state, memory, steering, model)
    if "test" not in evaluations:  # else the last epoch's are of this model, on all parts
        evaluations = evaluate(model, setup.dataset, ("validation", "test"))
    summary = report.sum_up(run_dir, setup, state, model, evaluations, more)
    return _finished(run_dir, summary, config, show)


def _finished(run_dir: Path, summary: dict[str, Any], config: TrainConfig, show: Show) -> Outcome:
    for text in summary.get("warnings", []):  # none in a run from before there were any
        show(Note(text, warning=True))
    return Outcome(run_dir, True, summary, config)


def _observed(
    observer: Callable[[Setup], Observe] | None,
    setup: Setup,
    record: Callable[[dict[str, Any]], None],
    show: Show,
) -> Callable[[TrainState, Batch, Hyper], None] | None:
    """Return what looks at a step before it is taken, and records what it saw."""
    if observer is None or not setup.config.audit_every:
        return None
    told = False

    def on_failure(error: AuditError) -> None:  # a training goes on without
        nonlocal told
        if not told:
            show(Note(f"steps go unaudited: {error}", warning=True))
        told = True

    try:
        observe = observer(setup)
    except AuditError as error:
        on_failure(error)
        return None

    def look(state: TrainState, batch: Batch, hyper: Hyper) -> None:
        begin = time.perf_counter()
        try:
            rows = observe(state, batch, hyper)
        except AuditError as error:
            on_failure(error)
            return
        number = int(state.step) + 1
        audited = Audited(number, time.perf_counter() - begin, rows)
        place = {"step": number, "epoch": (number - 1) // setup.per_epoch + 1}
        for row in rows:
            record({"kind": "audit"} | place | row | {"seconds": audited.seconds})
        show(audited)

    return look


def _save(
    run_dir: Path,
    setup: Setup,
    state: TrainState,
    memory: Memory = None,
    steering: Steering | None = None,
    model: TrainedModel | None = None,
) -> None:
    """Write the checkpoint to go on from, and the model to use."""
    config, step = setup.config, int(state.step)
    kept = {"state": state}
    if steering is not None:
        # What the next step is given: an audit of the checkpoint needs it.
        kept |= {"steering": memory, "hyper": steering.hyper(memory)}
        model = model or steering.model(memory)
    model = model or setup.trained(state)
    header = {"step": step, "epoch": step // setup.per_epoch, "config": option_values(config)}
    save_tensors(
        run_dir / folder.CHECKPOINT,
        flatten(kept),
        header | {"environment": folder.environment()},
    )
    save_model(run_dir / folder.MODEL, model, step=step)
