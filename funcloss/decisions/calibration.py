"""From a model's scores to probabilities: fitted once on held-out data, kept, used everywhere."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from funcloss.decisions.costs import Costs
from funcloss.decisions.evaluation import calibration_error
from funcloss.decisions.rules import DecisionRule, fit_temperature, log_posterior, posterior_shift

_FOLDS = 5
_SPREAD = 0.5  # of the logarithm of temperatures: two thirds lie between 0.6 and 1.6
_ENOUGH = 5_000  # examples that one number cannot be fitted too closely to


@dataclass(frozen=True)
class Calibration:
    """What makes probabilities of a model's scores, and how that was found.

    The probabilities are ``softmax(scale * logits / temperature + log(prior / implied_prior))``.
    """

    implied_prior: Float[Tensor, " classes"]  # of which softmax(logits) is the posterior
    prior: Float[Tensor, " classes"]  # class frequencies where the model is used
    scale: Float[Tensor, " classes"] | float = 1.0  # of the logits, as the loss has it
    temperature: float = 1.0  # that is applied
    fitted_on: str = ""  # the data that the temperature was fitted on; empty: it was not
    examples: int = 0  # of these
    tried: float = 1.0  # temperature of least cross-entropy on them
    log_score: tuple[float, float] = (math.nan, math.nan)  # cross-entropy at 1, and at ``tried``
    error: tuple[float, float] = (math.nan, math.nan)  # calibration error, likewise

    def rule(self, costs: Costs) -> DecisionRule:
        """Return the decisions of minimum expected cost at these probabilities."""
        shift = posterior_shift(prior=self.prior, train_prior=self.implied_prior)
        return DecisionRule(costs, self.temperature, self.scale, shift)

    @property
    def sentence(self) -> str:
        """How the temperature was found, in a line."""
        if not self.fitted_on:
            return "probabilities are not calibrated: there was no held-out data to fit them on"
        (before, after), (error, calibrated) = self.log_score, self.error
        changes = (
            f"cross-entropy {before:.4f} -> {after:.4f}, calibration error {error:.4f} -> "
            f"{calibrated:.4f} on {self.examples:,} {self.fitted_on} examples"
        )
        if self.temperature == self.tried:
            return f"temperature {self.temperature:.3f}: {changes}"
        return f"temperature {self.tried:.3f} not applied, since it does not lower both: {changes}"

    def record(self) -> dict[str, Any]:
        """Return it as JSON has it."""
        plain = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        listed = {k: v.tolist() if isinstance(v, Tensor) else v for k, v in plain.items()}
        return listed | {
            name: [v if math.isfinite(v) else None for v in listed[name]]
            for name in ("log_score", "error")
        }

    @staticmethod
    def of_record(record: Mapping[str, Any]) -> "Calibration":
        """Return what :meth:`record` was made of.

        Raises:
            KeyError: a field is missing.
            TypeError: a field is of another kind.
            ValueError: likewise.
        """
        vectors = {
            name: torch.tensor(record[name], dtype=torch.float64)
            for name in ("implied_prior", "prior")
        }
        scale = record["scale"]

        def pair(name: str) -> tuple[float, float]:
            before, after = (math.nan if v is None else float(v) for v in record[name])
            return before, after

        return Calibration(
            **vectors,
            scale=float(scale) if isinstance(scale, int | float) else torch.tensor(scale).double(),
            temperature=float(record["temperature"]),
            fitted_on=str(record["fitted_on"]),
            examples=int(record["examples"]),
            tried=float(record["tried"]),
            log_score=pair("log_score"),
            error=pair("error"),
        )


def calibrate(
    calibration: Calibration,
    logits: Float[Tensor, "n classes"],
    labels: Int[Tensor, " n"],
    *,
    held_out_prior: Float[Tensor, " classes"],
    fitted_on: str = "validation",
) -> Calibration:
    """Fit the temperature on held-out examples, and apply it if that makes better probabilities.

    Few examples cannot take it far from 1: its logarithm has a normal distribution around 0 with a
    standard deviation of 0.5, beside what the examples say.

    It is applied if it lowers both the cross-entropy and the calibration error of examples that it
    was not fitted on: five folds of the held-out examples take turns. On 5,000 and more, which one
    number cannot be fitted to too closely, both are measured where it was fitted.

    Args:
        calibration: What is known without held-out examples.
        logits: The model's scores on them, shape ``(n, classes)``.
        labels: The truth, shape ``(n,)``.
        held_out_prior: Frequency of each class where they are from, shape ``(classes,)``.
        fitted_on: What they are called.

    Returns:
        The calibration with a temperature, 1 where the fitted one is not better.

    Example:
        >>> even = torch.tensor([0.5, 0.5])
        >>> logits = 8 * torch.eye(2).repeat(50, 1)  # sure, and right four times out of five
        >>> labels = torch.tensor([0, 1, 0, 1, 0, 1, 0, 1, 1, 0]).repeat(10)
        >>> found = calibrate(Calibration(even, even), logits, labels, held_out_prior=even)
        >>> round(found.temperature, 2)  # without that distribution 8 / log(4), which is 5.77
        4.86

    References:
        Guo, Pleiss, Sun and Weinberger, "On calibration of modern neural networks", 2017.
    """
    labels = labels.cpu().long()
    shift = posterior_shift(prior=held_out_prior, train_prior=calibration.implied_prior)
    scores = logits.detach().cpu().double() * calibration.scale

    def fitted(some: Tensor) -> float:
        return fit_temperature(scores[some], labels[some], log_shift=shift, spread=_SPREAD)

    tried = fitted(torch.ones(len(labels), dtype=torch.bool))
    temperatures = torch.full((len(labels), 1), tried, dtype=torch.float64)
    if len(labels) < _ENOUGH:
        fold = _folds(labels)
        for number in range(_FOLDS):
            temperatures[fold == number] = fitted(fold != number)
    at_one, at_fitted = (
        log_posterior(scores / t, log_shift=shift) for t in (torch.ones(()).double(), temperatures)
    )
    log_score = _cross_entropy(at_one, labels), _cross_entropy(at_fitted, labels)
    error = calibration_error(at_one, labels), calibration_error(at_fitted, labels)
    better = log_score[1] < log_score[0] and error[1] <= error[0]
    return dataclasses.replace(
        calibration,
        temperature=tried if better else 1.0,
        fitted_on=fitted_on,
        examples=len(labels),
        tried=tried,
        log_score=log_score,
        error=error,
    )


def _folds(labels: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
    """Return a fold for each example, those of each class shuffled and dealt out in turn."""
    shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    order = shuffled[labels[shuffled].argsort(stable=True)]
    folds = torch.empty_like(labels)
    folds[order] = torch.arange(len(labels)) % _FOLDS
    return folds


def _cross_entropy(log_probs: Tensor, labels: Tensor) -> float:
    return float(-log_probs.gather(1, labels[:, None]).mean())


def class_frequencies(
    counts: Float[Tensor, " classes"], train_counts: Float[Tensor, " classes"]
) -> Float[Tensor, " classes"]:
    """Return the frequency of each class in data of its own; one that is missing keeps its share.

    A class without an example among few is not rarer than it was in training, nor more frequent.

    Args:
        counts: Examples of each class, shape ``(classes,)``.
        train_counts: Examples of each class that the model was trained on.

    Returns:
        Frequencies that sum to 1, float64.

    Example:
        >>> class_frequencies(torch.tensor([20.0, 0.0]), torch.tensor([90.0, 10.0]))
        tensor([0.9000, 0.1000], dtype=torch.float64)
    """
    counts = counts.detach().cpu().double()
    # A class of neither is rare, not impossible.
    trained = train_counts.detach().cpu().double().clamp(min=0.5)
    trained = trained / trained.sum()
    missing = counts <= 0
    if missing.all():
        return trained
    left = 1 - trained[missing].sum()
    return torch.where(missing, trained, left * counts / counts.sum())
