"""A run: a training with a folder that holds all of it, made, taken up again, read."""

import contextlib
import importlib.util
import json
import math
from collections.abc import Callable, Iterator
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from funcloss._files import folder_replacing, write_text
from funcloss.config import TrainConfig
from funcloss.data import take
from funcloss.errors import ConfigError, RunError
from funcloss.training import figures, folder
from funcloss.training.checkpoint import flatten, load_tensors, restore, save_tensors
from funcloss.training.compilation import prepare
from funcloss.training.evaluation import Evaluation, evaluate
from funcloss.training.loop import IndexedStep, Progress, fit
from funcloss.training.objective import Forward, make_forward
from funcloss.training.setup import Setup, input_shape, make_model, make_setup
from funcloss.training.step import TrainState
from funcloss.typing import Buffers, Params


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


Event = Note | Started | Progress | EpochReport
Show = Callable[[Event], None]


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
) -> Outcome:
    """Train as a configuration says, into a new run folder.

    Args:
        config: What to train.
        run_dir: The run folder to make; None: a new one under ``runs``.
        overwrite: A run that is at ``run_dir`` may be replaced.
        show: Called with everything that happens.
        should_stop: Asked after every step; True saves and ends.

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
    _check_tensorboard(config)
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
    return _run_from(setup, setup.state, step, run_dir, show, should_stop)


def resume(
    run_dir: str | Path,
    *,
    data_dir: str = "",
    show: Show = lambda event: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Outcome:
    """Take up a run where its last checkpoint is, as if it had never stopped.

    Args:
        run_dir: A run folder.
        data_dir: Where the data is now, if it has moved.
        show: Called with everything that happens.
        should_stop: Asked after every step; True saves and ends.

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
    return _run_from(setup, state, step, run_dir, show, should_stop)


class LoadedRun(NamedTuple):
    """A trained model, and what is needed to use it."""

    model: nn.Module  # in evaluation mode, with the weights of the run, on the CPU
    params: Params  # the same weights, for functional_call
    buffers: Buffers
    classes: tuple[str, ...]
    mean: Tensor  # of each channel, pixels in 0..1
    std: Tensor
    input_shape: tuple[int, int, int]  # channels, height, width
    config: TrainConfig


def load(run_dir: str | Path) -> LoadedRun:
    """Return the model of a run, its class names and the scale of its inputs.

    Args:
        run_dir: A run folder, finished or not.

    Returns:
        The model as it was last saved. Its inputs are
        ``funcloss.data.normalised(images, run.mean, run.std)``.

    Raises:
        RunError: the folder is not a run folder or its model cannot be read.
    """
    run_dir = Path(run_dir).expanduser()
    config = folder.read_config(run_dir)
    needs = ("input_shape", "classes", "mean", "std")
    tensors, header = load_tensors(run_dir / folder.MODEL, needs=needs)
    channels, height, width = header["input_shape"]
    model = make_model(config, (channels, height, width), len(header["classes"]))
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise RunError(f"{run_dir / folder.MODEL} is of another model: {error}") from None
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    return LoadedRun(
        model=model.eval(),
        params={name: t for name, t in tensors.items() if name in trained},
        buffers={name: t for name, t in tensors.items() if name not in trained},
        classes=tuple(header["classes"]),
        mean=torch.tensor(header["mean"]),
        std=torch.tensor(header["std"]),
        input_shape=(channels, height, width),
        config=config,
    )


def _prepared(setup: Setup, mode: str, state: TrainState, show: Show) -> tuple[IndexedStep, Setup]:
    """Return the step to run and the setup with the decision on compilation."""
    config = setup.config
    steps = config.epochs * _steps_an_epoch(setup) - int(state.step)
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
) -> Outcome:
    """Train from ``state`` to the end, keeping the folder up to date, and sum up."""
    config, n = setup.config, len(setup.dataset.train.labels)
    per_epoch = _steps_an_epoch(setup)
    show(Started(run_dir, config, int(state.step), config.epochs * per_epoch))
    forward = make_forward(setup.model.eval())
    diverged = False
    with _scalars(run_dir, config.tensorboard) as add_scalars:

        def record(line: dict[str, Any]) -> None:
            folder.append_record(run_dir, line)
            add_scalars(line)

        def on_progress(progress: Progress) -> None:
            epoch = (progress.step - 1) // per_epoch + 1
            record({"kind": "step", "epoch": epoch} | progress._asdict())
            show(progress)
            nonlocal diverged
            if not diverged and not math.isfinite(progress.loss):
                diverged = True
                text = f"the loss is {progress.loss} at step {progress.step:,}"
                show(Note(f"{text}: a smaller learning_rate may help", warning=True))

        evaluations = _evaluations(setup, forward, state)
        if not folder.read_records(run_dir):
            line = {"kind": "epoch", "epoch": 0, "step": 0, "examples": 0}
            record(line | _scores(evaluations, setup.dataset.classes))
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
                loss, seconds = _of_epoch(folder.read_records(run_dir), epoch.number)
                line = {"kind": "epoch", "epoch": epoch.number, "step": epoch.step}
                line |= {"examples": epoch.examples, "loss": loss, "seconds": seconds}
                record(line | _scores(evaluations, setup.dataset.classes))
                report = EpochReport(epoch.number, config.epochs, loss, seconds, evaluations)
                show(report)
            _save(run_dir, setup, state)
    if int(state.step) < config.epochs * per_epoch:
        return Outcome(run_dir, False, {})
    _save(run_dir, setup, state)  # a kill may have parted the model from its checkpoint
    return Outcome(run_dir, True, _sum_up(run_dir, setup, state, evaluations))


