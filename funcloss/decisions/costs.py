"""What each decision costs in each true class, named and put into words."""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Real
from types import MappingProxyType

import torch
from jaxtyping import Float, Int
from torch import Tensor

from funcloss._checks import check_shape
from funcloss.errors import ConfigError

CostTable = Mapping[str, Mapping[str, float]]  # by name of the true class, then of the decision
_NO_AMOUNTS: Mapping[str, Tensor] = MappingProxyType({})
_Spoken = float | str  # a cost, or the name of those that each example has
_LARGEST = 1e15  # cost of a decision
_SPOKEN = 20  # costs that are read out one by one


@dataclass(frozen=True)
class Costs:
    """What decisions cost: rows the truth, columns the decision."""

    matrix: Float[Tensor, "classes decisions"]  # float64; NaN where each example has a cost
    classes: tuple[str, ...]
    decisions: tuple[str, ...]  # the classes in their order, then those that are no class
    # cells that cost another amount for each example: true class, decision, name of the amounts
    amounts: tuple[tuple[int, int, str], ...] = ()

    @property
    def extra(self) -> tuple[str, ...]:
        """Return the decisions that are no class, such as to abstain."""
        return self.decisions[len(self.classes) :]

    def of_labels(
        self, labels: Int[Tensor, " n"], amounts: Mapping[str, Float[Tensor, " n"]] = _NO_AMOUNTS
    ) -> Float[Tensor, "n decisions"]:
        """Return what each decision costs on examples whose class is known.

        Args:
            labels: Class of each example, on the CPU.
            amounts: Costs of each example by name, for the cells that have one.

        Returns:
            A row per example, float64.

        Raises:
            ValueError: an amount is missing, or has not the shape of the labels.

        Example:
            >>> costs = make_costs(("legit", "fraud"), cost={"fraud,legit": "amount"})
            >>> costs.of_labels(torch.tensor([0, 1]), {"amount": torch.tensor([30.0, 80.0])})
            tensor([[ 0.,  1.],
                    [80.,  0.]], dtype=torch.float64)
        """
        rows = self.matrix[labels]
        for truth, decision, values in self.cells(amounts, len(labels)):
            rows[:, decision] = torch.where(labels == truth, values, rows[:, decision])
        return rows

    def of_examples(
        self, amounts: Mapping[str, Float[Tensor, " n"]]
    ) -> Float[Tensor, "n classes decisions"]:
        """Return the cost matrix of each example, whose class need not be known.

        Args:
            amounts: Costs of each example by name, for the cells that have one.

        Returns:
            A matrix per example, float64.

        Raises:
            ValueError: an amount is missing, or they differ in length.

        Example:
            >>> costs = make_costs(("legit", "fraud"), cost={"fraud,legit": "amount"})
            >>> costs.of_examples({"amount": torch.tensor([30.0, 80.0])})[1]
            tensor([[ 0.,  1.],
                    [80.,  0.]], dtype=torch.float64)
        """
        n = len(next(iter(amounts.values()), ()))
        matrices = self.matrix.repeat(n, 1, 1)
        for truth, decision, values in self.cells(amounts, n):
            matrices[:, truth, decision] = values
        return matrices

    def cells(
        self, amounts: Mapping[str, Float[Tensor, " n"]], n: int
    ) -> Iterator[tuple[int, int, Float[Tensor, " n"]]]:
        """Yield the cells that cost another amount for each example.

        Args:
            amounts: Costs of each example by name.
            n: Number of examples.

        Yields:
            True class, decision, and what it costs on each example, float64 on the CPU.

        Raises:
            ValueError: an amount is missing, of another shape, negative or not finite.
        """
        for truth, decision, name in self.amounts:
            if name not in amounts:
                raise ValueError(
                    f"Costs: a true {self.classes[truth]} decided as {self.decisions[decision]} "
                    f"costs each example its {name}: give amounts with {name!r}, got "
                    f"{', '.join(amounts) or 'none'}"
                )
            values = amounts[name]
            check_shape("Costs", name, values, (n,), "the other values of the examples")
            if not ((values >= 0) & (values <= _LARGEST)).all():
                raise ValueError(
                    f"Costs: {name} must be finite and at least 0, at most {_LARGEST:g}"
                )
            yield truth, decision, values.detach().cpu().double()


