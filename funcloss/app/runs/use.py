"""A trained model in use: on a data set, on image files."""

import dataclasses
import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from funcloss._files import write_csv, write_text
from funcloss.app.config import TrainConfig, check_code, make_config
from funcloss.app.data import (
    Dataset,
    Examples,
    InputSchema,
    joined,
    moved,
    read_features,
    read_images,
    resized,
    with_classes,
)
from funcloss.app.data.folders import files_in
from funcloss.app.data.images import IMAGES
from funcloss.app.data.table import TABLES, is_table
from funcloss.app.options import EvaluateOptions
from funcloss.app.runs import folder
from funcloss.app.runs.evaluation import (
    deployment_prior,
    evaluate_examples,
    record_of,
    rescored,
)
from funcloss.app.runs.folds import OUT_OF_FOLD, read_folds
from funcloss.app.runs.model import TrainedModel, load_model
from funcloss.app.runs.options import amounts_of, chosen_loss, resolved_costs
from funcloss.app.runs.rules import check_rule, rule_caveat, usual_rule
from funcloss.app.runs.setup import load_data, resolve_device, with_absolute_paths
from funcloss.combinators import options_of
from funcloss.decisions import Calibration, Decisions, Evaluation, decision_sentences
from funcloss.errors import ConfigError, DataError

_DEFAULTS = EvaluateOptions()


def load(run_dir: str | Path, *, device: str = "cpu", allow_import: bool = False) -> TrainedModel:
    """Return the model of a run, its class names and the scale of its inputs.

    Args:
        run_dir: A run folder, finished or not.
        device: Where its tensors go.
        allow_import: Whether code that the run names (a model of yours) may be imported.

    Returns:
        The model as it was last saved. Its inputs are
        ``funcloss.app.data.normalised(images, run.mean, run.std)``.

    Raises:
        ConfigError: the run names code and that is not allowed.
        RunError: the folder is not a run folder or its model cannot be read.
    """
    run_dir = Path(run_dir).expanduser()
    config = folder.read_config(run_dir, allow_import=allow_import, used=("model",))
    return load_model(run_dir / folder.MODEL, config, device=device)


@dataclass(frozen=True)
class EvaluationReport:
    """An evaluation of a run's model, and where it comes from."""

    evaluation: Evaluation
    calibration: Calibration  # of the run
    rule: str  # that the run decides by
    dataset: str
    split: str
    note: str
    sources: Sequence[tuple[str, int | None]]  # file or data set, and row, of each example


@dataclass(frozen=True)
class Predictions:
    """Decisions on files, each with where its example is."""

    sources: Sequence[tuple[str, int | None]]  # file, and the row of a table, from 1
    decisions: Decisions


def evaluate_run(run_dir: str | Path, options: EvaluateOptions = _DEFAULTS) -> EvaluationReport:
    """Evaluate a run's model on a split of a data set, and score what its decisions cost.

    Args:
        run_dir: A run folder.
        options: The data and the costs; the test split and the costs of the run by default.

    Returns:
        The evaluation under the loss of the run, and its scores by the rule that the run keeps.

    Raises:
        ConfigError: the data set does not fit the model, the split is empty or the device absent.
        DataError: the data cannot be had.
        RunError: the run cannot be read.
    """
    device = resolve_device(options.device)
    run = load(run_dir, device=device, allow_import=options.allow_import)
    config = run.config
    fitted = moved(_fitted(_loaded(run, options), run), device)
    split = options.split
    if split == "test" and config.folds and not len(fitted.test.labels):
        split = OUT_OF_FOLD
    config = _scored_by(config, fitted.classes, options)
    calibration = run.calibration
    if options.prior:
        prior = deployment_prior(config, fitted.classes, calibration.prior)
        assert prior is not None
        calibration = dataclasses.replace(calibration, prior=prior)
    scored = dataclasses.replace(
        run, config=config, classes=fitted.classes, calibration=calibration
    )
    if split == OUT_OF_FOLD:
        if not config.folds or _asked(run.config, options).dataset != run.config.dataset:
            raise ConfigError("split out-of-fold is of a run with folds, on its own data")
        found = read_folds(Path(run_dir).expanduser()).evaluation(scored)
        examples = joined(fitted.train, fitted.validation)
    else:
        # A loss that takes costs is that of the run's; for others its costs need not be at hand.
        by_costs = options_of(chosen_loss(config)) & {"cost_matrix", "costs"}
        judged = run if by_costs else scored
        examples = split_of(fitted, split)
        found = evaluate_examples(judged, fitted, examples)
    return EvaluationReport(
        evaluation=rescored(scored, {split: found})[split],
        calibration=calibration,
        rule=usual_rule(config),
        dataset=fitted.name,
        split=split,
        note="; ".join(filter(None, (fitted.note, rule_caveat(config)))),
        sources=sources_of(_asked(run.config, options), fitted, split, examples) * found.repeats,
    )


