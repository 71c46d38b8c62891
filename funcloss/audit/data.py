"""The forms that audited data comes in, brought to one: batches that can be passed over again."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from funcloss.errors import AuditError
from funcloss.typing import Batch

GroupBy = Callable[[Batch], Tensor]
_TARGETS = ("labels", "targets")


class Rows(NamedTuple):
    """A batch and what the audit needs beside it."""

    inputs: Any  # a tensor, or a tuple or dict of tensors, each beginning with the batch
    targets: Tensor
    where: Tensor | None
    groups: Tensor  # (batch,) int64: the class that each example counts for; -1: it does not count
    first: int  # position in the data of its first example


def batches(
    data: Any, *, batch_size: int, group_by: GroupBy | None, device: torch.device
) -> Callable[[], Iterator[Rows]]:
    """Return a function that begins a new pass over the data.

    Args:
        data: ``(inputs, targets)`` tensors or a :class:`funcloss.typing.Batch` in memory; a
            map-style ``torch.utils.data.Dataset``; a function that returns an iterator; or what
            can be iterated over again and again in one order, such as a list or an unshuffled
            DataLoader, over batches: tuples ``(inputs, targets)`` or ``(inputs, targets, where)``,
            or dicts with ``labels`` or ``targets``, perhaps ``where``, and the model's keywords.
        batch_size: Examples a batch, where the data does not come in batches.
        group_by: From a batch to the class that each example counts for; None: its label.
        device: Where the batches go.

    Returns:
        A function without arguments; each call gives a fresh iterator over the rows.

    Raises:
        AuditError: on the way, if a batch is in none of these forms; or at once if the data can
            be passed over only once.
    """
    begin = _source(data, batch_size)
    seen: list[Tensor] = []  # groups of each batch of the first pass
    ended = False

    def passes() -> Iterator[Rows]:
        nonlocal ended
        first, number = 0, 0
        for number, item in enumerate(begin(), 1):
            batch = _on_tensors(lambda x: x.to(device), as_batch(item))
            rows = Rows(*batch, groups=groups_of(batch, group_by), first=first)
            mark = rows.groups.cpu()
            if number <= len(seen):
                _check_same(torch.equal(mark, seen[number - 1]))
            else:
                _check_same(not ended)
                seen.append(mark)
            yield rows
            first += len(mark)
        _check_same(number == len(seen))
        ended = True

    return passes


def _check_same(same: bool) -> None:
    if not same:
        raise AuditError(
            "audit: the data gave other examples in a later pass than in the first: give data that "
            "can be passed over again and comes in one order, a list or an unshuffled DataLoader"
        )


def as_batch(item: Any) -> Batch:
    """Return one item of the data as a batch.

    Raises:
        AuditError: it is none.
    """
    if isinstance(item, Mapping):
        targets = [name for name in _TARGETS if name in item]
        if len(targets) != 1:
            raise AuditError(
                "audit: a batch in a dict must have its targets under 'labels' or 'targets', got "
                f"{sorted(map(str, item))}"
            )
        rest = {k: v for k, v in item.items() if k not in (*targets, "where")}
        return _checked(Batch(rest, item[targets[0]], item.get("where")))
    if isinstance(item, tuple | list) and len(item) in (2, 3):
        inputs = tuple(item[0]) if isinstance(item[0], list) else item[0]
        return _checked(Batch(inputs, *item[1:]))
    raise AuditError(
        "audit: a batch must be (inputs, targets), (inputs, targets, where) or a dict, got "
        f"{_described(item)}"
    )


def _checked(batch: Batch) -> Batch:
    leaves = tree_leaves(batch.inputs)
    wrong = [x for x in [*leaves, batch.targets] if not isinstance(x, Tensor)]
    if wrong or not leaves:
        got = _described(wrong[0]) if wrong else "no inputs"
        raise AuditError(f"audit: a batch must hold tensors, got {got}")
    sizes = {len(x) if x.dim() else None for x in [*leaves, batch.targets]}
    if len(sizes) != 1 or None in sizes:
        shapes = [tuple(x.shape) for x in [*leaves, batch.targets]]
        raise AuditError(f"audit: inputs and targets must begin with the batch, got {shapes}")
    n = len(batch.targets)
    where = batch.where
    if where is not None and (where.dtype != torch.bool or where.shape != (n,)):
        raise AuditError(
            f"audit: where must be boolean, one entry an example, ({n},); got {where.dtype} "
            f"{tuple(where.shape)}"
        )
    return batch


def groups_of(batch: Batch, group_by: GroupBy | None) -> Tensor:
    """Return the class that each example counts for, -1 where it does not.

    Raises:
        AuditError: there are no labels and no ``group_by``, or these are out of range.
    """
    targets = batch.targets
    if group_by is not None:
        groups = group_by(batch)
    elif targets.dim() == 1 and not targets.is_floating_point() and not targets.is_complex():
        groups = targets
    else:
        raise AuditError(
            "audit: the targets are no labels, one integer an example, but "
            f"{targets.dtype} {tuple(targets.shape)}: say with group_by=lambda batch: ... which "
            "group each example counts for"
        )
    if groups.shape != (len(targets),) or groups.is_floating_point():
        raise AuditError(
            f"audit: group_by must give one integer an example, ({len(targets)},), got "
            f"{groups.dtype} {tuple(groups.shape)}"
        )
    groups = groups.long()
    counts = torch.ones_like(groups, dtype=torch.bool) if batch.where is None else batch.where
    if bool((counts & (groups < 0)).any()):
        raise AuditError(
            f"audit: labels must be at least 0, got {int(groups[counts].min())}: leave an "
            "example out with where="
        )
    return torch.where(counts, groups, -1)


def _source(data: Any, batch_size: int) -> Callable[[], Iterable[Any]]:
    if isinstance(data, Batch) or _in_memory(data):
        batch = as_batch(data)
        n = len(batch.targets)
        return lambda: (
            _on_tensors(lambda x, i=i: x[i : i + batch_size], batch)
            for i in range(0, n, batch_size)
        )
    if isinstance(data, torch.utils.data.Dataset) and hasattr(data, "__getitem__"):
        return lambda: torch.utils.data.DataLoader(data, batch_size=batch_size)
    if isinstance(data, Iterator):
        raise AuditError(
            "audit: the data is passed over more than once, and an iterator ends: give a list, an "
            "unshuffled DataLoader, or a function that returns a new iterator"
        )
    if callable(data):
        return cast(Callable[[], Iterable[Any]], data)
    if not isinstance(data, Iterable):
        raise AuditError(
            f"audit: data must be (inputs, targets) or batches of these, got {_described(data)}"
        )
    return lambda: data


def _on_tensors(change: Callable[[Tensor], Tensor], batch: Batch) -> Batch:
    return tree_map(lambda x: change(x) if isinstance(x, Tensor) else x, batch)


def _in_memory(data: Any) -> bool:
    """Return whether ``data`` is one batch, not a tuple or list of batches."""
    if isinstance(data, Mapping):
        return True
    return isinstance(data, tuple | list) and len(data) in (2, 3) and isinstance(data[1], Tensor)


def _described(thing: Any) -> str:
    if isinstance(thing, tuple | list):
        return f"a {type(thing).__name__} of {len(thing)}"
    return f"a {type(thing).__name__}"