def make_costs(
    classes: Sequence[str],
    table: CostTable | None = None,
    class_cost: Mapping[str, float] | None = None,
    cost: Mapping[str, float | str] | None = None,
) -> Costs:
    """Return the costs that a table or a cost of each true class names; else 1 for every mistake.

    Args:
        classes: Names of the classes, in the order of the labels.
        table: Cost of each decision (inner key) in each true class (outer key). Every class is a
            row and a column; further columns are decisions that are no class.
        class_cost: Cost of every mistake on a true class, by name or index; 1 for the others. The
            row form of ``table``, instead of it.
        cost: Cost of single decisions on a true class, over what the others say, by a key as
            :func:`cost_cell` reads it: ``{"9,4": 20.0}``. A text is the name of amounts, of which
            each example has its own: ``{"fraud,legit": "amount"}``.

    Returns:
        The costs, columns in the order of ``classes`` and then of the table's first row.

    Raises:
        ConfigError: ``table`` and ``class_cost`` are both given, two classes share a name, a name
            does not fit the classes, a cell is named twice, a cost is missing, beyond 1e15 or, in
            ``class_cost``, negative.

    Example:
        >>> make_costs(("cat", "dog"), class_cost={"dog": 5.0}).matrix
        tensor([[0., 1.],
                [5., 0.]], dtype=torch.float64)
        >>> make_costs(("cat", "dog"), cost={"cat,dog": 20.0}).matrix
        tensor([[ 0., 20.],
                [ 1.,  0.]], dtype=torch.float64)
    """
    classes = tuple(classes)
    if twice := [name for name, count in Counter(classes).items() if count > 1]:
        raise ConfigError(f"two classes are named {twice[0]!r}: give each a name of its own")
    if table and class_cost:
        raise ConfigError("cost_matrix and class_cost are two forms of the same: give one")
    if table:
        return _bounded(_with_cells(_from_table(classes, table), cost or {}))
    rows = _by_class(classes, class_cost or {})
    matrix = rows[:, None] * (1.0 - torch.eye(len(classes)).double())
    return _bounded(_with_cells(Costs(matrix, classes, classes), cost or {}))


def _bounded(costs: Costs) -> Costs:
    """Return costs of which sums and squares are numbers, in losses of single precision too."""
    large = (costs.matrix.abs() > _LARGEST).nonzero()
    if len(large):
        truth, decision = large[0].tolist()
        raise ConfigError(
            f"cost: calling a true {costs.classes[truth]} {costs.decisions[decision]} costs "
            f"{float(costs.matrix[truth, decision]):g}, which is beyond {_LARGEST:g}: what counts "
            "is their ratio, so divide all costs by one number"
        )
    return costs


def class_index(what: str, key: str, classes: Sequence[str]) -> int:
    """Return the index of the class that ``key`` names; a key that is no name may be an index.

    Where a class is named by a number, as in ``("1", "2")``, an index could be taken for a name:
    only names count.

    Args:
        what: The option that named it, for the error.
        key: A name, or an index as text.
        classes: Names of the classes, in the order of the labels.

    Returns:
        The index.

    Raises:
        ConfigError: there is no such class.

    Example:
        >>> class_index("floor", "dog", ("cat", "dog")), class_index("floor", "0", ("cat", "dog"))
        (1, 0)
    """
    if (index := _place(key, classes)) is None:
        raise ConfigError(f"{what}: no class {key!r}; the classes are {_listed(classes)}")
    return index


def _place(key: str, classes: Sequence[str]) -> int | None:
    if key in classes:
        return classes.index(key)
    numbered = any(name.isdecimal() for name in classes)
    if not numbered and key.isascii() and key.isdecimal() and int(key) < len(classes):
        return int(key)
    return None


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:20]) + (" and more" if len(names) > 20 else "")


