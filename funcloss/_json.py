"""The one conversion of results to values that JSON has."""

import dataclasses
import math
from typing import Any

from torch import Tensor


def or_nan(value: float | None) -> float:
    """Return a number that JSON had, NaN for what is not defined."""
    return math.nan if value is None else value


def jsonable(value: Any) -> Any:
    """Return a value as JSON has it: records as dicts, numbers that are not finite as None.

    Args:
        value: Tensors, dataclasses, NamedTuples, dicts, lists and tuples, nested, of plain values.

    Example:
        >>> import torch
        >>> jsonable({"loss": torch.tensor([1.0, torch.nan]), "recall": (0.5, math.inf)})
        {'loss': [1.0, None], 'recall': [0.5, None]}
    """
    if isinstance(value, Tensor):
        return jsonable(value.tolist())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: jsonable(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if (as_dict := getattr(value, "_asdict", None)) is not None:  # a NamedTuple
        return jsonable(as_dict())
    if isinstance(value, dict):
        return {name: jsonable(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
