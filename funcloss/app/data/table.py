"""A table in a file: text in CSV or another form of it, or Parquet. pandas reads it."""

import contextlib
import csv
import gzip
import io
import sys
import zlib
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import TextIO

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from funcloss._files import SNIFFED, is_number, reading, separator_of
from funcloss.app.data.arrays import check_amount
from funcloss.app.data.columns import check_columns, column_names, encoded, values_of
from funcloss.app.data.records import Cells, Column, Frame, RawSplit, Rows, ordered
from funcloss.errors import ConfigError, DataError

_TEXT, _PARQUET = (".csv", ".tsv", ".txt", ".data"), (".parquet",)
TABLES = (*_TEXT, *(f"{suffix}.gz" for suffix in _TEXT), *_PARQUET)
_MISSING = ("", "?", "NA", "N/A", "n/a", "#N/A", "<NA>", "nan", "NaN", "NAN", "null", "NULL")
_MISSING += ("None",)
_NO_LABEL = _MISSING[:-1]  # None may be the name of a class


def is_table(path: str | Path) -> bool:
    """Return whether a path names a table.

    Example:
        >>> is_table("loans.csv.gz"), is_table("pets.npz")
        (True, False)
    """
    return str(path).lower().endswith(TABLES)


def read_table(
    path: Path,
    *,
    target: str,
    ignore: Sequence[str] = (),
    columns: Sequence[Column] = (),
    amounts: Sequence[str] = (),
    drop_unlabelled: bool = False,
) -> RawSplit:
    """Read a table with a column of classes.

    Args:
        path: A text file in UTF-8, its cells separated by commas, semicolons, tabs, bars or spaces,
            perhaps compressed by gzip; or a Parquet file.
        target: The column of the classes.
        ignore: Columns to leave out.
        columns: Those of a model, which are the ones to take; empty: all others.
        amounts: Columns with a cost of each example, which are no features unless ``columns`` names
            them too.
        drop_unlabelled: Leave out rows without a class.

    Returns:
        Rows, labels, amounts and names.

    Raises:
        ConfigError: there is no such column, no target was named, or pandas is missing.
        DataError: the file cannot be read, a row has no class, or an amount is negative or missing.
    """
    names = [column.name for column in columns]
    rows, notes = _read(path, (target, *names))
    if not target:
        raise ConfigError(
            f"{path} needs a target, the column of its classes; it has {column_names(rows)}"
        )
    for name in amounts:
        check_amount(str(path), name, [*map(str, rows.frame.columns)])
    check_columns(rows, "target column", [target])
    check_columns(rows, "column to ignore,", ignore)
    if target in (*ignore, *amounts):
        raise ConfigError(
            f"{path}: target {target!r} cannot be ignored, nor be the cost of an example"
        )
    if not len(rows):
        raise DataError(f"{path} has a header and no rows")
    label = rows.frame[target].astype("string")
    rows, label, dropped = _labelled(rows, label.where(~label.isin(_NO_LABEL)), drop_unlabelled)
    each = {name: _amounts(rows, name) for name in amounts}
    left_out = {target, *(() if names else (*ignore, *amounts))}
    features = rows.frame.drop(columns=[*left_out])
    if not len(features.columns):
        raise ConfigError(f"{path} has no column but its target {target!r} to learn from")
    classes = ordered(map(str, label.unique()))
    place = label.map({name: i for i, name in enumerate(classes)}).to_numpy(dtype=np.int64)
    return RawSplit(
        Rows(path, features, rows.separator),
        torch.from_numpy(place.copy()),
        classes,
        tuple(columns),
        amounts=each,
        notes=(*notes, *dropped),
        rows=torch.from_numpy(features.index.to_numpy(dtype=np.int64) + 1),
    )


def read_features(
    path: Path, columns: Sequence[Column], amounts: Sequence[str] = ()
) -> tuple[Float[Tensor, "n features"], dict[str, Float[Tensor, " n"]]]:
    """Read the features of a table, whose classes are not known.

    Args:
        path: As for :func:`read_table`.
        columns: Those of a model.
        amounts: Columns with a cost of each example.

    Returns:
        Features, float64, and the amounts by name.

    Raises:
        ConfigError: there is no such column.
        DataError: as for :func:`read_table`.
    """
    rows, _ = _read(path, [column.name for column in columns])
    for name in amounts:
        check_amount(str(path), name, [*map(str, rows.frame.columns)])
    if not len(rows):
        raise DataError(f"{path} has a header and no rows")
    return encoded(rows, columns), {name: _amounts(rows, name) for name in amounts}


def features_of(frame: Frame, columns: Sequence[Column]) -> Float[Tensor, "n features"]:
    """Return the features of the rows of a ``pandas.DataFrame``, in float64.

    Raises:
        ConfigError: there is no such column.
        DataError: a cell is not what its column holds.
    """
    return encoded(_rows_of(Path("the frame"), frame), columns)


def _labelled(rows: Rows, label: Cells, drop: bool) -> tuple[Rows, Cells, tuple[str, ...]]:
    """Return the rows that have a class, their classes, and a line on the others."""
    missing = label.isna().to_numpy(dtype=bool)
    if not missing.any():
        return rows, label, ()
    where = np.flatnonzero(missing) + 1
    named = ", ".join(map(str, where[:10])) + (", ..." if len(where) > 10 else "")
    if not drop:
        raise DataError(
            f"{rows.path}: no {label.name!r}, the class, in {len(where):,} rows ({named}): fill it "
            "in, or leave them out with drop_unlabelled"
        )
    kept = np.flatnonzero(~missing)
    if not len(kept):
        raise DataError(f"{rows.path}: no row has a {label.name!r}, its class")
    left = Rows(rows.path, rows.frame.iloc[kept], rows.separator)
    line = f"{len(where):,} rows without a {label.name!r} are left out"
    return left, label.iloc[kept], (line,)


