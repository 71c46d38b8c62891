"""A trained model on the splits of its data, and what its decisions cost."""

import dataclasses
import math
from collections.abc import Collection, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from funcloss._json import jsonable
from funcloss.app.config import TrainConfig
from funcloss.app.data import Dataset, Examples, iter_batches
from funcloss.app.runs.model import TrainedModel
from funcloss.app.runs.options import chosen_loss, with_costs
from funcloss.combinators import correction_of
from funcloss.decisions import (
    Calibration,
    Costs,
    DecisionScores,
    Evaluation,
    Interval,
    calibrate,
    class_frequencies,
    score,
)
from funcloss.training import evaluate as run_model
from funcloss.training import oversampled_counts
from funcloss.typing import Correction

_EVALUATED_AT_ONCE = 1024 * 3 * 32 * 32  # values of the inputs


def logit_scale(
    config: TrainConfig, counts: Float[Tensor, " classes"], *, costs: Costs | None = None
) -> Float[Tensor, " classes"] | float:
    """Return what the loss multiplies the logits of each class by before its softmax.

    Args:
        config: The training.
        counts: Training examples of each class.
        costs: What decisions cost, for a loss whose correction depends on them.

    Returns:
        The scale that the loss states, see :class:`funcloss.typing.Correction`.
    """
    return _correction(config, counts, costs).scale


def implied_prior(
    config: TrainConfig,
    counts: Float[Tensor, " classes"],
    class_weights: Float[Tensor, " classes"] | None,
    *,
    costs: Costs | None = None,
) -> Float[Tensor, " classes"]:
    """Return the prior of which ``softmax(logits)`` is the posterior, as far as the loss tells.

    The prior of the examples that an epoch draws times the class weights, for the cross-entropy;
    what other losses state that they add to the logits is out, see
    :class:`funcloss.typing.Correction`.

    Args:
        config: The training.
        counts: Training examples of each class.
        class_weights: What the training was given; None: 1.
        costs: What decisions cost, for a loss whose correction depends on them.

    Returns:
        Parts that sum to 1, float64; a class that was never seen, or at weight 0, has the least of
        the others.
    """
    offset = _correction(config, counts, costs).offset
    offset = torch.as_tensor(offset, dtype=torch.float64).cpu()
    parts = oversampled_counts(counts, config.oversample).double() * (-offset).exp()
    if class_weights is not None:
        parts = parts * class_weights.cpu().double()
    seen = (counts.cpu() > 0) & (parts > 0)
    least = parts[seen].min() if seen.any() else torch.ones((), dtype=torch.float64)
    parts = torch.where(seen, parts, least)
    return parts / parts.sum()


def _correction(config: TrainConfig, counts: Tensor, costs: Costs | None) -> Correction:
    """Return the correction that the loss states, under the options of the training, in float64."""
    counted = counts.cpu().double().clamp(min=0.5)  # a class that was not met is rare
    options = {"class_counts": counted, "class_prior": counted / counted.sum()}
    if costs is not None and not costs.amounts:
        options["cost_matrix"] = costs.matrix.cpu().double()
    return correction_of(chosen_loss(config), options | config.loss_option)


def deployment_prior(
    config: TrainConfig, classes: tuple[str, ...], support: Float[Tensor, " classes"]
) -> Float[Tensor, " classes"] | None:
    """Return the part of each class where the model is used, None where nothing is said of it.

    Args:
        config: Its ``prior`` by name of the class; the classes without one share what is left, in
            the proportions of ``support``.
        classes: Names of the classes, in the order of the labels.
        support: Examples of each class, or their frequencies.

    Returns:
        Parts that sum to 1, float64.
    """
    if not config.prior:
        return None
    named = torch.tensor([config.prior.get(c, math.nan) for c in classes], dtype=torch.float64)
    others = torch.where(named.isnan(), support.double(), 0.0)
    rest = others / others.sum().clamp(min=1e-300) * (1.0 - named.nansum())
    prior = torch.where(named.isnan(), rest, named)
    return prior / prior.sum()


def evaluate(
    model: TrainedModel, dataset: Dataset, splits: Collection[str]
) -> dict[str, Evaluation]:
    """Evaluate a trained model on splits of a data set, by its rule.

    Args:
        model: The model.
        dataset: The data, on the device of the model.
        splits: Of ``train``, ``validation`` and ``test``; one that is empty is left out.

    Returns:
        The evaluations by split, validation first.
    """
    found = {}
    for name in ("validation", "test", "train"):
        examples = dataset.splits[name]
        if name in splits and len(examples.labels):
            found[name] = evaluate_examples(model, dataset, examples)
    return found


