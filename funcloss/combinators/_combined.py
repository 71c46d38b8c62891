"""What a combinator gives back: a loss that knows what it was made of."""

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor

from funcloss.typing import LossFn

Factor = float | Tensor | str  # a number, or the name of the option that brings it


class Combined:
    """A loss made of losses: as pure as they are, and with a name and options to look up."""

    def __init__(
        self,
        call: Callable[..., Tensor],
        name: str,
        *losses: Callable[..., Any],
        takes: Iterable[str] = (),
    ) -> None:
        """Keep what to call, and of what and with which further options it was made."""
        self.call = call
        self.name = name
        self.losses = losses
        self.takes = tuple(takes)

    def __call__(self, *data: Tensor, **options) -> Tensor:
        """Return one value an example."""
        return self.call(*data, **options)

    def __repr__(self) -> str:
        """Return it as it was written: ``class_weighted(cross_entropy)``."""
        return f"{self.name}({', '.join(map(name_of, self.losses))})"

    @property
    def couples_examples(self) -> bool:
        """Whether the value of one example depends on the others of its batch."""
        return any(couples_examples(loss) for loss in self.losses)


def name_of(loss: Callable[..., Any]) -> str:
    """Return what a loss is called."""
    return getattr(loss, "__name__", None) or repr(loss)


def couples_examples(loss: Callable[..., Any]) -> bool:
    """Return whether a loss says that the value of one example depends on the others.

    Example:
        >>> from funcloss.losses import cross_entropy, nt_xent
        >>> couples_examples(cross_entropy), couples_examples(nt_xent)
        (False, True)
    """
    if isinstance(loss, functools.partial):
        loss = loss.func
    return getattr(loss, "couples_examples", False)


def options_of(loss: Callable[..., Any]) -> frozenset[str]:
    """Return the names of the keywords that a loss takes, ``where`` among them.

    Example:
        >>> from funcloss import class_weighted, losses
        >>> sorted(options_of(class_weighted(losses.poly1)))
        ['class_weights', 'epsilon', 'where']
    """
    if isinstance(loss, Combined):
        inner = [name for part in loss.losses for name in options_of(part)]
        return frozenset([*loss.takes, *inner])
    try:
        parameters = inspect.signature(loss).parameters.values()
    except ValueError:  # built in
        return frozenset()
    keywords = [p for p in parameters if p.kind is p.KEYWORD_ONLY or p.default is not p.empty]
    return frozenset(p.name for p in keywords if p.kind is not p.POSITIONAL_ONLY)


def factor_names(*factors: Factor) -> tuple[str, ...]:
    """Return the options that factors are named by."""
    return tuple(f for f in factors if isinstance(f, str))


def taken(factor: Factor, options: dict[str, Any], like: Tensor) -> float | Tensor:
    """Return a factor in the dtype of ``like``, from the options where it is a name."""
    if isinstance(factor, str) and factor not in options:
        raise TypeError(f"the option {factor!r} is missing: it is a factor of the loss")
    value = options[factor] if isinstance(factor, str) else factor
    if not isinstance(value, Tensor):
        return value
    if value.dim() != 0:
        raise ValueError(
            f"a factor must be a number or a scalar tensor, got shape {tuple(value.shape)}; "
            "sample_weighted weighs each example"
        )
    return value.to(like.dtype)


def not_of(names: tuple[str, ...], loss: LossFn) -> tuple[str, ...]:
    """Return the names of factors that are no options of the loss itself."""
    return tuple(name for name in names if name not in options_of(loss))


def passed_on(options: dict[str, Any], less: tuple[str, ...]) -> dict[str, Any]:
    """Return the options without those of some names."""
    return {name: value for name, value in options.items() if name not in less}


def masking(where: Tensor | None) -> dict[str, Tensor]:
    """Return ``where`` as a keyword if it is given: a loss without masks need not know the word."""
    return {} if where is None else {"where": where}