def cost_cell(key: str, classes: Sequence[str], extra: Sequence[str] = ()) -> tuple[int, int]:
    """Return the row and the column of the cost that ``key`` names, as in ``"9,4"``.

    A name may have commas in it: every comma of the key is tried as the one between the two.

    Args:
        key: The true class and the decision, by name or index as :func:`class_index` takes it.
        classes: Names of the classes, in the order of the labels.
        extra: Decisions that are no class, the columns after those of the classes.

    Returns:
        Index of the true class, index of the decision.

    Raises:
        ConfigError: there is no such cell, or the key could be read as several.

    Example:
        >>> cost_cell("dog,cat", ("cat", "dog")), cost_cell("a, b,c", ("a, b", "c"))
        ((1, 0), (0, 1))
    """
    found = []
    pieces = key.split(",")
    for i in range(1, len(pieces)):
        truth, decision = ",".join(pieces[:i]), ",".join(pieces[i:])
        row, column = _place(truth, classes), _place(decision, classes)
        if column is None and decision in extra:
            column = len(classes) + extra.index(decision)
        if row is not None and column is not None:
            found.append((row, column))
    if len(found) == 1:
        return found[0]
    decisions = (*classes, *extra)
    if found:
        ways = " or ".join(f"{classes[t]!r} decided as {decisions[d]!r}" for t, d in found)
        raise ConfigError(f"cost {key!r} can be read as {ways}: give that cost in cost_matrix")
    if len(pieces) == 2:
        class_index(f"cost {key!r}", pieces[0], classes)
        known = f"the decisions are {_listed(decisions)}"
        raise ConfigError(f"cost {key!r}: no decision {pieces[1]!r}; {known}")
    raise ConfigError(
        f"cost {key!r} must be a true class and a decision, as in "
        f"{classes[-1]},{classes[0]}; the decisions are {_listed(decisions)}"
    )


def cost_sentences(costs: Costs) -> list[str]:
    r"""Return costs in plain words, those that stand out one by one.

    Args:
        costs: The costs.

    Returns:
        Lines such as ``calling a true 9 a 4 costs 10``, the rest in one.

    Example:
        >>> print(*cost_sentences(make_costs(("cat", "dog"), class_cost={"dog": 5.0})), sep="\n")
        calling a true dog a cat costs 5
        every other mistake costs 1, a right decision 0
    """
    size, table = len(costs.classes), _table(costs)
    lines = []
    for decision, column in zip(costs.extra, [*zip(*table, strict=True)][size:], strict=True):
        each = [
            (f"deciding {decision} on a true {t}", c)
            for t, c in zip(costs.classes, column, strict=True)
        ]
        whole = f"deciding {decision}, whatever the truth,"
        lines += _spoken(each, rest=f"deciding {decision} otherwise", whole=whole)
    lines += _spoken(_mistakes(costs, table), rest="every other mistake", whole="every mistake")
    own = [row[t] for t, row in enumerate(table)]
    right = [(f"rightly deciding {t}", c) for t, c in zip(costs.classes, own, strict=True)]
    told = _spoken(right, rest="every other right decision", whole="a right decision")
    if len(told) > 1 or size == 1:
        return lines + told
    return [*lines[:-1], f"{lines[-1]}, a right decision {_number(own[0])}"]


def _table(costs: Costs) -> list[list[_Spoken]]:
    """Return the matrix as lists, the name of the amounts where each example has its own."""
    table: list[list[_Spoken]] = costs.matrix.tolist()
    for truth, decision, name in costs.amounts:
        table[truth][decision] = name
    return table


def _mistakes(costs: Costs, table: list[list[_Spoken]]) -> list[tuple[str, _Spoken]]:
    """Return mistakes of classes and what they cost, a row of equal costs of its own as one."""
    size = len(costs.classes)
    rows = [row[:size] for row in table]
    common = _commonest([c for t, row in enumerate(rows) for c in row[:t] + row[t + 1 :]])
    found = []
    for name, row in zip(costs.classes, rows, strict=True):
        wrong = [(d, c) for d, c in zip(costs.classes, row, strict=True) if d != name]
        if size > 2 and len({c for _, c in wrong}) == 1 and wrong[0][1] != common:
            found.append((f"calling a true {name} anything else", wrong[0][1]))
        else:
            found += [(f"calling a true {name} a {d}", c) for d, c in wrong]
    return found


