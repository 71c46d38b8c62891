"""What a loss is fed: other predictions, other targets, fewer examples."""

# Annotations stay text: a combinator may be called, and its loss defined, in what is being traced.
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from funcloss._checks import (
    check_floating,
    check_labels,
    check_number,
    check_shape,
    check_where,
    option_of,
)
from funcloss._numbers import product
from funcloss.combinators._combined import (
    Combined,
    Factor,
    classes_of,
    factor_names,
    masking,
    name_of,
    not_of,
    passed_on,
    probabilities_of,
    taken,
    targets_of,
)
from funcloss.losses._shared import known_labels, masked, one_hot
from funcloss.typing import Correction, LossFn, Probabilities


def from_logits(loss: LossFn) -> LossFn:
    """Return ``loss`` of log-probabilities as a loss of logits, ``loss(log_softmax(logits))``.

    Args:
        loss: A loss whose predictions are log-probabilities, such as :func:`funcloss.losses.nll`.

    Returns:
        The same loss of unnormalised logits, shape ``(*batch, classes)``.

    Example:
        >>> from funcloss.losses import nll
        >>> from_logits(nll)(torch.zeros(2, 4), torch.tensor([0, 3]))
        tensor([1.3863, 1.3863])
    """
    return FromLogits((loss,))


@dataclass(frozen=True, eq=False, repr=False)
class FromLogits(Combined):
    """What :func:`from_logits` returns."""

    name = "from_logits"

    def __call__(
        self, logits: Tensor, targets: Tensor, /, *, where: Tensor | None = None, **options: Any
    ) -> Tensor:
        """Return one value per example."""
        (loss,) = self.losses
        check_where("from_logits", where, tuple(logits.shape[:-1]))
        return loss(masked(logits, where).log_softmax(-1), targets, **masking(where), **options)


def one_hot_targets(loss: LossFn) -> LossFn:
    """Return a loss of values as a loss of labels, ``sum_c loss(prediction_c, [c == label])``.

    Args:
        loss: A loss of real values and targets, such as :func:`funcloss.losses.squared_error`.

    Returns:
        A loss of predictions ``(*batch, classes)`` and labels ``(*batch)``: the targets are 1 at
        the label and 0 elsewhere, and the values are summed over the classes.

    Example:
        >>> from funcloss.losses import squared_error
        >>> one_hot_targets(squared_error)(torch.tensor([[0.0, 0.5, 0.0]]), torch.tensor([1]))
        tensor([0.2500])

    References:
        Brier, "Verification of forecasts expressed in terms of probability", 1950, for
        predictions that are probabilities.
    """
    return OneHotTargets((loss,))


@dataclass(frozen=True, eq=False, repr=False)
class OneHotTargets(Combined):
    """What :func:`one_hot_targets` returns."""

    name = "one_hot_targets"

    @property
    def probabilities(self) -> Probabilities:
        """``"none"``: the value of each class is fitted by itself, without a softmax."""
        return "none"

    def __call__(
        self, predictions: Tensor, labels: Tensor, /, *, where: Tensor | None = None, **options: Any
    ) -> Tensor:
        """Return one value per example."""
        (loss,) = self.losses
        check_labels("one_hot_targets", "labels", labels)
        check_where("one_hot_targets", where, tuple(labels.shape))
        labels, spoiled = known_labels(
            "one_hot_targets", masked(labels, where), predictions.shape[-1]
        )
        targets = one_hot(labels, predictions.shape[-1]).to(predictions.dtype)
        targets = targets if spoiled is None else targets + spoiled[..., None]
        every = None if where is None else where[..., None].expand(targets.shape)
        return loss(predictions, targets, **masking(every), **options).sum(-1)


