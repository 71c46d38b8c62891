"""What a run's decisions cost: from its loss and data to the judgement of its logits."""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from funcloss.app.config import TrainConfig
from funcloss.app.data import Dataset, feed
from funcloss.app.registry import loss_named
from funcloss.app.runs import folder
from funcloss.app.runs.setup import Setup
from funcloss.app.runs.steering import Model
from funcloss.combinators import Combined, correction_of, name_of, options_of, probabilities_of
from funcloss.decisions import Costs, Judged, RuleScores, fit_temperature, judge, posterior_shift
from funcloss.objectives.supervised import Forward
from funcloss.training.evaluation import Evaluation, evaluate
from funcloss.typing import Correction, Hyper, Probabilities

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
        name = _unstated(loss_named(loss, refused=config.refused_code), loss.rpartition(":")[2])
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
    loss = loss_named(config.loss, refused=config.refused_code)
    stated = probabilities_of(loss)
    return "costs" if stated is None and "cost_matrix" in options_of(loss) else stated


def probability_scores(
    logits: Float[Tensor, "n classes"],
    config: TrainConfig,
    counts: Float[Tensor, " classes"],
    *,
    costs: Costs | None = None,
) -> Float[Tensor, "n classes"]:
    """Return the logits as the loss takes them before its softmax, but for what is added to them.

    Args:
        logits: What the model says.
        config: The training.
        counts: Training examples of each class.
        costs: What decisions cost, for a loss whose correction depends on them.

    Returns:
        The logits times the scale that the loss states, see :class:`funcloss.typing.Correction`.
    """
    scale = _correction(config, counts, costs).scale
    if isinstance(scale, Tensor):
        return logits * scale.to(logits.device)
    return logits if scale == 1.0 else logits * scale


