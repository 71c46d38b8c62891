"""A trained model in use: on a data set, on image files."""

import csv
import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor, nn

from funcloss._files import replacing, write_text
from funcloss.config import TrainConfig, make_config
from funcloss.data import Dataset, Examples, load_dataset, moved, normalised, resized, take
from funcloss.decisions import Costs, Judged, make_costs
from funcloss.errors import ConfigError, DataError, RunError
from funcloss.training import folder
from funcloss.training.checkpoint import load_tensors
from funcloss.training.evaluation import Evaluation, evaluate
from funcloss.training.judging import judge_parts, judged_record, rule_caveat
from funcloss.training.objective import make_criterion, make_forward
from funcloss.training.setup import (
    input_shape,
    make_hyper,
    make_model,
    resolve_device,
    resolved_costs,
)
from funcloss.training.step import preferred_layout
from funcloss.typing import Buffers, Params


class LoadedRun(NamedTuple):
    """A trained model, and what is needed to use it."""

    model: nn.Module  # in evaluation mode, with the weights of the run, on the CPU
    params: Params  # the same weights, for functional_call
    buffers: Buffers
    classes: tuple[str, ...]
    class_counts: Tensor  # float32, training examples of each class
    class_weights: Tensor | None  # that its last steps were given; None: none
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
    needs = ("input_shape", "classes", "class_counts", "class_weights", "mean", "std")
    tensors, header = load_tensors(run_dir / folder.MODEL, needs=needs)
    channels, height, width = header["input_shape"]
    weights = header["class_weights"]
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
        class_counts=torch.tensor(header["class_counts"], dtype=torch.float32),
        class_weights=None if weights is None else torch.tensor(weights, dtype=torch.float32),
        mean=torch.tensor(header["mean"]),
        std=torch.tensor(header["std"]),
        input_shape=(channels, height, width),
        config=config,
    )


class Judgement(NamedTuple):
    """How a run's model does on a part of a data set."""

    evaluation: Evaluation
    judged: Judged  # what its decisions cost
    costs: Costs
    temperature_on: str  # the part that the temperature was fitted on; empty: it is 1
    labels: Tensor  # of the examples, in the order of ``evaluation.logits``
    classes: tuple[str, ...]
    dataset: str
    note: str


class Guess(NamedTuple):
    """What a model says of one image."""

    label: str  # name of the class
    probability: float


def evaluate_run(
    run_dir: str | Path,
    *,
    dataset: str = "",
    part: str = "test",
    data_dir: str = "",
    device: str = "auto",
    judge_by: Mapping[str, Any] | None = None,
) -> Judgement:
    """Evaluate a run's model on a part of a data set, and judge what its decisions cost.

    Args:
        run_dir: A run folder.
        dataset: Name of a data set with as many classes; empty: the one that was trained on.
        part: ``test``, ``validation`` or ``train``, split as in the training; the last as
            long-tailed as it was trained on, where the data set is the run's own.
        data_dir: Folder of the data; empty: that of the run.
        device: Where to run the model.
        judge_by: ``cost_matrix``, ``class_cost`` and ``prior`` to judge by, instead of the run's.

    Returns:
        The evaluation under the loss of the run, and its judgement. The temperature of the
        probabilities is fitted on the validation part of the same data set, if there is one.

    Raises:
        ConfigError: the data set does not fit the model, the part is empty or the device absent.
        DataError: the data cannot be had.
        RunError: the run cannot be read.
    """
    run = load(run_dir)
    config = run.config
    device = resolve_device(device)
    own = dataset in ("", config.dataset)
    data = load_dataset(
        dataset or config.dataset,
        data_dir or config.data_dir,
        val_fraction=config.val_fraction,
        imbalance=config.imbalance if own else 1.0,
    )
    data = moved(_fitted(data, run), device)
    examples = part_of(data, part)
    costs = make_costs(run.classes, config.cost_matrix, config.class_cost)
    hyper = make_hyper(config, costs, run.class_counts, device)
    if run.class_weights is not None:
        hyper["class_weights"] = run.class_weights.to(device)
    tensors = {
        name: preferred_layout(t.to(device)) for name, t in {**run.params, **run.buffers}.items()
    }
    config, costs = _judged_by(config, data.classes, judge_by or {})
    criterion = make_criterion(config.loss, config.reduction, weighted="class_weights" in hyper)
    forward = make_forward(run.model)
    parts = {"validation": data.validation} if len(data.validation.labels) else {}
    parts |= {part: examples}
    evaluations = {
        name: evaluate(
            forward, tensors, {}, partial(take, data, chosen), len(chosen.labels), criterion, hyper
        )
        for name, chosen in parts.items()
    }
    judged = judge_parts(
        evaluations,
        {name: chosen.labels.cpu() for name, chosen in parts.items()},
        config=config,
        costs=costs,
        counts=run.class_counts,
        class_weights=hyper.get("class_weights"),
    )
    return Judgement(
        evaluation=evaluations[part],
        judged=judged[part],
        costs=costs,
        temperature_on="validation" if "validation" in parts else "",
        labels=examples.labels.cpu(),
        classes=data.classes,
        dataset=data.name,
        note="; ".join(filter(None, (data.note, rule_caveat(config)))),
    )


