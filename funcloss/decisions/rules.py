"""From logits to decisions: posteriors for another prior, temperature, minimum expected cost."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from funcloss._checks import (
    check_floating,
    check_labels,
    check_number,
    check_per_class,
    check_shape,
)
from funcloss.decisions.costs import Costs

_LEAST, _MOST = 0.05, 20.0  # temperatures; on data without an error the likeliest is 0

RULES = ("argmax", "min-cost")  # the likeliest class by the scores, the least expected cost
_ROUNDING = 1e-12  # of the largest cost: sums over a thousand classes in float64


def log_posterior(
    logits: Float[Tensor, "*batch classes"],
    *,
    temperature: float | Tensor = 1.0,
    log_shift: Float[Tensor, " classes"] | None = None,
) -> Float[Tensor, "*batch classes"]:
    """Return ``log_softmax(logits / temperature + log_shift)``, in nats.

    Args:
        logits: Unnormalised log-probabilities, shape ``(*batch, classes)``.
        temperature: Above 0; above 1 the probabilities are evened out, below 1 sharpened.
        log_shift: Added to each class, as :func:`posterior_shift` gives it.

    Returns:
        Log-probabilities in float64, shape ``(*batch, classes)``.

    Raises:
        TypeError: ``logits`` or ``log_shift`` is not floating point.
        ValueError: ``log_shift`` has not an entry a class, or ``temperature`` is not above 0.

    Example:
        >>> log_posterior(torch.tensor([0.0, 2.0]), temperature=2.0).exp()
        tensor([0.2689, 0.7311], dtype=torch.float64)

    References:
        Guo, Pleiss, Sun and Weinberger, "On calibration of modern neural networks", 2017.
    """
    check_floating("log_posterior", "logits", logits)
    check_number("log_posterior", "temperature", temperature, low=0.0, above=True)
    if log_shift is not None:
        check_per_class("log_posterior", "log_shift", log_shift, logits)
    scores = logits.double() / temperature
    return (scores if log_shift is None else scores + log_shift.to(scores)).log_softmax(-1)


def posterior_shift(
    *,
    prior: Float[Tensor, " classes"] | None = None,
    train_prior: Float[Tensor, " classes"] | None = None,
    class_weights: Float[Tensor, " classes"] | None = None,
) -> Float[Tensor, " classes"] | None:
    """Return what takes a posterior of the training to one of the deployment, in nats.

    ``log(prior / train_prior) - log(class_weights)``: the cross-entropy of class weights ``w`` is
    least at ``w * p`` (made to sum to 1), so that weights act as a change of prior, which this
    takes back. A class of weight or part 0 in the training was never learnt: it is divided by 1.

    Args:
        prior: Part of each class where the model is used; None: as in the training.
        train_prior: Part of each class in the training set.
        class_weights: Costs of the true classes in a training with the cross-entropy; None: 1.

    Returns:
        What to add to log-probabilities, float64, up to a constant; None: nothing.

    Raises:
        ValueError: ``prior`` comes without ``train_prior``, or the shapes differ.

    Example:
        >>> shift = posterior_shift(class_weights=torch.tensor([1.0, 4.0]))
        >>> log_posterior(torch.zeros(2), log_shift=shift).exp()
        tensor([0.8000, 0.2000], dtype=torch.float64)

    References:
        Saerens, Latinne and Decaestecker, "Adjusting the outputs of a classifier to new a priori
        probabilities", 2002, eq. 2.4; Elkan, "The foundations of cost-sensitive learning", 2001.
    """
    who, factors = "posterior_shift", []
    if prior is not None:
        if train_prior is None:
            raise ValueError(f"{who}: prior needs train_prior, which it replaces")
        check_shape(who, "train_prior", train_prior, tuple(prior.shape), "prior")
        factors += [prior.double(), 1 / _or_one(train_prior)]
    if class_weights is not None:
        if prior is not None:
            check_shape(who, "class_weights", class_weights, tuple(prior.shape), "prior")
        factors.append(1 / _or_one(class_weights))
    return torch.stack(factors).log().sum(0) if factors else None


def _or_one(values: Tensor) -> Tensor:
    return torch.where(values > 0, values.double(), 1.0)


def fit_temperature(
    logits: Float[Tensor, "n classes"],
    labels: Int[Tensor, " n"],
    *,
    log_shift: Float[Tensor, " classes"] | None = None,
    spread: float = math.inf,
) -> float:
    """Return the temperature of least cross-entropy on held-out examples.

    The cross-entropy of ``log_softmax(b * logits + log_shift)`` is convex in ``b``, the inverse
    temperature, so bisection of its derivative finds the one minimum. With ``spread`` it is the
    likeliest temperature under a normal distribution of its logarithm around 0, which few examples
    cannot take far: the least of ``sum(cross-entropy) + log(b)^2 / (2 spread^2)``.

    Args:
        logits: Unnormalised log-probabilities of held-out examples, shape ``(n, classes)``.
        labels: Their classes, shape ``(n,)``.
        log_shift: As for :func:`log_posterior`: what takes the model to the prior of these
            examples, so of ``class_weights`` alone where they were split off the training set.
        spread: Standard deviation of the logarithm of the temperature, above 0; inf: any is as
            likely.

    Returns:
        The temperature, within 0.05 and 20: where no example is wrong the least is at 0. It is 1
        where nothing tells it: no examples, logits that are not finite or the same for all classes.

    Raises:
        TypeError: ``logits`` is not floating point, or ``labels`` is.
        ValueError: ``labels`` does not fit the shape of ``logits``.

    Example:
        >>> logits = torch.tensor([[2.0, 0.0], [2.0, 0.0], [2.0, 0.0], [2.0, 0.0]])
        >>> round(fit_temperature(logits, torch.tensor([0, 0, 0, 1])), 3)  # 2 / log(3)
        1.82

    References:
        Guo, Pleiss, Sun and Weinberger, "On calibration of modern neural networks", 2017.
    """
    check_floating("fit_temperature", "logits", logits)
    check_labels("fit_temperature", "labels", labels)
    shape = tuple(logits.shape)
    check_shape("fit_temperature", "labels", labels, shape[:-1], f"logits {shape}")
    scores = logits.detach().double()
    scores = scores - scores.amax(-1, keepdim=True)  # the same everywhere: exactly 0
    if not len(labels) or not scores.isfinite().all() or not scores.any():
        return 1.0
    shift = 0.0 if log_shift is None else log_shift.to(scores)
    of_label = scores.gather(-1, labels.to(scores.device).long()[:, None]).squeeze(-1)

    def slope(inverse: float) -> float:
        probs = (scores * inverse + shift).softmax(-1)
        pull = math.log(inverse) / (inverse * spread**2 * len(labels))
        return float(((probs * scores).sum(-1) - of_label).mean()) + pull

    low, high = math.log(1 / _MOST), math.log(1 / _LEAST)
    for _ in range(40):  # to 6 / 2^40 of the logarithm
        middle = (low + high) / 2
        # 0 too goes up: so it rounds where no example is wrong, by a wide margin.
        low, high = (middle, high) if slope(math.exp(middle)) <= 0 else (low, middle)
    return math.exp(-(low + high) / 2)


def expected_costs(
    log_probs: Float[Tensor, "*batch classes"],
    cost_matrix: Float[Tensor, "*#batch classes decisions"],
) -> Float[Tensor, "*batch decisions"]:
    """Return what each decision is expected to cost, ``softmax @ cost_matrix``.

    Args:
        log_probs: Log-probabilities of the classes, shape ``(*batch, classes)``.
        cost_matrix: Cost of each decision (column) in each true class (row), shape
            ``(classes, decisions)``; or a matrix per example, ``(*batch, classes, decisions)``.

    Returns:
        Expected costs, shape ``(*batch, decisions)``, in float32 at least.

    Raises:
        ValueError: ``cost_matrix`` has not one row per class, or not one matrix per example.

    Example:
        >>> cost_matrix = torch.tensor([[0.0, 1.0, 0.3], [9.0, 0.0, 0.3]])  # the last: abstain
        >>> expected_costs(torch.tensor([0.9, 0.1]).log(), cost_matrix)
        tensor([0.9000, 0.9000, 0.3000])
    """
    got, (*batch, classes) = tuple(cost_matrix.shape), log_probs.shape
    if got[:-1] not in ((classes,), (*batch, classes)):
        raise ValueError(
            f"expected_costs: cost_matrix must have shape ({classes}, decisions), one row per "
            f"class, or (*batch, {classes}, decisions), one matrix per example; got {got}"
        )
    # Not promote_types: torch 2.6 keeps it in an exported graph and cannot read it back.
    precise = log_probs if log_probs.dtype == torch.float64 else log_probs.float()
    return _expected(precise.exp(), cost_matrix.to(precise))


def _expected(probs: Tensor, cost_matrix: Tensor) -> Tensor:
    if cost_matrix.dim() == 2:
        return probs @ cost_matrix
    return (probs.unsqueeze(-2) @ cost_matrix).squeeze(-2)


def min_cost_decisions(
    log_probs: Float[Tensor, "*batch classes"],
    cost_matrix: Float[Tensor, "*#batch classes decisions"],
) -> Int[Tensor, "*batch"]:
    """Return the decisions of minimum expected cost, ``argmin(softmax @ cost_matrix)``.

    Bayes' decisions, the best there are if the probabilities are right. At equal costs, to the
    rounding of float64, the first, as of equal logits argmax takes the first.

    Args:
        log_probs: Log-probabilities of the classes, shape ``(*batch, classes)``.
        cost_matrix: Cost of each decision (column) in each true class (row), shape
            ``(classes, decisions)``; or a matrix per example, ``(*batch, classes, decisions)``.

    Returns:
        Decisions, shape ``(*batch)``.

    Raises:
        ValueError: ``cost_matrix`` has not one row per class, or not one matrix per example.

    Example:
        >>> log_probs = torch.tensor([[0.8, 0.2], [0.95, 0.05]]).log()
        >>> min_cost_decisions(log_probs, torch.tensor([[0.0, 1.0], [10.0, 0.0]]))
        tensor([1, 0])

    References:
        Elkan, "The foundations of cost-sensitive learning", 2001, eq. 1.
    """
    expected = expected_costs(log_probs.double(), cost_matrix)
    cheapest = expected.amin(-1, keepdim=True)
    # Of what is compared: one enormous cost must not make equals of all the others.
    size = _expected(log_probs.double().exp(), cost_matrix.abs().double())
    slack = _ROUNDING * size.gather(-1, expected.argmin(-1, keepdim=True))
    return (expected <= cheapest + slack).byte().argmax(-1)


@dataclass(frozen=True)
class Decisions:
    """What is decided on some examples, and by which probabilities and expected costs."""

    rule: str  # of RULES
    costs: Costs
    index: Int[Tensor, " n"]  # among ``costs.decisions``
    probabilities: Float[Tensor, "n classes"]
    expected_costs: Float[Tensor, "n decisions"]

    @property
    def names(self) -> list[str]:
        """The decisions by name."""
        return [self.costs.decisions[i] for i in self.index.tolist()]

    @property
    def probability(self) -> Float[Tensor, " n"]:
        """Probability that each decision is right; NaN of one that is no class."""
        extra = self.probabilities.new_full((len(self.index), len(self.costs.extra)), math.nan)
        return torch.cat([self.probabilities, extra], 1).gather(1, self.index[:, None])[:, 0]

    @property
    def expected_cost(self) -> Float[Tensor, " n"]:
        """Expected cost of each decision."""
        return self.expected_costs.gather(1, self.index[:, None])[:, 0]


@dataclass(frozen=True)
class DecisionRule:
    """How decisions of minimum expected cost are made of a model's scores.

    The probabilities are ``softmax(scale * logits / temperature + log_shift)``.

    Example:
        >>> from funcloss.decisions import make_costs
        >>> rule = DecisionRule(make_costs(("well", "ill"), class_cost={"ill": 9.0}))
        >>> rule.decide(torch.tensor([[2.0, 0.0], [3.0, 0.0]]))
        tensor([1, 0])
    """

    costs: Costs
    temperature: float = 1.0
    scale: Float[Tensor, " classes"] | float = 1.0  # of the logits, as the loss has it
    log_shift: Float[Tensor, " classes"] | None = None  # see :func:`posterior_shift`

    def log_probs(self, logits: Float[Tensor, "*batch classes"]) -> Float[Tensor, "*batch classes"]:
        """Return the log-probabilities that the rule decides by, float64 on the CPU."""
        scores = logits.detach().cpu()
        if isinstance(self.scale, Tensor) or self.scale != 1.0:
            scores = scores * self.scale
        return log_posterior(scores, temperature=self.temperature, log_shift=self.log_shift)

    def decide(
        self,
        logits: Float[Tensor, "*batch classes"],
        example_costs: Float[Tensor, "*batch classes decisions"] | None = None,
    ) -> Int[Tensor, "*batch"]:
        """Return the index of each decision among ``costs.decisions``.

        Args:
            logits: The model's scores, shape ``(*batch, classes)``.
            example_costs: The cost matrix of each example, as ``costs.of_examples`` makes it of its
                amounts; None: ``costs.matrix`` for all.

        Raises:
            ValueError: a cost is another for each example, and ``example_costs`` is not given.

        Example:
            >>> from funcloss.decisions import make_costs
            >>> costs = make_costs(("legit", "fraud"), cost={"fraud,legit": "amount"})
            >>> each = costs.of_examples({"amount": torch.tensor([3.0, 80.0])})
            >>> DecisionRule(costs).decide(torch.tensor([[2.0, 0.0], [2.0, 0.0]]), each)
            tensor([0, 1])
        """
        return min_cost_decisions(self.log_probs(logits), self._matrix(example_costs))

    def _matrix(self, example_costs: Tensor | None) -> Tensor:
        """Return the cost matrix, or that of each example, which some costs need."""
        if example_costs is not None:
            return example_costs.cpu()
        if self.costs.amounts:
            names = ", ".join(dict.fromkeys(name for *_, name in self.costs.amounts))
            raise ValueError(
                f"DecisionRule.decide: the costs depend on the {names} of each example: give "
                "example_costs, made by costs.of_examples"
            )
        return self.costs.matrix

    def decisions(
        self,
        logits: Float[Tensor, "n classes"],
        example_costs: Float[Tensor, "n classes decisions"] | None = None,
        *,
        by: str = "min-cost",
    ) -> Decisions:
        """Return the decisions on examples with their probabilities and expected costs.

        Args:
            logits: The model's scores, shape ``(n, classes)``.
            example_costs: As for :meth:`decide`.
            by: ``min-cost``; or ``argmax``, the largest logit, whatever mistakes cost.

        Raises:
            ValueError: there is no such rule, or as for :meth:`decide`.
        """
        if by not in RULES:
            raise ValueError(f"decisions: by must be one of {', '.join(RULES)}, got {by!r}")
        log_probs, matrix = self.log_probs(logits), self._matrix(example_costs)
        if by == "argmax":
            index = logits.detach().cpu().argmax(-1)
        else:
            index = min_cost_decisions(log_probs, matrix)
        return Decisions(
            rule=by,
            costs=self.costs,
            index=index,
            probabilities=log_probs.exp(),
            expected_costs=expected_costs(log_probs, matrix),
        )