def implied_prior(
    config: TrainConfig,
    counts: Float[Tensor, " classes"],
    class_weights: Float[Tensor, " classes"] | None,
    *,
    costs: Costs | None = None,
) -> Float[Tensor, " classes"]:
    """Return the prior of which ``softmax(logits)`` is the posterior, as far as the loss tells.

    The training prior times the class weights, for the cross-entropy; what other losses state that
    they add to the logits is out, see :class:`funcloss.typing.Correction`.

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
    parts = counts.cpu().double() * (-offset).exp()
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
    if costs is not None:
        options["cost_matrix"] = costs.matrix.cpu().double()
    return correction_of(
        loss_named(config.loss, refused=config.refused_code), options | config.loss_option
    )


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


def evaluation_batch(dataset: Dataset) -> int:
    """Return how many examples are evaluated at a time: fewer where they are large."""
    return max(16, min(1024, _EVALUATED_AT_ONCE // math.prod(dataset.input_shape)))


def evaluate_model(
    setup: Setup, forward: Forward, model: Model, parts: tuple[str, ...]
) -> dict[str, Evaluation]:
    """Evaluate a model on the parts of the data that are named and not empty.

    Args:
        setup: The data and the loss.
        forward: The network as a function, in evaluation mode.
        model: Its tensors, and what its last steps were given.
        parts: Of ``validation`` and ``test``.

    Returns:
        The evaluations by part, validation first.
    """
    examples_of = {"validation": setup.dataset.validation, "test": setup.dataset.test}
    return {
        name: evaluate(
            forward,
            model.params,
            model.buffers,
            partial(feed, setup.dataset, examples),
            len(examples.labels),
            setup.criterion,
            model.hyper,
            batch_size=evaluation_batch(setup.dataset),
        )
        for name, examples in examples_of.items()
        if name in parts and len(examples.labels)
    }


def judge_model(
    setup: Setup, evaluations: Mapping[str, Evaluation], hyper: Hyper
) -> dict[str, Judged]:
    """Judge a model on the parts of the data that it was evaluated on.

    Args:
        setup: Its training.
        evaluations: The model on validation, test or both.
        hyper: What its last steps were given, for the class weights.

    Returns:
        The judgement of each part.
    """
    dataset = setup.dataset
    labels = {"validation": dataset.validation.labels, "test": dataset.test.labels}
    return judge_parts(
        evaluations,
        {name: labels[name].cpu() for name in evaluations},
        config=setup.config,
        costs=setup.costs,
        counts=setup.counts,
        class_weights=hyper.get("class_weights"),
    )


def judge_parts(
    evaluations: Mapping[str, Evaluation],
    labels: Mapping[str, Tensor],
    *,
    config: TrainConfig,
    costs: Costs,
    counts: Float[Tensor, " classes"],
    class_weights: Float[Tensor, " classes"] | None = None,
) -> dict[str, Judged]:
    """Judge a model on parts of its data, the temperature fitted on validation alone.

    Args:
        evaluations: The model on each part; without ``validation`` the temperature is 1.
        labels: The truth of each part.
        config: The training.
        costs: What decisions cost.
        counts: Training examples of each class.
        class_weights: What the training was given; None: 1.

    Returns:
        The judgement of each part, under both rules.
    """
    implied = implied_prior(config, counts, class_weights, costs=costs)
    fitted = "validation" if "validation" in evaluations else None
    # What was held out, else the training set, stands for where the model will be used, unless a
    # prior says otherwise; the examples that are judged have no say in the decisions.
    support = {name: e.support for name, e in evaluations.items()}
    scores = {
        name: probability_scores(e.logits, config, counts, costs=costs)
        for name, e in evaluations.items()
    }
    temperature = 1.0
    if fitted:
        here = _shift(_counted(support[fitted]), implied)
        temperature = fit_temperature(scores[fitted], labels[fitted].cpu(), log_shift=here)
    judged = {}
    for name, evaluation in evaluations.items():
        prior = deployment_prior(config, costs.classes, support[name])
        there = _counted(support[fitted] if fitted else counts.cpu())
        expected = there if prior is None else deployment_prior(config, costs.classes, there)
        assert expected is not None
        judged[name] = judge(
            evaluation.logits,
            labels[name],
            costs,
            scores=scores[name],
            temperature=temperature,
            log_shift=_shift(expected, implied),
            prior=prior,
        )
    return judged


def _counted(support: Tensor) -> Tensor:
    """Return counts as a prior; a class that was not met is rare, not impossible."""
    return support.double().clamp(min=0.5)


def _shift(prior: Tensor, implied: Tensor) -> Tensor:
    shift = posterior_shift(prior=prior / prior.sum(), train_prior=implied)
    assert shift is not None
    return shift


def judged_record(judged: Judged, costs: Costs, *, matrices: bool = True) -> dict[str, Any]:
    """Return a judgement as JSON has it, None for what is not defined.

    Args:
        judged: The judgement.
        costs: What decisions cost.
        matrices: Whether the confusion matrices are among it, which grow with the square of the
            classes.

    Returns:
        Scores by rule, confusion matrices in counts and in cost units.
    """
    return folder.plain(
        {
            "rules": {
                name: _record(scores, costs) | (_matrices(scores) if matrices else {})
                for name, scores in judged.rules.items()
            },
            "temperature": judged.temperature,
            "calibration_error": judged.calibration_error,
            "calibrated_error": judged.calibrated_error,
            "prior": dict(zip(costs.classes, judged.prior.tolist(), strict=True)),
            "constant_decision": judged.constant_decision,
            "constant_cost": judged.constant_cost,
        }
    )


def _record(scores: RuleScores, costs: Costs) -> dict[str, Any]:
    def by_class(*columns: Tensor) -> dict[str, list[float]]:
        rows = zip(*(column.tolist() for column in columns), strict=True)
        return {c: list(row) for c, row in zip(costs.classes, rows, strict=True)}

    return {
        "expected_cost": list(scores.expected_cost),
        "normalised_cost": scores.normalised_cost,
        "accuracy": list(scores.accuracy),
        "recall": by_class(scores.recall, scores.recall_low, scores.recall_high),
        "precision": by_class(scores.precision, scores.precision_low, scores.precision_high),
        "decisions": list(costs.decisions),
    }


def _matrices(scores: RuleScores) -> dict[str, Any]:
    return {"confusion": scores.confusion.tolist(), "confusion_cost": scores.cost.tolist()}
