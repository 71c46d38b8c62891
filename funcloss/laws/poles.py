"""Answers that a loss must tell apart: certain and right, certain and wrong, for the same targets.

What an answer looks like follows from the names of the data: logits are high in the column of the
class, estimates of costs low, values near their targets, vectors of a pair alike.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from funcloss.combinators import couples_examples
from funcloss.laws.case import Batch, LossCase, NotApplicable

_MOST_PAIRS = 90  # of classes that are tried
_NEAR = 0.1  # how far a near prediction of a value is from its target


@dataclass(frozen=True)
class Poles:
    """Two answers to the same targets, an example per row."""

    right: Batch
    wrong: Batch
    rows: tuple[str, ...]  # what each row is about; none: only the totals can be compared


def of_classes(case: LossCase, batch: Batch) -> bool:
    """Return whether the targets are classes, and the predictions have a column for each."""
    names, targets = case.parameters, batch[-1]
    if names[:1] == ("embeddings",) or batch[0].dim() != 2:
        return False
    if not targets.is_floating_point():
        return True
    several = targets.shape == batch[0].shape and batch[0].shape[-1] == case.classes
    return several and names[0].endswith(("logits", "log_probs"))


def poles_of(case: LossCase, batch: Batch, size: float) -> Poles:
    """Return answers whose logits are ``size`` for what is certain and ``-size`` for the rest.

    Raises:
        NotApplicable: the names of the data do not say what is right.
    """
    if of_classes(case, batch):
        return _of_class_pairs(case, batch, size)
    names, first = case.parameters, batch[0]
    if names == ("logits", "targets") and first.dim() == 1:
        return _two_sided(case, size, 0.0, lambda side: (side, (side > 0).to(side.dtype)))
    if names == ("scores", "signs"):
        return _two_sided(case, size, -1.0, lambda side: (side, side.sign()))
    if names == ("probabilities", "targets"):
        bits = torch.stack([batch[-1].round(), 1 - batch[-1].round()])
        right = (0.98 * bits + 0.01).flatten(0, 1)
        return Poles((right, bits.flatten(0, 1)), (1 - right, bits.flatten(0, 1)), ())
    if names == ("distances", "signs"):
        signs = torch.tensor([1.0, -1.0], dtype=first.dtype)
        far, near = torch.full_like(signs, size), torch.zeros_like(signs)
        right, wrong = (torch.where(signs > 0, a, b) for a, b in ((near, far), (far, near)))
        return Poles((right, signs), (wrong, signs), ("a pair", "no pair"))
    if names == ("first", "second", "signs"):
        return _of_signed_pairs(batch, size)
    other = first.roll(1, 0)  # what belongs to another example
    if names in (("anchor", "positive", "negative"), ("anchors", "positives", "negatives")):
        return Poles((first, first, other), (first, other, first), ())
    if names == ("embeddings", "labels"):
        labels, corners = torch.arange(8) % 2, torch.eye(2, first.shape[-1], dtype=first.dtype)
        return Poles((corners[labels], labels), (corners[torch.arange(8) // 2 % 2], labels), ())
    if names == ("first", "second"):
        return Poles((first, first), (first, other), ())
    if names[:1] in (("predictions",), ("log_predictions",)) and names[-1] == "targets":
        targets, rest = batch[-1], batch[1:]
        return Poles((targets + _NEAR, *rest), (targets.roll(1, 0) + _NEAR, *rest), ())
    raise NotApplicable(f"what is right is not known for {', '.join(names) or 'such data'}")


def answers(case: LossCase, batch: Batch, classes: Tensor, high: float, low: float) -> Tensor:
    """Return predictions whose logits are ``high`` for the given classes and ``low`` elsewhere."""
    columns = torch.arange(batch[0].shape[-1])
    chosen = columns < classes[:, None] if ordered(case, batch) else columns == classes[:, None]
    logits = torch.where(chosen, high, low).to(batch[0].dtype)
    return _SHAPED.get(case.parameters[0], lambda z: z)(logits)


_SHAPED: dict[str, Callable[[Tensor], Tensor]] = {
    "log_probs": lambda z: z.log_softmax(-1),
    "log_targets": lambda z: z.clamp(-30, 30).log_softmax(-1),
    "probabilities": lambda z: z.softmax(-1),
    "cost_estimates": lambda z: -z,
}


def targets_for(case: LossCase, batch: Batch, classes: Tensor) -> Batch:
    """Return the targets, or the teacher's logits, that say these classes."""
    hot = classes[:, None] == torch.arange(batch[0].shape[-1])

    def made(name: str, like: Tensor) -> Tensor:
        if not like.is_floating_point():
            return classes.to(like.dtype)
        if name.endswith("logits") or name == "log_targets":
            return _SHAPED.get(name, lambda z: z)(torch.where(hot, 10.0, -10.0).to(like.dtype))
        return hot.to(like.dtype)

    return tuple(made(n, x) for n, x in zip(case.parameters[1:], batch[1:], strict=True))


