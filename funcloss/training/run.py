"""A run: a training with a folder that holds all of it, made, taken up again, read."""

import copy
import math
import time
from collections.abc import Callable
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from funcloss._files import folder_replacing
from funcloss.config import TrainConfig
from funcloss.data import take
from funcloss.errors import AuditError
from funcloss.training import folder, report
from funcloss.training.checkpoint import flatten, load_tensors, restore, save_tensors
from funcloss.training.compilation import prepare
from funcloss.training.evaluation import Evaluation, evaluate
from funcloss.training.loop import IndexedStep, Progress, fit
from funcloss.training.objective import Forward, make_forward
from funcloss.training.setup import Setup, input_shape, make_setup
from funcloss.training.step import TrainState
from funcloss.typing import Metrics


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
    evaluations: dict[str, Evaluation]  # by part of the data set


class Audited(NamedTuple):
    """Who owned the gradient of a step, looked at before it was taken."""

    step: int  # its number, from 1
    seconds: float  # that looking took
    rows: list[dict[str, Any]]  # one a class


Event = Note | Started | Progress | EpochReport | Audited
Show = Callable[[Event], None]
# what looks at the step on the training examples at an index: a record a class
Observe = Callable[[TrainState, Tensor], list[dict[str, Any]]]


class Outcome(NamedTuple):
    """How a run ended."""

    folder: Path
    finished: bool  # False when it was told to stop
    summary: dict[str, Any]  # what ``summary.json`` holds; empty unless finished


