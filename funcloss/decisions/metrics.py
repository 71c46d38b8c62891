"""Metrics of a model's probabilities: how they rank, and how far they are to be trusted."""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

_BINS = 15


@dataclass(frozen=True)
class Reliability:
    """The data of a reliability diagram: 15 bins of equal width; NaN in an empty one."""

    confidence: Float[Tensor, " bins"]  # mean probability of the likeliest class
    accuracy: Float[Tensor, " bins"]  # how often that class is the true one
    count: Int[Tensor, " bins"]  # examples
    share: Float[Tensor, " bins"]  # their fraction of the weight

    @property
    def error(self) -> float:
        """The calibration error: the mean gap of accuracy and confidence, 0 to 1."""
        gaps = self.share * (self.accuracy - self.confidence).abs()
        return float(gaps[self.count > 0].sum())


@dataclass(frozen=True)
class Metrics:
    """Metrics of probabilities on labelled examples, under the prior of the deployment.

    A class against the rest needs examples of both: NaN where there are none.
    """

    auc: Float[Tensor, " classes"]  # area under the ROC curve, the class against the rest
    mean_auc: float  # over the classes that occur
    average_precision: Float[Tensor, " classes"]  # area under precision and recall
    mean_average_precision: float  # over the classes that occur
    brier_score: float  # mean sum over classes of (p - [true])^2, 0 to 2
    log_score: float  # mean negative log-likelihood, in nats per example
    reliability: Reliability


def make_metrics(
    log_probs: Float[Tensor, "n classes"],
    labels: Int[Tensor, " n"],
    weights: Float[Tensor, " n"] | None = None,
) -> Metrics:
    """Return the metrics of probabilities on labelled examples.

    The areas are those of scikit-learn's ``roc_curve``, trapezoids for the AUC and, as in its
    ``average_precision_score``, steps of the recall times the precision. Brier score
    ``mean_i sum_c (p[i, c] - [y_i = c])^2``, for two classes twice that of the second alone; log
    score ``mean_i -log p[i, y_i]``. Both are least at the true probabilities.

    Args:
        log_probs: Log-probabilities, shape ``(n, classes)``.
        labels: The truth, shape ``(n,)``.
        weights: Of each example, such as those of a deployment prior; None: equal.

    Returns:
        The metrics; NaN where the probabilities are.

    Example:
        >>> log_probs = torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.7, 0.3]]).log()
        >>> found = make_metrics(log_probs, torch.tensor([0, 0, 1]))
        >>> found.mean_auc, round(found.brier_score, 4), round(found.log_score, 4)
        (0.5, 0.44, 0.6067)

    References:
        Hand and Till, "A simple generalisation of the area under the ROC curve for multiple class
        classification problems", 2001; Brier, "Verification of forecasts expressed in terms of
        probability", 1950; Gneiting and Raftery, "Strictly proper scoring rules, prediction, and
        estimation", 2007.
    """
    log_probs, labels, part = _parts(log_probs, labels, weights)
    counts = part > 0  # what weighs nothing may be anything
    log_probs, labels, part = log_probs[counts], labels[counts], part[counts]
    probs = log_probs.exp()
    truth = labels[:, None] == torch.arange(probs.shape[1])
    auc, precision = _areas(probs, truth, part)
    return Metrics(
        auc=auc,
        mean_auc=float(auc.nanmean()),
        average_precision=precision,
        mean_average_precision=float(precision.nanmean()),
        brier_score=float(part @ (probs - truth.double()).square().sum(1)),
        log_score=float(part @ -log_probs.gather(1, labels[:, None]).squeeze(1)),
        reliability=reliability(log_probs, labels, part),
    )


def reliability(
    log_probs: Float[Tensor, "n classes"],
    labels: Int[Tensor, " n"],
    weights: Float[Tensor, " n"] | None = None,
) -> Reliability:
    """Return confidence and accuracy over 15 bins of equal width of the confidence.

    The confidence is the probability of the likeliest class; of calibrated probabilities it is the
    accuracy, in every bin.

    Args:
        log_probs: Log-probabilities, shape ``(n, classes)``.
        labels: The truth, shape ``(n,)``.
        weights: Of each example; None: equal.

    Returns:
        The bins from 0 to 1, each with its upper edge.

    Example:
        >>> found = reliability(torch.tensor([[0.9, 0.1], [0.9, 0.1]]).log(), torch.tensor([0, 1]))
        >>> found.count[-2:], found.confidence[-2], found.accuracy[-2]
        (tensor([2, 0]), tensor(0.9000, dtype=torch.float64), tensor(0.5000, dtype=torch.float64))

    References:
        Niculescu-Mizil and Caruana, "Predicting good probabilities with supervised learning", 2005.
    """
    log_probs, labels, part = _parts(log_probs, labels, weights)
    confidence, guess = log_probs.exp().max(-1)
    bins = (confidence * _BINS).ceil().long().clamp(1, _BINS) - 1

    def summed(values: Tensor) -> Tensor:
        return torch.zeros(_BINS, dtype=torch.float64).index_add(0, bins, values)

    share = summed(part)
    return Reliability(
        confidence=summed(part * confidence) / share,
        accuracy=summed(part * (guess == labels)) / share,
        count=bins.bincount(minlength=_BINS),
        share=share,
    )


def _areas(probs: Tensor, truth: Tensor, part: Tensor) -> tuple[Tensor, Tensor]:
    """Return the areas under ROC and precision-recall of each class against the rest."""
    from sklearn.metrics import auc, roc_curve

    areas = torch.full((2, probs.shape[1]), torch.nan, dtype=torch.float64)
    scores, hits, weights = probs.T.contiguous().numpy(), truth.T.contiguous().numpy(), part.numpy()
    defined = truth.any(0) & ~truth.all(0) & probs.isfinite().all()
    for c in defined.nonzero().squeeze(1).tolist():
        false_alarms, found, _ = roc_curve(
            hits[c], scores[c], sample_weight=weights, drop_intermediate=False
        )
        right = found * weights[hits[c]].sum()
        wrong = false_alarms * weights[~hits[c]].sum()
        precision = right[1:] / (right + wrong)[1:]  # scikit-learn's, without a curve of its own
        areas[:, c] = torch.tensor([auc(false_alarms, found), np.diff(found) @ precision])
    return areas[0], areas[1]


def _parts(
    log_probs: Tensor, labels: Tensor, weights: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return log-probabilities, labels and the fraction of each example, float64 on the CPU."""
    part = torch.ones(len(labels)) if weights is None else weights.cpu()
    part = part.double() / part.double().sum()
    return log_probs.detach().cpu().double(), labels.cpu().long(), part