def sources_of(
    asked: TrainConfig, data: Dataset, split: str, examples: Examples
) -> list[tuple[str, int | None]]:
    """Return where each example is: its file, a table and its row, or its number in the split."""
    if examples.files:
        return [(file, None) for file in examples.files]
    apart = {"validation": asked.validation_dataset, "test": asked.test_dataset}.get(split, "")
    place = apart or asked.dataset
    if is_table(place) and examples.rows is not None:
        return [(place, row) for row in examples.rows.tolist()]
    return [(f"{data.name}, {split}", number + 1) for number in range(len(examples.labels))]


def _loaded(run: TrainedModel, options: EvaluateOptions) -> Dataset:
    """Return the data set that was asked for, or that of the run."""
    config = run.config
    asked = _asked(config, options)
    own = asked.dataset == config.dataset
    splits = ("validation_dataset", "test_dataset") if own else ()
    check_code(config, ("loss", *splits, *(() if options.dataset else ("dataset",))))
    if options.dataset:  # it is asked for here, whatever the run says
        refused = {a: by for a, by in asked.refused_code.items() if a != asked.dataset}
        asked = dataclasses.replace(asked, refused_code=refused)
    amounts = _amounts_for(run, options)
    if own:
        loaded = load_data(asked, columns=run.columns, amounts=amounts)
        loaded = with_classes(loaded, run.classes)
        if loaded.fingerprint == run.data:
            return loaded
        changed = f"{loaded.name} has changed since the run was trained"
        note = "; ".join(filter(None, (loaded.note, changed)))
        return dataclasses.replace(loaded, note=note)
    shape = run.input_shape if run.images else ()
    schema = InputSchema(run.classes, run.columns, shape)
    return load_data(_as_other_data(asked), schema=schema, amounts=amounts)


def _asked(config: TrainConfig, options: EvaluateOptions) -> TrainConfig:
    """Return the configuration of a run with the data that was asked for, if any was."""
    dataset, place = options.dataset or config.dataset, options.data_dir or config.data_dir
    return with_absolute_paths(dataclasses.replace(config, dataset=dataset, data_dir=place))


def _amounts_for(run: TrainedModel, options: EvaluateOptions) -> tuple[str, ...]:
    """Return the costs of each example that the evaluation needs, and those that the loss does."""
    others = options.cost_matrix or options.class_cost or options.cost
    learnt_by = run.config if not others or "costs" in options_of(chosen_loss(run.config)) else None
    scored_by = make_config({"cost": options.cost})
    return tuple(
        dict.fromkeys(n for c in (learnt_by, scored_by) if c is not None for n in amounts_of(c))
    )