def _of_epoch(records: list[dict[str, Any]], number: int) -> tuple[float, float]:
    """Return mean loss and seconds of an epoch's steps, those before a stop included."""
    reports = [r for r in records if r["kind"] == "step" and r["epoch"] == number]
    losses = [math.nan if r["loss"] is None else r["loss"] * r["steps"] for r in reports]
    return sum(losses) / sum(r["steps"] for r in reports), sum(r["seconds"] for r in reports)


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


def _scores(evaluations: dict[str, Evaluation], classes: tuple[str, ...]) -> dict[str, Any]:
    """Return what JSON can hold of evaluations, None where a score is not defined."""

    def by_class(scores: Tensor) -> dict[str, float | None]:
        return {c: folder.defined(s) for c, s in zip(classes, scores.tolist(), strict=True)}

    return {
        name: {
            "n": int(scores.confusion.sum()),
            "loss": folder.defined(scores.loss),
            "accuracy": scores.accuracy,
            "recall": by_class(scores.recall),
            "precision": by_class(scores.precision),
        }
        for name, scores in evaluations.items()
    }


def _save(run_dir: Path, setup: Setup, state: TrainState) -> None:
    """Write the checkpoint to go on from, and the model to use."""
    config, dataset = setup.config, setup.dataset
    step = int(state.step)
    header = {"step": step, "epoch": step // _steps_an_epoch(setup), "config": config._asdict()}
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


def _steps_an_epoch(setup: Setup) -> int:
    return len(setup.dataset.train.labels) // setup.config.batch_size


def _sum_up(
    run_dir: Path, setup: Setup, state: TrainState, evaluations: dict[str, Evaluation]
) -> dict[str, Any]:
    """Draw the figures and write the summary, which is the sign of a finished run."""
    config, classes, test = setup.config, setup.dataset.classes, setup.dataset.test
    records = folder.read_records(run_dir)
    epochs = [r for r in records if r["kind"] == "epoch" and r["epoch"] > 0]
    seconds = sum(r["seconds"] for r in epochs)
    examples = int(state.step) * config.batch_size
    shown = min(6, len(test.labels))
    guesses = evaluations["test"].logits[:shown].argmax(-1).tolist()
    truths = test.labels[:shown].tolist()
    for name, figure in (
        ("curves.png", figures.curves(records)),
        ("confusion.png", figures.confusion(evaluations["test"].confusion, classes)),
        (
            "predictions.png",
            figures.predictions(
                test.images[:shown].cpu(),
                [classes[i] for i in truths],
                [classes[i] for i in guesses],
            ),
        ),
    ):
        figures.save_figure(figure, run_dir / name)
    summary = {
        "dataset": config.dataset,
        "dataset_note": setup.dataset.note,
        "model": config.model,
        "parameters": sum(p.numel() for p in state.params.values()),
        "loss": config.loss,
        "reduction": config.reduction,
        "class_weight": config.class_weight,
        "seed": config.seed,
        "epochs": config.epochs,
        "steps": int(state.step),
        "examples": examples,
        "train_seconds": seconds,
        "images_per_second": examples / seconds if seconds else None,
        "device": config.device,
        "compile": config.compile,
        "threads": config.threads,
        "torch": torch.__version__,
        **_scores(evaluations, classes),
    }
    write_text(run_dir / folder.SUMMARY, json.dumps(summary, indent=2) + "\n")
    return summary


@contextlib.contextmanager
def _scalars(run_dir: Path, wanted: bool) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Give a function that logs a record for TensorBoard, or does nothing."""
    if not wanted:
        yield lambda record: None
        return
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(run_dir / "tensorboard") as writer:

        def add(record: dict[str, Any]) -> None:
            if record["kind"] == "step":
                writer.add_scalar("loss/train", record["loss"], record["step"])
                writer.add_scalar("images_per_second", record["images_per_second"], record["step"])
            for part in ("validation", "test"):
                if part in record:
                    for score in ("loss", "accuracy"):
                        writer.add_scalar(f"{score}/{part}", record[part][score], record["step"])

        yield add


def _check_tensorboard(config: TrainConfig) -> None:
    if config.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise ConfigError("tensorboard is not installed: pip install 'funcloss[tensorboard]'")
