"""The forms that audited data comes in, brought to one: batches that can be iterated again."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from funcloss.audit.state import ModelState
from funcloss.errors import AuditError
from funcloss.keys import example_keys
from funcloss.typing import Batch

GroupBy = Callable[[Batch], Tensor]
_TARGETS = ("labels", "targets")


@dataclass(frozen=True, eq=False)
class MaskedBatch:
    """The examples of a batch that count, side by side."""

    inputs: Any  # a tensor, or a tuple or dict of tensors, each beginning with the batch
    targets: Tensor
    keys: Tensor  # of their random numbers
    groups: Tensor  # (n,) int64: the class that each counts for
    position: Tensor  # of each in the data
    batch_size: int  # of the whole batch, with the examples that do not count

    def __len__(self) -> int:
        """Return how many examples count."""
        return len(self.position)

    def at(self, index: Tensor | slice) -> "MaskedBatch":
        """Return some of them."""
        return replace(
            self,
            inputs=tree_map(lambda x: _select(x, index), self.inputs),
            targets=self.targets[index],
            keys=self.keys[index],
            groups=self.groups[index],
            position=self.position[index],
        )

    def in_one_group(self) -> "MaskedBatch":
        """Return them as examples of one class, 0."""
        return replace(self, groups=torch.zeros_like(self.groups))

    def some(self, most: int) -> "MaskedBatch":
        """Return at most so many of them, evenly spread."""
        n = len(self)
        return self.at(torch.linspace(0, n - 1, min(n, most), device=self.position.device).long())


MakeBatches = Callable[[], Iterator[MaskedBatch]]


def select_valid(
    batch: Batch, groups: Tensor, state: ModelState, *, number: int = 0, first: int = 0
) -> MaskedBatch:
    """Return the examples of a batch that count, those whose group is not -1.

    Batch ``number`` draws as step ``state.step + number`` does; ``first`` is the position in the
    data of its first example.
    """
    n = len(groups)
    keys = example_keys(state.key, state.step + number, n)
    position = first + torch.arange(n, device=keys.device)
    every = MaskedBatch(batch.inputs, batch.targets, keys, groups, position, n)
    counts = groups >= 0
    return every if bool(counts.all()) else every.at(counts.nonzero().squeeze(1))


def reiterable(
    data: Any, state: ModelState, *, batch_size: int, group_by: GroupBy | None
) -> MakeBatches:
    """Return a function that iterates over the data from its beginning, however often it is called.

    Raises:
        AuditError: on the way, if a batch is in none of these forms, or the data changes; at once,
            if the data can be iterated over only once.
    """
    begin = _source(data, batch_size)
    seen: list[Tensor] = []  # groups of each batch, the first time
    ended = False

    def make_batches() -> Iterator[MaskedBatch]:
        nonlocal ended
        first, number = 0, 0
        for item in begin():
            batch = _on_tensors(lambda x: x.to(state.device), as_batch(item))
            groups = groups_of(batch, group_by)
            mark = groups.cpu()
            if number < len(seen):
                _check_same(torch.equal(mark, seen[number]))
            else:
                _check_same(not ended)
                seen.append(mark)
            yield select_valid(batch, groups, state, number=number, first=first)
            number, first = number + 1, first + len(mark)
        _check_same(number == len(seen))
        ended = True

    return make_batches


def _check_same(same: bool) -> None:
    if not same:
        raise AuditError(
            "audit: the data changed between passes: use a list or a DataLoader with shuffle=False"
        )


def as_batch(item: Any) -> Batch:
    """Return one item of the data as a batch.

    Raises:
        AuditError: it is none.
    """
    if isinstance(item, Batch):
        return _checked(item)
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
    if batch.costs is not None:
        raise AuditError(
            "audit: a loss under costs of each example cannot be audited: leave out the batch's "
            "costs, and give the loss a cost_matrix"
        )
    leaves = tree_leaves(batch.inputs)
    wrong = [x for x in [*leaves, batch.targets] if not isinstance(x, Tensor)]
    if wrong or not leaves:
        got = _described(wrong[0]) if wrong else "no inputs"
        raise AuditError(f"audit: a batch must hold tensors, got {got}")
    sizes = {len(x) if x.dim() else None for x in [*leaves, batch.targets]}
    if len(sizes) != 1 or None in sizes:
        shapes = [tuple(x.shape) for x in [*leaves, batch.targets]]
        raise AuditError(f"audit: inputs and targets must begin with the batch, got {shapes}")
    n, where = len(batch.targets), batch.where
    if where is not None and (where.dtype != torch.bool or where.shape != (n,)):
        raise AuditError(
            f"audit: where must be boolean, one entry per example, ({n},); got {where.dtype} "
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
            "audit: the targets are no labels, one integer per example, but "
            f"{targets.dtype} {tuple(targets.shape)}: say with group_by=lambda batch: ... which "
            "group each example counts for"
        )
    if groups.shape != (len(targets),) or groups.is_floating_point():
        raise AuditError(
            f"audit: group_by must give one integer per example, ({len(targets)},), got "
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


def number_of(classes: Sequence[str] | int | None) -> int | None:
    """Return how many classes there are by their names or their number; None: not said."""
    return classes if isinstance(classes, int | None) else len(classes)


def check_labels(groups: Tensor, classes: int) -> None:
    """Raise ``AuditError`` if an example counts for a class that there is not."""
    if len(groups) and int(groups.max()) >= classes:
        raise AuditError(
            f"audit: labels must be in 0..{classes - 1}, got {int(groups.max())}: give classes= "
            "for more"
        )


def _source(data: Any, batch_size: int) -> Callable[[], Iterable[Any]]:
    if isinstance(data, Batch) or in_memory(data):
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
            "audit: the data is iterated over more than once, and an iterator ends: give a list, "
            "a DataLoader with shuffle=False, or a function that returns a new iterator"
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


def in_memory(data: Any) -> bool:
    """Return whether ``data`` is one batch, not a tuple or list of batches."""
    if isinstance(data, Mapping):
        return True
    return isinstance(data, tuple | list) and len(data) in (2, 3) and isinstance(data[1], Tensor)


def _select(inputs: Tensor, index: Tensor | slice) -> Tensor:
    """Return the inputs at an index, images in the layout that convolutions like."""
    if inputs.dim() != 4 or isinstance(index, slice):
        return inputs[index]
    return inputs.movedim(1, -1)[index].movedim(-1, 1)


def _described(thing: Any) -> str:
    if isinstance(thing, tuple | list):
        return f"a {type(thing).__name__} of {len(thing)}"
    return f"a {type(thing).__name__}"
