"""Loss functions for people whose mistakes do not cost the same.

Losses are pure functions (:mod:`funcloss.losses`), trained by a stateless step
(:mod:`funcloss.training`). Names load when they are first asked for: ``import funcloss`` alone
loads nothing, not even torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from funcloss import data, keys, losses, models, optim, training, typing
    from funcloss.combinators import class_weighted, class_weights_of, from_logits, one_hot_targets
    from funcloss.reduction import mean, weighted_mean
    from funcloss.training import load

__version__ = "0.1.0"

__all__ = [
    "class_weighted",
    "class_weights_of",
    "data",
    "from_logits",
    "keys",
    "load",
    "losses",
    "mean",
    "models",
    "one_hot_targets",
    "optim",
    "training",
    "typing",
    "weighted_mean",
]

_HOMES = {
    "class_weighted": "combinators",
    "class_weights_of": "combinators",
    "from_logits": "combinators",
    "load": "training",
    "mean": "reduction",
    "one_hot_targets": "combinators",
    "weighted_mean": "reduction",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'funcloss' has no attribute {name!r}")
    if name in _HOMES:
        return getattr(importlib.import_module(f"funcloss.{_HOMES[name]}"), name)
    return importlib.import_module(f"funcloss.{name}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