def train(
    config: TrainConfig,
    run_dir: str | Path | None = None,
    *,
    overwrite: bool = False,
    show: Show = lambda event: None,
    should_stop: Callable[[], bool] = lambda: False,
    observer: Callable[[Setup], Observe] | None = None,
) -> Outcome:
    """Train as a configuration says, into a new run folder.

    Args:
        config: What to train.
        run_dir: The run folder to make; None: a new one under ``runs``.
        overwrite: A run that is at ``run_dir`` may be replaced.
        show: Called with everything that happens.
        should_stop: Asked after every step; True saves and ends.
        observer: What audits a step every ``audit_every`` steps, ``funcloss.audit.observer``;
            None: nothing does.

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
    setup = make_setup(config)
    if setup.dataset.note:
        show(Note(setup.dataset.note, warning=True))
    step, setup = _prepared(setup, config.compile, setup.state, show)
    if run_dir is None:
        stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
        name = f"{setup.config.dataset}-{setup.config.model}-{stamp}"
        run_dir = folder.fresh_name(Path("runs"), name)
    run = {
        "command": folder.command_line(),
        "dataset_note": setup.dataset.note,
        "requested": {name: getattr(config, name) for name in ("dataset", "device", "compile")},
        "environment": folder.environment(),
    }
    with folder_replacing(run_dir, last=folder.CONFIG) as beside:
        folder.write_config(beside, setup.config, run)
        _save(beside, setup, setup.state)
        folder.write_records(beside, [])
    return _run_from(setup, setup.state, step, run_dir, show, should_stop, observer)


def resume(
    run_dir: str | Path,
    *,
    data_dir: str = "",
    show: Show = lambda event: None,
    should_stop: Callable[[], bool] = lambda: False,
    observer: Callable[[Setup], Observe] | None = None,
) -> Outcome:
    """Take up a run where its last checkpoint is, as if it had never stopped.

    Args:
        run_dir: A run folder.
        data_dir: Where the data is now, if it has moved.
        show: Called with everything that happens.
        should_stop: Asked after every step; True saves and ends.
        observer: As for :func:`train`.

    Returns:
        The run folder and the summary.

    Raises:
        ConfigError: a device of the run is not on this machine.
        DataError: the data cannot be had.
        RunError: the folder is not a run folder, or its files are not of one run.
    """
    run_dir = Path(run_dir).expanduser()
    config = folder.read_config(run_dir)
    if (summary := folder.read_summary(run_dir)) is not None:
        show(Note(f"{run_dir} is finished: there is nothing to resume"))
        return Outcome(run_dir, True, summary)
    tensors, header = load_tensors(run_dir / folder.CHECKPOINT, needs=("environment",))
    for line in folder.differences(header["environment"], folder.environment()):
        show(Note(f"not the same to the bit as without a stop: {line}", warning=True))
    setup = make_setup(config._replace(data_dir=data_dir or config.data_dir))
    state = restore(setup.state, tensors)
    step, setup = _prepared(setup, config.compile, state, show)
    # What was logged after the checkpoint is about to be logged again.
    folder.write_records(run_dir, folder.read_records(run_dir, up_to_step=int(state.step)))
    return _run_from(setup, state, step, run_dir, show, should_stop, observer)


def _prepared(setup: Setup, mode: str, state: TrainState, show: Show) -> tuple[IndexedStep, Setup]:
    """Return the step to run and the setup with the decision on compilation."""
    config = setup.config
    steps = config.epochs * setup.per_epoch - int(state.step)
    if steps == 0:
        return setup.step_on, setup
    index = torch.arange(config.batch_size, device=config.device)
    made = prepare(setup.step_on, mode, state, index, steps)
    show(Note(f"step: {made.note}"))
    config = config._replace(compile="on" if made.on else "off")
    return made.step_on, setup._replace(config=config)


def _run_from(
    setup: Setup,
    state: TrainState,
    step_on: IndexedStep,
    run_dir: Path,
    show: Show,
    should_stop: Callable[[], bool],
    observer: Callable[[Setup], Observe] | None,
) -> Outcome:
    """Train from ``state`` to the end, keeping the folder up to date, and sum up."""
    config, n = setup.config, len(setup.dataset.train.labels)
    steps = config.epochs * setup.per_epoch
    show(Started(run_dir, config, int(state.step), steps))
    forward = make_forward(copy.deepcopy(setup.model).eval())
    diverged = unaudited = False
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

        if observer is not None and config.audit_every and int(state.step) < steps:

            def on_audit(audited: Audited) -> None:
                place = {"step": audited.step, "epoch": (audited.step - 1) // setup.per_epoch + 1}
                for row in audited.rows:
                    record({"kind": "audit"} | place | row | {"seconds": audited.seconds})
                show(audited)

            def on_failure(why: str) -> None:
                nonlocal unaudited
                if not unaudited:
                    unaudited = True
                    show(Note(f"steps go unaudited: {why}", warning=True))

            try:
                observe = observer(setup)
            except AuditError as error:
                on_failure(str(error))
            else:
                step_on = _observed(
                    step_on, observe, config.audit_every, int(state.step), on_audit, on_failure
                )
        evaluations = _evaluations(setup, forward, state)
        if not folder.read_records(run_dir):
            line = {"kind": "epoch", "epoch": 0, "step": 0, "examples": 0}
            record(line | report.scores(evaluations, setup.dataset.classes))
        for epoch in fit(
            state,
            step_on,
            n,
            epochs=config.epochs,
            batch_size=config.batch_size,
            log_every=config.log_every,
            on_progress=on_progress,
            should_stop=should_stop,
        ):
            state = epoch.state
            if epoch.finished:
                evaluations = _evaluations(setup, forward, state)
                loss, seconds = report.of_epoch(folder.read_records(run_dir), epoch.number)
                line = {"kind": "epoch", "epoch": epoch.number, "step": epoch.step}
                line |= {"examples": epoch.examples, "loss": loss, "seconds": seconds}
                record(line | report.scores(evaluations, setup.dataset.classes))
                show(EpochReport(epoch.number, config.epochs, loss, seconds, evaluations))
            _save(run_dir, setup, state)
    if int(state.step) < steps:
        return Outcome(run_dir, False, {})
    _save(run_dir, setup, state)  # a kill may have parted the model from its checkpoint
    return Outcome(run_dir, True, report.sum_up(run_dir, setup, state, evaluations))


def _observed(
    step_on: IndexedStep,
    observe: Observe,
    every: int,
    step: int,
    on_audit: Callable[[Audited], None],
    on_failure: Callable[[str], None],
) -> IndexedStep:
    """Return the step, which first looks at what it is about to do, every so many steps."""
    done = step  # a state's own counter may be on a device that is busy

    def looked_at(state: TrainState, index: Tensor) -> tuple[TrainState, Metrics]:
        nonlocal done
        if done % every == 0:
            begin = time.perf_counter()
            try:
                rows = observe(state, index)
            except AuditError as error:  # a training goes on without
                on_failure(str(error))
            else:
                on_audit(Audited(done + 1, time.perf_counter() - begin, rows))
        done += 1
        return step_on(state, index)

    return looked_at


def _evaluations(setup: Setup, forward: Forward, state: TrainState) -> dict[str, Evaluation]:
    """Evaluate on validation, if there is one, and test set. Nothing is chosen by either."""
    parts = {"validation": setup.dataset.validation, "test": setup.dataset.test}
    return {
        name: evaluate(
            forward,
            state.params,
            state.buffers,
            partial(take, setup.dataset, examples),
            len(examples.labels),
            setup.criterion,
            setup.hyper,
        )
        for name, examples in parts.items()
        if len(examples.labels)
    }


def _save(run_dir: Path, setup: Setup, state: TrainState) -> None:
    """Write the checkpoint to go on from, and the model to use."""
    config, dataset = setup.config, setup.dataset
    step = int(state.step)
    header = {"step": step, "epoch": step // setup.per_epoch, "config": config._asdict()}
    save_tensors(
        run_dir / folder.CHECKPOINT,
        flatten(state),
        header | {"environment": folder.environment()},
    )
    save_tensors(
        run_dir / folder.MODEL,
        state.params | state.buffers,
        {
            "step": step,
            "model": config.model,
            "classes": dataset.classes,
            "mean": dataset.mean.tolist(),
            "std": dataset.std.tolist(),
            "input_shape": input_shape(dataset),
        },
    )