def _as_other_data(config: TrainConfig) -> TrainConfig:
    """Return a configuration without what it says of reading and splitting the run's own data."""
    splitting = (
        "imbalance",
        "folds",
        "repeats",
        "test_fraction",
        "validation_dataset",
        "test_dataset",
        "stream",
    )
    of_tables = ("target", "ignore", "drop_unlabelled")
    reading = ("class_order", *(() if is_table(config.dataset) else of_tables))
    plain = TrainConfig()
    return dataclasses.replace(config, **{n: getattr(plain, n) for n in (*splitting, *reading)})


def _scored_by(
    config: TrainConfig, classes: tuple[str, ...], options: EvaluateOptions
) -> TrainConfig:
    """Return the configuration with the costs and the prior that were asked for."""
    costs = ("cost_matrix", "class_cost", "cost")
    asked = {name: value for name in (*costs, "prior") if (value := getattr(options, name))}
    if asked.keys() & set(costs):
        config = dataclasses.replace(config, **dict.fromkeys(costs, {}))
    checked = make_config(asked)
    config = dataclasses.replace(config, **{name: getattr(checked, name) for name in asked})
    return resolved_costs(config, classes)


def split_of(dataset: Dataset, split: str) -> Examples:
    """Return the split ``train``, ``validation`` or ``test`` of a data set.

    Raises:
        ConfigError: there is no such split, or nothing in it.
    """
    splits = dataset.splits
    if split not in splits:
        raise ConfigError(f"split must be one of {', '.join(splits)}; got {split!r}")
    if not len(splits[split].labels):
        raise ConfigError(f"{dataset.name} has no {split} split: the run held out none")
    return splits[split]


def _fitted(data: Dataset, run: TrainedModel) -> Dataset:
    """Return the data at the size and scale that the model was trained for."""
    if len(data.classes) != len(run.classes) or data.has_images != run.images:
        raise ConfigError(
            f"the model tells {len(run.classes)} classes of {_described(run.input_shape)}, "
            f"{data.name} has {len(data.classes)} of {_described(data.input_shape)}"
        )
    _, *size = run.input_shape
    if run.images and list(data.input_shape[1:]) != size and size[0] == size[1]:
        data = resized(data, size[0])
    if data.input_shape != run.input_shape:
        raise ConfigError(
            f"the model takes {_described(run.input_shape)}, {data.name} has "
            f"{_described(data.input_shape)}"
        )
    return dataclasses.replace(data, mean=run.mean, std=run.std)


def _described(shape: tuple[int, ...]) -> str:
    if len(shape) == 3:
        return f"{shape[0]}-channel images of {shape[1]}x{shape[2]}"
    return f"inputs of shape {' x '.join(map(str, shape))}"


def write_decisions(
    path: Path,
    decisions: Decisions,
    sources: Sequence[tuple[str, int | None]],
    labels: Sequence[str] = (),
) -> None:
    """Write a CSV file with a line per example.

    Its columns: file and row; the label, if labels are given; the decision, its probability and its
    expected cost; ``probability CLASS`` of each class; ``cost DECISION``, the expected cost, of
    each decision.

    Args:
        path: The file to make or replace.
        decisions: On the examples.
        sources: Where each is: a file, and a row of it if it has rows.
        labels: Names of the true classes, where they are known.

    Raises:
        RunError: the file cannot be written; what was there is as it was.
    """
    costs = decisions.costs
    head = ["file", "row", *(["label"] if labels else []), "decision", "probability"]
    head += ["expected_cost", *(f"probability {c}" for c in costs.classes)]
    head += [f"cost {d}" for d in costs.decisions]
    numbers = torch.column_stack(
        [
            decisions.probability,
            decisions.expected_cost,
            decisions.probabilities,
            decisions.expected_costs,
        ]
    )

    def rows() -> Iterator[Sequence[Any]]:
        yield head
        for i, (source, name) in enumerate(zip(sources, decisions.names, strict=True)):
            truth = [labels[i]] if labels else []
            cells = ("" if math.isnan(v) else f"{v:.6g}" for v in numbers[i].tolist())
            yield (*source, *truth, name, *cells)

    write_csv(path, rows())


