"""A trained model in use: on a data set, on image files."""

import csv
import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from funcloss._files import replacing, write_text
from funcloss.app.config import TrainConfig, check_code, make_config
from funcloss.app.data import (
    Dataset,
    Examples,
    Known,
    feed,
    moved,
    normalised,
    read_features,
    read_image,
    resized,
)
from funcloss.app.data.own import TABLES
from funcloss.app.registry import make_criterion
from funcloss.app.runs import folder
from funcloss.app.runs.checkpoint import load_tensors
from funcloss.app.runs.judging import evaluation_batch, judge_parts, judged_record, rule_caveat
from funcloss.app.runs.network import make_model, untied
from funcloss.app.runs.setup import (
    load_data,
    make_hyper,
    resolve_device,
    resolved_costs,
    with_absolute_paths,
)
from funcloss.decisions import Costs, Judged, make_costs
from funcloss.errors import ConfigError, RunError
from funcloss.objectives import make_forward
from funcloss.training.evaluation import Evaluation, evaluate
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
    mean: Tensor  # of each channel, pixels in 0..1; empty: inputs go to the model as they are
    std: Tensor
    input_shape: tuple[int, ...]  # channels, height, width of an image
    columns: tuple[str, ...]  # names of the features of a table
    images: bool  # whether the inputs are images
    config: TrainConfig


def load(run_dir: str | Path, *, allow_import: bool = False) -> LoadedRun:
    """Return the model of a run, its class names and the scale of its inputs.

    Args:
        run_dir: A run folder, finished or not.
        allow_import: Whether code that the run names, a model of yours say, may be imported.

    Returns:
        The model as it was last saved. Its inputs are
        ``funcloss.app.data.normalised(images, run.mean, run.std)``.

    Raises:
        ConfigError: the run names code and that is not allowed.
        RunError: the folder is not a run folder or its model cannot be read.
    """
    run_dir = Path(run_dir).expanduser()
    config = folder.read_config(run_dir, allow_import=allow_import, used=("model",))
    needs = ("input_shape", "classes", "class_counts", "class_weights", "mean", "std", "columns")
    tensors, header = load_tensors(run_dir / folder.MODEL, needs=(*needs, "images"))
    weights, shape = header["class_weights"], tuple(header["input_shape"])
    model = make_model(config, shape, len(header["classes"]))
    try:
        model.load_state_dict(untied(model, tensors))
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
        input_shape=shape,
        columns=tuple(header["columns"]),
        images=header["images"],
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

    example: str  # the image's file, or the row of a table
    label: str  # name of the class
    probability: float


