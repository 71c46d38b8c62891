"""What a sweep goes over: values of options, their grid, and the tensors that they become."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from funcloss.app.config import TrainConfig
from funcloss.decisions import class_index
from funcloss.errors import ConfigError
from funcloss.typing import Hyper

_MOST = 4096  # trials
_ROUNDING = 0.02  # of a step
_KEYS = {"class_weight": "CLASS", "loss_option": "NAME", "learning_rate": ""}


@dataclass(frozen=True)
class Axis:
    """An option and the values that it takes in a sweep."""

    option: str  # "class_weight", "loss_option" or "learning_rate"
    key: str  # the class, or the loss's option; empty for the learning rate
    values: tuple[float, ...]

    @property
    def name(self) -> str:
        """Return what the axis is called: ``class_weight 9``, ``tau``, ``learning_rate``."""
        if self.option == "class_weight":
            return f"{self.option} {self.key}"
        return self.key or self.option


TrialParams = dict[str, float]  # value by name of the axis


def parse_values(name: str, text: str) -> tuple[float, ...]:
    """Read the values of an axis: ``1:100:log16``, ``0:2:5`` or ``1,2,5``.

    Args:
        name: What they are for, for the error.
        text: First and last value and how many, in equal steps or in equal ratios (``log``); or a
            list; or one number.

    Returns:
        The values, ends included.

    Raises:
        ConfigError: it is none of these, ``log`` goes through 0, or the ends are too close.

    Example:
        >>> parse_values("class_weight 9", "1:100:log3"), parse_values("tau", "0:2:5")
        ((1.0, 10.0, 100.0), (0.0, 0.5, 1.0, 1.5, 2.0))
    """
    parts = text.split(":")
    if len(parts) == 1:
        values = tuple(_number(name, part) for part in text.split(","))
        if len(set(values)) < len(values):
            raise ConfigError(f"{name}: {text} names a value twice")
        return values
    if len(parts) != 3:
        raise ConfigError(
            f"{name} must be a number, a list as in 1,2,5, or FIRST:LAST:COUNT as in 1:100:log16; "
            f"got {text!r}"
        )
    first, last = (_number(name, part) for part in parts[:2])
    log = parts[2].startswith("log")
    count = _count(name, parts[2])
    if first == last:
        raise ConfigError(f"{name}: {text} begins and ends at one value")
    if log and not (first > 0 and last > 0):
        raise ConfigError(f"{name}: log values must be above 0, got {text}")
    return _between(name, first, last, count, _in_ratios if log else _in_steps)


def trials_of(axes: Sequence[Axis]) -> list[TrialParams]:
    """Return every combination of the axes' values.

    Args:
        axes: What is swept.

    Returns:
        Values by name of the axis, one dict a trial, the last axis changing fastest.

    Raises:
        ConfigError: there is no axis, one is given twice or names nothing that can be swept, or
            there are more than 4,096 trials.

    Example:
        >>> trials_of([Axis("class_weight", "9", (2.0, 4.0))])
        [{'class_weight 9': 2.0}, {'class_weight 9': 4.0}]
    """
    if not axes:
        raise ConfigError(
            "a sweep needs something to sweep: a class_weight, loss_option or learning_rate as in "
            "9=1:100:log16 or 1,2,5"
        )
    for axis in axes:
        _check(axis)
    names = [axis.name for axis in axes]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ConfigError(f"{twice} is swept twice")
    size = math.prod(len(axis.values) for axis in axes)
    if size > _MOST:
        raise ConfigError(f"the sweep has {size:,} trials; at most {_MOST:,} are taken")
    grid = itertools.product(*(axis.values for axis in axes))
    return [dict(zip(names, values, strict=True)) for values in grid]


def plain_trials(axes: Sequence[Axis], config: TrainConfig) -> list[TrialParams]:
    """Return the values at which a trial is plain training: cross-entropy at costs of 1.

    Args:
        axes: What is swept.
        config: The training that all trials share, what is swept left out.

    Returns:
        Values by name of the axis, one for each learning rate that is swept; none where no value
        makes it plain, as under another loss.
    """
    weighted = any(weight != 1.0 for weight in config.class_weight.values())
    options = any(axis.option == "loss_option" for axis in axes) or config.loss_option
    if config.loss != "cross_entropy" or weighted or options:
        return []
    ones = [replace(a, values=(1.0,)) if a.option == "class_weight" else a for a in axes]
    return trials_of(ones)


def learning_rates(axes: Sequence[Axis], config: TrainConfig) -> tuple[float, ...]:
    """Return the learning rates that are swept, or the one that is not."""
    swept = [axis.values for axis in axes if axis.option == "learning_rate"]
    return swept[0] if swept else (config.learning_rate,)


def trial_config(config: TrainConfig, axes: Sequence[Axis], trial: TrialParams) -> TrainConfig:
    """Return the configuration that trains a trial alone.

    Args:
        config: The training that all trials share.
        axes: What is swept.
        trial: The trial's values.

    Returns:
        The configuration, the values in it.
    """
    weights, options = dict(config.class_weight), dict(config.loss_option)
    for axis in axes:
        value = trial[axis.name]
        if axis.option == "class_weight":
            weights[axis.key] = value
        elif axis.option == "loss_option":
            options[axis.key] = value
        else:
            config = dataclasses.replace(config, learning_rate=value)
    return dataclasses.replace(config, class_weight=weights, loss_option=options)


def by_name(axes: Sequence[Axis], classes: Sequence[str]) -> list[Axis]:
    """Return the axes with classes by name, where they were named by index.

    Args:
        axes: What is swept.
        classes: Names of the classes, in the order of the labels.

    Returns:
        The axes.

    Raises:
        ConfigError: there is no such class, or a value makes no sense.
    """
    named = []
    for axis in axes:
        if axis.option == "class_weight":
            if min(axis.values) < 0:
                raise ConfigError(f"{axis.name}: a weight must be at least 0")
            key = classes[class_index("class_weight", axis.key, classes)]
            axis = replace(axis, key=key)
        elif axis.option == "learning_rate" and min(axis.values) <= 0:
            raise ConfigError("learning_rate must be above 0")
        named.append(axis)
    return named


def stacked_hypers(hypers: Sequence[Hyper]) -> Hyper:
    """Return what trials are given as one dict, a leading axis over the trials.

    Args:
        hypers: One a trial, of the same names.

    Returns:
        Tensors of shape ``(trials, ...)`` by name.
    """
    return {name: torch.stack([hyper[name] for hyper in hypers]) for name in hypers[0]}


def describe(trial: Mapping[str, float]) -> str:
    """Return a trial in words: ``class_weight 9=5, tau=0.5``.

    Args:
        trial: Value by name of the axis.

    Returns:
        The words.

    Example:
        >>> describe({"class_weight 9": 5.0, "tau": 0.25})
        'class_weight 9=5, tau=0.25'
    """
    return ", ".join(f"{name}={value:.6g}" for name, value in trial.items())


def _check(axis: Axis) -> None:
    if axis.option not in _KEYS:
        raise ConfigError(f"a sweep is of {', '.join(_KEYS)}; got {axis.option!r}")
    wanted = _KEYS[axis.option]
    if bool(axis.key) != bool(wanted):
        form = f"{wanted}=VALUES" if wanted else "VALUES alone"
        raise ConfigError(f"{axis.option} must be swept as {form}, got the key {axis.key!r}")
    if not axis.values:
        raise ConfigError(f"{axis.name}: there is no value to sweep")
    if not all(map(math.isfinite, axis.values)):
        raise ConfigError(f"{axis.name}: its values must be finite")


def _in_steps(first: float, last: float, part: float) -> float:
    value = (1 - part) * first + part * last
    return value if abs(value) > 1e-12 * max(abs(first), abs(last)) else 0.0  # rounded away from it


def _in_ratios(first: float, last: float, part: float) -> float:
    return math.exp((1 - part) * math.log(first) + part * math.log(last))


def _between(
    name: str, first: float, last: float, count: int, at: Callable[[float, float, float], float]
) -> tuple[float, ...]:
    """Return values from first to last, of as few digits as leave the steps between them even."""
    exact = [at(first, last, i / (count - 1)) for i in range(1, count - 1)]
    for digits in range(4, 18):
        values = (first, *(float(f"{v:.{digits}g}") for v in exact), last)
        if _is_even(values, (first, *exact, last)):
            return values
    raise ConfigError(f"{name}: {first!r} and {last!r} are too close together for {count} values")


def _is_even(values: Sequence[float], exact: Sequence[float]) -> bool:
    pairs = itertools.pairwise(zip(values, exact, strict=True))
    return all(
        a != b and abs(b - y) <= _ROUNDING * abs(y - x) and (a < b) == (values[0] < values[-1])
        for (a, x), (b, y) in pairs
    )


def _count(name: str, text: str) -> int:
    digits = text.removeprefix("log")
    count = int(digits) if digits.isascii() and digits.isdecimal() and len(digits) < 10 else 0
    if not 2 <= count <= _MOST:
        raise ConfigError(f"{name}: {text!r} must be how many, 2 to {_MOST:,}, as in 16 or log16")
    return count


def _number(name: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ConfigError(f"{name}: {text!r} is not a number")
    return value
