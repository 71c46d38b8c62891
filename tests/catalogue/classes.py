"""The rows of losses of one label: logits of classes, of decisions, of ordered thresholds."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from catalogue.rows import (
    LABELS,
    MULTI_HOT,
    WEIGHTS,
    OfTorch,
    each,
    number,
    row,
    sigmoid,
    softmax,
    wide,
)
from funcloss import losses
from funcloss.laws import LossCase
from funcloss.laws.case import CLASSES
from funcloss.laws.feed import Feed

Row = list[float]


def soft_targets(n: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """Return logits and distributions, both ``(n, CLASSES)``."""
    logits, others = torch.randn(2, n, CLASSES, generator=generator, dtype=torch.float64)
    return 3 * logits, others.softmax(-1)


def decisions(n: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """Return logits of one decision more than there are classes, and labels."""
    logits, labels = Feed(("logits", "labels"), (CLASSES + 1,))(n, generator)
    return logits, labels


def thresholds(n: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """Return logits of what lies between the classes, and labels."""
    return Feed(("logits", "labels"), (CLASSES - 1,))(n, generator)


# -- cross-entropy and what is made of it ---------------------------------------------------------


def _cross_entropy(z: Row, y: int) -> float:
    return max(z) - z[y] + math.log(math.fsum(math.exp(a - max(z)) for a in z))


def _softmax_focal(z: Row, y: int, gamma: float = 2.0, alpha: Row | None = None) -> float:
    p = softmax(z)[y]
    return -(alpha[y] if alpha else 1.0) * (1 - p) ** gamma * math.log(p)


def _poly1(z: Row, y: int, epsilon: float = 1.0) -> float:
    p = softmax(z)[y]
    return -math.log(p) + epsilon * (1 - p)


def _asymmetric(
    z: Row, y: int, gamma_pos: float = 0.0, gamma_neg: float = 4.0, label_smoothing: float = 0.1
) -> float:
    value = 0.0
    for k, p in enumerate(softmax(z)):
        weight = (1 - p) ** gamma_pos if k == y else p**gamma_neg
        share = (1 - label_smoothing) * (k == y) + label_smoothing / len(z)
        value -= share * weight * math.log(p)
    return value


def _multiclass_hinge(z: Row, y: int, margin: float = 1.0) -> float:
    return max(0.0, *(margin + z[k] - z[y] for k in range(len(z)) if k != y))


_CROSS_ENTROPY = OfTorch(F.cross_entropy)
_MULTI_MARGIN = OfTorch(F.multi_margin_loss)

CASES = {
    "cross_entropy": row(losses.cross_entropy, LABELS, _CROSS_ENTROPY, minus_inf=True, shift=True),
    "cross_entropy, smoothed": row(
        losses.cross_entropy, LABELS, _CROSS_ENTROPY, {"label_smoothing": 0.1}, shift=True
    ),
    "soft_cross_entropy": row(
        losses.soft_cross_entropy, soft_targets, _CROSS_ENTROPY, shift=True, names=MULTI_HOT.names
    ),
    "nll": row(
        losses.nll, wide("log_probs", "labels"), OfTorch(F.nll_loss), minus_inf=True, shift=False
    ),
    "softmax_focal": row(
        losses.softmax_focal, LABELS, each(_softmax_focal), minus_inf=True, shift=True
    ),
    "softmax_focal, weighted": row(
        losses.softmax_focal,
        LABELS,
        each(_softmax_focal),
        {"gamma": number(0.5), "alpha": WEIGHTS},
        costs=("alpha",),
        minus_inf=True,
        shift=True,
    ),
    "poly1": row(losses.poly1, LABELS, each(_poly1), minus_inf=True, shift=True),
    "poly1, epsilon -0.5": row(
        losses.poly1, LABELS, each(_poly1), {"epsilon": number(-0.5)}, shift=True
    ),
    "asymmetric_single_label": row(
        losses.asymmetric_single_label, LABELS, each(_asymmetric), minus_inf=True, shift=True
    ),
    "asymmetric_single_label, other options": row(
        losses.asymmetric_single_label,
        LABELS,
        each(_asymmetric),
        {"gamma_pos": number(0.5), "gamma_neg": number(1.5), "label_smoothing": number(0.2)},
        shift=True,
    ),
    "multiclass_hinge": row(
        losses.multiclass_hinge, LABELS, each(_multiclass_hinge), minus_inf=True, shift=True
    ),
    "multiclass_hinge, margin 2.5": row(
        losses.multiclass_hinge,
        LABELS,
        each(_multiclass_hinge),
        {"margin": number(2.5)},
        shift=True,
    ),
    "multi_margin": row(losses.multi_margin, LABELS, _MULTI_MARGIN, minus_inf=True, shift=True),
    "multi_margin, squared and weighted": row(
        losses.multi_margin,
        LABELS,
        _MULTI_MARGIN,
        {"margin": number(2.5), "p": 2, "class_weights": WEIGHTS},
        costs=("class_weights",),
        shift=True,
    ),
}


# -- costs of decisions ---------------------------------------------------------------------------

# Right decisions are free; no two mistakes on a class cost the same.
COSTS = torch.tensor(
    [
        [0.0, 1.0, 2.0, 0.5, 4.0],
        [9.0, 0.0, 1.5, 2.5, 0.7],
        [0.3, 1.2, 0.0, 3.0, 1.1],
        [2.2, 0.9, 0.4, 0.0, 5.0],
        [1.3, 0.8, 6.0, 1.7, 0.0],
    ],
    dtype=torch.float64,
)
_ABSTAIN = torch.tensor([[0.25], [0.2], [0.15], [0.35], [0.6]], dtype=torch.float64)


def _expected_cost(z: Row, y: int, cost_matrix: list[Row]) -> float:
    return math.fsum(c * p for c, p in zip(cost_matrix[y], softmax(z), strict=True))


def _log_bilinear(z: Row, y: int, cost_matrix: list[Row]) -> float:
    p, costs = softmax(z), cost_matrix[y]
    others = [math.fsum(p[:k] + p[k + 1 :]) for k in range(len(p))]
    return -math.fsum(costs[k] * math.log(others[k]) for k in range(len(p)) if k != y)


def _softmax_margin(z: Row, y: int, cost_matrix: list[Row]) -> float:
    pairs = zip(z, cost_matrix[y], strict=True)
    return math.log(math.fsum(math.exp(a + c) for a, c in pairs)) - z[y]


def _cost_hinge(z: Row, y: int, cost_matrix: list[Row]) -> float:
    return max(a + c for a, c in zip(z, cost_matrix[y], strict=True)) - z[y]


def _one_sided_regression(r: Row, y: int, cost_matrix: list[Row]) -> float:
    costs = cost_matrix[y]
    signs = [1 if c == min(costs) else -1 for c in costs]
    terms = zip(signs, r, costs, strict=True)
    return math.fsum(math.log1p(math.exp(s * (a - c))) for s, a, c in terms)


@dataclass(frozen=True)
class _OfRows:
    """A loss given the costs of each example itself, not a matrix."""

    loss: Callable[..., Tensor]

    def __call__(
        self,
        logits: Tensor,
        labels: Tensor,
        *,
        cost_matrix: Tensor,
        where: Tensor | None = None,
    ) -> Tensor:
        counted = labels if where is None else torch.where(where, labels, 0)
        rows = cost_matrix.gather(0, counted.reshape(-1, 1).expand(-1, cost_matrix.shape[1]))
        return self.loss(logits, labels, costs=rows.reshape(logits.shape), where=where)


def _of_costs(loss: Callable[..., Tensor], value: Callable[..., float]) -> dict[str, LossCase]:
    """Return the rows of a loss: on squares of free right decisions or not, and on an oblong."""
    estimates = loss is losses.one_sided_regression
    names = ("cost_estimates" if estimates else "logits", "labels")

    def of(
        cost_matrix: Tensor,
        feed: Callable = LABELS,
        loss: Callable[..., Tensor] = loss,
        **limits: str,
    ) -> LossCase:
        return row(
            loss,
            feed,
            each(value),
            {"cost_matrix": cost_matrix},
            costs=("cost_matrix",),
            shift=not estimates,
            minus_inf=not estimates,
            limits=limits,
            names=names,
        )

    name = loss.__name__
    oblong = {"class permutation": "the last decision is no class"}
    right_too = COSTS + 0.1 * torch.eye(CLASSES, dtype=torch.float64)
    return {
        name: of(COSTS),
        f"{name}, right decisions cost too": of(right_too),
        f"{name}, with a decision to abstain": of(
            torch.cat([COSTS, _ABSTAIN], -1), decisions, **oblong
        ),
        f"costs of each example({name})": of(COSTS, loss=_OfRows(loss)),
    }


CASES |= {
    **_of_costs(losses.expected_cost, _expected_cost),
    **_of_costs(losses.log_bilinear, _log_bilinear),
    **_of_costs(losses.softmax_margin, _softmax_margin),
    **_of_costs(losses.cost_hinge, _cost_hinge),
    **_of_costs(losses.one_sided_regression, _one_sided_regression),
}


# -- imbalanced classes ---------------------------------------------------------------------------

COUNTS = torch.tensor([1000.0, 200.0, 50.0, 7.0, 1.0], dtype=torch.float64)
_ABSENT = {"class_counts": torch.tensor([1000.0, 200.0, 50.0, 7.0, 0.0], dtype=torch.float64)}
_AT_ZERO = {
    law: "a count of 0 is taken as 2^-126: the value jumps there, and its derivative by it is 0"
    for law in ("gradcheck", "gradgradcheck")
}


def _log(frequency: float) -> float:
    return math.log(frequency) if frequency > 0 else -126 * math.log(2)


def _logit_adjusted(z: Row, y: int, class_prior: Row, tau: float = 1.0) -> float:
    return _cross_entropy([a + tau * _log(p) for a, p in zip(z, class_prior, strict=True)], y)


def _balanced_softmax(z: Row, y: int, class_counts: Row) -> float:
    return _logit_adjusted(z, y, [n / sum(class_counts) for n in class_counts])


def _class_balanced(z: Row, y: int, class_counts: Row, beta: float = 0.9999) -> float:
    weights = [1 / math.fsum(beta**i for i in range(int(n))) for n in class_counts]
    mean = math.fsum(w * n for w, n in zip(weights, class_counts, strict=True)) / sum(class_counts)
    return weights[y] / mean * _cross_entropy(z, y)


def _ldam(z: Row, y: int, class_counts: Row, max_margin: float = 0.5, scale: float = 30.0) -> float:
    rarest = min(n for n in class_counts if n > 0)
    widest = max_margin * rarest**0.25  # the constant C of the paper's C / n^(1/4)
    margin = widest / max(class_counts[y], rarest) ** 0.25
    return _cross_entropy([scale * (a - margin * (k == y)) for k, a in enumerate(z)], y)


def _vector_scaling(
    z: Row, y: int, class_counts: Row, gamma: float = 0.2, tau: float = 1.0
) -> float:
    total, most = math.log(sum(class_counts)), math.log(max(class_counts))
    logs = [_log(n) for n in class_counts]
    scores = [
        math.exp(gamma * (n - most)) * a + tau * (n - total) for a, n in zip(z, logs, strict=True)
    ]
    return _cross_entropy(scores, y)


def _equalization(z: Row, y: int, class_counts: Row, threshold: float) -> float:
    value = 0.0
    for k, (a, n) in enumerate(zip(z, class_counts, strict=True)):
        if k == y:
            value -= math.log(sigmoid(a))
        elif n / sum(class_counts) >= threshold:
            value -= math.log(sigmoid(-a))
    return value


_COUNTED = {"class_counts": COUNTS}

CASES |= {
    "balanced_softmax": row(
        losses.balanced_softmax,
        LABELS,
        each(_balanced_softmax),
        _COUNTED,
        minus_inf=True,
        shift=True,
    ),
    "balanced_softmax, a class absent": row(
        losses.balanced_softmax,
        LABELS,
        # The floor is under the count, not under its share.
        each(lambda z, y, class_counts: _logit_adjusted(z, y, class_counts)),
        _ABSENT,
        shift=True,
        limits=_AT_ZERO,
    ),
    "class_balanced": row(
        losses.class_balanced,
        LABELS,
        each(_class_balanced),
        {**_COUNTED, "beta": number(0.99)},
        minus_inf=True,
        shift=True,
    ),
    "logit_adjusted": row(
        losses.logit_adjusted,
        LABELS,
        each(_logit_adjusted),
        {"class_prior": COUNTS / COUNTS.sum(), "tau": number(1.5)},
        minus_inf=True,
        shift=True,
    ),
    "ldam": row(losses.ldam, LABELS, each(_ldam), _COUNTED, minus_inf=True, shift=True),
    "ldam, unscaled": row(
        losses.ldam,
        LABELS,
        each(_ldam),
        {**_COUNTED, "max_margin": number(0.7), "scale": number(1.0)},
        shift=True,
    ),
    "ldam, a class absent": row(
        losses.ldam,
        LABELS,
        each(_ldam),
        {**_ABSENT, "scale": 2.0},
        shift=True,
        limits={
            law: "a count of 0 is taken as the least other: the value jumps there"
            for law in ("gradcheck", "gradgradcheck")
        },
    ),
    "vector_scaling": row(
        losses.vector_scaling,
        LABELS,
        each(_vector_scaling),
        {**_COUNTED, "gamma": number(0.2), "tau": number(1.25)},
        shift=False,
    ),
    "vector_scaling, a class absent": row(
        losses.vector_scaling, LABELS, each(_vector_scaling), _ABSENT, shift=False, limits=_AT_ZERO
    ),
    "equalization": row(
        losses.equalization,
        LABELS,
        each(_equalization),
        {**_COUNTED, "threshold": 0.01},
        minus_inf=True,
        shift=False,
    ),
}


# -- ordered classes ------------------------------------------------------------------------------

_ORDER = {"class permutation": "the order of the classes matters"}


def _coral(z: Row, y: int) -> float:
    return -sum(math.log(sigmoid(a if y > k else -a)) for k, a in enumerate(z))


def _corn(z: Row, y: int) -> float:
    """Return the negative logarithm of the label's probability, passed up to it and no further."""
    passed = math.prod(sigmoid(a) for a in z[:y])
    return -math.log(passed * sigmoid(-z[y]) if y < len(z) else passed)