def temperature(loss: LossFn, value: Factor) -> LossFn:
    """Return ``loss`` of predictions divided by a temperature, ``loss(predictions / value)``.

    Above 1 it softens the softmax. The gradient shrinks with it: multiply by ``value ** 2``
    (:func:`funcloss.scaled`) to keep its size, as distillation does.

    Args:
        loss: A loss of logits and whatever follows them.
        value: A positive number, a scalar tensor, or the name of the option that brings it.

    Returns:
        A loss of the same data.

    Raises:
        ValueError: ``value`` is a number that is not positive.

    Example:
        >>> from funcloss.losses import cross_entropy
        >>> temperature(cross_entropy, 2.0)(torch.tensor([[2.0, 0.0]]), torch.tensor([0]))
        tensor([0.3133])

    References:
        Guo, Pleiss, Sun and Weinberger, "On calibration of modern neural networks", 2017.
    """
    names = factor_names(value)
    if not isinstance(value, str):
        check_number("temperature", "value", value, low=0, above=True)
    return Temperature((loss,), value, not_of(names, loss))


@dataclass(frozen=True, eq=False, repr=False)
class Temperature(Combined):
    """What :func:`temperature` returns."""

    value: Factor
    own: tuple[str, ...]  # the name of the factor, where the loss has no option of that name
    name = "temperature"

    @property
    def factors(self) -> tuple[Factor, ...]:
        """The temperature."""
        return (self.value,)

    @property
    def probabilities(self) -> Probabilities | None:
        """How its scores become probabilities: divided by the temperature, as those of its loss."""
        stated = probabilities_of(self.losses[0])
        return self.correction if callable(stated) or stated == "softmax" else stated

    def correction(self, **options: Any) -> Correction:
        """Return the correction that the scores need under some options."""
        scale, offset = super().correction(**options)
        like = scale if isinstance(scale, Tensor) else torch.tensor(scale, dtype=torch.float64)
        return Correction(scale / taken(self.value, options, like), offset)

    def __call__(self, predictions: Tensor, *targets: Tensor, **options: Any) -> Tensor:
        """Return one value per example."""
        (loss,) = self.losses
        predictions = masked(predictions, options.get("where"))
        cooled = predictions / taken(self.value, options, predictions)
        return loss(cooled, *targets, **passed_on(options, self.own))


def soft(loss: LossFn) -> LossFn:
    """Return a loss of labels as a loss of distributions, ``sum_k targets_k * loss(logits, k)``.

    The expectation of the loss over a label drawn from the targets. It looks at each class once,
    so it costs as many times the loss as there are classes; of cross-entropy alone
    :func:`funcloss.losses.soft_cross_entropy` is the same at the price of one.

    Args:
        loss: A loss of logits and labels.

    Returns:
        A loss of logits and targets ``(*batch, classes)``; it raises ``ValueError`` if these have
        another number of classes than the loss.

    Example:
        >>> from funcloss.losses import cross_entropy
        >>> soft(cross_entropy)(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.5, 0.5]]))
        tensor([0.8133])
    """
    return Soft((loss,))


@dataclass(frozen=True, eq=False, repr=False)
class Soft(Combined):
    """What :func:`soft` returns."""

    name = "soft"

    def __call__(
        self, logits: Tensor, targets: Tensor, /, *, where: Tensor | None = None, **options: Any
    ) -> Tensor:
        """Return one value per example."""
        (loss,) = self.losses
        check_floating("soft", "targets", targets)
        classes, batch = classes_of(loss, logits, options=options), tuple(logits.shape[:-1])
        if targets.shape != (shape := (*batch, classes)):  # see name_of
            check_shape("soft", "targets", targets, shape, f"logits and {name_of(loss)}")
        check_where("soft", where, batch)
        targets = masked(targets, where).to(logits.dtype)
        return product(targets, _of_each_class(loss, logits, where, options, classes)).sum(-1)


