"""From whatever a user calls a loss to the case that the laws are tried on."""

import inspect
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Generator, Tensor, nn

from funcloss.combinators import Combined
from funcloss.errors import ConfigError
from funcloss.laws._common import left_as_found
from funcloss.laws.case import LossCase
from funcloss.laws.feed import Feed, feeds_for, vector_width

_NAMES: dict[str, tuple[str, ...]] = {
    "classification": ("logits", "labels"),
    "binary": ("logits", "targets"),
    "regression": ("predictions", "targets"),
}
TASKS = (*_NAMES, "embedding")


@dataclass(frozen=True)
class Adapted:
    """A loss as the laws see it, and what was found out about it."""

    case: LossCase
    kind: str  # what it is, and how it reduces
    task: str  # what it is fed


@left_as_found()
def adapt(
    loss: Any,
    *,
    task: str = "",
    classes: int = 10,
    class_weights: Mapping[int, float] | None = None,
    batch_size: int = 32,
) -> Adapted:
    """Return the case of anything that is meant as a loss.

    Args:
        loss: A function of predictions and targets, per example or reduced; a module, its class or
            a function without arguments that makes one; the class of an ``autograd.Function``.
        task: What it is fed: ``classification`` (logits and labels), ``binary`` (logits and
            targets of 0 or 1), ``regression`` (values) or ``embedding`` (vectors). By default it
            is inferred from the names of its parameters, as ``(log_probs, labels)`` or
            ``(scores, signs)``; where they say nothing, it is ``classification``.
        classes: How many classes there are.
        class_weights: What the classes are said to weigh. Where the loss takes ``class_weights``,
            it is given them.
        batch_size: Size of the random batches across which the weights are measured.

    Returns:
        The case, with a line that says what the loss is.

    Raises:
        ConfigError: it cannot be called or made, or there is no such task or class.

    Example:
        >>> from funcloss import losses
        >>> adapt(losses.hinge).task
        'scores, signs'
    """
    if task and task not in TASKS:
        raise ConfigError(f"task must be one of {', '.join(TASKS)}; got {task!r}")
    call, kind = _callable(loss)
    stated = dict(class_weights or {})
    feeds = _feeds(call, task, classes, tuple(stated))
    case, feed = _that_runs(call, feeds, stated)
    task = task or _task(feed)
    _check_stated(stated, feed.class_count, task)
    reduction = _reduction(case)
    case = replace(case, reduction=reduction, batch_size=batch_size, unbatched=_takes_one(case))
    ways = {
        "none": "one value per example",
        "mean": "reduced by the mean",
        "sum": "reduced by the sum",
        "other": "neither the mean nor the sum of its examples",
    }
    return Adapted(case, f"{kind}, {ways[reduction]}", task)


def _feeds(
    call: Callable[..., Any], task: str, classes: int, stated: tuple[int, ...]
) -> list[Feed]:
    """Return what the loss may be fed, likeliest first."""
    stated = tuple(i for i in stated if 0 <= i < classes)  # the others are refused further on
    if task == "embedding":
        three = (("anchor", "positive", "negative"), ("first", "second", "signs"))
        either = three if len(_needed(call)) > 2 else (("predictions", "targets"),)
        return [Feed(names, (vector_width(classes),), classes) for names in either]
    names = _NAMES[task] if task else _needed(call)
    feeds = feeds_for(names, classes, stated)
    if not task:
        return feeds
    feed = next(feed for feed in feeds if feed.names == names)
    return [feed, replace(feed, positive=True)] if task == "regression" else [feed]


def _case(call: Callable[..., Any], feed: Feed, stated: Mapping[int, float]) -> LossCase:
    names, classes = _keywords(call), feed.class_count or feed.classes
    options: dict[str, Tensor | float] = {}
    if "class_weights" in names and "labels" in feed.names:
        weights = [stated.get(i, 1.0 if stated else 1.0 + i / 4) for i in range(classes)]
        options["class_weights"] = torch.tensor(weights, dtype=torch.float64)
    weighted = bool(options)
    options |= _facts(call, classes)
    return LossCase(
        call,
        feed,
        options,
        costs=tuple(name for name in ("class_weights", "cost_matrix") if name in options),
        predictions=feed.predictions,
        extremes=(80.0, -1e4) if _of_logs(call) else feed.extremes,
        classes=classes,
        takes_where="where" in names,
        stated={} if weighted else stated,
    )


def _of_logs(call: Callable[..., Any]) -> bool:
    """Return whether predictions are logs, whose exponential is above any float32 from 89 on."""
    if isinstance(call, nn.PoissonNLLLoss):
        return call.log_input
    return any(p.name == "log_input" and p.default is True for p in _parameters(call) or ())


def _task(feed: Feed) -> str:
    """Return the name of what is fed: a task's, or the parameters'."""
    known = {
        names: task
        for task, names in _NAMES.items()
        if bool(feed.shape) == (task == "classification")
    }
    return known.get(feed.names, ", ".join(feed.names))


