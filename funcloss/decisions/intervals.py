"""Intervals around what was counted: of a part, of a cost, of a mean, of a paired difference."""

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

_LEVEL = 0.95
_Z = NormalDist().inv_cdf(0.5 + _LEVEL / 2)
_MANY = 30.0  # degrees of freedom from which Student's quantile is told by its series
_ANY = (-math.inf, math.inf)


class Interval(NamedTuple):
    """A number, or one per class in tensors, and the interval of 95 % around it; NaN: unknown."""

    value: Any
    low: Any = math.nan
    high: Any = math.nan


def wilson(
    hits: Float[Tensor, "*batch"], trials: Float[Tensor, "*batch"]
) -> tuple[Float[Tensor, "*batch"], Float[Tensor, "*batch"]]:
    """Return Wilson's interval of a part at 95 %, ``(low, high)``.

    With ``p = hits / trials``: centre ``(p + z^2 / 2n) / (1 + z^2 / n)``, half-width ``z sqrt(p (1
    - p) / n + z^2 / 4n^2) / (1 + z^2 / n)``. It stays within [0, 1] and has a width at 0 and 1 too.

    Args:
        hits: How often it was so.
        trials: Out of how many; 0 gives NaN.

    Returns:
        The bounds, float64.

    Example:
        >>> wilson(torch.tensor(10.0), torch.tensor(10.0))
        (tensor(0.7225, dtype=torch.float64), tensor(1., dtype=torch.float64))

    References:
        Wilson, "Probable inference, the law of succession, and statistical inference", 1927.
    """
    hits, n = hits.double(), trials.double()
    part, z2 = hits / n, _Z**2
    centre = (part + z2 / (2 * n)) / (1 + z2 / n)
    half = _Z * (part * (1 - part) / n + z2 / (4 * n**2)).clamp(min=0).sqrt() / (1 + z2 / n)
    # Exactly 0 and 1 at the ends, where rounding would pass them.
    low = torch.where(hits <= 0, hits * 0, (centre - half).clamp(min=0))
    high = torch.where(hits >= n, part, (centre + half).clamp(max=1))
    return low + 0 * part, high