def _spoken(each: list[tuple[str, _Spoken]], *, rest: str, whole: str) -> list[str]:
    """Return what costs other than the most, at most some of it, and then what the most costs."""
    if not each:
        return []
    common = _commonest([cost for _, cost in each])
    odd = [f"{what} costs {_number(cost)}" for what, cost in each if cost != common]
    left = len(odd) - _SPOKEN
    more = ["1 more has a cost of its own" if left == 1 else f"{left} more have costs of their own"]
    ending = f"{rest if odd else whole} costs {_number(common)}"
    return [*odd[:_SPOKEN], *(more if left > 0 else []), ending]


def _commonest(values: list[_Spoken]) -> _Spoken:
    numbers = [value for value in values if not isinstance(value, str)]  # a name stands out
    return Counter(numbers or values).most_common(1)[0][0] if values else 0.0


def _number(cost: _Spoken) -> str:
    return f"its {cost}" if isinstance(cost, str) else f"{cost + 0.0:.10g}"  # + 0.0: no -0


def _with_cells(costs: Costs, cost: Mapping[str, float | str]) -> Costs:
    """Return costs with single cells replaced."""
    matrix, seen, amounts = costs.matrix.clone(), set(), []
    for key, value in cost.items():
        cell = cost_cell(key, costs.classes, costs.extra)
        if cell in seen:
            truth, decision = costs.classes[cell[0]], costs.decisions[cell[1]]
            raise ConfigError(f"cost: {truth!r} decided as {decision!r} is given twice")
        seen.add(cell)
        if isinstance(value, str):
            amounts.append((*cell, value))
            matrix[cell] = math.nan
        elif _finite(value):
            matrix[cell] = float(value)
        else:
            raise ConfigError(f"cost {key} must be a finite number, got {value!r}")
    return replace(costs, matrix=matrix, amounts=tuple(amounts))


def _by_class(classes: tuple[str, ...], class_cost: Mapping[str, float]) -> Tensor:
    rows = torch.ones(len(classes), dtype=torch.float64)
    seen = set()
    for key, cost in class_cost.items():
        index = class_index("class_cost", key, classes)
        if index in seen:
            raise ConfigError(f"class_cost: class {classes[index]!r} is given twice")
        if not _finite(cost) or cost < 0:
            raise ConfigError(f"class_cost {key} must be finite and at least 0, got {cost}")
        seen.add(index)
        rows[index] = float(cost)
    return rows


def _from_table(classes: tuple[str, ...], table: CostTable) -> Costs:
    columns = tuple(next(iter(table.values())))
    _check_names(classes, tuple(table), columns)
    known = set(classes)
    decisions = (*classes, *(name for name in columns if name not in known))
    for truth in classes:
        if odd := set(table[truth]) ^ set(columns):
            raise ConfigError(
                f"cost_matrix: the row of {truth} has not the columns of the others: "
                f"{', '.join(sorted(odd)[:5])}"
            )
        for decision, cost in table[truth].items():
            if not _finite(cost):
                raise ConfigError(
                    f"cost_matrix: the cost of deciding {decision} on a true {truth} must be a "
                    f"finite number, got {cost!r}"
                )
    costs = [[float(table[truth][decision]) for decision in decisions] for truth in classes]
    return Costs(torch.tensor(costs, dtype=torch.float64), classes, decisions)


def _finite(cost: object) -> bool:
    return isinstance(cost, Real) and not isinstance(cost, bool) and math.isfinite(cost)


def _check_names(classes: tuple[str, ...], rows: tuple[str, ...], columns: tuple[str, ...]) -> None:
    if set(columns) == set(classes) and set(rows) > set(classes):
        raise ConfigError(
            "cost_matrix is transposed: rows are the truth and columns the decision, but it has "
            f"{', '.join(sorted(set(rows) - set(classes)))} as a row; swap its two axes"
        )
    for what, names in (("row", set(rows)), ("column", set(columns))):
        if missing := [name for name in classes if name not in names]:
            raise ConfigError(
                f"cost_matrix has no {what} for class {', '.join(missing[:5])}; every class is a "
                "row (the truth) and a column (the decision)"
            )
    if unknown := [name for name in rows if name not in set(classes)]:
        raise ConfigError(
            f"cost_matrix has a row {unknown[0]!r}, which is no class; the classes are "
            f"{', '.join(classes[:20])}"
        )