def _check_stated(stated: Mapping[int, float], classes: int, task: str) -> None:
    if stated and not classes:
        raise ConfigError(f"class weights need classes, and {task} has none")
    if any(not 0 <= index < classes for index in stated):
        raise ConfigError(f"class weights must name classes in 0..{classes - 1}, got {stated}")


def _callable(loss: Any) -> tuple[Callable[..., Any], str]:
    """Return what to call, and what it is."""
    if isinstance(loss, type) and issubclass(loss, torch.autograd.Function):
        return loss.apply, "autograd.Function"
    if isinstance(loss, type) and issubclass(loss, nn.Module):
        return _made(loss), "module"
    if not callable(loss):
        got = type(loss).__name__
        raise ConfigError(f"a loss must be a function, a module or an autograd.Function; got {got}")
    if not isinstance(loss, nn.Module) and not _needed(loss):
        made = _made(loss)
        return made, "module" if isinstance(made, nn.Module) else "function"
    return loss, "module" if isinstance(loss, nn.Module) else "function"


def _made(factory: Callable[[], Any]) -> Any:
    name = getattr(factory, "__name__", repr(factory))
    try:
        made = factory()
    except (Exception, SystemExit) as error:
        raise ConfigError(
            f"{name}() raised {type(error).__name__}: {error}; name a function without arguments "
            "that makes the loss"
        ) from error
    if not callable(made):
        raise ConfigError(f"{name}() gave {type(made).__name__}, which is no loss")
    return made


def _parameters(call: Callable[..., Any]) -> list[inspect.Parameter] | None:
    try:
        target = call.forward if isinstance(call, nn.Module) else call
        return list(inspect.signature(target).parameters.values())
    except (TypeError, ValueError):  # built in: nothing is known
        return None


def _needed(call: Callable[..., Any]) -> tuple[str, ...]:
    """Return the positional parameters that a call needs; two unnamed where nothing is known."""
    parameters = _parameters(call)
    if parameters is None or any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return "", ""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return tuple(p.name for p in parameters if p.kind in kinds and p.default is p.empty)


def _keywords(call: Callable[..., Any]) -> set[str]:
    if isinstance(call, Combined):
        return set(call.options)
    return {p.name for p in _parameters(call) or () if p.kind is not p.POSITIONAL_ONLY}


def _facts(call: Callable[..., Any], classes: int) -> dict[str, Tensor | float]:
    """Return the options that a loss requires, made up: of the data, and of no default."""
    counts = torch.linspace(100.0, 10.0, classes, dtype=torch.float64)
    known = {
        "class_counts": counts,
        "class_prior": counts / counts.sum(),
        "cost_matrix": 1.0 - torch.eye(classes, dtype=torch.float64),
        "threshold": 1.0 / classes,  # of a frequency
        "alpha": 1.0,
    }
    needed = {p.name for p in _parameters(call) or () if p.default is p.empty}
    needed |= {"cost_matrix"} & _keywords(call)  # the other way is a row of costs per example
    return {name: value for name, value in known.items() if name in needed}


def _that_runs(
    call: Callable[..., Any], feeds: list[Feed], stated: Mapping[int, float]
) -> tuple[LossCase, Feed]:
    """Return the case that gives one value per example, else one that runs, else the first.

    Of those that do, the first whose values do not depend on the rest of the batch.

    In float64, or in float32 where only that runs.
    """
    ran, fits = [], []
    n = 16 if feeds[0].classes != 16 else 17  # labels must not pass for targets per class
    for feed, dtype in itertools.product(feeds, (torch.float64, torch.float32)):
        feed = replace(feed, dtype=dtype)
        case = _case(call, feed, stated).in_dtype(dtype)
        try:
            batch = feed(n, Generator().manual_seed(0))
            values = case.fresh()(*batch)
            if len(feeds) > 1 and not values.isfinite().all():
                continue
            few = case.fresh()(*(x[:3] for x in batch))
        except (Exception, SystemExit):  # the laws will say what it raised
            continue
        if isinstance(values, Tensor) and tuple(values.shape) == (n,):
            if few.shape == (3,) and torch.allclose(few, values[:3]):
                return case, feed
            fits.append((case, feed))
        ran.append((case, feed))
    ran = fits or ran
    return ran[0] if ran else (_case(call, feeds[0], stated), feeds[0])


def _reduction(case: LossCase) -> str:
    batch = case.data(16, Generator().manual_seed(0))
    case = case.fresh()
    try:
        whole = case(*batch)
        if whole.dim():
            return "none"
        alone = torch.stack([case(*(x[i : i + 1] for x in batch)) for i in range(16)])
    except (Exception, SystemExit):  # the laws will say what it raised
        return "other"
    for name, value in (("mean", alone.mean()), ("sum", alone.sum())):
        if torch.allclose(whole, value, rtol=1e-4, atol=1e-6):
            return name
    return "other"


def _takes_one(case: LossCase) -> bool:
    example = (x[0] for x in case.data(1, Generator().manual_seed(0)))
    try:
        return case.fresh()(*example).dim() == 0
    except (Exception, SystemExit):
        return False
