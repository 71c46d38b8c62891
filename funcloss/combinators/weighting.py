"""How much an example, a class or a term counts."""

# Annotations stay text: a combinator may be called, and its loss defined, in what is being traced.
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from funcloss._checks import check_floating, check_labels, check_shape, check_where
from funcloss._numbers import product
from funcloss.combinators._combined import (
    Combined,
    Factor,
    factor_names,
    masking,
    name_of,
    not_of,
    options_of,
    passed_on,
    probabilities_of,
    stated_classes,
    taken,
    targets_of,
)
from funcloss.losses._shared import known_labels, masked
from funcloss.typing import Correction, LossFn, Probabilities


def class_weights_of(class_weights: Tensor, labels: Tensor, where: Tensor | None = None) -> Tensor:
    """Weight of each example's class, ``class_weights[label]``, 0 where an example does not count.

    Args:
        class_weights: Weight of each true class, shape ``(classes,)``.
        labels: Class indices in ``[0, classes)``, shape ``(*batch)``.
        where: Examples that count, shape ``(*batch)``; the labels of the others may be anything.

    Returns:
        Weights, shape ``(*batch)``, dtype of ``class_weights``.

    Raises:
        TypeError: ``class_weights`` is not floating point, or ``labels`` is.
        ValueError: ``class_weights`` is not a vector.
        IndexError: a label that counts is out of range; compiled, its weight is NaN.

    Example:
        >>> class_weights_of(torch.tensor([1.0, 5.0]), torch.tensor([1, 0, 1]))
        tensor([5., 1., 5.])
    """
    check_floating("class_weights_of", "class_weights", class_weights)
    check_labels("class_weights_of", "labels", labels)
    check_where("class_weights_of", where, tuple(labels.shape))
    if class_weights.dim() != 1:
        got = tuple(class_weights.shape)
        raise ValueError(f"class_weights_of: class_weights must have shape (classes,), got {got}")
    labels, spoiled = known_labels(
        "class_weights_of", masked(labels, where), class_weights.shape[0]
    )
    weights = class_weights.gather(0, labels.reshape(-1)).reshape(labels.shape)
    weights = weights if spoiled is None else weights + spoiled
    return weights if where is None else torch.where(where, weights, 0.0)


def class_weighted(loss: LossFn) -> LossFn:
    """Return ``class_weights[label] * loss``: each example at the cost of its true class.

    The result takes one more keyword, ``class_weights`` of shape ``(classes,)``, which may be
    mapped over and differentiated. Reduced with :func:`funcloss.mean`, the sum is divided by the
    number of examples, so a weight acts also at batch size one; torch's division by the sum of
    the weights is :func:`funcloss.weighted_mean`, on the unweighted loss.

    There are as many classes as weights: the loss may have other columns than classes, as
    :func:`funcloss.losses.coral` has thresholds. A two-class loss of bits or signs (its
    ``targets``) takes two weights; a target between 0 and 1 has the weight between theirs.

    Args:
        loss: A loss whose last data are labels, bits or signs.

    Returns:
        A loss of the same data with the keyword ``class_weights``. It raises ``ValueError`` if
        these are no vector or ``loss`` does not give one value per label, and ``IndexError`` if a
        label has no weight (compiled, the loss is NaN).

    Example:
        >>> from funcloss.losses import cross_entropy
        >>> weights = torch.tensor([1.0, 1.0, 5.0])
        >>> class_weighted(cross_entropy)(torch.zeros(2, 3), torch.tensor([0, 2]),
        ...                               class_weights=weights)
        tensor([1.0986, 5.4931])

    References:
        Elkan, "The foundations of cost-sensitive learning", 2001.
    """
    return ClassWeighted((loss,))