def cost_interval(
    confusion: Float[Tensor, "classes decisions"],
    cost_matrix: Float[Tensor, "classes decisions"],
    prior: Float[Tensor, " classes"] | None = None,
) -> Interval:
    """Return the mean cost of decisions, with an interval at 95 % within what it can be.

    The value is the plain mean. The interval is that of a posterior that takes one more example
    for seen, half of it at the least cost and half at the largest, so that a costly mistake that
    did not occur is not taken for impossible. It is a Beta distribution between the least and the
    largest mean cost there can be, of the mean and the variance that the counts then have, and is
    widened to hold the value where that is an end: without a mistake it begins at no mistake.

    With a known prior each class is a sample of its own; the additional example is one of the
    class where an example moves the mean most, and the variance of the others is the unbiased one
    (a class with a single example is compared with the mean of all). For two decisions of one class
    the posterior is that of Jeffreys' prior, ``Beta(hits + 1/2, misses + 1/2)``. An additional
    example for each class would add up: with 200 classes of ten examples such intervals miss the
    truth in more than a third of the cases.

    Args:
        confusion: Counts, rows the truth, shape ``(classes, decisions)``.
        cost_matrix: Cost of each decision (column) in each true class (row).
        prior: Known fraction of each class; None: as counted, and as uncertain as that. Classes
            without an example are left out.

    Returns:
        Mean cost per example and its bounds; NaN without an example.

    Example:
        >>> cost_matrix = torch.tensor([[0.0, 1.0], [20.0, 0.0]])
        >>> value, low, high = cost_interval(torch.tensor([[52, 0], [0, 18]]), cost_matrix)
        >>> value, low, round(high, 2)
        (0.0, 0.0, 0.7)

    References:
        Brown, Cai and DasGupta, "Interval estimation for a binomial proportion", 2001; Fay and
        Feuer, "Confidence intervals for directly standardized rates", 1997 (one more event at the
        largest weight).
    """
    from scipy.special import betaincinv

    counts, costs = confusion.cpu().double(), cost_matrix.cpu().double()
    support = counts.sum(1)
    share = support if prior is None else prior.cpu().double()
    present = (support > 0) & (share > 0)
    if not present.any():
        return Interval(math.nan)
    counts, costs, share = counts[present], costs[present], share[present] / share[present].sum()
    value = float(share @ ((counts * costs).sum(1) / counts.sum(1)))
    if prior is None:  # one sample of all classes
        counts, costs, share = counts.reshape(1, -1), costs.reshape(1, -1), share.sum()[None]
    least, reach = costs.amin(1), costs.amax(1) - costs.amin(1)
    low, width = float(share @ least), float(share @ reach)
    if not width > 0:
        return Interval(value, value, value)
    # From here on in parts of what is possible of a class, 0 to 1.
    place = torch.where(reach[:, None] > 0, (costs - least[:, None]) / reach[:, None], 0.0)
    weight, n = share * reach / width, counts.sum(1)
    extra = torch.zeros_like(n)
    extra[(weight / n).argmax()] = 1.0
    size = n + extra
    means = ((counts * place).sum(1) + extra / 2) / size
    squares = ((counts * place**2).sum(1) + extra / 2) / size
    mean = weight @ means
    variances = torch.where(size > 1, (squares - means**2).clamp(min=0), (means - mean) ** 2)
    variance = weight**2 @ (variances / torch.where(extra > 0, size + 1, size - 1).clamp(min=1))
    number = mean * (1 - mean) / variance - 1  # of examples that the Beta distribution is worth
    tail = (1 - _LEVEL) / 2
    ends = betaincinv(float(mean * number), float((1 - mean) * number), (tail, 1 - tail))
    lower, upper = (low + width * min(float(end), 1.0) for end in ends)
    return Interval(value, min(lower, value), max(upper, value))


def mean_interval(
    values: Float[Tensor, "seeds n"],
    weights: Float[Tensor, " n"] | None = None,
    *,
    strata: Int[Tensor, " n"] | None = None,
    within: tuple[float, float] = _ANY,
) -> Interval:
    """Return the mean over examples and seeds, with an interval for both at 95 %.

    The variance of the mean is that over the examples, of their means over the seeds, plus that
    over the seeds, of their means over the examples, each over its number; the quantile is
    Student's, with Satterthwaite's degrees of freedom. What varies with seed and example together
    is in both, so that the interval errs to the wide side. Values may be differences of two models
    on the same examples: the interval is then a paired one. One seed says nothing of other seeds,
    and equal values, an interval of no width, nothing of values that were not seen.

    Args:
        values: One value an example and seed, shape ``(seeds, n)``.
        weights: Of each example, such as those of a deployment prior; None: equal.
        strata: Groups of examples whose parts of the weight are known, not sampled: under a prior
            the classes. What differs between them is then no uncertainty; None: one group.
        within: Least and largest mean there can be; the interval ends there.

    Returns:
        Mean and interval; NaN bounds for a single example and seed.

    Example:
        >>> mean_interval(torch.tensor([[0.0, 1.0, 0.0, 1.0]]))
        Interval(value=0.5, low=-0.418..., high=1.418...)

    References:
        Satterthwaite, "An approximate distribution of estimates of variance components", 1946;
        Cochran, "Sampling techniques", 1977, eq. 5.6 and 5A.42 (a group of one is compared with
        the mean of all).
    """
    seeds, n = values.shape
    values = values.detach().cpu().double()
    part = torch.ones(n) if weights is None else weights.detach().cpu()
    part = part.double() / part.double().sum()
    groups = torch.zeros(n).long() if strata is None else strata.cpu().long()
    of_seed = values @ part
    mean = float(of_seed.mean())
    sources = _of_examples(values.mean(0), part, mean, groups) if n > 1 else []
    if seeds > 1:
        sources.append((float(of_seed.var()) / seeds, seeds - 1))
    variance = sum(v for v, _ in sources)
    if not sources or not math.isfinite(variance):
        return Interval(mean, math.nan, math.nan)
    freedom = variance**2 / max(sum(v**2 / df for v, df in sources), 1e-300)
    half = student(freedom) * math.sqrt(variance) if variance else 0.0
    return Interval(mean, max(mean - half, within[0]), min(mean + half, within[1]))


