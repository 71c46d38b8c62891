"""A run: a training with a folder that holds all of it, made, resumed and read."""

import contextlib
import dataclasses
import math
import shutil
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from funcloss._folders import Hold, folder_replacing, holding, settle
from funcloss._trees import flatten
from funcloss.app import length
from funcloss.app.config import TrainConfig, option_values
from funcloss.app.data import Column, short_name, with_classes
from funcloss.app.decoding import Count
from funcloss.app.report.choice import Choice
from funcloss.app.runs import folder, report
from funcloss.app.runs.auditing import step_auditor
from funcloss.app.runs.checkpoint import beneath, load_header, load_record, restore, save_tensors
from funcloss.app.runs.constrained import Controller, Held, make_controller
from funcloss.app.runs.diverged import reason_of
from funcloss.app.runs.early import (
    Best,
    better,
    make_first_best,
    sentence_on,
    summary_of,
)
from funcloss.app.runs.evaluation import calibrated, evaluate, rescored
from funcloss.app.runs.events import Constrained, EpochReport, Note, Show, Started, Watcher
from funcloss.app.runs.folds import FILE, OUT_OF_FOLD, cross_validated, make_folds, read_done
from funcloss.app.runs.ledger import RunLedger
from funcloss.app.runs.log import keep_lines, lines_of, metrics_line, with_steps_before
from funcloss.app.runs.model import Header, TrainedModel, save_model, weights_of
from funcloss.app.runs.opening import announce
from funcloss.app.runs.setup import Setup, make_setup, trial_batch
from funcloss.decisions import Evaluation
from funcloss.errors import ConfigError, DataError, RunError
from funcloss.training.compilation import AnyStep, prepare
from funcloss.training.loop import Progress, fit
from funcloss.training.step import TrainState
from funcloss.typing import Batch, Hyper, Metrics

_SAVED_EVERY = 1.0  # seconds between two checkpoints, if epochs are shorter
_REQUESTED = ("dataset", "epochs", "batch_size", "schedule", "device", "compile")
Memory = Held | Best  # of a run under constraints, and of one that stops early


@dataclass(frozen=True)
class Outcome:
    """How a run, or a sweep, ended."""

    folder: Path
    finished: bool  # False when it was told to stop
    config: TrainConfig  # what ``config.toml`` holds, and whether its code may be imported
    summary: dict[str, Any] = field(default_factory=dict)  # ``summary.json``; empty unless finished
    choice: Choice | None = None  # between models, of constraints or a sweep
    files: tuple[Path, ...] = ()  # of the choice's report, the page first
    run_dir: Path | None = None  # of the model that was chosen, if it is not the folder


def run(
    config: TrainConfig,
    run_dir: str | Path | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    test_once: bool = False,
    folds: Path | None = None,
    watcher: Watcher | None = None,
    held: contextlib.ExitStack | None = None,
) -> Outcome:
    """Train as a configuration says, into a run folder.

    Args:
        config: What to train; to resume, what :func:`funcloss.app.runs.folder.read_config` reads.
        run_dir: The run folder; None: a new one under ``runs``.
        resume: Go on from the last checkpoint of the folder, as if the run had never stopped.
        overwrite: A run that is at ``run_dir`` may be replaced.
        test_once: Evaluate on the test set at the end only, not after each epoch too. So it is
            under floors and ceilings.
        folds: A file of :func:`cross_validated` with what is done of the folds; None: nothing is.
        watcher: Its callbacks.
        held: Where the folder stays held until; None: until the training ends.

    Returns:
        The run folder and the summary.

    Raises:
        ConfigError: the request makes no sense on this machine or data, or there is a run already.
        DataError: the data cannot be had.
        RunError: the run folder cannot be written, is in use by another process, its files are not
            of one run, or the loss is no longer finite.
    """
    watcher = watcher or Watcher()
    place = None if run_dir is None else Path(run_dir).expanduser()
    with contextlib.ExitStack() as own:
        held = own if held is None else held
        if resume:
            if place is None:
                raise ConfigError("resume needs a run folder")
            folder.check_is(place, "run")
            hold = held.enter_context(holding(place))
            if (summary := folder.read_summary(place)) is not None:
                watcher.show(Note(f"{place} is finished: there is nothing to resume"))
                return _finished(Outcome(place, True, config, summary), watcher.show)
            job, begin = _taken_up(config, place, watcher.show)
        else:
            job, begin = _begun(config, place, watcher.show, overwrite=overwrite, folds=folds)
            hold = held.enter_context(holding(job.run_dir))
        once = test_once or job.controller is not None
        splits = ("validation",) if once else ("validation", "test")
        return _run_from(dataclasses.replace(job, splits=splits, hold=hold), begin, watcher)


