"""The application: the commands, and what they do, as functions.

Its rooms load when they are first asked for.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from funcloss.app import addresses, audits, cli, config, data, registry, report, runs, sweep

__all__ = [
    "addresses",
    "audits",
    "cli",
    "config",
    "data",
    "registry",
    "report",
    "runs",
    "sweep",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'funcloss.app' has no attribute {name!r}")
    return importlib.import_module(f"funcloss.app.{name}")