@dataclass(frozen=True, eq=False, repr=False)
class ClassWeighted(Combined):
    """What :func:`class_weighted` returns."""

    name = "class_weighted"
    keeps = ("class_weights",)

    @property
    def probabilities(self) -> Probabilities | None:
        """How its scores become probabilities: as those of its loss, without the weights."""
        stated = probabilities_of(self.losses[0])
        return self.correction if callable(stated) or stated == "softmax" else stated

    def correction(self, *, class_weights: Tensor, **options: Any) -> Correction:
        """Return the correction that the scores need under some options."""
        scale, offset = super().correction(**options)
        return Correction(scale, offset - class_weights.log())

    def __call__(
        self,
        *data: Tensor,
        class_weights: Tensor,
        where: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        """Return one value per example."""
        (loss,) = self.losses
        *predictions, labels = data
        check_floating("class_weighted", "class_weights", class_weights)
        classes = stated_classes(loss, *predictions, options=options)
        if classes is not None and class_weights.shape != (classes,):  # see name_of
            given = name_of(loss)
            check_shape("class_weighted", "class_weights", class_weights, (classes,), given)
        values = loss(*data, **masking(where), **options)
        # A loss that is reduced already would be weighted as a whole, which weighs no class.
        check_shape("class_weighted", "what the loss gives", values, labels.shape, "labels")
        weights = target_weights(loss, class_weights, labels, where)
        return product(weights.to(values.dtype), values)


def target_weights(
    loss: LossFn, class_weights: Tensor, targets: Tensor, where: Tensor | None = None
) -> Tensor:
    """Return the weight of each target of a loss: of its class, or of its bit or sign.

    Of two classes, a target between them has the weight between theirs; what does not count has
    weight 0.
    """
    kind = targets_of(loss)
    if kind == "labels":
        return class_weights_of(class_weights, targets, where)
    check_floating("target_weights", "class_weights", class_weights)
    check_shape("target_weights", "class_weights", class_weights, (2,), f"targets of {kind}")
    share = masked(targets, where).to(class_weights.dtype)
    share = share if kind == "bits" else (share + 1) / 2
    no, yes = class_weights.unbind()
    weights = (1 - share) * no + share * yes
    return weights if where is None else torch.where(where, weights, 0.0)


def sample_weighted(loss: LossFn) -> LossFn:
    """Return ``sample_weights * loss``: each example at its own importance.

    The result takes one more keyword, ``sample_weights`` of the shape of the values, which may be
    mapped over and differentiated.

    Args:
        loss: A loss.

    Returns:
        A loss with the keyword ``sample_weights``. It raises ``ValueError`` if these do not have
        one entry an example, and ``TypeError`` if they are not floating point.

    Example:
        >>> from funcloss.losses import squared_error
        >>> sample_weighted(squared_error)(torch.tensor([1.0, 2.0]), torch.zeros(2),
        ...                                sample_weights=torch.tensor([3.0, 0.0]))
        tensor([3., 0.])
    """
    return SampleWeighted((loss,))


@dataclass(frozen=True, eq=False, repr=False)
class SampleWeighted(Combined):
    """What :func:`sample_weighted` returns; of probabilities, those of the weighted data."""

    name = "sample_weighted"
    keeps = ("sample_weights",)

    def __call__(
        self,
        *data: Tensor,
        sample_weights: Tensor,
        where: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        """Return one value per example."""
        (loss,) = self.losses
        values = loss(*data, **masking(where), **options)
        check_floating("sample_weighted", "sample_weights", sample_weights)
        shape = tuple(values.shape)
        check_shape("sample_weighted", "sample_weights", sample_weights, shape, "the values")
        if where is not None:
            sample_weights = torch.where(where, sample_weights, 0.0)
        return product(sample_weights.to(values.dtype), values)


def scaled(loss: LossFn, factor: Factor) -> LossFn:
    """Return ``factor * loss``.

    Args:
        loss: A loss.
        factor: A number, a scalar tensor, or the name of an option that brings it with each call
            (from ``hyper``, in a training step).

    Returns:
        A loss of the same data, which takes the option that ``factor`` names, if it does.

    Example:
        >>> from funcloss.losses import squared_error
        >>> half = scaled(squared_error, 0.5)
        >>> half(torch.tensor([3.0]), torch.zeros(1))
        tensor([4.5000])
        >>> scaled(squared_error, "strength")(torch.tensor([3.0]), torch.zeros(1), strength=2.0)
        tensor([18.])
    """
    return Scaled((loss,), factor, not_of(factor_names(factor), loss))


@dataclass(frozen=True, eq=False, repr=False)
class Scaled(Combined):
    """What :func:`scaled` returns."""

    factor: Factor
    own: tuple[str, ...]  # the name of the factor, where the loss has no option of that name
    name = "scaled"

    @property
    def factors(self) -> tuple[Factor, ...]:
        """The factor."""
        return (self.factor,)

    def __call__(self, *data: Tensor, **options: Any) -> Tensor:
        """Return one value per example."""
        (loss,) = self.losses
        values = loss(*data, **passed_on(options, self.own))
        return product(taken(self.factor, options, values), values)


Terms = Mapping[str, tuple[Factor, LossFn]]


def parts(terms: Terms) -> Parts:
    """Return the terms of :func:`summed` one by one, weighted, to log them.

    Args:
        terms: ``(factor, loss)`` by name; a factor is a number, a scalar tensor or the name of the
            option that brings it.

    Returns:
        ``(*data, **options) -> {name: factor * loss}``. Each loss is given those of the options
        that it takes; ``where`` goes to all.

    Raises:
        ValueError: there is no term.

    Example:
        >>> from funcloss.losses import absolute_error, squared_error
        >>> terms = {"square": (1.0, squared_error), "line": (0.5, absolute_error)}
        >>> parts(terms)(torch.tensor([2.0]), torch.zeros(1))
        {'square': tensor([4.]), 'line': tensor([1.])}
    """
    if not terms:
        raise ValueError("summed, parts: there must be a term, got none")
    factors, summands = zip(*terms.values(), strict=True)
    return Parts(tuple(terms), factors, summands, tuple(tuple(options_of(x)) for x in summands))


@dataclass(frozen=True)
class Parts:
    """What :func:`parts` returns."""

    names: tuple[str, ...]
    factors: tuple[Factor, ...] = field(hash=False)  # equal tensors have other hashes
    losses: tuple[LossFn, ...]
    takes: tuple[tuple[str, ...], ...]  # the options of each loss

    def __call__(self, *data: Tensor, **options: Any) -> dict[str, Tensor]:
        """Return one value per example of each term."""
        known = [*factor_names(*self.factors), *(n for names in self.takes for n in names)]
        for name in options:
            if name not in known:
                expected = ", ".join(sorted(set(known))) or "none"
                raise TypeError(f"summed: no term takes the option {name!r}; they take {expected}")
        for name, names in zip(self.names, self.takes, strict=True):
            if options.get("where") is not None and "where" not in names:
                raise TypeError(f"summed: the term {name!r} takes no `where`, so it cannot mask")
        values = {}
        for name, factor, loss, names in zip(
            self.names, self.factors, self.losses, self.takes, strict=True
        ):
            own = {key: value for key, value in options.items() if key in names}
            of_term = loss(*data, **own)
            values[name] = product(taken(factor, options, of_term), of_term)
        return values


def summed(terms: Terms) -> LossFn:
    """Return the sum of weighted losses, ``sum(factor * loss)``.

    Args:
        terms: ``(factor, loss)`` by name; a factor is a number, a scalar tensor or the name of the
            option that brings it. The losses share their data; each is given those of the options
            that it takes, an option of one name goes to all that take it.

    Returns:
        A loss of the same data, which takes all their options. :func:`parts` of the same terms
        gives them unsummed.

    Raises:
        ValueError: there is no term.

    Example:
        >>> from funcloss.losses import cross_entropy, expected_cost
        >>> loss = summed({"fit": (1.0, cross_entropy), "cost": ("price", expected_cost)})
        >>> cost_matrix = torch.tensor([[0.0, 1.0], [4.0, 0.0]])
        >>> loss(torch.zeros(1, 2), torch.tensor([1]), cost_matrix=cost_matrix, price=0.5)
        tensor([1.6931])
    """
    return Summed(tuple(loss for _, loss in terms.values()), parts(terms))


@dataclass(frozen=True, eq=False, repr=False)
class Summed(Combined):
    """What :func:`summed` returns."""

    each: Parts
    name = "summed"

    @property
    def factors(self) -> tuple[Factor, ...]:
        """Those of its terms."""
        return self.each.factors

    @property
    def probabilities(self) -> Probabilities | None:
        """How its scores become probabilities, where its terms agree; costs in one are in all.

        Terms that need different corrections have their minimum where neither is right: none.
        """
        first, *others = self.losses
        stated = [probabilities_of(loss) for loss in self.losses]
        for statement in ("costs", "none", None):
            if statement in stated:
                return statement
        if all(statement == "softmax" for statement in stated):
            return "softmax"
        return self.correction if all(loss == first for loss in others) else "none"

    def __call__(self, *data: Tensor, **options: Any) -> Tensor:
        """Return one value per example."""
        first, *others = self.each(*data, **options).values()
        for values in others:
            first = first + values
        return first
