"""A trained model on the splits of its data, and what its decisions cost."""

import math
from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from funcloss._json import jsonable
from funcloss.app.config import TrainConfig
from funcloss.app.data import Dataset, Examples, iter_batches
from funcloss.app.runs.model import TrainedModel
from funcloss.app.runs.options import chosen_loss, with_costs
from funcloss.combinators import (
    Combined,
    correction_of,
    name_of,
    options_of,
    probabilities_of,
)
from funcloss.decisions import (
    Costs,
    DecisionRule,
    DecisionScores,
    Evaluation,
    Interval,
    fit_temperature,
    posterior_shift,
    score,
)
from funcloss.training import evaluate as run_model
from funcloss.training import oversampled_counts
from funcloss.typing import Correction, Probabilities

_EVALUATED_AT_ONCE = 1024 * 3 * 32 * 32  # values of the inputs


def rule_fits(config: TrainConfig) -> bool:
    """Return whether decisions of minimum expected cost fit what a loss makes of logits.

    A loss that does not state how its scores become probabilities is taken like the cross-entropy,
    unless it takes the costs.
    """
    return _statement(config) not in ("none", "costs")


def rule_caveat(config: TrainConfig) -> str:
    """Return what to doubt about decisions of minimum expected cost after a training.

    Args:
        config: The training.

    Returns:
        A sentence; empty where the loss states how its scores become probabilities, and they do.
    """
    stated, loss = _statement(config), config.loss
    if stated == "costs":
        return (
            f"the logits of {loss} have the costs in them already: decisions of minimum "
            "expected cost count them twice, go by argmax"
        )
    if stated == "none":
        return (
            f"the softmax of the logits of {loss} estimates no probabilities: decisions of "
            "minimum expected cost rest on a temperature alone"
        )
    if stated is None:
        name = _unstated(chosen_loss(config), loss.rpartition(":")[2])
        return (
            f"{loss} does not state how its scores become probabilities; their softmax is used, "
            f'as for cross_entropy: set {name}.probabilities = "softmax" where it is defined if '
            'that is right, "none" if not'
        )
    return ""


def _unstated(loss: Callable[..., Any], name: str) -> str:
    """Return the name of the function inside a loss that states nothing of its scores."""
    while isinstance(loss, (partial, Combined)):
        inside = (loss.func,) if isinstance(loss, partial) else loss.losses
        loss = next(part for part in inside if probabilities_of(part) is None)
        name = name_of(loss)
    return name


def _statement(config: TrainConfig) -> Probabilities | None:
    loss = chosen_loss(config)
    stated = probabilities_of(loss)
    return "costs" if stated is None and "cost_matrix" in options_of(loss) else stated


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
    counted = _counted(counts.cpu())
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
        support: Examples of each class that are judged.

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
    """Evaluate a trained model on splits of a data set, at the scores as they are.

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
    """Evaluate a trained model on examples, at the scores as they are.

    Args:
        model: The model.
        dataset: The data set of the examples, for the scale of its inputs.
        examples: The examples, on the device of the model.

    Returns:
        The evaluation, by a rule that takes the softmax of the scores for probabilities.
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
        costs=model.costs,
        amounts=examples.amounts,
    )


def evaluated(model: TrainedModel, dataset: Dataset) -> dict[str, Evaluation]:
    """Evaluate a model on validation and test set, by the rule fitted on validation data."""
    return with_fitted_rule(model, evaluate(model, dataset, ("validation", "test")))


def with_fitted_rule(
    model: TrainedModel, evaluations: Mapping[str, Evaluation]
) -> dict[str, Evaluation]:
    """Return evaluations by the rule of minimum expected cost, fitted on validation data alone.

    Args:
        model: The model that was evaluated.
        evaluations: By split; without ``validation`` the temperature is 1.

    Returns:
        The same, under the prior of the deployment if one is given.
    """
    config, costs, counts = model.config, model.costs, model.class_counts
    implied = implied_prior(config, counts, model.class_weights, costs=costs)
    scale = logit_scale(config, counts, costs=costs)
    temperature, support = 1.0, counts.cpu()
    if (held_out := evaluations.get("validation")) is not None:
        support = held_out.counts
        here = _shift(_counted(support), implied)
        scores = held_out.logits * scale
        temperature = fit_temperature(scores, held_out.labels, log_shift=here)
    # What was held out, else the training set, stands for where the model will be used, unless a
    # prior says otherwise; the examples that are judged have no say in the decisions.
    expected = deployment_prior(config, costs.classes, _counted(support))
    expected = _counted(support) if expected is None else expected
    rule = DecisionRule(costs, temperature, scale, _shift(expected, implied))
    return {
        name: score(
            found.logits,
            found.labels,
            rule,
            prior=deployment_prior(config, costs.classes, found.counts),
            loss=found.loss,
            amounts=found.amounts,
        )
        for name, found in evaluations.items()
    }


def _counted(support: Tensor) -> Tensor:
    """Return counts as a prior; a class that was not met is rare, not impossible."""
    return support.double().clamp(min=0.5)


def _shift(prior: Tensor, implied: Tensor) -> Tensor:
    shift = posterior_shift(prior=prior / prior.sum(), train_prior=implied)
    assert shift is not None
    return shift


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
            "n": len(evaluation.labels),
            "loss": evaluation.loss,
            "temperature": rule.temperature,
            "calibration_error": evaluation.calibration_error,
            "calibrated_error": evaluation.calibrated_error,
            "prior": dict(zip(rule.costs.classes, evaluation.prior.tolist(), strict=True)),
            "constant_decision": evaluation.constant_decision,
            "constant_cost": evaluation.constant_cost,
            "rules": {
                name: _record(scores, rule.costs) | (_matrices(scores) if matrices else {})
                for name, scores in evaluation.rules.items()
            },
        }
    )


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
        "decisions": list(costs.decisions),
    }


def _matrices(scores: DecisionScores) -> dict[str, Any]:
    return {"confusion": scores.confusion.tolist(), "confusion_cost": scores.cost.tolist()}