def evaluate_run(
    run_dir: str | Path,
    *,
    dataset: str = "",
    part: str = "test",
    data_dir: str = "",
    device: str = "auto",
    allow_import: bool = False,
    judge_by: Mapping[str, Any] | None = None,
) -> Judgement:
    """Evaluate a run's model on a part of a data set, and judge what its decisions cost.

    Args:
        run_dir: A run folder.
        dataset: Name of a data set with as many classes, or your own with the same; empty: the one
            that was trained on.
        part: ``test``, ``validation`` or ``train``, split as in the training; the last as
            long-tailed as it was trained on, where the data set is the run's own. Of other data of
            your own that comes in one part, ``test`` is all of it.
        data_dir: Folder of the data; empty: that of the run.
        device: Where to run the model.
        allow_import: Whether code that the run names may be imported.
        judge_by: ``cost_matrix``, ``class_cost`` and ``prior`` to judge by, instead of the run's.

    Returns:
        The evaluation under the loss of the run, and its judgement. The temperature of the
        probabilities is fitted on the validation part of the same data set, if there is one.

    Raises:
        ConfigError: the data set does not fit the model, the part is empty or the device absent.
        DataError: the data cannot be had.
        RunError: the run cannot be read.
    """
    run = load(run_dir, allow_import=allow_import)
    config = run.config
    device = resolve_device(device)
    asked = config._replace(dataset=dataset or config.dataset, data_dir=data_dir or config.data_dir)
    asked = with_absolute_paths(asked)
    own = asked.dataset == config.dataset
    parts = ("validation_dataset", "test_dataset") if own else ()
    check_code(config, ("loss", *parts, *(() if dataset else ("dataset",))))
    if dataset:  # it is asked for here, whatever the run says
        refused = {a: by for a, by in asked.refused_code.items() if a != asked.dataset}
        asked = asked._replace(refused_code=refused)
    if own:
        loaded = load_data(asked)
    else:
        asked = _as_other_data(asked)
        shape = run.input_shape if run.images else ()
        loaded = load_data(asked, known=Known(run.classes, run.columns, shape))
    data = moved(_fitted(loaded, run), device)
    examples = part_of(data, part)
    costs = make_costs(run.classes, config.cost_matrix, config.class_cost)
    hyper = make_hyper(config, costs, run.class_counts, device)
    if run.class_weights is not None:
        hyper["class_weights"] = run.class_weights.to(device)
    tensors = {
        name: preferred_layout(t.to(device)) for name, t in {**run.params, **run.buffers}.items()
    }
    config, costs = _judged_by(config, data.classes, judge_by or {})
    criterion = make_criterion(
        config.loss,
        config.reduction,
        weighted="class_weights" in hyper,
        refused=config.refused_code,
    )
    forward = make_forward(run.model)
    parts = {"validation": data.validation} if len(data.validation.labels) else {}
    parts |= {part: examples}
    evaluations = {
        name: evaluate(
            forward,
            tensors,
            {},
            partial(feed, data, chosen),
            len(chosen.labels),
            criterion,
            hyper,
            batch_size=evaluation_batch(data),
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


def _as_other_data(config: TrainConfig) -> TrainConfig:
    """Return a configuration without what it says of reading and parting the run's own data."""
    parting = ("imbalance", "test_fraction", "validation_dataset", "test_dataset", "stream")
    reading = () if Path(config.dataset).suffix.lower() in TABLES else ("target", "ignore")
    return config._replace(**{n: config._field_defaults[n] for n in (*parting, *reading)})


def _judged_by(
    config: TrainConfig, classes: tuple[str, ...], judge_by: Mapping[str, Any]
) -> tuple[TrainConfig, Costs]:
    """Return the configuration with other costs and priors, and the costs."""
    if "cost_matrix" in judge_by or "class_cost" in judge_by:
        config = config._replace(cost_matrix={}, class_cost={})
    asked = make_config(judge_by)
    config = config._replace(**{name: getattr(asked, name) for name in judge_by})
    config = resolved_costs(config, classes)
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
    if len(data.classes) != len(run.classes) or data.has_images != run.images:
        raise ConfigError(
            f"the model tells {len(run.classes)} classes of {_described(run.input_shape)}, "
            f"{data.name} has {len(data.classes)} of {_described(data.input_shape)}"
        )
    if run.images and data.input_shape[1:] != run.input_shape[1:]:
        if run.input_shape[1] != run.input_shape[2]:
            raise ConfigError(
                f"the model takes {_described(run.input_shape)}, {data.name} has "
                f"{_described(data.input_shape)}"
            )
        data = resized(data, run.input_shape[1])
    if data.input_shape != run.input_shape:
        raise ConfigError(
            f"the model takes {_described(run.input_shape)}, {data.name} has "
            f"{_described(data.input_shape)}"
        )
    return data._replace(mean=run.mean, std=run.std)


def _described(shape: tuple[int, ...]) -> str:
    if len(shape) == 3:
        return f"{shape[0]}-channel images of {shape[1]}x{shape[2]}"
    return f"inputs of shape {' x '.join(map(str, shape))}"


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
    run_dir: str | Path,
    paths: Sequence[str | Path],
    *,
    invert: bool = False,
    allow_import: bool = False,
) -> list[Guess]:
    """Say which class each image file shows, or each row of CSV tables without a target.

    Args:
        run_dir: A run folder.
        paths: Image files, each brought to the size and the channels of the training images; or,
            where the model was trained on a table, CSV files with its columns.
        invert: Swap dark and light first.
        allow_import: Whether code that the run names may be imported.

    Returns:
        A guess an image or row.

    Raises:
        ConfigError: the model takes neither images nor the columns of a table.
        DataError: a file cannot be read, is not an image or lacks a column.
        RunError: the run cannot be read.
    """
    run = load(run_dir, allow_import=allow_import)
    if run.images:
        channels, *size = run.input_shape
        images = [read_image(p, (size[0], size[1]), channels, invert=invert) for p in paths]
        names, inputs = [str(path) for path in paths], torch.stack(images)
    elif run.columns:
        if invert:
            raise ConfigError("invert is for images, and the model takes the rows of a table")
        tables = [read_features(Path(path), run.columns) for path in paths]
        names = [f"{p}:{i + 1}" for p, t in zip(paths, tables, strict=True) for i in range(len(t))]
        inputs = torch.cat(tables)
    else:
        raise ConfigError(
            f"the model takes {_described(run.input_shape)}, which no file holds: use funcloss.load"
        )
    logits = []
    with torch.no_grad():
        for piece in inputs.split(1024):
            logits.append(run.model(normalised(piece, run.mean, run.std)))
    probabilities, guesses = torch.cat(logits).softmax(-1).max(-1)
    rows = zip(names, guesses.tolist(), probabilities.tolist(), strict=True)
    return [Guess(name, run.classes[guess], probability) for name, guess, probability in rows]