def smoothed(loss: LossFn, smoothing: Factor = 0.1, *, classes: int | None = None) -> LossFn:
    """Return a loss under smoothed labels, ``(1 - e) * loss(label) + e * mean_k loss(k)``.

    Of a two-class loss of bits or signs the mean is over both.

    Under class weights the order says what is weighted. ``class_weighted(smoothed(loss))``, the
    order to prefer, gives the smoothed loss the weight of the true class, ``w[label] * ((1 - e) *
    loss(label) + e * mean_k loss(k))``: an example costs what its class costs.
    ``smoothed(class_weighted(loss))`` is what ``torch.nn.functional.cross_entropy`` does with
    ``weight`` and ``label_smoothing``, ``(1 - e) * w[label] * loss(label) + e * mean_k w[k] *
    loss(k)``: every example then pays a little for the costly classes that it is not.

    It costs as many times the loss as there are classes; of cross-entropy alone, the option
    ``label_smoothing`` is the same at the price of one.

    Args:
        loss: A loss of logits and labels, or of two classes.
        smoothing: Part of the label spread over all classes, in ``[0, 1]``: a number, a scalar
            tensor, or the name of the option that brings it.
        classes: How many there are, where a loss of yours has another number of columns and does
            not state it.

    Returns:
        A loss of the same data.

    Raises:
        ValueError: ``smoothing`` is a number out of range.

    Example:
        >>> from funcloss.losses import cross_entropy
        >>> smoothed(cross_entropy, 0.5)(torch.tensor([[2.0, 0.0]]), torch.tensor([0]))
        tensor([0.6269])

    References:
        Szegedy et al., "Rethinking the inception architecture for computer vision", 2016.
    """
    names = factor_names(smoothing)
    if not isinstance(smoothing, str):
        check_number("smoothed", "smoothing", smoothing, low=0, high=1)
    return Smoothed((loss,), smoothing, not_of(names, loss), classes)


@dataclass(frozen=True, eq=False, repr=False)
class Smoothed(Combined):
    """What :func:`smoothed` returns."""

    smoothing: Factor
    own: tuple[str, ...]  # the name of the factor, where the loss has no option of that name
    of: int | None  # classes
    name = "smoothed"

    @property
    def factors(self) -> tuple[Factor, ...]:
        """The smoothing."""
        return (self.smoothing,)

    def __call__(
        self, logits: Tensor, labels: Tensor, /, *, where: Tensor | None = None, **options: Any
    ) -> Tensor:
        """Return one value per example."""
        (loss,) = self.losses
        part = taken(self.smoothing, options, logits)
        rest = passed_on(options, self.own)
        of_label = loss(logits, labels, **masking(where), **rest)
        classes = self.of or classes_of(loss, logits, options=rest)
        even = _of_each_class(loss, logits, where, rest, classes).mean(-1)
        return product(1 - part, of_label) + product(part, even)


def mixup(loss: LossFn) -> LossFn:
    """Return a loss of mixed examples, ``mix * loss(label) + (1 - mix) * loss(other_label)``.

    Args:
        loss: A loss of predictions and targets.

    Returns:
        A loss of predictions (of inputs mixed in the same proportion), targets and the targets of
        what was mixed in, with the keyword ``mix``: a number, or one an example.

    Example:
        >>> from funcloss.losses import cross_entropy
        >>> logits, labels, others = torch.zeros(1, 2), torch.tensor([0]), torch.tensor([1])
        >>> mixup(cross_entropy)(logits, labels, others, mix=0.7)
        tensor([0.6931])

    References:
        Zhang, Cisse, Dauphin and Lopez-Paz, "mixup: beyond empirical risk minimization", 2018.
    """
    return Mixup((loss,))


@dataclass(frozen=True, eq=False, repr=False)
class Mixup(Combined):
    """What :func:`mixup` returns."""

    name = "mixup"
    keeps = ("mix",)

    @property
    def factors(self) -> tuple[Factor, ...]:
        """The proportion of the first example."""
        return ("mix",)

    def __call__(
        self,
        predictions: Tensor,
        targets: Tensor,
        others: Tensor,
        /,
        *,
        mix: float | Tensor,
        **options: Any,
    ) -> Tensor:
        """Return one value per example."""
        (loss,) = self.losses
        first, second = (loss(predictions, t, **options) for t in (targets, others))
        mix = option_of("mixup", "mix", mix, tuple(first.shape), low=0, high=1)
        if isinstance(mix, Tensor):
            if options.get("where") is not None:
                mix = torch.where(options["where"], mix, 0.0)
            mix = mix.to(first.dtype)
        return product(mix, first) + product(1 - mix, second)


