"""A CSV table: one column of classes, the others numbers."""

import array
import math
import operator
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from funcloss._files import csv_rows, is_number
from funcloss.app.config import did_you_mean
from funcloss.app.data.arrays import check_amount
from funcloss.app.data.records import RawSplit, ordered
from funcloss.errors import ConfigError, DataError


def read_table(
    path: Path,
    *,
    target: str,
    ignore: Sequence[str] = (),
    columns: Sequence[str] = (),
    amounts: Sequence[str] = (),
) -> RawSplit:
    """Read a CSV file whose first row names the columns.

    Cells are separated by commas, semicolons or tabs. The numbers go into one float32 tensor as
    they are read, so that the table is never in memory as text.

    Args:
        path: A file in UTF-8.
        target: The column of the classes.
        ignore: Columns to leave out.
        columns: The columns to take, in this order; empty: all others.
        amounts: Columns with a cost of each example, which are no features unless ``columns`` names
            them too.

    Returns:
        Features, labels, amounts and names.

    Raises:
        ConfigError: there is no such column, or no target was named.
        DataError: the file cannot be read, or a cell is missing, not a number or not finite, or an
            amount is negative.
    """
    with csv_rows(path) as rows:
        header = _header(path, rows)
        for name in amounts:
            check_amount(str(path), name, header)
        names = _feature_names(path, header, target, (*ignore, *amounts), columns)
        return _read(path, header, names, header.index(target), rows, amounts)


def read_features(
    path: Path, columns: Sequence[str], amounts: Sequence[str] = ()
) -> tuple[Float[Tensor, "n columns"], dict[str, Float[Tensor, " n"]]]:
    """Read some columns of a CSV file, whose classes are not known.

    Args:
        path: A file in UTF-8.
        columns: The columns to take, in this order.
        amounts: Columns with a cost of each example.

    Returns:
        Features, float32, and the amounts by name.

    Raises:
        ConfigError: there is no such column.
        DataError: as for :func:`read_table`.
    """
    with csv_rows(path) as rows:
        header = _header(path, rows)
        _check_columns(path, header, "column", columns)
        for name in amounts:
            check_amount(str(path), name, header)
        read = _read(path, header, columns, None, rows, amounts)
        assert isinstance(read.inputs, Tensor)
        return read.inputs, dict(read.amounts)


def _header(path: Path, rows: Iterator[list[str]]) -> list[str]:
    header = [cell.strip() for cell in next(rows, [])]
    if not any(header):
        raise DataError(f"{path} is empty")
    if all(map(is_number, header)):
        raise DataError(f"{path} has no header: write the names of its columns into its first row")
    for i, name in enumerate(header):
        if not name:
            raise DataError(f"{path}: column {i + 1} has no name")
        if name in header[:i]:
            raise DataError(f"{path}: two columns are called {name!r}")
    return header


def _feature_names(
    path: Path, header: list[str], target: str, ignore: Sequence[str], columns: Sequence[str]
) -> list[str]:
    if not target:
        raise ConfigError(
            f"{path} needs a target, the column of its classes; it has {_listed(header)}"
        )
    _check_columns(path, header, "target column", [target])
    _check_columns(path, header, "column to ignore,", ignore)
    _check_columns(path, header, "column", columns)
    if target in ignore:
        raise ConfigError(
            f"{path}: target {target!r} cannot be ignored, nor be the cost of an example"
        )
    left = [name for name in header if name != target and name not in ignore]
    features = list(columns) or left
    if not features:
        raise ConfigError(f"{path} has no column but its target {target!r} to learn from")
    return features


def _check_columns(path: Path, header: list[str], what: str, names: Sequence[str]) -> None:
    for name in names:
        if name not in header:
            guess = did_you_mean(name, header)
            raise ConfigError(f"{path} has no {what} {name!r}{guess}; it has {_listed(header)}")


def _read(
    path: Path,
    header: list[str],
    names: Sequence[str],
    target: int | None,
    rows: Iterator[list[str]],
    amounts: Sequence[str] = (),
) -> RawSplit:
    own = {name: (header.index(name), array.array("d")) for name in amounts}
    cells, labels = array.array("f"), array.array("q")
    number_of: dict[str, int] = {}  # of a class, in the order in which they occur
    chosen = [header.index(name) for name in names]
    pick = operator.itemgetter(*chosen) if len(chosen) > 1 else lambda row: (row[chosen[0]],)
    number = 0
    for number, row in enumerate(rows, 1):
        if len(row) != len(header):
            raise DataError(f"{path}: row {number} has {len(row)} cells, the header {len(header)}")
        if target is not None:
            if not (name := row[target].strip()):
                raise DataError(f"{path}: row {number} has no {header[target]!r}, its class")
            labels.append(number_of.setdefault(name, len(number_of)))
        try:
            cells.extend(map(float, pick(row)))
        except ValueError:
            raise _no_number(path, number, header, row, chosen) from None
        for name, (place, values) in own.items():
            values.append(_amount(path, number, name, row[place]))
    if not number:
        raise DataError(f"{path} has a header and no rows")
    features = np.frombuffer(cells, dtype=np.float32).reshape(number, len(chosen))
    _check_finite(path, features, names)
    found = torch.from_numpy(np.frombuffer(labels, dtype=np.int64))
    classes = ordered(number_of)
    place_of = {name: i for i, name in enumerate(classes)}
    place = torch.tensor([place_of[name] for name in number_of], dtype=torch.int64)
    each = {
        name: torch.from_numpy(np.frombuffer(values, dtype=np.float64))
        for name, (_, values) in own.items()
    }
    return RawSplit(torch.from_numpy(features), place[found], classes, tuple(names), amounts=each)


def _amount(path: Path, number: int, name: str, cell: str) -> float:
    if not cell.strip():
        raise DataError(
            f"{path}: row {number} has no {name!r}, which cost names: fill it in, or leave out the "
            "row"
        )
    value = float(cell) if is_number(cell) else math.nan
    if not 0.0 <= value < math.inf:
        raise DataError(
            f"{path}: row {number}, column {name!r}: the cost of an example must be finite and at "
            f"least 0, got {cell.strip()[:40]!r}"
        )
    return value


def _no_number(
    path: Path, number: int, header: list[str], row: list[str], chosen: list[int]
) -> DataError:
    column = next(i for i in chosen if not is_number(row[i]))
    cell, name = row[column].strip(), header[column]
    if not cell:
        return DataError(
            f"{path}: row {number} has no {name!r}: fill it in, or leave out the row, or the "
            f"column with ignore {name}"
        )
    comma = " (write a decimal point)" if is_number(cell.replace(",", ".")) else ""
    return DataError(
        f"{path}: row {number}, column {name!r}: {cell[:40]!r} is not a number{comma}: turn the "
        f"column into numbers, or leave it out with ignore {name}"
    )


def _check_finite(path: Path, features: np.ndarray, names: Sequence[str]) -> None:
    for start in range(0, len(features), 65_536):
        wrong = np.argwhere(~np.isfinite(features[start : start + 65_536]))
        if len(wrong):
            row, column = start + wrong[0][0], wrong[0][1]
            raise DataError(
                f"{path}: row {row + 1}, column {names[column]!r} is {features[row, column]} in "
                "float32: fill it in, or leave out the row, or the column with ignore"
            )


def _listed(names: Sequence[str]) -> str:
    few = ", ".join(names[:12])
    return few if len(names) <= 12 else f"{few} and {len(names) - 12} more"
