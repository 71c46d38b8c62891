"""The cost matrix that a user writes as a CSV file."""

import math
import re
from pathlib import Path

from funcloss._files import TEXT, csv_rows, is_number
from funcloss.errors import ConfigError

_TRUTH = {"true", "truth", "actual", "label"}
_DECISION = {"decided", "decision", "predicted", "prediction"}


def read_cost_matrix(path: str | Path) -> dict[str, dict[str, float]]:
    r"""Read what decisions cost from a CSV file: rows the truth, columns the decision.

    Its first cell must say so, as ``true\decided`` does: a matrix that was written the other way
    round looks just as good. The first row names the decisions, the first column the true
    classes. Cells are separated by commas, semicolons or tabs.

    Args:
        path: A file in UTF-8.

    Returns:
        Costs by name of the true class, then of the decision, not yet held against any classes.

    Raises:
        ConfigError: the file cannot be read, is transposed or does not say whether it is, or a
            name or number is missing, given twice or none.
    """
    with csv_rows(path, ConfigError, most=TEXT) as read:
        stripped = ([cell.strip() for cell in row] for row in read)
        filled = [row for row in stripped if any(row)]
    if not filled:
        raise ConfigError(f"{path} is empty")
    header, *rows = filled
    _check_corner(path, header)
    decisions = _names(path, "row 1, the decisions,", header[1:])
    truths = _names(path, "column 1, the true classes,", [row[0] for row in rows])
    costs = {}
    for truth, row in zip(truths, rows, strict=True):
        if len(row) != len(header):
            raise ConfigError(f"{path}: row {truth!r} has {len(row)} cells, row 1 {len(header)}")
        cells = zip(decisions, row[1:], strict=True)
        costs[truth] = {d: _cost(f"{path}: row {truth!r}, column {d!r}", c) for d, c in cells}
    return costs


def _check_corner(path: str | Path, header: list[str]) -> None:
    """Raise unless the first cell names the truth before the decision."""
    corner = header[0]
    words = [word.removesuffix("s") for word in re.findall("[a-z]+", corner.lower())]
    truth, decision = (
        next((i for i, word in enumerate(words) if word in known), None)
        for known in (_TRUTH, _DECISION)
    )
    if truth is None or decision is None:
        why = f"does not say which axis is the truth: its first cell is {corner!r}"
        why = "has no names: its first row is all numbers" if all(map(is_number, header)) else why
        raise ConfigError(
            f"{path} {why}; write true\\decided into the first cell, the decisions after it and "
            "a true class before each row"
        )
    if decision < truth:
        raise ConfigError(
            f"{path} is transposed: its first cell {corner!r} makes the decisions its rows; swap "
            "its two axes, so that rows are the truth and columns the decision"
        )


def _names(path: str | Path, what: str, names: list[str]) -> list[str]:
    if not names:
        raise ConfigError(f"{path}: {what} has no name")
    for i, name in enumerate(names):
        if not name:
            raise ConfigError(f"{path}: {what} has no name in cell {i + 2}")
        if name in names[:i]:
            raise ConfigError(f"{path}: {what} has {name!r} twice")
        if not name.isprintable():  # it will be read back on a terminal
            raise ConfigError(f"{path}: {what} has {name!r}, a name that cannot be printed")
    return names


def _cost(where: str, cell: str) -> float:
    if not cell:
        raise ConfigError(f"{where}: the cost is missing")
    if not is_number(cell):
        comma = " (write a decimal point, not a comma)" if "," in cell else ""
        raise ConfigError(f"{where}: {cell!r} is not a number{comma}")
    if not math.isfinite(cost := float(cell)):
        raise ConfigError(f"{where}: the cost must be finite, got {cell}")
    return cost