def where(loss: LossFn, counts: Callable[..., Tensor]) -> LossFn:
    """Return a loss that counts only some examples; the others give 0, with zero gradient.

    Reduce it with ``mean(values, where=counts(...))`` to divide by the number of those.

    Args:
        loss: A loss.
        counts: From its data to which examples count, bool ``(*batch)``.

    Returns:
        A loss of the same data; with its own ``where`` an example counts if both say so.

    Example:
        >>> from funcloss.losses import cross_entropy
        >>> known = where(cross_entropy, lambda logits, labels: labels != -100)
        >>> known(torch.zeros(2, 2), torch.tensor([1, -100]))
        tensor([0.6931, 0.0000])
    """
    return Where((loss,), counts)


@dataclass(frozen=True, eq=False, repr=False)
class Where(Combined):
    """What :func:`where` returns."""

    counts: Callable[..., Tensor]
    name = "where"

    def __call__(self, *data: Tensor, where: Tensor | None = None, **options: Any) -> Tensor:
        """Return one value per example."""
        (loss,) = self.losses
        some = self.counts(*data)
        return loss(*data, where=some if where is None else some & where, **options)


def channels_first(loss: LossFn) -> LossFn:
    """Return a loss whose classes are the last axis as one whose classes are axis 1, as in torch.

    The outermost combinator, of any loss and of what any other combinator returns. Predictions of
    shape ``(N, C, H, W)``, and whatever else has as many axes, have axis 1 moved to the end;
    labels, ``where`` and weights of shape ``(N, H, W)`` stay as they are.

    Args:
        loss: A loss.

    Returns:
        A loss of the same data, classes along axis 1, one value per pixel, ``(N, H, W)``; of a loss
        of single values, such as a binary one, ``(N, C, H, W)``. It raises ``ValueError`` if
        predictions have no axis 1 but are more than the scores of one example.

    Example:
        >>> from funcloss.losses import softmax_focal
        >>> images, masks = torch.zeros(8, 4, 16, 16), torch.zeros(8, 16, 16, dtype=torch.long)
        >>> channels_first(softmax_focal)(images, masks).shape
        torch.Size([8, 16, 16])
    """
    return ChannelsFirst((loss,))


@dataclass(frozen=True, eq=False, repr=False)
class ChannelsFirst(Combined):
    """What :func:`channels_first` returns."""

    name = "channels_first"

    def __call__(self, predictions: Tensor, *rest: Tensor, **options: Any) -> Tensor:
        """Return one value per example."""
        (loss,) = self.losses
        axes = predictions.dim()

        def last(value: Any) -> Any:
            moves = isinstance(value, Tensor) and value.dim() == axes > 2
            return value.movedim(1, -1) if moves else value

        options = {name: last(option) for name, option in options.items()}
        values = loss(last(predictions), *map(last, rest), **options)
        return values.movedim(-1, 1) if values.dim() == axes > 2 else values


def _of_each_class(
    loss: LossFn, predictions: Tensor, where: Tensor | None, options: dict, classes: int
) -> Tensor:
    """Return the loss as if each class were the label, ``(*batch, classes)``."""
    targets = torch.arange(classes, device=predictions.device)
    if targets_of(loss) == "labels":
        shape = (*predictions.shape[:-1], classes)
        rows = predictions[..., None, :].expand(*shape, predictions.shape[-1])
    else:  # two classes, of which an example has one score
        shape = (*predictions.shape, classes)
        rows = predictions[..., None].expand(shape)
        targets = (targets if targets_of(loss) == "bits" else 2 * targets - 1).to(rows.dtype)
    every = None if where is None else where[..., None].expand(shape)
    return loss(rows, targets.expand(shape), **masking(every), **options)
