"""What is said of a run: records, scalars, figures and the summary."""

import contextlib
import importlib.util
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from funcloss._files import write_text
from funcloss._json import jsonable, or_nan
from funcloss.app.config import TrainConfig
from funcloss.app.data import as_pixels, subset
from funcloss.app.report import run_figures as figures
from funcloss.app.runs import folder
from funcloss.app.runs.evaluation import evaluate_examples, record_of
from funcloss.app.runs.folds import OUT_OF_FOLD
from funcloss.app.runs.learned import learning_warnings, no_better_than_constant, underfitted
from funcloss.app.runs.log import logged
from funcloss.app.runs.model import TrainedModel
from funcloss.app.runs.rules import rule_caveat, usual_rule
from funcloss.app.runs.setup import Setup
from funcloss.decisions import cost_sentences, decision_sentences
from funcloss.errors import ConfigError
from funcloss.training.evaluation import Evaluation
from funcloss.training.step import TrainState

_TRAINING = 10_000  # examples at most that tell whether a model predicts a constant
_SHOWN = 6  # test images with what the model says
_MATRICES = 100  # classes at most whose confusion matrices are in a summary


def of_epoch(records: list[dict[str, Any]], number: int) -> tuple[float, float]:
    """Return mean loss and seconds of an epoch's steps, those before a stop included."""
    reports = [r for r in records if r["kind"] == "step" and r["epoch"] == number]
    if not reports:  # their lines were damaged
        return math.nan, 0.0
    losses = [math.nan if r["loss"] is None else r["loss"] * r["steps"] for r in reports]
    return sum(losses) / sum(r["steps"] for r in reports), sum(r["seconds"] for r in reports)


def scores(evaluations: dict[str, Evaluation], classes: tuple[str, ...]) -> dict[str, Any]:
    """Return the scores of an epoch by count, as JSON has them, None where one is not defined."""

    def by_class(values: Tensor) -> dict[str, float | None]:
        return {c: jsonable(s) for c, s in zip(classes, values.tolist(), strict=True)}

    return {
        name: {
            "n": len(found.labels),
            "loss": jsonable(found.loss),
            "accuracy": float(hits.sum() / len(found.labels)),
            "recall": by_class(hits / confusion.sum(1)),
            "precision": by_class(hits / confusion.sum(0)[: len(classes)]),
        }
        for name, found in evaluations.items()
        for confusion in [found.argmax.confusion.double()]
        for hits in [confusion.diagonal()]
    }


def sum_up(
    run_dir: Path,
    setup: Setup,
    state: TrainState,
    model: TrainedModel,
    evaluations: dict[str, Evaluation],
    more: dict[str, Any],
) -> dict[str, Any]:
    """Draw the figures and write the summary, which is the sign of a finished run."""
    config, classes, test = setup.config, setup.dataset.classes, setup.dataset.test
    log = logged(folder.records_of(run_dir))
    examples = int(state.step) * config.batch_size
    # Under floors and ceilings the loss itself changes with the class weights.
    losses = [] if config.floor or config.ceiling else log.losses
    few = torch.arange(min(_SHOWN, len(test.labels)), device=test.labels.device)
    split = "test" if "test" in evaluations else OUT_OF_FOLD
    shown = evaluations[split]
    guesses = shown.logits[: len(few)].argmax(-1).tolist()
    drawn = figures.Drawn(
        records=[*log.steps, *log.epochs],
        classes=classes,
        confusion=shown.argmax.confusion,
        reliability=shown.metrics.reliability,
        images=as_pixels(subset(test, few)) if setup.dataset.has_images and len(few) else None,
        truths=[classes[i] for i in test.labels[few].tolist()],
        guesses=[classes[i] for i in guesses],
        curve=shown.curve,
        sensitivity=shown.sensitivity,
        what="test set" if split == "test" else "out-of-fold examples",
    )
    for name, draw in figures.FIGURES.items():
        with figures.own_style():
            figure = draw(drawn)
        if figure:
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
        "epochs": int(state.step) // setup.per_epoch,
        "steps": int(state.step),
        "examples": examples,
        "train_seconds": log.seconds,
        "audits": log.audits,
        "audit_seconds": log.audit_seconds,
        "images_per_second": examples / log.seconds if log.seconds else None,
        "device": config.device,
        "compile": config.compile,
        "threads": config.threads,
        "torch": torch.__version__,
        "warnings": learning_warnings(
            shown.argmax.confusion, classes, losses, trained=bool(state.step)
        )
        + _underfitted(setup, model, shown, log.epochs, losses),
        **more,
        "costs": cost_sentences(setup.costs),
        "decisions": decision_sentences(setup.costs),
        "rule": usual_rule(config),
        "calibration": model.calibration.record(),
        "calibrated": model.calibration.sentence,
        "caveat": rule_caveat(config),
        **{
            name: record_of(found, matrices=len(classes) <= _MATRICES)
            for name, found in evaluations.items()
        },
    }
    write_text(run_dir / folder.SUMMARY, json.dumps(summary, indent=2) + "\n")
    return summary


def _underfitted(
    setup: Setup,
    model: TrainedModel,
    test: Evaluation,
    done: list[dict[str, Any]],
    losses: list[tuple[float, int]],
) -> list[str]:
    """Return a warning if a training of a fixed number of epochs was too short."""
    epochs, train = setup.config.epochs, setup.dataset.train
    if not isinstance(epochs, int) or not losses:
        return []
    constant = no_better_than_constant(test.argmax.confusion)
    if constant:  # else not on training data either, of which a part will do
        n, device = len(train.labels), train.labels.device
        few = torch.arange(0, n, math.ceil(n / _TRAINING), device=device)
        on_train = evaluate_examples(model, setup.dataset, subset(train, few))
        constant = no_better_than_constant(on_train.argmax.confusion)
    validation = [or_nan(r["validation"]["loss"]) for r in done if "validation" in r]
    return underfitted(losses, validation, epochs=epochs, constant=constant)


@contextlib.contextmanager
def scalars(run_dir: Path, wanted: bool) -> Iterator[Callable[[dict[str, Any]], None]]:
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
            if record["kind"] == "audit":
                for score in ("share", "norm", "update_share"):
                    value = math.nan if record[score] is None else record[score]
                    writer.add_scalar(f"{score}/{record['class']}", value, record["step"])
            for part in ("validation", "test"):
                if part in record:
                    for score in ("loss", "accuracy"):
                        value = record[part][score]
                        value = math.nan if value is None else value
                        writer.add_scalar(f"{score}/{part}", value, record["step"])

        yield add


def check_tensorboard(config: TrainConfig) -> None:
    """Raise ``ConfigError`` if TensorBoard is asked for and not installed."""
    if config.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise ConfigError("tensorboard is not installed: pip install 'funcloss[tensorboard]'")