@dataclass(frozen=True)
class _Header:
    """The header of a checkpoint, as far as it is read back."""

    step: Count
    environment: dict[str, str]
    data: str  # fingerprint of the data
    classes: tuple[str, ...]
    columns: tuple[Column, ...]
    seconds: float = 0.0  # of the steps since the last report


@dataclass(frozen=True)
class _Begin:
    """Where a training begins or goes on."""

    state: TrainState
    memory: Memory | None
    records: tuple[dict[str, Any], ...] = ()  # of this epoch, and of before the first
    losses: tuple[Tensor, ...] = ()  # of the steps since the last report
    seconds: float = 0.0  # of these


@dataclass(frozen=True)
class _Job:
    """A run that is ready to train."""

    setup: Setup
    run_dir: Path
    train_step: AnyStep  # compiled or not
    controller: Controller | None
    splits: tuple[str, ...] = ()  # that are evaluated during training
    hold: Hold | None = None  # on the folder, once it is in its place

    def place(self, step: int) -> dict[str, int]:
        """Return a step and the epoch that it is of, as records have them."""
        return {"step": step, "epoch": max(step - 1, 0) // self.setup.per_epoch + 1}

    def is_over(self, step: int, memory: Memory | None) -> bool:
        """Return whether the training is over after a step."""
        per_epoch = self.setup.per_epoch
        if isinstance(memory, Best):
            return length.is_over(step // per_epoch, int(memory.step) // per_epoch, per_epoch)
        return step >= self.setup.steps


def _begun(
    config: TrainConfig,
    run_dir: Path | None,
    show: Show,
    *,
    overwrite: bool,
    folds: Path | None,
) -> tuple[_Job, _Begin]:
    """Make a new run folder."""
    if run_dir is not None:
        folder.check_free(run_dir, overwrite=overwrite)
    report.check_tensorboard(config)
    setup = make_setup(config)
    announce(setup, show)
    if config.folds:
        make_folds(setup)  # it refuses what cannot be dealt into folds, before anything is trained
    controller, memory = make_controller(setup), make_first_best(setup)
    step, setup = _prepared(setup, config.compile, setup.state, show)
    if run_dir is None:
        stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
        name = f"{setup.dataset.name}-{short_name(setup.config.model)}-{stamp}"
        run_dir = folder.fresh_name(Path("runs"), folder.as_name(name))
    about = {
        "command": folder.command_line(),
        "dataset_note": setup.dataset.note,
        "requested": {name: getattr(config, name) for name in _REQUESTED},
        "environment": folder.environment(),
    }
    job = _Job(setup, run_dir, step, controller)
    memory = memory if controller is None else controller.init(setup.state)
    folder.check_free(run_dir, overwrite=overwrite)  # another may have come meanwhile
    begin = _Begin(setup.state, memory)
    with folder_replacing(run_dir, last=folder.CONFIG) as beside:
        folder.write_config(beside / folder.CONFIG, setup.config, run=about)
        _save(dataclasses.replace(job, run_dir=beside), begin)
        keep_lines(beside / folder.METRICS, [])
        if folds is not None:
            shutil.copyfile(folds, beside / FILE)
    return job, begin


def _taken_up(config: TrainConfig, run_dir: Path, show: Show) -> tuple[_Job, _Begin]:
    """Read a run folder at its last checkpoint: all that will be needed, before any of it changes.

    Raises:
        RunError: it cannot be read; the folder is as it was.
    """
    path, log = run_dir / folder.CHECKPOINT, run_dir / folder.METRICS
    folder.check_files(run_dir)
    tensors, header = load_record(path, _Header)
    for line in folder.differences(header.environment, folder.environment()):
        show(Note(f"the resumed run will not be bit-identical: {line}", warning=True))
    # Its weights come from the checkpoint.
    setup = make_setup(dataclasses.replace(config, init="", pretrained=False))
    if header.data != setup.dataset.fingerprint:
        raise RunError(
            f"{setup.dataset.name} has changed since {run_dir} began to train on it: put the data "
            "back as it was, or begin another run"
        )
    controller, memory = make_controller(setup), make_first_best(setup)
    state = restore(setup.state, beneath(tensors, "state"), of=path)
    if controller is not None:
        memory = restore(controller.init(setup.state), beneath(tensors, "constraints"), of=path)
    elif memory is not None:
        memory = restore(memory, beneath(tensors, "best"), of=path)
    done = int(state.step)
    _check_steps(path, setup, header.step, done, done if memory is None else int(memory.step))
    losses = tensors.get("unreported", torch.zeros(0))
    if losses.dim() != 1 or len(losses) > done or not losses.isfinite().all():
        raise RunError(f"{path} is damaged: its unreported losses are not those of {done} steps")
    params = flatten({"now": state.params, "kept": {} if memory is None else memory.params})
    sound = all(t.isfinite().all() for t in params.values())
    if not sound or any(t.isnan().any() for t in flatten(state.opt_state).values()):
        raise RunError(f"{path} is damaged: not all of its numbers are finite")
    if config.folds and (run_dir / FILE).exists():
        read_done(run_dir / FILE)

    def is_kept(record: dict[str, Any]) -> bool:
        # What was logged after the checkpoint is about to be logged again. A step's constraints are
        # measured before it: at the step of a checkpoint, not yet.
        return record["step"] + (record["kind"] == "constraints") <= done

    epoch, records, lost, kept = done // setup.per_epoch + 1, [], [], 0
    for line, record in lines_of(log, metrics_line, lost.append):
        kept += len(line) if is_kept(record) else 0
        if is_kept(record) and record["epoch"] in (0, epoch):
            records.append(record)
    for text in lost:
        show(Note(text, warning=True))
    step, setup = _prepared(setup, config.compile, state, show)
    settle(run_dir, last=folder.CONFIG)
    if not log.exists() or kept != log.stat().st_size:
        lines = lines_of(log, metrics_line)
        keep_lines(log, (line for line, record in lines if is_kept(record)))
    job = _Job(setup, run_dir, step, controller)
    return job, _Begin(state, memory, tuple(records), tuple(losses), header.seconds)


def _check_steps(path: Path, setup: Setup, stated: int, done: int, remembered: int) -> None:
    """Raise ``RunError`` unless a checkpoint says everywhere the same, possible, steps."""
    if stated != done or not 0 <= remembered <= done <= setup.steps:
        raise RunError(
            f"{path} is damaged: it is after step {stated} by its header and {done} by its state, "
            f"remembers step {remembered}, and the training has {setup.steps} steps"
        )


def write_run(
    run_dir: Path,
    setup: Setup,
    state: TrainState,
    records: Iterable[dict[str, Any]],
    evaluations: dict[str, Evaluation],
    about: dict[str, Any],
) -> dict[str, Any]:
    """Write the folder of a run that was trained elsewhere, whole or not at all.

    Args:
        run_dir: The run folder to make or replace.
        setup: The training.
        state: The state after its last step.
        records: What was logged of its steps, for ``metrics.jsonl``.
        evaluations: The model on validation and test set.
        about: What else ``config.toml`` says of it.

    Returns:
        The summary.

    Raises:
        ConfigError: what is there is not a run alone.
        RunError: it cannot be written; what was there is as it was.
    """
    folder.check_free(run_dir, overwrite=True)
    step = int(state.step)
    records, of_epoch = [*records], {}
    for record in records:
        of_epoch.setdefault(record["epoch"], []).append(record)
    epochs = []
    for epoch in range(1, step // setup.per_epoch + 1):
        loss, seconds = report.of_epoch(of_epoch.get(epoch, []), epoch)
        line = {"kind": "epoch", "epoch": epoch, "step": epoch * setup.per_epoch}
        examples = epoch * setup.per_epoch * setup.config.batch_size
        epochs.append(line | {"examples": examples, "loss": loss, "seconds": seconds})
    first = {"kind": "epoch", "epoch": 0, "step": 0, "examples": 0}
    epochs = epochs or [first]  # of an empty training
    epochs[-1] |= report.scores(evaluations, setup.dataset.classes)
    with folder_replacing(run_dir, last=folder.CONFIG) as beside:
        folder.write_config(beside / folder.CONFIG, setup.config, run=about)
        held_out = evaluations.get("validation")
        model = calibrated(setup.trained(state), held_out, cut=setup.dataset.cut)
        _save(_Job(setup, beside, setup.train_step, None), _Begin(state, None), model)
        lines = (folder.as_line(record).encode() for record in (*records, *epochs))
        keep_lines(beside / folder.METRICS, lines)
        return report.sum_up(beside, setup, state, model, rescored(model, evaluations), {})


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
    path = run_dir / folder.CHECKPOINT
    tensors, header = load_record(path, _Header)
    state = restore(setup.state, beneath(tensors, "state"), of=path)
    given = beneath(tensors, "hyper")
    _check_steps(path, setup, header.step, int(state.step), 0)
    # Under constraints it holds what the next step is given.
    if any(n not in setup.hyper or t.shape != setup.hyper[n].shape for n, t in given.items()):
        raise RunError(f"{path} is of another training: see its {', '.join(sorted(given))}")
    return state, setup.hyper | {name: t.to(setup.config.device) for name, t in given.items()}


def note_on_data(run_dir: Path, setup: Setup) -> str:
    """Return a line that the data has changed since a run was trained on it, if it has.

    Raises:
        DataError: it has other classes or columns.
        RunError: the checkpoint cannot be read.
    """
    header = load_header(run_dir / folder.CHECKPOINT, _Header)
    dataset = setup.dataset
    with_classes(dataset, header.classes)
    if (header.classes, header.columns) != (dataset.classes, dataset.columns):
        raise DataError(
            f"{dataset.name} has other columns, or classes in another order, than when "
            f"{run_dir} was trained on it: put the data back as it was"
        )
    changed = header.data != dataset.fingerprint
    return f"{dataset.name} has changed since the run was trained on it" * changed


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
    path = run_dir / folder.MODEL
    tensors, header = load_record(path, Header)
    if header.classes != setup.dataset.classes:
        raise RunError(f"{path} is of other classes than the run's: {', '.join(header.classes)}")
    kept = restore(setup.state.params | setup.state.buffers, tensors, of=path)
    return dataclasses.replace(
        setup.trained(setup.state),
        params={name: kept[name] for name in setup.state.params},
        buffers={name: kept[name] for name in setup.state.buffers},
        class_weights=weights_of(header),
    )


def _prepared(setup: Setup, mode: str, state: TrainState, show: Show) -> tuple[AnyStep, Setup]:
    """Return the step to run and the setup with the decision on compilation."""
    config = setup.config
    if int(state.step) == setup.steps:
        return setup.train_step, setup
    made = prepare(setup.train_step, mode, state, (trial_batch(setup), setup.hyper))
    show(Note(f"step: {made.note}", made.warning))
    config = dataclasses.replace(config, compile="on" if made.on else "off")
    return made.step_on, dataclasses.replace(setup, config=config)


class _Log:
    """Writes the records of a run, and shows what happens."""

    def __init__(self, job: _Job, begin: _Begin, show: Show, add_scalars: Any) -> None:
        self.job, self.show, self.add_scalars = job, show, add_scalars
        self.hyper = job.setup.hyper
        self.before: TrainState | None = None  # of the last report that was finite
        self.since: TrainState | None = None  # at the first step after it
        self.records = list(begin.records)  # of this epoch, those before a stop among them
        self.losses = list(begin.losses)  # of the steps since the last report that is a record
        self.seconds = begin.seconds  # of those of them that were taken before a stop

    def record(self, line: dict[str, Any]) -> None:
        if self.job.hold is not None:
            self.job.hold.check()
        self.records.append(line)
        folder.append_line(self.job.run_dir / folder.METRICS, line)
        self.add_scalars(line)

    def progress(self, progress: Progress) -> None:
        setup, step = self.job.setup, progress.step
        progress = with_steps_before(progress, self.losses, self.seconds, setup.config.batch_size)
        if step % setup.config.log_every == 0 or step % setup.per_epoch == 0:
            place = {"kind": "step", "epoch": self.job.place(step)["epoch"]}
            self.record(place | dataclasses.asdict(progress))
            self.losses, self.seconds = [], 0.0
        else:  # a stop: the checkpoint keeps these for the report that they are a part of
            self.seconds = progress.seconds
        self.show(progress)
        if math.isfinite(progress.loss):
            self.before, self.since = self.since, None
            return
        first = self.before or self.since  # a gradient may have been NaN before the loss was
        if first is None:
            raise RunError(f"the loss {setup.config.loss} is not finite")
        raise RunError(reason_of(setup, first, self.hyper, step - int(first.step)))

    def taking(self, state: TrainState, hyper: Hyper) -> None:
        """Remember where a step begins, and what it is given."""
        self.since, self.hyper = self.since or state, hyper

    def epoch(self, line: dict[str, Any], evaluations: dict[str, Evaluation]) -> None:
        classes = self.job.setup.dataset.classes
        self.record({"kind": "epoch"} | line | report.scores(evaluations, classes))
        self.records.clear()


def _run_from(job: _Job, begin: _Begin, watcher: Watcher) -> Outcome:
    """Train to the end, keeping the folder up to date, and sum up."""
    setup, config, controller = job.setup, job.setup.config, job.controller
    state, memory = begin.state, begin.memory
    done = int(state.step)  # a state's own counter may be on a busy device
    over = job.is_over(done, memory)
    watcher.show(Started(job.run_dir, config, done, setup.steps))
    audit = None if over else step_auditor(setup, watcher.show)
    ledger = (
        None
        if over or config.ledger == "off"
        else RunLedger(setup, watcher.show, state, job.run_dir)
    )
    saved = time.monotonic()
    with report.scalars(job.run_dir, config.tensorboard) as add_scalars:
        log = _Log(job, begin, watcher.show, add_scalars)

        def measured(memory: Memory | None, state: TrainState) -> Memory | None:
            if controller is None or not isinstance(memory, Held):
                return memory
            memory, line = controller.update(memory, state)
            log.record({"kind": "constraints"} | job.place(done) | line)
            watcher.show(Constrained(done, line))
            return memory

        def take_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
            nonlocal memory, done
            if controller is not None and done and done % controller.every == 0:
                memory = measured(memory, state)
            hyper = _hyper(job, memory)
            if audit is not None and done % config.audit_every == 0:
                audited = audit(state, batch, hyper)
                if audited is not None:
                    for row in audited.rows:
                        place = {"kind": "audit"} | job.place(audited.step)
                        log.record(place | row | {"seconds": audited.seconds})
                    watcher.show(audited)
            done += 1
            log.taking(state, hyper)
            after, metrics = job.train_step(state, batch, hyper)
            if ledger is not None:
                ledger.update(state, batch, hyper, after)
            log.losses.append(metrics["loss"])
            return after, metrics

        def save() -> None:
            _save(job, _Begin(state, memory, (), tuple(log.losses), log.seconds))
            if ledger is not None:
                ledger.save(job.run_dir, int(state.step))

        evaluations: dict[str, Evaluation] = {}
        if done == 0 and not log.records:
            evaluations = evaluate(setup.trained(state), setup.dataset, job.splits)
            log.epoch({"epoch": 0, "step": 0, "examples": 0}, evaluations)
        for epoch in fit(
            state,
            take_step,
            setup.drawn,
            order=setup.order,
            iter_batches=setup.iter_batches,
            epochs=done // setup.per_epoch if over else setup.epochs,
            batch_size=config.batch_size,
            log_every=config.log_every,
            on_progress=log.progress,
            should_stop=watcher.should_stop,
        ):
            state = epoch.state
            if epoch.finished:
                evaluations = evaluate(setup.trained(state), setup.dataset, job.splits)
                loss, seconds = report.of_epoch(log.records, epoch.number)
                line = {"epoch": epoch.number, "step": epoch.step, "examples": epoch.examples}
                if ledger is not None and (summed := ledger.epoch(epoch.number, state)):
                    log.record(summed | {"epoch": epoch.number, "step": epoch.step})
                log.epoch(line | {"loss": loss, "seconds": seconds}, evaluations)
                watcher.show(EpochReport(epoch.number, setup.epochs, loss, seconds, evaluations))
                if isinstance(memory, Best):
                    memory = better(memory, state, evaluations["validation"].loss)
                    over = job.is_over(epoch.step, memory)
            if over:
                break
            if time.monotonic() - saved >= _SAVED_EVERY:
                save()
                saved = time.monotonic()
        if not job.is_over(int(state.step), memory):
            save()
            return Outcome(job.run_dir, False, config)
        # The checkpoint keeps the memory from before the last measurement: a run that is killed
        # from here on makes it again.
        last = measured(memory, state)
    model, more = setup.trained(state), {}
    if controller is not None and isinstance(last, Held):
        model, more = controller.model(last), controller.summary(last)
    elif isinstance(memory, Best):
        model, more, evaluations = setup.trained(memory), summary_of(memory, setup), {}
        watcher.show(Note(sentence_on(memory, setup, done)))
    if "test" not in evaluations:  # else the last epoch's are of this model, on all splits
        evaluations = evaluate(model, setup.dataset, ("validation", "test"))
    held_out, on, folds = evaluations.get("validation"), "validation", None
    if config.folds:
        folds = cross_validated(setup, job.run_dir / FILE, watcher)
        if folds is None:
            return Outcome(job.run_dir, False, config)
        held_out, on = folds.evaluation(model), OUT_OF_FOLD
        evaluations = {OUT_OF_FOLD: held_out, **evaluations}
    model = calibrated(model, held_out, cut=setup.dataset.cut, on=on)
    _save(job, _Begin(state, memory), model)
    if ledger is not None:
        ledger.save(job.run_dir, int(state.step), finished=True)
    evaluations = rescored(model, evaluations)
    if folds is not None:
        over = folds.over_folds(evaluations[OUT_OF_FOLD])
        more |= {"over_folds": over, "folds": config.folds, "repeats": config.repeats}
    summary = report.sum_up(job.run_dir, setup, state, model, evaluations, more)
    return _finished(Outcome(job.run_dir, True, config, summary), watcher.show)


def _finished(outcome: Outcome, show: Show) -> Outcome:
    for text in outcome.summary.get("warnings", []):  # none in a run from before there were any
        show(Note(text, warning=True))
    return outcome


def _hyper(job: _Job, memory: Memory | None) -> Hyper:
    """Return what the next step is given."""
    if job.controller is None or not isinstance(memory, Held):
        return job.setup.hyper
    return job.controller.hyper(memory)


def _save(job: _Job, now: _Begin, model: TrainedModel | None = None) -> None:
    """Write the checkpoint to go on from, and the model to use."""
    if job.hold is not None:
        job.hold.check()
    setup, state, memory, step = job.setup, now.state, now.memory, int(now.state.step)
    kept: dict[str, Any] = {"state": state}
    if now.losses:
        kept |= {"unreported": torch.stack(now.losses)}
    if isinstance(memory, Best):
        kept |= {"best": memory}
        model = model or setup.trained(memory)
    elif job.controller is not None and memory is not None:
        # What the next step is given: an audit of the checkpoint needs it.
        kept |= {"constraints": memory, "hyper": _hyper(job, memory)}
        model = model or job.controller.model(memory)
    header = {
        "step": step,
        "epoch": step // setup.per_epoch,
        "config": option_values(setup.config),
        "environment": folder.environment(),
        "data": setup.dataset.fingerprint,
        "classes": setup.dataset.classes,
        "columns": [dataclasses.asdict(column) for column in setup.dataset.columns],
        "seconds": now.seconds,
    }
    save_tensors(job.run_dir / folder.CHECKPOINT, flatten(kept), header)
    model = model or setup.trained(state)
    if not model.calibration.fitted_on:  # in the middle of a training
        model = calibrated(model, None, cut=setup.dataset.cut)
    save_model(job.run_dir / folder.MODEL, model, step=step)
