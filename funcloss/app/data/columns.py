"""From the columns of a table to features: numbers, dates and categories.

What is learnt of the training rows is kept in :class:`Column` records, so that any other table is
read in the same way.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from funcloss._names import listed
from funcloss.app.config import did_you_mean
from funcloss.app.data.records import MISSING, Cells, Column, RawSplit, Rows
from funcloss.errors import ConfigError, DataError

_MOSTLY = 0.9  # of the cells are numbers: the others are mistakes, not categories
_RARE = (5, 0.005)  # fewer rows, or a smaller part of them, and a category is pooled with others
_MOST_LEVELS = 50
_NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?|[+-]?(?:inf|infinity|nan)"
_COMMA = r"[+-]?\d+(?:,\d+)?(?:[eE][+-]?\d+)?"
_THOUSANDS = r"[+-]?(?:[1-9]\d{0,2}(?:,\d{3})+|\d{1,3})(?:\.\d+)?"
_BOTH = r"[+-]?\d{1,3}(?:\.\d{3})+(?:,\d+)?|" + _COMMA
_DATES = {  # format: what all cells look like
    "ISO8601": r"\d{4}-\d{2}-\d{2}(?:[ T]\d{2}:\d{2}(?::\d{2}(?:\.\d+)?)?(?:Z|[+-]\d{2}:?\d{2})?)?",
    "%d.%m.%Y": r"\d{1,2}\.\d{1,2}\.\d{4}",
    "%m/%d/%Y": r"\d{1,2}/\d{1,2}/\d{4}",
    "%d/%m/%Y": r"\d{1,2}/\d{1,2}/\d{4}",
}


def with_features(
    splits: Mapping[str, RawSplit], index: Int[Tensor, " train"]
) -> dict[str, RawSplit]:
    """Return splits with the rows of tables as features; all else stays as it is.

    Args:
        splits: By name, ``train`` among them.
        index: The rows of ``train`` that will be trained on: medians and categories are theirs.

    Raises:
        ConfigError: no column is left to learn from.
        DataError: a column is missing, or a cell is not what its column holds.
    """
    train = splits["train"]
    if not isinstance(train.inputs, Rows):
        return dict(splits)
    columns, notes, read = train.columns, train.notes, {}
    if not columns:
        columns, line, read = _fitted(train.inputs, index.numpy())
        notes = (*notes, *line)
    done = {id(train.inputs): encoded(train.inputs, columns, read)}
    found = {}
    for split, raw in splits.items():
        if isinstance(raw.inputs, Rows):
            if id(raw.inputs) not in done:
                done[id(raw.inputs)] = encoded(raw.inputs, columns)
            raw = dataclasses.replace(raw, inputs=done[id(raw.inputs)], columns=columns)
        found[split] = raw
    return found | {"train": dataclasses.replace(found["train"], notes=notes)}


def encoded(
    rows: Rows, columns: Sequence[Column], read: Mapping[str, np.ndarray] | None = None
) -> Float[Tensor, "n features"]:
    """Return the features of the rows of a table, in float64.

    Args:
        rows: Of a table.
        columns: Its columns that count, from the training.
        read: Columns of numbers and dates that are read already, by name.

    Raises:
        ConfigError: there is no such column.
        DataError: a cell is not what its column holds.
    """
    check_columns(rows, "column", [column.name for column in columns])
    pieces = [_of_column(rows, column, read or {}) for column in columns]
    return torch.from_numpy(np.concatenate(pieces, 1))


def check_columns(rows: Rows, what: str, names: Iterable[str]) -> None:
    """Raise ``ConfigError`` unless a table has all these columns."""
    known = [*map(str, rows.frame.columns)]
    for name in names:
        if name not in known:
            guess = did_you_mean(name, known)
            raise ConfigError(
                f"{rows.path} has no {what} {name!r}{guess}; it has {column_names(rows)}"
            )


def column_names(rows: Rows) -> str:
    """Return the names of the columns of a table, or the first of them."""
    return listed([*map(str, rows.frame.columns)], 12)


def _of_column(rows: Rows, column: Column, read: Mapping[str, np.ndarray]) -> np.ndarray:
    if column.kind == "category":
        import pandas as pd

        names = _names(rows.frame[column.name])
        codes = pd.Index(column.levels, dtype="string").get_indexer(names)
        width = len(column.features)
        codes = np.where(codes < 0, len(column.levels), codes)  # the pooled feature, or none
        return np.eye(len(column.levels) + 1)[codes][:, :width]
    values = read[column.name] if column.name in read else values_of(rows, column)
    missing = np.isnan(values)
    filled = np.where(missing, column.median, values)
    return np.stack([filled, missing] if column.flagged else [filled], 1)


def _names(cells: Cells) -> Cells:
    """Return the categories of a column, missing ones among them."""
    return cells.astype("string").fillna(MISSING)


def values_of(rows: Rows, column: Column) -> np.ndarray:
    """Return a column of numbers or dates as float64, NaN where a cell is missing.

    Raises:
        DataError: a cell is not what the column holds.
    """
    import pandas as pd

    name = column.name
    cells = rows.frame[name]
    if column.kind == "date":
        dates = cells
        if not pd.api.types.is_datetime64_any_dtype(cells):
            dates = pd.to_datetime(cells, format=column.format, utc=True, errors="coerce")
            wrong = (dates.isna() & cells.notna()).to_numpy()
            _check_cells(rows, name, wrong, f"a date {column.format}")
        days = dates.to_numpy(dtype="datetime64[us]").astype(np.int64) / 86_400e6
        return np.where(dates.isna().to_numpy(), np.nan, days)
    if not pd.api.types.is_numeric_dtype(cells):
        plain = _with_points(cells, rows)
        wrong = ~plain.str.fullmatch(_NUMBER, case=False).fillna(True).to_numpy(dtype=bool)
        _check_cells(rows, name, wrong, "a number")
        cells = plain
    present = cells.notna().to_numpy()
    values = np.full(len(cells), np.nan)
    values[present] = cells[present].to_numpy(dtype=object).astype(np.float64)
    _check_cells(rows, name, np.isinf(values), "a finite number")
    return values


def _check_cells(rows: Rows, name: str, wrong: np.ndarray, what: str) -> None:
    if not wrong.any():
        return
    first = int(wrong.argmax())
    cell = str(rows.frame[name].iloc[first])[:40]
    more = f" ({int(wrong.sum()):,} such cells)" if wrong.sum() > 1 else ""
    raise DataError(
        f"{rows.path}: row {rows.number(first)}, column {name!r}: {cell!r} is not {what}{more}: "
        f"mend it, leave the cell empty, or leave out the column with ignore {name}"
    )


def _with_points(cells: Cells, rows: Rows) -> Cells:
    """Return text in which numbers have a decimal point, whatever the file writes."""
    present = cells.dropna()
    if not present.str.contains(",", regex=False).any():
        return cells
    if rows.separator == "," and present.str.fullmatch(_THOUSANDS).all():
        return cells.str.replace(",", "", regex=False)
    if present.str.fullmatch(_COMMA).all():
        return cells.str.replace(",", ".", regex=False)
    if present.str.fullmatch(_BOTH).all():
        two = present[present.str.contains(".", regex=False)].iloc[0]
        raise DataError(
            f"{rows.path}, column {cells.name!r}: {two!r} among numbers with decimal commas can be "
            "read in two ways: write 1234.5 for 1.234,5"
        )
    return cells


def _kind_of(rows: Rows, name: str) -> Column:
    """Return a column of the kind that its cells are of, nothing learnt of it yet."""
    import pandas as pd

    cells = rows.frame[name]
    if pd.api.types.is_datetime64_any_dtype(cells):
        return Column(name, "date", format="ISO8601")
    if pd.api.types.is_numeric_dtype(cells) and not pd.api.types.is_bool_dtype(cells):
        return Column(name, "number")
    present = cells.astype("string").dropna()
    numbers = _with_points(present, rows).str.fullmatch(_NUMBER, case=False)
    if numbers.mean() >= _MOSTLY:  # text among them is a mistake, and said when they are read
        return Column(name, "number")
    fit = [
        form
        for form, pattern in _DATES.items()
        if present.str.fullmatch(pattern).all()
        and pd.to_datetime(present, format=form, utc=True, errors="coerce").notna().all()
    ]
    if len(fit) > 1:
        raise DataError(
            f"{rows.path}, column {name!r}: {present.iloc[0]!r} may be day/month or month/day: "
            f"write 2024-01-31, or leave out the column with ignore {name}"
        )
    return Column(name, "date", format=fit[0]) if fit else Column(name, "category")


def _fitted(
    rows: Rows, index: np.ndarray
) -> tuple[tuple[Column, ...], tuple[str, ...], dict[str, np.ndarray]]:
    """Return what is learnt of the rows at ``index``, for every row.

    Returns:
        The columns to learn from, a line on what was done, and the numbers and dates read.
    """
    columns, plain, said, read = [], 0, [], {}
    for name in map(str, rows.frame.columns):
        some = rows.frame[name].iloc[index]
        if some.nunique(dropna=False) < 2:
            said.append(f"{name} left out, as it has one value only")
            continue
        column = _kind_of(rows, name)
        if column.kind == "category":
            column, line = _category(name, some)
        else:
            read[name] = values_of(rows, column)
            column, line = _number(column, read[name][index])
        if column is not None:
            columns.append(column)
        plain += not line
        said += [line] if line else []
    if not columns:
        raise ConfigError(f"{rows.path} has no column but its target to learn from")
    if not said:
        return tuple(columns), (), read
    numbers = f"{plain} of numbers" if plain else ""
    return tuple(columns), (f"columns: {'; '.join(filter(None, (numbers, *said)))}",), read


def _number(column: Column, values: np.ndarray) -> tuple[Column | None, str]:
    name, is_date = column.name, column.kind == "date"
    missing = int(np.isnan(values).sum())
    if missing == len(values):
        return None, f"{name} left out, as it is empty"
    median = float(np.nanmedian(values))
    what = "days since 1970" if is_date else ""
    if missing:
        shown = str(np.datetime64(math.floor(median), "D")) if is_date else f"{median:.6g}"
        what = f"{what or 'numbers'}, {missing:,} missing ones set to the median {shown} and marked"
    learnt = dataclasses.replace(column, median=median, flagged=missing > 0)
    return learnt, f"{name} {what}" if what else ""


def _category(name: str, cells: Cells) -> tuple[Column | None, str]:
    counts = _names(cells).value_counts()
    least = max(_RARE[0], math.ceil(_RARE[1] * len(cells)))
    frequent = counts[counts >= least].index[:_MOST_LEVELS]
    rare = len(counts) - len(frequent)
    if not len(frequent):
        return None, f"{name} left out, as its {len(counts):,} texts hardly repeat"
    column = Column(name, "category", levels=tuple(sorted(map(str, frequent))), pooled=rare > 0)
    pooled = f", {rare:,} rarer ones pooled" if rare else ""
    return column, f"{name} {len(frequent)} categories{pooled}"
