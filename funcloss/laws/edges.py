"""The laws of what a loss may be given and where it may go: labels, options, pickles.

Each takes a case and a batch, raises ``Broken`` or ``NotApplicable`` where it does not hold, and
may return a remark where it does.
"""

import copy
import inspect
import io
import pickle
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from funcloss.combinators import couples_examples
from funcloss.laws._common import raised, same
from funcloss.laws.case import Batch, Broken, LossCase, NotApplicable, shown


def refuses_labels(case: LossCase, batch: Batch) -> str | None:
    """A label out of range raises, and gives NaN where it is compiled.

    A user's loss may give a number: the remark says so.
    """
    labels = batch[-1]
    if labels.is_floating_point() or case.parameters[:1] == ("embeddings",):
        raise NotApplicable("its targets are no labels")
    outside = (-100, case.classes, case.classes + 3)
    for label in outside:
        value = _of_label(case, batch, label)
        if value is not None and value.isfinite().all():
            what = f"a label of {label} gives {float(value.sum()):.4g}"
            if case.reference is None:
                return f"{what}, and no error: mask such examples, or check labels before"
            raise Broken(f"{what}, and no error")
    if case.reference is None:
        return None
    torch.compiler.reset()
    compiled = torch.compile(
        lambda *data: case.loss(*data, **case.options), fullgraph=True, backend="aot_eager"
    )
    for label in outside:
        value = _of_label(replace(case, loss=compiled, options={}), batch, label)
        if value is not None and not value.isnan().all():
            raise Broken(f"compiled, a label of {label} gives {float(value.sum()):.4g}, not NaN")
    return None


def _of_label(case: LossCase, batch: Batch, label: int) -> Tensor | None:
    """Return the value of an example of a label; None: it raises."""
    targets = (x if x.is_floating_point() else torch.full_like(x, label) for x in batch[1:])
    try:
        return case(batch[0], *targets)
    except Exception:  # that it refuses the label is what is asked for
        return None


def options_have_shapes(case: LossCase, batch: Batch) -> str | None:
    """An option is 0-d, or one per example, or one per class; nothing else broadcasts."""
    if case.reference is None:
        raise NotApplicable("the options of a loss of one's own are its own affair")
    n, dtype, refused = len(batch[0]), batch[0].dtype, []
    for name, number in _numbers(case).items():
        plain = case(*batch, **{name: number})
        what = f"{name} as a 0-d tensor, against the number"
        same(case(*batch, **{name: torch.tensor(number, dtype=dtype)}), plain, what, batch, 1e-7)
        if not _is_per_example(case, batch, name, number):
            refused.append(name)
        for shape in ((n, 1), (1, n), (n + 1,)):
            try:
                value = case(*batch, **{name: torch.full(shape, number, dtype=dtype)})
            except (ValueError, TypeError):
                continue
            raise Broken(f"{name} of shape {shape} for {n} examples gives {tuple(value.shape)}")
    return f"one for the batch only: {', '.join(refused)}" if refused else None


def _is_per_example(case: LossCase, batch: Batch, name: str, number: float) -> bool:
    """Return whether an option may be one per example; it is then what a loop gives."""
    n = len(batch[0])
    steps = torch.arange(n, dtype=batch[0].dtype) / n
    each = number * (1 - 0.1 * steps) if number else 0.05 * (steps + 1 / n)
    try:
        got = case(*batch, **{name: each})
    except (ValueError, TypeError) as error:
        if "shape" not in str(error):
            raise
        return False
    if couples_examples(case.loss):
        raise Broken(f"{name} is taken per example by a loss that couples its examples")
    rows = [case(*(x[i : i + 1] for x in batch), **{name: each[i]}) for i in range(n)]
    same(got, torch.cat(rows), f"{name} per example, against a loop", batch)
    return True


def _numbers(case: LossCase) -> dict[str, float]:
    """Return the options that are one floating number: as given, or by default and so annotated."""
    numbers = {
        name: float(option)
        for name, option in case.options.items()
        if isinstance(option, float) or (isinstance(option, Tensor) and not option.dim())
    }
    try:
        parameters = inspect.signature(case.loss).parameters.values()
    except (TypeError, ValueError):
        parameters = ()
    for p in parameters:
        if isinstance(p.default, float) and "Tensor" in str(p.annotation):
            numbers.setdefault(p.name, p.default)
    finite = {name: x for name, x in numbers.items() if abs(x) < torch.inf}
    if not finite:
        raise NotApplicable("it has no option that is a number")
    return finite


def survives_pickling(case: LossCase, batch: Batch) -> None:
    """What comes out of a pickle, a deep copy and torch.save gives the same values."""
    expected = case(*batch)
    for what, copied in _COPIES.items():
        try:
            loss = copied(case.loss)
        except Exception as error:
            if case.reference is None:
                raise NotApplicable(f"{what} {raised(error)}: it belongs to no module") from None
            raise Broken(f"{what} {raised(error)}; at {shown(batch)}") from error
        try:
            got = replace(case, loss=loss)(*batch)
        except Exception as error:
            raise Broken(f"out of {what} it {raised(error)}") from error
        same(got, expected, f"its value out of {what}", batch)


def _saved(loss: Any) -> Any:
    file = io.BytesIO()
    torch.save(loss, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


_COPIES: dict[str, Callable[[Any], Any]] = {
    "pickle": lambda loss: pickle.loads(pickle.dumps(loss)),
    "a deep copy": copy.deepcopy,
    "torch.save": _saved,
}