def _earth_mover(z: Row, y: int) -> float:
    p = softmax(z)
    gaps = [math.fsum(p[: k + 1]) - (k >= y) for k in range(len(p))]
    return math.fsum(gap * gap for gap in gaps)


def _sord(z: Row, y: int, scale: float = 1.0) -> float:
    targets = softmax([-scale * (k - y) ** 2 for k in range(len(z))])
    return -sum(t * math.log(p) for t, p in zip(targets, softmax(z), strict=True))


CASES |= {
    "coral": row(
        losses.coral, thresholds, each(_coral), shift=False, limits=_ORDER, names=LABELS.names
    ),
    "corn": row(
        losses.corn, thresholds, each(_corn), shift=False, limits=_ORDER, names=LABELS.names
    ),
    "earth_mover": row(losses.earth_mover, LABELS, each(_earth_mover), shift=True, limits=_ORDER),
    "sord": row(
        losses.sord, LABELS, each(_sord), {"scale": number(0.4)}, shift=True, limits=_ORDER
    ),
}


# -- wrong labels ---------------------------------------------------------------------------------


def _generalized(z: Row, y: int, q: float = 0.7) -> float:
    p = softmax(z)[y]
    return (1 - p**q) / q if q else -math.log(p)


def _symmetric(
    z: Row, y: int, alpha: float = 1.0, beta: float = 1.0, log_zero: float = -4.0
) -> float:
    p = softmax(z)
    reverse = -sum(p_k * (0.0 if k == y else log_zero) for k, p_k in enumerate(p))
    return -alpha * math.log(p[y]) + beta * reverse