def write_evaluated(path: Path, report: EvaluationReport) -> None:
    """Write a CSV file with a line per example of an evaluation, as :func:`write_decisions` does.

    Where an example is a row of a table, they are named; where it has a file of its own, that is;
    else the data set with its split, and the number of the example in it, from 1.

    Raises:
        RunError: the file cannot be written; what was there is as it was.
    """
    found = report.evaluation
    costs = found.rule.costs
    classes = costs.classes
    each = costs.of_examples(found.amounts) if costs.amounts else None
    write_decisions(
        path,
        found.rule.decisions(found.logits, each, by=report.rule),
        report.sources,
        [classes[i] for i in found.labels.tolist()],
    )


def write_evaluation(path: Path, report: EvaluationReport) -> None:
    """Write a JSON file with all scores of an evaluation, by rule.

    Raises:
        RunError: the file cannot be written; what was there is as it was.
    """
    record = {
        "dataset": report.dataset,
        "split": report.split,
        "note": report.note,
        "rule": report.rule,
        "decisions": decision_sentences(report.evaluation.rule.costs),
        "calibration": report.calibration.record(),
        **record_of(report.evaluation),
    }
    write_text(path, json.dumps(record, indent=2, allow_nan=False) + "\n")


def predict_files(
    run_dir: str | Path,
    paths: Sequence[str | Path],
    *,
    rule: str = "",
    invert: bool = False,
    allow_import: bool = False,
) -> Predictions:
    """Decide on image files, or on the rows of CSV tables without a target.

    Args:
        run_dir: A run folder.
        paths: Image files, each brought to the size and the channels of the training images; or,
            where the model was trained on a table, CSV files with its columns. A folder stands for
            all files in it, and in the folders below, that are of such a kind.
        rule: ``min-cost`` or ``argmax``; empty: the first if the run was given costs.
        invert: Swap dark and light first.
        allow_import: Whether code that the run names may be imported.

    Returns:
        A decision per image or row, in the order of the paths.

    Raises:
        ConfigError: the model takes neither images nor the columns of a table, or there is no such
            rule.
        DataError: a file cannot be read, is not an image or lacks a column, or a folder has none.
        RunError: the run cannot be read.
    """
    check_rule(rule)
    run, amounts = load(run_dir, allow_import=allow_import), {}
    if run.images:
        channels, *size = run.input_shape
        files = _files(paths, IMAGES)
        inputs = read_images(files, (size[0], size[1]), channels, invert=invert)
        sources = [(str(path), None) for path in files]
    elif run.columns:
        if invert:
            raise ConfigError("invert is for images, and the model takes the rows of a table")
        files = _files(paths, TABLES)
        names = amounts_of(run.config)
        tables = [read_features(path, run.columns, names) for path in files]
        counted = [(path, len(table)) for path, (table, _) in zip(files, tables, strict=True)]
        sources = [(str(path), row + 1) for path, n in counted for row in range(n)]
        inputs = torch.cat([table for table, _ in tables])
        amounts = {name: torch.cat([own[name] for _, own in tables]) for name in names}
    else:
        raise ConfigError(
            f"the model takes {_described(run.input_shape)}, which no file holds: use "
            "funcloss.load and its decide"
        )
    return Predictions(sources, run.decide(inputs, amounts=amounts, by=rule))


def _files(paths: Sequence[str | Path], suffixes: Sequence[str]) -> list[Path]:
    """Return files, those of folders in the order of their names."""
    found = []
    for path in map(Path, paths):
        inside = [path]
        if path.is_dir():
            inside = files_in(path, suffixes, Counter())
            if not inside:
                raise DataError(f"{path} has no file to predict: {', '.join(suffixes)}")
        found += inside
    if not found:
        raise ConfigError("name a file or a folder to predict")
    return found
