"""From whatever a user calls a loss to the subject that the laws are tried on."""

import inspect
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor, nn

from funcloss.combinators import Combined
from funcloss.errors import ConfigError
from funcloss.laws.catalogue import SUBJECTS
from funcloss.laws.subject import Batch, Subject, in_dtype

TASKS = ("classification", "binary", "regression", "embedding")
_FEATURES = 4  # of an embedding


class Adapted(NamedTuple):
    """A loss as the laws see it, and what was found out about it."""

    subject: Subject
    kind: str  # what it is, and how it reduces
    task: str


def adapt(
    loss: Any,
    *,
    task: str = "",
    classes: int = 10,
    class_weights: Mapping[int, float] | None = None,
    batch_size: int = 32,
) -> Adapted:
    """Return the subject of anything that is meant as a loss.

    Args:
        loss: A function of predictions and targets, per example or reduced; a module, its class or
            a function without arguments that makes one; the class of an ``autograd.Function``. A
            loss of the catalogue brings its own data.
        task: What it is fed: ``classification`` (logits and labels, the default), ``binary``
            (logits and targets of 0 or 1), ``regression`` (values) or ``embedding`` (vectors).
        classes: How many classes there are.
        class_weights: What the classes are said to weigh. Where the loss takes ``class_weights``,
            it is given them.
        batch_size: Size of the random batches across which the weights are measured.

    Returns:
        The subject, with a line that says what the loss is.

    Raises:
        ConfigError: it cannot be called or made, or there is no such task or class.
    """
    known = next((s for s in SUBJECTS.values() if s.loss is loss), None)
    if known is not None and not task and not class_weights:
        return Adapted(known._replace(batch_size=batch_size), "loss of the catalogue", "its own")
    stated = dict(class_weights or {})
    if stated and task in ("regression", "embedding"):
        raise ConfigError(f"class weights need classes, and {task} has none")
    classes = 2 if task == "binary" else classes
    if any(not 0 <= index < classes for index in stated):
        raise ConfigError(f"class weights must name classes in 0..{classes - 1}, got {stated}")
    task = task or "classification"
    call, kind = _callable(loss)
    names = _keywords(call)
    options: dict[str, Tensor | float] = {}
    if "class_weights" in names and task == "classification":
        weights = [stated.get(i, 1.0 if stated else 1.0 + i / 4) for i in range(classes)]
        options["class_weights"] = torch.tensor(weights, dtype=torch.float64)
    weighted = bool(options)
    if task == "classification":
        options |= _facts(call, classes)
    subject = Subject(
        call,
        _data(task, classes, stated, call),
        options,
        costs=("class_weights",) if weighted else (),
        predictions=_arity(call) if task == "embedding" and _arity(call) > 2 else 1,
        classes=classes,
        takes_where="where" in names,
        stated={} if weighted else stated,
        batch_size=batch_size,
    )
    subject = _that_runs(subject)
    reduction = _reduction(subject)
    subject = subject._replace(reduction=reduction)
    if reduction == "none":
        subject = subject._replace(unbatched=_takes_one(subject))
    ways = {
        "none": "one value an example",
        "mean": "reduced by the mean",
        "sum": "reduced by the sum",
        "other": "neither the mean nor the sum of its examples",
    }
    return Adapted(subject, f"{kind}, {ways[reduction]}", task)


def _callable(loss: Any) -> tuple[Callable[..., Any], str]:
    """Return what to call, and what it is."""
    if isinstance(loss, type) and issubclass(loss, torch.autograd.Function):
        return loss.apply, "autograd.Function"
    if isinstance(loss, type) and issubclass(loss, nn.Module):
        return _made(loss), "module"
    if not callable(loss):
        got = type(loss).__name__
        raise ConfigError(f"a loss must be a function, a module or an autograd.Function; got {got}")
    if not isinstance(loss, nn.Module) and _arity(loss) == 0:
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


def _arity(call: Callable[..., Any]) -> int:
    """Return how many arguments a call needs; 2 where nothing is known."""
    parameters = _parameters(call)
    if parameters is None or any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return 2
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(p.kind in kinds and p.default is p.empty for p in parameters)


def _keywords(call: Callable[..., Any]) -> set[str]:
    if isinstance(call, Combined):
        return set(call.options)
    return {p.name for p in _parameters(call) or () if p.kind is not p.POSITIONAL_ONLY}


def _facts(call: Callable[..., Any], classes: int) -> dict[str, Tensor]:
    """Return what a loss of labels must be told of the data, made up."""
    counts = torch.linspace(100.0, 10.0, classes, dtype=torch.float64)
    known = {
        "class_counts": counts,
        "class_prior": counts / counts.sum(),
        "cost_matrix": 1.0 - torch.eye(classes, dtype=torch.float64),
    }
    needed = {p.name for p in _parameters(call) or () if p.default is p.empty}
    return {name: value for name, value in known.items() if name in needed}


def _data(
    task: str, classes: int, first: Collection[int], call: Callable[..., Any]
) -> Callable[[int, Generator], Batch]:
    if task not in TASKS:
        raise ConfigError(f"task must be one of {', '.join(TASKS)}; got {task!r}")

    def normal(generator: Generator, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def classification(n: int, generator: Generator) -> Batch:
        # Those of stated weight come first, and sixteen examples have most of the classes.
        others = torch.randperm(classes, generator=generator).tolist()
        order = torch.tensor([*first, *(i for i in others if i not in first)])
        return 2 * normal(generator, n, classes), order[torch.arange(n) % classes]

    def binary(n: int, generator: Generator) -> Batch:
        bits = torch.rand(n, generator=generator) > 0.5
        return 2 * normal(generator, n), bits.double()

    def regression(n: int, generator: Generator) -> Batch:
        return normal(generator, n), normal(generator, n)

    def embedding(n: int, generator: Generator) -> Batch:
        vectors = max(2, _arity(call))
        return tuple(normal(generator, n, _FEATURES) for _ in range(vectors))

    return {
        "classification": classification,
        "binary": binary,
        "regression": regression,
        "embedding": embedding,
    }[task]


def _that_runs(subject: Subject) -> Subject:
    """Return the subject in float64, or in float32 where only that runs."""
    for dtype in (torch.float64, torch.float32):
        there = subject._replace(data=_cast(subject.data, dtype)).in_dtype(dtype)
        try:
            there.fresh()(*there.data(16, Generator().manual_seed(0)))
        except (Exception, SystemExit):  # the laws will say what it raised
            continue
        return there
    return subject


def _cast(
    data: Callable[[int, Generator], Batch], dtype: torch.dtype
) -> Callable[[int, Generator], Batch]:
    def cast(n: int, generator: Generator) -> Batch:
        return in_dtype(data(n, generator), dtype)

    return cast


def _reduction(subject: Subject) -> str:
    batch = subject.data(16, Generator().manual_seed(0))
    subject = subject.fresh()
    try:
        whole = subject(*batch)
        if whole.dim():
            return "none"
        alone = torch.stack([subject(*(x[i : i + 1] for x in batch)) for i in range(16)])
    except (Exception, SystemExit):  # the laws will say what it raised
        return "other"
    for name, value in (("mean", alone.mean()), ("sum", alone.sum())):
        if torch.allclose(whole, value, rtol=1e-4, atol=1e-6):
            return name
    return "other"


def _takes_one(subject: Subject) -> bool:
    example = (x[0] for x in subject.data(1, Generator().manual_seed(0)))
    try:
        return subject.fresh()(*example).dim() == 0
    except (Exception, SystemExit):
        return False