def _judged_by(
    config: TrainConfig, classes: tuple[str, ...], judge_by: Mapping[str, Any]
) -> tuple[TrainConfig, Costs]:
    """Return the configuration with other costs and priors, and the costs."""
    if "cost_matrix" in judge_by or "class_cost" in judge_by:
        config = config._replace(cost_matrix={}, class_cost={})
    config = resolved_costs(make_config(config._asdict(), judge_by), classes)
    return config, make_costs(classes, config.cost_matrix, config.class_cost)


def part_of(dataset: Dataset, part: str) -> Examples:
    """Return a part of a data set, ``train``, ``validation`` or ``test``.

    Raises:
        ConfigError: there is no such part, or nothing in it.
    """
    parts = {"train": dataset.train, "validation": dataset.validation, "test": dataset.test}
    if part not in parts:
        raise ConfigError(f"part must be one of {', '.join(parts)}; got {part!r}")
    if not len(parts[part].labels):
        raise ConfigError(f"{dataset.name} has no {part} part: the run held out none")
    return parts[part]


def _fitted(data: Dataset, run: LoadedRun) -> Dataset:
    """Return the data at the size and scale that the model was trained for."""
    channels, height, _ = run.input_shape
    if len(data.classes) != len(run.classes) or input_shape(data)[0] != channels:
        raise ConfigError(
            f"the model tells {len(run.classes)} classes on {channels}-channel images, {data.name} "
            f"has {len(data.classes)} on {input_shape(data)[0]}-channel images"
        )
    if data.test.images.shape[1] != height:
        data = resized(data, height)
    return data._replace(mean=run.mean, std=run.std)


def write_predictions(path: Path, judgement: Judgement) -> None:
    """Write a CSV file with a line an example: index, truth, prediction, its probability.

    Raises:
        RunError: the file cannot be written; what was there is as it was.
    """
    probabilities, guesses = judgement.evaluation.logits.softmax(-1).max(-1)
    columns = (judgement.labels.tolist(), guesses.tolist(), probabilities.tolist())
    with replacing(path) as beside, beside.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("index", "label", "prediction", "probability"))
        for i, (label, guess, probability) in enumerate(zip(*columns, strict=True)):
            names = judgement.classes[label], judgement.classes[guess]
            writer.writerow((i, *names, f"{probability:.6f}"))


def write_judgement(path: Path, judgement: Judgement) -> None:
    """Write a JSON file with all scores of an evaluation, by rule.

    Raises:
        RunError: the file cannot be written; what was there is as it was.
    """
    scores = judgement.evaluation
    record = {
        "dataset": judgement.dataset,
        "note": judgement.note,
        "n": len(judgement.labels),
        "loss": folder.defined(scores.loss),
        "accuracy": scores.accuracy,
        "judged": judged_record(judgement.judged, judgement.costs),
    }
    write_text(path, json.dumps(record, indent=2, allow_nan=False) + "\n")


def predict_files(
    run_dir: str | Path, paths: Sequence[str | Path], *, invert: bool = False
) -> list[Guess]:
    """Say which class each image file shows.

    Args:
        run_dir: A run folder.
        paths: Image files; each is brought to the size and the channels of the training images.
        invert: Swap dark and light first.

    Returns:
        A guess an image.

    Raises:
        DataError: a file cannot be read or is not an image.
        RunError: the run cannot be read.
    """
    run = load(run_dir)
    images = torch.stack([_read_image(path, run.input_shape, invert=invert) for path in paths])
    with torch.no_grad():
        logits = run.model(normalised(images, run.mean, run.std))
    probabilities, guesses = logits.softmax(-1).max(-1)
    return [
        Guess(run.classes[guess], probability)
        for guess, probability in zip(guesses.tolist(), probabilities.tolist(), strict=True)
    ]


def _read_image(path: str | Path, shape: tuple[int, int, int], *, invert: bool) -> Tensor:
    channels, height, width = shape
    try:
        with Image.open(path) as file:
            picture = file.convert("RGBA")
        ground = Image.new("RGBA", picture.size, "white" if invert else "black")
        flat = Image.alpha_composite(ground, picture).convert("L" if channels == 1 else "RGB")
        image = flat.resize((width, height))
    except (UnidentifiedImageError, Image.DecompressionBombError):
        raise DataError(f"{path} is not an image, or not one of a sensible size") from None
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from None
    if invert:
        image = ImageOps.invert(image)
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return pixels.reshape(height, width, channels)