def _of_examples(
    values: Tensor, part: Tensor, mean: float, groups: Tensor
) -> list[tuple[float, float]]:
    """Return what each group adds to the variance of the mean, and its degrees of freedom."""

    def summed(of_each: Tensor) -> Tensor:
        return of_each.new_zeros(int(groups.max()) + 1).index_add(0, groups, of_each)

    number, share = summed(torch.ones_like(part)), summed(part)
    inside = summed(values * part) / torch.where(share > 0, share, 1.0)
    centre = torch.where(number > 1, inside, mean)
    scale = torch.where(number > 1, number / (number - 1), 1.0)  # unbiased
    variance = summed((part * (values - centre[groups])) ** 2) * scale
    return list(zip(variance.tolist(), (number - 1).clamp(min=1).tolist(), strict=True))


def paired_interval(gained: float, lost: float, n: int) -> Interval:
    """Return the difference of two fractions of the same examples, with an interval at 95 %.

    An adjusted Wald interval: with one more example of either kind, ``p = (gained + 1) / (n + 2)``
    and ``q = (lost + 1) / (n + 2)``, it is ``p - q -+ z sqrt((p + q - (p - q)^2) / (n + 2))``. It
    has a width also where no example changed.

    Args:
        gained: Examples that the second alone gets right; over several models, their mean number.
        lost: Examples that the first alone gets right.
        n: Examples; 0 gives NaN.

    Returns:
        ``(gained - lost) / n`` and its interval, within [-1, 1].

    Example:
        >>> value, low, high = paired_interval(5, 0, 50)
        >>> value, round(low, 3), round(high, 3)
        (0.1, -0.0, 0.192)

    References:
        Bonett and Price, "Adjusted Wald confidence interval for a difference of binomial
        proportions based on paired data", 2012.
    """
    if not n:
        return Interval(math.nan)
    p, q = (gained + 1) / (n + 2), (lost + 1) / (n + 2)
    half = _Z * math.sqrt((p + q - (p - q) ** 2) / (n + 2))
    return Interval((gained - lost) / n, max(p - q - half, -1.0), min(p - q + half, 1.0))


def seed_interval(values: list[float], *, within: tuple[float, float] = _ANY) -> Interval:
    """Return the mean of a value a seed with Student's interval; NaN bounds for a single one.

    Args:
        values: One number per seed.
        within: Least and largest mean there can be; the interval ends there.

    Returns:
        Mean and interval at 95 %. One that is all of ``within`` says that the seeds are too few.

    Example:
        >>> seed_interval([1.0, 2.0, 3.0])
        Interval(value=2.0, low=-0.484..., high=4.484...)
        >>> seed_interval([0.5, 0.75, 1.0], within=(0.0, 1.0))
        Interval(value=0.75, low=0.128..., high=1.0)
    """
    if not values:
        return Interval(math.nan, math.nan, math.nan)
    mean = sum(values) / len(values)
    if len(values) == 1:
        return Interval(mean, math.nan, math.nan)
    variance = sum((v - mean) ** 2 for v in values) / (len(values) - 1)
    half = student(len(values) - 1) * math.sqrt(variance / len(values))
    return Interval(mean, max(mean - half, within[0]), min(mean + half, within[1]))


