"""What a combinator gives back: a loss that can be pickled, compared and asked for facts."""

# Annotations stay text: a combinator may be called, and its loss defined, in what is being traced.
from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, cast

from torch import Tensor

from funcloss.typing import Correction, LossFn, Probabilities

Factor = float | Tensor | str  # a number, or the name of the option that brings it
_STATEMENTS = ("softmax", "none", "costs")


@dataclass(frozen=True, eq=False, repr=False)
class Combined:
    """A loss made of losses: as pure as they are, and equal to another of the same parts."""

    losses: tuple[Callable[..., Any], ...]
    name: ClassVar[str]
    keeps: ClassVar[tuple[str, ...]] = ()  # options that it takes and does not pass on

    def __repr__(self) -> str:
        """Return it as it was written: ``class_weighted(cross_entropy)``."""
        return f"{self.name}({', '.join(map(name_of, self.losses))})"

    def __eq__(self, other: object) -> bool:
        """Return whether the other was made in the same way of equal parts."""
        return type(self) is type(other) and vars(self) == vars(other)

    def __hash__(self) -> int:
        """Return the hash of its losses: equal tensors, among the factors, have other hashes.

        The compiler of torch 2.6 looks up the hash of what is made in its trace, still empty.
        """
        return hash((type(self), vars(self).get("losses")))

    @property
    def factors(self) -> tuple[Factor, ...]:
        """What it multiplies or divides by, numbers or names of the options that bring them."""
        return ()

    @property
    def options(self) -> frozenset[str]:
        """The names of the keywords that it takes, those of its losses included."""
        own = (*self.keeps, *factor_names(*self.factors))
        return frozenset(own).union(*map(options_of, self.losses))

    @property
    def couples_examples(self) -> bool:
        """Whether the value of one example depends on the others of its batch."""
        return any(couples_examples(loss) for loss in self.losses)

    @property
    def targets(self) -> str:
        """What its targets are: as those of its loss."""
        return targets_of(self.losses[0])

    @property
    def probabilities(self) -> Probabilities | None:
        """How its scores become probabilities: as those of its loss; None: not stated."""
        stated = probabilities_of(self.losses[0])
        return self.correction if callable(stated) else stated

    def correction(self, **options: Any) -> Correction:
        """Return the correction that the scores need under some options."""
        return correction_of(self.losses[0], passed_on(options, self.keeps))


def name_of(loss: Callable[..., Any]) -> str:
    """Return what a loss is called, for an error: the compiler of torch 2.6 traces no repr."""
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


def targets_of(loss: Callable[..., Any]) -> str:
    """Return what a loss says that its targets are, its ``targets``.

    Returns:
        ``"labels"``: class indices, which is what a loss that states nothing takes. ``"bits"``: 0
        or 1, or a probability of 1, of two classes. ``"signs"``: -1 or +1.

    Example:
        >>> from funcloss import class_weighted, losses
        >>> targets_of(losses.cross_entropy), targets_of(class_weighted(losses.hinge))
        ('labels', 'signs')
    """
    if isinstance(loss, functools.partial):
        loss = loss.func
    return getattr(loss, "targets", "labels")


def classes_of(
    loss: Callable[..., Any], *predictions: Tensor, options: Mapping[str, Any] | None = None
) -> int:
    """Return how many classes a loss of labels tells apart, columns where it says nothing.

    Example:
        >>> import torch
        >>> from funcloss.losses import coral, cross_entropy
        >>> classes_of(cross_entropy, torch.zeros(5, 3)), classes_of(coral, torch.zeros(5, 3))
        (3, 4)
    """
    stated = stated_classes(loss, *predictions, options=options or {})
    return predictions[0].shape[-1] if stated is None else stated


