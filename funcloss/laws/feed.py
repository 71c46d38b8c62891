"""The data that a loss is fed, drawn at random from the names of its positional parameters."""

from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from funcloss.laws.case import CLASSES, Batch, in_dtype

_TARGETS = ("labels", "signs", "targets")  # these are not differentiated
_WORDS = {
    *_TARGETS, "logits", "other_logits", "student_logits", "teacher_logits", "log_probs",
    "probabilities", "log_predictions", "predictions", "variances", "scores", "cost_estimates",
    "distances", "embeddings", "first", "second",
    "anchor", "positive", "negative", "anchors", "positives", "negatives",
}  # fmt: skip
_DOMAINS = {  # of predictions that may not be any number, the ends to try
    "probabilities": (0.0, 1.0),
    "log_probs": (-1e4, 0.0),
    "log_predictions": (-1e4, 80.0),  # beyond 88 the prediction itself overflows in float32
}


@dataclass(frozen=True)
class Feed:
    """Random data for parameters of these names, ``feed(n, generator)``.

    Example:
        >>> logits, labels = Feed(("logits", "labels"), (3,), 3)(8, Generator())
        >>> logits.shape, labels.shape
        (torch.Size([8, 3]), torch.Size([8]))
    """

    names: tuple[str, ...]  # as logits, labels
    shape: tuple[int, ...] = ()  # of one example's predictions
    classes: int = CLASSES
    first: tuple[int, ...] = ()  # classes that come before the others among the labels
    dtype: torch.dtype = torch.float64
    positive: bool = False  # whether values are above 0, as logarithms need

    def __call__(self, n: int, generator: Generator) -> Batch:
        """Return ``n`` examples."""
        drawn = {name: self._drawn(name, n, generator) for name in reversed(self.names)}
        data = tuple(drawn[name].exp() if self.positive else drawn[name] for name in self.names)
        return in_dtype(data, self.dtype)

    @property
    def predictions(self) -> int:
        """How many of the data come before the targets."""
        return next((i for i, name in enumerate(self.names) if name in _TARGETS), len(self.names))

    @property
    def extremes(self) -> tuple[float, ...]:
        """The ends of what the predictions may be."""
        if self.positive:
            return 1e4, 1e-4
        return _DOMAINS.get(self.names[0], (1e4, -1e4))

    @property
    def class_count(self) -> int:
        """How many classes an example may be of; 0: its targets are no classes."""
        if "labels" in self.names:
            return self.classes
        two = "signs" in self.names or self.names == ("logits", "targets")
        return 2 if two and not self.shape else 0

    def _drawn(self, name: str, n: int, generator: Generator) -> Tensor:
        of = self.names[0]
        if name == "labels":
            if of == "embeddings":  # of few classes, so that most have their like
                return torch.arange(n) % 2
            # Those that come first do, and sixteen examples have most of the classes.
            others = torch.randperm(self.classes, generator=generator).tolist()
            order = [*self.first, *(i for i in others if i not in self.first)]
            return torch.tensor(order)[torch.arange(n) % self.classes]
        if name == "signs":
            return 2.0 * (torch.rand(n, generator=generator) > 0.5).double() - 1.0
        if name == "targets" and of in ("logits", "probabilities"):
            return (torch.rand(n, *self.shape, generator=generator) > 0.5).double()
        if name == "targets" and of == "log_predictions":
            return torch.randint(4, (n, *self.shape), generator=generator).double()
        x = torch.randn(n, *self.shape, generator=generator, dtype=torch.float64)
        if name == "targets":
            return x.softmax(-1) if of == "log_probs" else x
        if name == "log_probs":
            return (2 * x).log_softmax(-1)
        if name == "probabilities":
            return (2 * x).sigmoid()
        if name == "variances":
            return x.exp()
        if name == "distances":
            return x.abs()
        return 2 * x if name.endswith(("logits", "scores")) else x


def feeds_for(
    names: tuple[str, ...], classes: int = CLASSES, first: tuple[int, ...] = ()
) -> list[Feed]:
    """Return what parameters of these names may be fed, likeliest first.

    Args:
        names: Positional parameters of a loss.
        classes: How many classes there are.
        first: Classes that come before the others among the labels.

    Returns:
        The candidates; logits and labels for names that say nothing.

    Example:
        >>> [feed.shape for feed in feeds_for(("probabilities", "targets"))]
        [(), (4,)]
    """
    of_classes = Feed(("logits", "labels"), (classes,), classes, first)
    vector = (vector_width(classes),)
    if len(names) < 2 or not set(names) <= _WORDS:
        return [of_classes]
    if "labels" in names:
        return [Feed(names, vector if names[0] == "embeddings" else (classes,), classes, first)]
    if names == ("log_probs", "targets"):  # distributions, or labels
        either = (names, ("log_probs", "labels"))
        return [Feed(named, (classes,), classes, first) for named in either]
    if names[0].startswith("log_") or names[-1].endswith("_logits"):
        return [Feed(names, (classes,), classes)]
    if not set(names) & set(_TARGETS):
        return [Feed(names, vector, classes)]
    row = (classes,) if names[0] == "logits" else vector
    either = [Feed(names, (), classes), Feed(names, row, classes)]
    # Labels are often called targets, and logits predictions.
    return [of_classes, *either] if names[0] in ("logits", "predictions") else either


def vector_width(classes: int) -> int:
    """Return the length of a vector that nothing takes for one entry per class."""
    return 4 if classes != 4 else 3