def _normalized(z: Row, y: int) -> float:
    p = softmax(z)
    return math.log(p[y]) / sum(math.log(p_k) for p_k in p)


def _absolute(z: Row, y: int) -> float:
    return sum(abs((k == y) - p) for k, p in enumerate(softmax(z)))


def _log_t(x: float, t: float) -> float:
    return math.log(x) if t == 1 else (x ** (1 - t) - 1) / (1 - t)


def _exp_t(x: float, t: float) -> float:
    return math.exp(x) if t == 1 else (1 + (1 - t) * x) ** (1 / (1 - t))


def _tempered_softmax(z: Row, t: float) -> Row:
    """Find the level by bisection."""
    low, high = max(z), max(z) - _log_t(1 / len(z), t)
    for _ in range(200):
        level = (low + high) / 2
        low, high = (level, high) if sum(_exp_t(a - level, t) for a in z) > 1 else (low, level)
    return [_exp_t(a - low, t) for a in z]


def _bi_tempered(
    z: Row, label: int, t1: float = 0.8, t2: float = 1.2, label_smoothing: float = 0.0
) -> float:
    total = 0.0
    for k, p in enumerate(_tempered_softmax(z, t2)):
        y = (1 - label_smoothing) * (k == label) + label_smoothing / len(z)
        total += y * (_log_t(y, t1) - _log_t(p, t1)) if y else 0.0
        total -= (y ** (2 - t1) - p ** (2 - t1)) / (2 - t1)
    return total


def _robust(loss: Callable[..., Tensor], value: Callable[..., float], **options) -> LossCase:
    return row(loss, LABELS, each(value), options, shift=True)


CASES |= {
    "generalized_cross_entropy": _robust(
        losses.generalized_cross_entropy, _generalized, q=number(0.7)
    ),
    "generalized_cross_entropy, q = 0": _robust(
        losses.generalized_cross_entropy, _generalized, q=0.0
    ),
    "symmetric_cross_entropy": _robust(
        losses.symmetric_cross_entropy,
        _symmetric,
        alpha=number(0.1),
        beta=number(0.7),
        log_zero=number(-6.0),
    ),
    "normalized_cross_entropy": _robust(losses.normalized_cross_entropy, _normalized),
    "mean_absolute_error": _robust(losses.mean_absolute_error, _absolute),
    "bi_tempered": _robust(losses.bi_tempered, _bi_tempered),
    "bi_tempered, smoothed": _robust(
        losses.bi_tempered,
        _bi_tempered,
        t1=number(0.3),
        t2=number(2.5),
        label_smoothing=number(0.1),
    ),
    "bi_tempered, t1 = t2 = 1": _robust(losses.bi_tempered, _bi_tempered, t1=1.0, t2=1.0),
}
