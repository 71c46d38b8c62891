"""The application: the commands, and what they do, as functions.

Its rooms load when they are first asked for.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from funcloss.app import (
        addresses,
        audits,
        choice,
        cli,
        config,
        data,
        registry,
        report,
        runs,
        sweep,
        train,
    )

__all__ = [
    "addresses",
    "audits",
    "choice",
    "cli",
    "config",
    "data",
    "registry",
    "report",
    "runs",
    "sweep",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'funcloss.app' has no attribute {name!r}")
    return importlib.import_module(f"funcloss.app.{name}")
