"""Loss functions for people whose mistakes do not cost the same.

Losses are pure functions (:mod:`funcloss.losses`), trained by a stateless step
(:mod:`funcloss.training`), and :mod:`funcloss.audit` says who owns each update. Names load when
they are first asked for: ``import funcloss`` alone loads nothing, not even torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from funcloss import (
        app,
        audit,
        constraints,
        decisions,
        errors,
        keys,
        laws,
        losses,
        models,
        objectives,
        optim,
        sensitivity,
        training,
        transforms,
        typing,
    )
    from funcloss._custom_vjp import custom_vjp, from_numpy
    from funcloss.app.runs import load
    from funcloss.combinators import (
        channels_first,
        class_weighted,
        class_weights_of,
        couples_examples,
        from_logits,
        mixup,
        one_hot_targets,
        options_of,
        parts,
        probabilities_of,
        sample_weighted,
        scaled,
        smoothed,
        soft,
        summed,
        temperature,
        where,
    )
    from funcloss.modules import as_module, from_module
    from funcloss.reduction import mean, weighted_mean

__version__ = "0.1.0"

__all__ = [
    "app",
    "as_module",
    "audit",
    "channels_first",
    "class_weighted",
    "class_weights_of",
    "constraints",
    "couples_examples",
    "custom_vjp",
    "decisions",
    "errors",
    "from_logits",
    "from_module",
    "from_numpy",
    "keys",
    "laws",
    "load",
    "losses",
    "mean",
    "mixup",
    "models",
    "objectives",
    "one_hot_targets",
    "optim",
    "options_of",
    "parts",
    "probabilities_of",
    "sample_weighted",
    "scaled",
    "sensitivity",
    "smoothed",
    "soft",
    "summed",
    "temperature",
    "training",
    "transforms",
    "typing",
    "weighted_mean",
    "where",
]

_HOMES = {
    "as_module": "modules",
    "channels_first": "combinators",
    "class_weighted": "combinators",
    "class_weights_of": "combinators",
    "couples_examples": "combinators",
    "custom_vjp": "_custom_vjp",
    "from_logits": "combinators",
    "from_module": "modules",
    "from_numpy": "_custom_vjp",
    "load": "app.runs",
    "mean": "reduction",
    "mixup": "combinators",
    "one_hot_targets": "combinators",
    "options_of": "combinators",
    "parts": "combinators",
    "probabilities_of": "combinators",
    "sample_weighted": "combinators",
    "scaled": "combinators",
    "smoothed": "combinators",
    "soft": "combinators",
    "summed": "combinators",
    "temperature": "combinators",
    "weighted_mean": "reduction",
    "where": "combinators",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'funcloss' has no attribute {name!r}")
    if name in _HOMES:
        return getattr(importlib.import_module(f"funcloss.{_HOMES[name]}"), name)
    return importlib.import_module(f"funcloss.{name}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