def ordered(case: LossCase, batch: Batch) -> bool:
    """Return whether the columns lie between ordered classes, one fewer than these.

    Such a loss takes one label more than it has columns, and is lower where all columns are high.
    """
    logits, columns = batch[0][:1], batch[0].shape[-1]
    if len(batch) != 2 or batch[1].is_floating_point() or case.reduction != "none":
        return False
    high, low = torch.full_like(logits, 10.0), torch.full_like(logits, -10.0)
    first, last = torch.zeros(1, dtype=torch.long), torch.full((1,), columns)
    try:
        return bool(case(high, last) < case(low, last)) and bool(
            case(low, first) < case(high, first)
        )
    except Exception:  # it has as many columns as classes, and refuses such a label
        return False


def class_pairs(classes: int, without: frozenset[int] = frozenset()) -> tuple[Tensor, Tensor]:
    """Return pairs of different classes, neighbours always among them; all where they are few."""
    if classes * (classes - 1) > _MOST_PAIRS:
        drawn = torch.randperm(classes, generator=Generator().manual_seed(0)).tolist()
        some = [0, classes - 1, *(i for i in drawn if i not in without)][: _MOST_PAIRS // 3]
        steps = (1, classes - 1, classes // 2)
        pairs = [(i, (i + step) % classes) for i in some if i not in without for step in steps]
    else:
        every = range(classes)
        pairs = [(i, j) for i in every for j in every if i != j and i not in without]
    first, second = torch.tensor(pairs, dtype=torch.long).reshape(-1, 2).unbind(-1)
    return first, second


def _of_class_pairs(case: LossCase, batch: Batch, size: float) -> Poles:
    true, other = class_pairs(case.classes, case.weightless)
    if not len(true):
        raise NotApplicable("no class is said to weigh anything")
    rest = targets_for(case, batch, true)
    rows = tuple(f"class {i}, against class {j}" for i, j in zip(true, other, strict=True))
    right, wrong = (answers(case, batch, k, size, -size) for k in (true, other))
    return Poles((right, *rest), (wrong, *rest), rows)


def _two_sided(case: LossCase, size: float, low: float, made: Callable[[Tensor], Batch]) -> Poles:
    """Return one logit on either side, with the target that ``made`` gives for it."""
    sides = [k for k in (0, 1) if k not in case.weightless]
    side = torch.tensor([(2.0 * k - 1) * size for k in sides], dtype=torch.float64)
    predictions, targets = made(side)
    names = tuple(f"target {low if k == 0 else 1.0:g}" for k in sides)
    return Poles((predictions, targets), (-predictions, targets), names)


def _of_signed_pairs(batch: Batch, size: float) -> Poles:
    """Return pairs to rank, where they are scores, or to bring together or apart."""
    first = batch[0]
    signs = torch.tensor([1.0, -1.0], dtype=first.dtype).repeat(len(first))
    if first.dim() == 1:
        right = size * signs
        return Poles(
            (right, -right, signs), (-right, right, signs), ("first", "second") * len(first)
        )
    vectors = first.repeat_interleave(2, 0)
    turned = vectors * signs[:, None]
    rows = ("a pair", "no pair") * len(first)
    return Poles((vectors, turned, signs), (vectors, -turned, signs), rows)


def costs_of(case: LossCase, batch: Batch, rows: tuple[str, ...]) -> Tensor:
    """Return the value of each row alone, or, where rows cannot be told apart, the total."""
    if not rows or couples_examples(case.loss):
        return case(*batch).sum().reshape(1)
    if case.reduction == "none":
        return case(*batch).reshape(len(rows), -1).sum(-1)
    return torch.stack([case(*(x[i : i + 1] for x in batch)).sum() for i in range(len(rows))])