def widened_by_seeds(
    of_examples: Interval, of_seed: Sequence[float], *, within: tuple[float, float] = (0.0, 1.0)
) -> Interval:
    """Return an interval over examples moved out by the spread of the seeds.

    The squares of the two distances from the mean add up.

    Args:
        of_examples: The mean over the seeds, with an interval over the examples alone.
        of_seed: The value of each seed; a single one changes nothing.
        within: Least and largest mean there can be; the interval ends there.

    Returns:
        The mean, with an interval over examples and seeds.

    Example:
        >>> low_and_high = widened_by_seeds(Interval(0.5, 0.4, 0.6), [0.5, 0.5])[1:]
        >>> [round(end, 6) for end in low_and_high]
        [0.4, 0.6]
    """
    value, low, high = of_examples
    spread = value - seed_interval(list(of_seed)).low if len(of_seed) > 1 else 0.0
    low, high = value - math.hypot(value - low, spread), value + math.hypot(high - value, spread)
    return Interval(value, max(low, within[0]), min(high, within[1]))


def part_interval(parts: Sequence[float], n: int) -> Interval:
    """Return the mean of parts of the same ``n`` examples over seeds, with an interval at 95 %.

    Wilson's bounds for the examples, moved out by the spread of the seeds.

    Args:
        parts: One per seed.
        n: Out of how many examples each.

    Returns:
        Mean and interval, within [0, 1].

    Example:
        >>> part_interval([1.0, 1.0], 100)
        Interval(value=1.0, low=0.963..., high=1.0)
    """
    mean = sum(parts) / len(parts)
    low, high = wilson(torch.tensor(mean * n), torch.tensor(float(n)))
    return widened_by_seeds(Interval(mean, float(low), float(high)), parts)


def fold_interval(
    values: Sequence[float], folds: int, *, within: tuple[float, float] = _ANY
) -> Interval:
    """Return the mean of a value per fold, with the interval of a corrected resampled t-test.

    Models of different folds share most of their training data, so that their values vary less than
    those of new data would: the variance of the mean of ``k`` values is ``(1 / k + 1 / (folds -
    1))`` times theirs.

    Args:
        values: One per fold, of all repeats.
        folds: How many each repeat has, 2 or more.
        within: Least and largest mean there can be; the interval ends there.

    Returns:
        Mean and interval at 95 %.

    Example:
        >>> fold_interval([1.0, 2.0, 3.0], 3)
        Interval(value=2.0, low=-1.927..., high=5.927...)

    References:
        Nadeau and Bengio, "Inference for the generalization error", 2003.
    """
    mean = sum(values) / len(values)
    variance = sum((v - mean) ** 2 for v in values) / (len(values) - 1)
    half = student(len(values) - 1) * math.sqrt(variance * (1 / len(values) + 1 / (folds - 1)))
    return Interval(mean, max(mean - half, within[0]), min(mean + half, within[1]))


def student(freedom: float) -> float:
    """Return Student's quantile at 97.5 %, to 0.0002.

    Args:
        freedom: Degrees of freedom, at least 1, not necessarily whole.

    Returns:
        The quantile.

    Example:
        >>> round(student(3), 3), round(student(1e9), 3)
        (3.182, 1.96)

    References:
        Student, "The probable error of a mean", 1908: of ``atan(t / sqrt(freedom))`` the density
        goes as ``cos ** (freedom - 1)``; Cornish and Fisher, "Moments and cumulants in the
        specification of distributions", 1937.
    """
    freedom = max(freedom, 1.0)
    if freedom > _MANY:
        first = (_Z**3 + _Z) / (4 * freedom)
        return _Z + first + (5 * _Z**5 + 16 * _Z**3 + 3 * _Z) / (96 * freedom**2)
    # Finer towards the right angle, where the density of 1 to 2 degrees is steep.
    angle = (1 - torch.linspace(1, 0, 4001, dtype=torch.float64) ** 2) * (math.pi / 2)
    area = torch.cumulative_trapezoid(angle.cos().clamp(min=0) ** (freedom - 1), angle)
    wanted = _LEVEL * area[-1]
    i = int(torch.searchsorted(area, wanted))  # area[i - 1] < wanted, which ends at angle[i]
    inside = (wanted - area[i - 1]) / (area[i] - area[i - 1])
    return math.tan(float(torch.lerp(angle[i], angle[i + 1], inside))) * math.sqrt(freedom)
