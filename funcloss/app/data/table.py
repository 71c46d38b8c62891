"""A CSV table: one column of classes, the others numbers."""

import array
import csv
import operator
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from funcloss.app.config import did_you_mean
from funcloss.app.data.raw import Raw, ordered
from funcloss.errors import ConfigError, DataError

_SNIFFED = 65_536  # characters in which the separator is looked for


def read_table(
    path: Path, *, target: str, ignore: Sequence[str] = (), columns: Sequence[str] = ()
) -> Raw:
    """Read a CSV file whose first row names the columns.

    Cells are separated by commas, semicolons or tabs. The numbers go into one float32 tensor as
    they are read, so that the table is never in memory as text.

    Args:
        path: A file in UTF-8.
        target: The column of the classes.
        ignore: Columns to leave out.
        columns: The columns to take, in this order; empty: all others.

    Returns:
        Features, labels and names.

    Raises:
        ConfigError: there is no such column, or no target was named.
        DataError: the file cannot be read, or a cell is missing, no number or not finite.
    """

    def places(header: list[str]) -> tuple[list[int], int]:
        chosen = _chosen(path, header, target, ignore, columns)
        return chosen, header.index(target)

    features, names, labels, known = _parsed(path, places)
    classes = ordered(known)
    place_of = {name: i for i, name in enumerate(classes)}
    place = torch.tensor([place_of[name] for name in known])
    return Raw(features, place[labels], classes, names)


def read_features(path: Path, columns: Sequence[str]) -> Float[Tensor, "n columns"]:
    """Read some columns of a CSV file, whose classes are not known.

    Args:
        path: A file in UTF-8.
        columns: The columns to take, in this order.

    Returns:
        Features, float32.

    Raises:
        ConfigError: there is no such column.
        DataError: as for :func:`read_table`.
    """

    def places(header: list[str]) -> tuple[list[int], None]:
        _check_columns(path, header, "column", columns)
        return [header.index(name) for name in columns], None

    return _parsed(path, places)[0]


def _parsed(
    path: Path, places: Callable[[list[str]], tuple[list[int], int | None]]
) -> tuple[Tensor, tuple[str, ...], Tensor, dict[str, int]]:
    """Return features, their names, labels in the order in which they occur, and their names."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            separator = _separator(file.read(_SNIFFED))
            file.seek(0)
            rows = csv.reader(file, delimiter=separator)
            header = [cell.strip() for cell in next(rows, [])]
            if not any(header):
                raise DataError(f"{path} is empty")
            _check_header(path, header)
            return _read(path, header, *places(header), rows)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise DataError(f"{path} is not text in UTF-8: save it as CSV in UTF-8") from None
    except csv.Error as error:
        raise DataError(f"{path} is not CSV: {error}") from None


def _separator(text: str) -> str:
    line = re.sub('"[^"]*"', "", text).partition("\n")[0]  # what is quoted separates nothing
    return max(",;\t", key=line.count)


def _check_header(path: Path, header: list[str]) -> None:
    if all(map(_is_number, header)):
        raise DataError(f"{path} has no header: write the names of its columns into its first row")
    for i, name in enumerate(header):
        if not name:
            raise DataError(f"{path}: column {i + 1} has no name")
        if name in header[:i]:
            raise DataError(f"{path}: two columns are called {name!r}")


def _chosen(
    path: Path, header: list[str], target: str, ignore: Sequence[str], columns: Sequence[str]
) -> list[int]:
    """Return the places of the features."""
    if not target:
        raise ConfigError(
            f"{path} needs a target, the column of its classes; it has {_listed(header)}"
        )
    _check_columns(path, header, "target column", [target])
    _check_columns(path, header, "column to ignore,", ignore)
    _check_columns(path, header, "column", columns)
    if target in ignore:
        raise ConfigError(f"{path}: target {target!r} cannot be ignored")
    left = [name for name in header if name != target and name not in ignore]
    features = list(columns) or left
    if not features:
        raise ConfigError(f"{path} has no column but its target {target!r} to learn from")
    return [header.index(name) for name in features]


def _check_columns(path: Path, header: list[str], what: str, names: Sequence[str]) -> None:
    for name in names:
        if name not in header:
            guess = did_you_mean(name, header)
            raise ConfigError(f"{path} has no {what} {name!r}{guess}; it has {_listed(header)}")


def _read(
    path: Path,
    header: list[str],
    chosen: list[int],
    target: int | None,
    rows: Iterator[list[str]],
) -> tuple[Tensor, tuple[str, ...], Tensor, dict[str, int]]:
    cells, labels = array.array("f"), array.array("q")
    known: dict[str, int] = {}
    pick = operator.itemgetter(*chosen) if len(chosen) > 1 else lambda row: (row[chosen[0]],)
    width, number = len(header), 0
    for row in rows:
        if len(row) != width:
            if not row:
                continue
            raise DataError(f"{path}: row {number + 1} has {len(row)} cells, the header {width}")
        number += 1
        if target is not None:
            if not (name := row[target].strip()):
                raise DataError(f"{path}: row {number} has no {header[target]!r}, its class")
            labels.append(known.setdefault(name, len(known)))
        try:
            cells.extend(map(float, pick(row)))
        except ValueError:
            raise _no_number(path, number, header, row, chosen) from None
    if not number:
        raise DataError(f"{path} has a header and no rows")
    names = tuple(header[i] for i in chosen)
    features = np.frombuffer(cells, dtype=np.float32).reshape(number, len(chosen))
    _check_finite(path, features, names)
    found = np.frombuffer(labels, dtype=np.int64)
    return torch.from_numpy(features), names, torch.from_numpy(found), known


def _no_number(
    path: Path, number: int, header: list[str], row: list[str], chosen: list[int]
) -> DataError:
    column = next(i for i in chosen if not _is_number(row[i]))
    cell, name = row[column].strip(), header[column]
    if not cell:
        return DataError(
            f"{path}: row {number} has no {name!r}: fill it in, or leave out the row, or the "
            f"column with ignore {name}"
        )
    comma = " (write a decimal point)" if _is_number(cell.replace(",", ".")) else ""
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


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _listed(names: Sequence[str]) -> str:
    few = ", ".join(names[:12])
    return few if len(names) <= 12 else f"{few} and {len(names) - 12} more"