def evaluate_examples(model: TrainedModel, dataset: Dataset, examples: Examples) -> Evaluation:
    """Evaluate a trained model on examples, by its rule.

    Args:
        model: The model.
        dataset: The data set of the examples, for the scale of its inputs.
        examples: The examples, on the device of the model.

    Returns:
        The evaluation, by the rule of the model.
    """
    index = torch.arange(len(examples.labels), device=examples.labels.device)
    examples = with_costs(model.config, model.costs, examples)
    size = max(16, min(1024, _EVALUATED_AT_ONCE // math.prod(dataset.input_shape)))
    batches = iter_batches(dataset, examples, index.split(size))
    return run_model(
        model.forward,
        model,
        batches,
        model.criterion,
        model.hyper,
        rule=model.rule,
        amounts=examples.amounts,
    )


def calibrated(
    model: TrainedModel, held_out: Evaluation | None, *, cut: bool, on: str = "validation"
) -> TrainedModel:
    """Return a model with its probabilities fitted on held-out data.

    Args:
        model: The model.
        held_out: It, or models trained as it was, on data that they were not trained on; None:
            there are none, and the temperature is 1.
        cut: Whether these were cut from the training data, so that the training's class frequencies
            are theirs too, and surer. Where they were not, a class that is missing from them keeps
            its share of the training.
        on: What they are called.

    Returns:
        The model with its calibration: for the prior of the deployment if one is given, else for
        that of the validation data.
    """
    config, costs, counts = model.config, model.costs, model.class_counts
    theirs = counts if held_out is None or cut else held_out.counts
    here = class_frequencies(theirs, counts)
    deployment = deployment_prior(config, costs.classes, here)
    plain = Calibration(
        implied_prior=implied_prior(config, counts, model.class_weights, costs=costs),
        prior=here if deployment is None else deployment,
        scale=logit_scale(config, counts, costs=costs),
    )
    if held_out is not None:
        plain = calibrate(
            plain, held_out.logits, held_out.labels, held_out_prior=here, fitted_on=on
        )
        examples = plain.examples // held_out.repeats
        plain = dataclasses.replace(plain, examples=examples)
    return dataclasses.replace(model, calibration=plain)


def rescored(model: TrainedModel, evaluations: Mapping[str, Evaluation]) -> dict[str, Evaluation]:
    """Return evaluations by the rule of a model, under the prior of its deployment if one is given.

    Args:
        model: The model, calibrated.
        evaluations: It on some splits, by whatever rule.
    """
    return {
        name: score(
            found.logits,
            found.labels,
            model.rule,
            prior=deployment_prior(model.config, model.classes, found.counts),
            loss=found.loss,
            repeats=found.repeats,
            amounts=found.amounts,
        )
        for name, found in evaluations.items()
    }


def evaluated(model: TrainedModel, dataset: Dataset) -> dict[str, Evaluation]:
    """Evaluate a model on validation and test set, by the rule fitted on validation data."""
    found = evaluate(model, dataset, ("validation", "test"))
    return rescored(calibrated(model, found.get("validation"), cut=dataset.cut), found)


def record_of(evaluation: Evaluation, *, matrices: bool = True) -> dict[str, Any]:
    """Return an evaluation as JSON has it, None for what is not defined.

    Args:
        evaluation: The evaluation.
        matrices: Whether the confusion matrices are among it, which grow with the square of the
            classes.

    Returns:
        Scores by rule, confusion matrices in counts and in cost units.
    """
    rule = evaluation.rule
    return jsonable(
        {
            "n": len(evaluation.labels) // evaluation.repeats,
            "loss": evaluation.loss,
            "temperature": rule.temperature,
            "calibration_error": evaluation.calibration_error,
            "calibrated_error": evaluation.calibrated_error,
            "metrics": _metrics(evaluation),
            "prior": dict(zip(rule.costs.classes, evaluation.prior.tolist(), strict=True)),
            "constant_decision": evaluation.constant_decision,
            "constant_cost": evaluation.constant_cost,
            "rules": {
                name: _record(scores, rule.costs) | (_matrices(scores) if matrices else {})
                for name, scores in evaluation.rules.items()
            },
        }
    )


def _metrics(evaluation: Evaluation) -> dict[str, Any]:
    found = vars(evaluation.metrics)
    by_class = {
        name: dict(zip(evaluation.rule.costs.classes, found[name].tolist(), strict=True))
        for name in ("auc", "average_precision")
    }
    return found | by_class


def _record(scores: DecisionScores, costs: Costs) -> dict[str, Any]:
    def by_class(interval: Interval) -> dict[str, list[float]]:
        rows = zip(*(bound.tolist() for bound in interval), strict=True)
        return {c: list(row) for c, row in zip(costs.classes, rows, strict=True)}

    return {
        "expected_cost": list(scores.expected_cost),
        "normalised_cost": scores.normalised_cost,
        "accuracy": list(scores.accuracy),
        "recall": by_class(scores.recall),
        "precision": by_class(scores.precision),
        "balanced_accuracy": scores.balanced_accuracy,
        "f1": dict(zip(costs.classes, scores.f1.tolist(), strict=True)),
        "macro_f1": scores.macro_f1,
        "decisions": list(costs.decisions),
    }


def _matrices(scores: DecisionScores) -> dict[str, Any]:
    return {"confusion": scores.confusion.tolist(), "confusion_cost": scores.cost.tolist()}