def stated_classes(
    loss: Callable[..., Any], *predictions: Tensor, options: Mapping[str, Any]
) -> int | None:
    """Return how many classes a loss says that it tells apart; None: it does not say.

    Two of bits or signs; what its ``classes(*predictions, **options)`` returns; as many as columns
    where their softmax gives the probabilities of the classes.
    """
    if targets_of(loss) != "labels":
        return 2
    if isinstance(loss, functools.partial):
        return stated_classes(loss.func, *predictions, options={**loss.keywords, **options})
    if isinstance(loss, Combined):
        inner = passed_on(dict(options), loss.keeps)
        return stated_classes(loss.losses[0], *predictions, options=inner)
    if (stated := getattr(loss, "classes", None)) is not None:
        return stated(*predictions, **options)
    softmax = callable(stated := probabilities_of(loss)) or stated == "softmax"
    return predictions[0].shape[-1] if softmax else None


def probabilities_of(loss: Callable[..., Any]) -> Probabilities | None:
    """Return how a loss says that its scores become probabilities, its ``probabilities``.

    Args:
        loss: A loss of labels: a function, a ``functools.partial`` of one, or what a combinator
            made.

    Returns:
        ``"softmax"``: ``softmax(scores)`` estimates the class probabilities under the training
        data. ``"none"``: the softmax of the scores estimates no probabilities. ``"costs"``: the
        scores have the costs of decisions in them already. A function of the loss's options, by
        name, to the :class:`funcloss.typing.Correction` that the scores need. None: the loss does
        not state it.

    Raises:
        ValueError: the loss states something else.

    Example:
        >>> import torch
        >>> from funcloss.losses import cross_entropy, logit_adjusted, multi_margin
        >>> probabilities_of(cross_entropy), probabilities_of(multi_margin)
        ('softmax', 'none')
        >>> adjusted = functools.partial(logit_adjusted, tau=2.0)
        >>> probabilities_of(adjusted)(class_prior=torch.tensor([0.25, 0.75])).offset
        tensor([-2.7726, -0.5754])
        >>> probabilities_of(lambda logits, labels: logits.sum(-1)) is None
        True
    """
    stated = getattr(loss, "probabilities", None)
    if stated is None and isinstance(loss, functools.partial):
        inside = probabilities_of(loss.func)
        if not callable(inside):
            return inside
        return functools.partial(inside, **passed_on(loss.keywords, ("where",)))
    if stated is None or callable(stated) or stated in _STATEMENTS:
        return cast("Probabilities | None", stated)  # as text: the compiler of torch 2.6 has no |
    raise ValueError(
        f"{name_of(loss)}.probabilities must be one of {', '.join(map(repr, _STATEMENTS))} or a "
        f"function of the loss's options that returns a Correction; got {stated!r}"
    )


def correction_of(loss: Callable[..., Any], options: Mapping[str, Any]) -> Correction:
    """Return the correction that the scores of a loss need to become probabilities.

    Args:
        loss: What :func:`probabilities_of` takes.
        options: Its options, by name; those that it does not take are ignored.

    Returns:
        ``Correction(1.0, 0.0)`` unless the loss states another.

    Example:
        >>> import torch
        >>> from funcloss import class_weighted, losses
        >>> weighted = class_weighted(losses.cross_entropy)
        >>> correction_of(weighted, {"class_weights": torch.tensor([1.0, 4.0])}).offset
        tensor([ 0.0000, -1.3863])
    """
    stated = probabilities_of(loss)
    if not callable(stated):
        return Correction()
    takes = options_of(loss) - {"where"}
    return stated(**{name: value for name, value in options.items() if name in takes})


def options_of(loss: Callable[..., Any]) -> frozenset[str]:
    """Return the names of the keywords that a loss takes, ``where`` among them.

    Example:
        >>> from funcloss import class_weighted, losses
        >>> sorted(options_of(class_weighted(losses.poly1)))
        ['class_weights', 'epsilon', 'where']
    """
    if isinstance(loss, Combined):
        return loss.options
    if isinstance(loss, functools.partial):
        return options_of(loss.func) | frozenset(loss.keywords)
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