def _amounts(rows: Rows, name: str) -> Tensor:
    values = values_of(rows, Column(name, "number"))
    wrong = ~(values >= 0)
    if wrong.any():
        i = int(wrong.argmax())
        got = "nothing" if np.isnan(values[i]) else f"{values[i]:g}"
        raise DataError(
            f"{rows.path}: row {rows.number(i)}, column {name!r}: the cost of an example must be "
            f"finite and at least 0, got {got}: fill it in, or leave out the row"
        )
    return torch.from_numpy(values)


def _read(path: Path, names: Collection[str]) -> tuple[Rows, tuple[str, ...]]:
    """Return the rows of a table, of which some columns are known, and what was made of them."""
    try:
        import pandas as pd
        import pyarrow
    except ImportError as error:
        raise ConfigError(
            f"{path} is a table, and {error.name} is not installed: pip install 'funcloss[tables]'"
        ) from None
    if path.suffix.lower() in _PARQUET:
        with reading(path, kind="a Parquet file", broken=(pyarrow.ArrowInvalid, ValueError)):
            frame = pd.read_parquet(path)
        frame.columns = _checked_names(path, [*map(str, frame.columns)])
        return _rows_of(path, frame), ()
    broken = (csv.Error, pd.errors.ParserError, pd.errors.EmptyDataError)
    broken += (gzip.BadGzipFile, EOFError, zlib.error)
    with reading(path, kind="a table of text", broken=broken), _opened(path) as file:
        some = file.read(SNIFFED)
        if "\0" in some:
            raise DataError(f"{path} is not a table of text: it has bytes of 0")
        separator = separator_of(some, " ")
        file.seek(0)
        width = _check_widths(path, file, separator)
        file.seek(0)
        frame = pd.read_csv(
            file,
            sep=r"\s+" if separator == " " else separator,
            header=None,
            names=range(width),
            index_col=False,
            dtype="string[pyarrow]",
            keep_default_na=False,
            skipinitialspace=True,
        )
    header, notes = [str(cell).strip() for cell in frame.iloc[0]], ()
    if _is_header(header, frame.iloc[1:1000], names):
        frame = frame.iloc[1:]
    else:
        header = [f"column_{i + 1}" for i in range(width)]
        notes = (f"{path.name} has no header: its columns are called column_1 to column_{width}",)
    if not header[0] and width > 1:
        frame, header = frame.iloc[:, 1:], header[1:]
        notes = (*notes, "the first column has no name, and is left out")
    frame.columns = _checked_names(path, header)
    frame = frame.reset_index(drop=True)
    return Rows(path, frame.apply(_text), separator), notes


def _rows_of(path: Path, frame: Frame) -> Rows:
    """Return the rows of a frame whose columns have types."""
    return Rows(path, frame.apply(_typed).reset_index(drop=True))


def _typed(cells: Cells) -> Cells:
    """Return a column of numbers or dates as it is, all else as text."""
    from pandas.api.types import is_bool_dtype, is_datetime64_any_dtype, is_numeric_dtype

    plain = is_numeric_dtype(cells) and not is_bool_dtype(cells)
    return cells if plain or is_datetime64_any_dtype(cells) else _text(cells)


def _text(cells: Cells) -> Cells:
    """Return a column as text, NA where a cell is missing."""
    text = cells.astype("string").str.strip()
    return text.where(~text.isin(_MISSING))


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[TextIO]:
    """Open a file of text, compressed or not."""
    opener = gzip.open if path.suffix.lower() == ".gz" else open
    with opener(path, "rt", encoding="utf-8-sig", newline="") as file:
        assert isinstance(file, io.TextIOWrapper)
        yield file


def _check_widths(path: Path, file: TextIO, separator: str) -> int:
    """Return how many cells each row has: pandas would fill up short ones."""
    limit = csv.field_size_limit(sys.maxsize)
    try:
        width = 0
        for number, row in enumerate(_cells(file, separator)):
            width = width or len(row)
            if len(row) != width:
                raise DataError(
                    f"{path}: row {number} has {len(row)} cells, the first line {width}"
                )
    finally:
        csv.field_size_limit(limit)
    if not width:
        raise DataError(f"{path} is empty")
    return width


def _cells(file: TextIO, separator: str) -> Iterator[list[str]]:
    if separator == " ":
        return filter(None, (line.split() for line in file))
    rows = csv.reader(file, delimiter=separator, skipinitialspace=True)
    return (row for row in rows if row)


def _is_header(first: Sequence[str], below: Frame, names: Collection[str]) -> bool:
    """Return whether the first row names the columns.

    It does if it has the names that are looked for, or if it does not look like the rows below:
    numbers where they have numbers, and text that occurs again.
    """
    if any(name in first for name in names if name):
        return True
    if [*first] == [*map(str, range(len(first)))] or not len(below):
        return True
    alike, again = True, all(map(is_number, first))
    for i, name in enumerate(first):
        cells = below.iloc[:, i]
        cells = cells[~cells.isin(_MISSING)]
        if name in _MISSING or not len(cells):
            continue
        alike = alike and is_number(name) == bool(cells.map(is_number).mean() > 0.5)
        again = again or (not is_number(name) and name in set(cells))
    return not (alike and again)


def _checked_names(path: Path, header: list[str]) -> list[str]:
    if not any(header):
        raise DataError(f"{path} is empty")
    for i, name in enumerate(header):
        if not name:
            raise DataError(f"{path}: column {i + 1} has no name")
        if name in header[:i]:
            raise DataError(f"{path}: two columns are called {name!r}")
    return header
