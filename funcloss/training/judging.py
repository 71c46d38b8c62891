"""What a run's decisions cost: from its loss and data to the judgement of its logits."""

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from funcloss.combinators import options_of
from funcloss.config import TrainConfig
from funcloss.data import Dataset, feed
from funcloss.decisions import Costs, Judged, RuleScores, fit_temperature, judge, posterior_shift
from funcloss.losses import effective_number_weights
from funcloss.training import folder
from funcloss.training.evaluation import Evaluation, evaluate
from funcloss.training.objective import Forward, loss_named
from funcloss.training.setup import Setup
from funcloss.training.steering import Model
from funcloss.typing import Hyper

# By what power of the training prior the optimum of a loss is away from the posterior.
_BALANCED = {"balanced_softmax": 1.0, "logit_adjusted": 1.0, "vector_scaling": 1.0}
_EVALUATED_AT_ONCE = 1024 * 3 * 32 * 32  # values of the inputs
_NO_PROBABILITIES = (
    "squared_error",
    "multiclass_hinge",
    "multi_margin",
    "mean_absolute_error",
    "earth_mover",
)


def rule_caveat(config: TrainConfig) -> str:
    """Return why the rule of minimum expected cost does not fit what a loss makes of logits.

    Args:
        config: The training.

    Returns:
        A sentence; empty where the softmax of the logits estimates probabilities.
    """
    if "cost_matrix" in options_of(loss_named(config.loss)):
        return (
            f"the logits of {config.loss} have the costs in them already: decisions of minimum "
            "expected cost count them twice, go by argmax"
        )
    if config.loss in _NO_PROBABILITIES:
        return (
            f"the softmax of the logits of {config.loss} estimates no probabilities: decisions of "
            "minimum expected cost rest on a temperature alone"
        )
    return ""


def probability_scores(
    logits: Float[Tensor, "n classes"], config: TrainConfig, counts: Float[Tensor, " classes"]
) -> Float[Tensor, "n classes"]:
    """Return the logits as the loss takes them before its softmax, but for what is added to them.

    Args:
        logits: What the model says.
        config: The training.
        counts: Training examples of each class.

    Returns:
        The logits, those of vector scaling times ``(n / max(n))^gamma``.
    """
    if config.loss != "vector_scaling":
        return logits
    counts = counts.cpu().double().clamp(min=0.5)
    return logits * (counts / counts.max()) ** config.loss_option.get("gamma", 0.2)


def implied_prior(
    config: TrainConfig,
    counts: Float[Tensor, " classes"],
    class_weights: Float[Tensor, " classes"] | None,
) -> Float[Tensor, " classes"]:
    """Return the prior of which ``softmax(logits)`` is the posterior, as far as the loss tells.

    The training prior times the class weights, for the cross-entropy; what the logit-adjusted
    losses take out of it is out. Other losses are taken like the cross-entropy.

    Args:
        config: The training.
        counts: Training examples of each class.
        class_weights: What the training was given; None: 1.

    Returns:
        Parts that sum to 1, float64; a class that was never seen, or at weight 0, has the least of
        the others.
    """
    tau = config.loss_option.get("tau", 1.0) * _BALANCED.get(config.loss, 0.0)
    parts = counts.cpu().double() ** (1.0 - tau)
    if config.loss == "class_balanced":
        beta = config.loss_option.get("beta", 0.9999)
        parts = parts * effective_number_weights(counts.cpu().double(), beta=beta)
    if class_weights is not None:
        parts = parts * class_weights.cpu().double()
    seen = (counts.cpu() > 0) & (parts > 0)
    least = parts[seen].min() if seen.any() else torch.ones((), dtype=torch.float64)
    parts = torch.where(seen, parts, least)
    return parts / parts.sum()


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
    implied = implied_prior(config, counts, class_weights)
    fitted = "validation" if "validation" in evaluations else None
    # What was held out, else the training set, stands for where the model will be used, unless a
    # prior says otherwise; the examples that are judged have no say in the decisions.
    support = {name: e.support for name, e in evaluations.items()}
    scores = {name: probability_scores(e.logits, config, counts) for name, e in evaluations.items()}
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
