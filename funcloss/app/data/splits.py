"""The splits of a data set: cut, counted, thinned out, measured."""

import dataclasses
import math
from collections.abc import Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor

from funcloss.app.data.columns import with_features
from funcloss.app.data.dataset import Dataset, Examples, subset
from funcloss.app.data.records import RawSplit, Rows
from funcloss.app.data.streaming import Stream, item_shape
from funcloss.errors import ConfigError, DataError

_MEASURED = 1_000  # streamed inputs whose mean and standard deviation stand for all
_VALUES_AT_ONCE = 2**17
IN_WORDS = {"train": "training", "validation": "validation", "test": "test"}


def make_dataset(
    name: str,
    splits: Mapping[str, RawSplit],
    *,
    scale: tuple[tuple[float, ...], tuple[float, ...]] | None = None,
    val_fraction: float = 0.1,
    test_fraction: float = 0.1,
    note: str = "",
) -> Dataset:
    """Check examples and split them into training, validation and test set.

    Args:
        name: Name of the data set.
        splits: ``train``, and perhaps ``validation`` and ``test``, of the same classes and columns.
            A split that is missing is cut from ``train``.
        scale: Mean and standard deviation of each channel, pixels in 0..1; None: measured on the
            training split, unless its inputs are what a model takes.
        val_fraction: Fraction of each class of ``train`` that becomes validation, if it is cut.
        test_fraction: Fraction of each class of ``train`` that becomes the test set, if it is cut.
        note: What readers of the results must know of the data.

    Returns:
        The data set. The splits depend on nothing but the labels, so every run sees the same.

    Raises:
        ConfigError: the fractions leave nothing to train on, or nothing to test on.
        DataError: there are no examples, inputs and labels differ in number, a label is out of
            range, the inputs of two splits are not alike, or a cell of a table is not what its
            column holds.
    """
    for split, raw in splits.items():
        _check_examples(f"{name}, {IN_WORDS[split]} set", raw, len(splits["train"].classes))
    fractions = (
        val_fraction if "validation" not in splits else 0.0,
        test_fraction if "test" not in splits else 0.0,
    )
    if sum(fractions) >= 1.0:
        raise ConfigError(
            f"val_fraction {val_fraction:g} and test_fraction {test_fraction:g} leave nothing to "
            "train on"
        )
    labels = splits["train"].labels
    kept, held, tested = stratified_split(labels, *fractions)
    if not len(kept) or not ("test" in splits or len(tested) or fractions[1] == 0.0):
        what = "train" if not len(kept) else "test"
        raise ConfigError(
            f"{name}: {len(labels):,} examples leave none to {what} on, at val_fraction "
            f"{val_fraction:g} and test_fraction {test_fraction:g}"
        )
    splits = with_features(splits, kept)
    _check_alike(name, splits)
    given = {split: _examples(raw) for split, raw in splits.items()}
    whole, first = given["train"], splits["train"]
    train = whole if len(kept) == len(labels) else subset(whole, kept)
    empty = torch.zeros(0)
    if scale is not None:
        mean, std = map(torch.tensor, scale)
    else:
        mean, std = (empty, empty) if first.unscaled else measured_scale(train)
    return Dataset(
        name=name,
        classes=first.classes,
        train=train,
        validation=given.get("validation") or subset(whole, held),
        test=given.get("test") or subset(whole, tested),
        mean=mean,
        std=std,
        note=note,
        columns=first.columns,
        notes=tuple(dict.fromkeys(line for raw in splits.values() for line in raw.notes)),
        measured=scale is None and not first.unscaled,
        cut="validation" not in given,
    )


def _examples(raw: RawSplit) -> Examples:
    assert not isinstance(raw.inputs, Rows)
    rows = torch.arange(1, len(raw.labels) + 1) if raw.rows is None else raw.rows
    return Examples(raw.inputs, raw.labels, raw.amounts, rows=rows, files=raw.files)


def measured_scale(
    examples: Examples,
) -> tuple[Float[Tensor, " channels"], Float[Tensor, " channels"]]:
    """Return mean and deviation of each channel or feature, the last axis; of a stream some count.

    uint8 pixels stand for 0..1; a constant has the standard deviation 1. They are float64 where the
    inputs are, else float32.

    Example:
        >>> features = torch.tensor([[0.0, 5.0], [2.0, 5.0]])
        >>> measured_scale(Examples(features, torch.tensor([0, 1])))
        (tensor([1., 5.]), tensor([1., 1.]))
    """
    inputs = examples.inputs
    if isinstance(inputs, Stream):
        some = torch.linspace(0, len(inputs) - 1, min(len(inputs), _MEASURED)).long()
        pieces = inputs.batches(some.split(100))
    else:
        pieces = inputs.split(max(1, _VALUES_AT_ONCE // inputs[:1].numel()))
    count, total, squares = 0, 0.0, 0.0
    first, dtype = None, torch.float32
    for piece in pieces:
        dtype = torch.float64 if piece.dtype == torch.float64 else torch.float32
        flat = piece.flatten(0, -2).double() / (255.0 if piece.dtype == torch.uint8 else 1.0)
        # Around the mean of the first piece: large features would cancel in the squares.
        first = flat.mean(0) if first is None else first
        flat = flat - first
        count, total, squares = count + len(flat), total + flat.sum(0), squares + (flat**2).sum(0)
    assert first is not None
    shift = torch.as_tensor(total / count)
    deviation = (torch.as_tensor(squares / count) - shift**2).clamp(min=0.0).sqrt()
    mean = shift + first
    constant = deviation <= 1e-7 * mean.abs()  # but for the rounding of the features
    deviation = torch.where(constant | (deviation == 0.0), 1.0, deviation)
    return mean.to(dtype), deviation.to(dtype)


def stratified_split(
    labels: Int[Tensor, " n"], *fractions: float, seed: int = 0
) -> tuple[Int[Tensor, " some"], ...]:
    """Split examples at random, each class in the same proportions.

    Args:
        labels: Class of each example, shape ``(n,)``.
        fractions: Fraction of each class that goes into the second split, the third, and so on.
        seed: Seed of the choice; the same seed gives the same splits.

    Returns:
        Indices of each split, in ascending order: first what is left, then one split per fraction.

    Raises:
        ValueError: the fractions are negative or reach 1 together.

    Example:
        >>> rest, tenth = stratified_split(torch.arange(20) % 2, 0.1)
        >>> len(rest), len(tenth)
        (18, 2)
    """
    if min(fractions, default=0.0) < 0.0 or sum(fractions) >= 1.0:
        raise ValueError(f"stratified_split: fractions must be in [0, 1) together, got {fractions}")
    generator = torch.Generator().manual_seed(seed)
    labels = labels.cpu()
    # A stable sort, so that thousands of classes take one pass.
    members = labels.argsort(stable=True).split(labels.unique(return_counts=True)[1].tolist())
    splits: list[list[Tensor]] = [[] for _ in range(len(fractions) + 1)]
    sizes = [_shares([len(m) for m in members], fraction) for fraction in fractions]
    for i, member in enumerate(members):
        shuffled = member[torch.randperm(len(member), generator=generator)]
        taken, left = [], len(member) - 1  # one of each class stays in the first split
        for size in sizes:
            taken.append(min(size[i], left))
            left -= taken[-1]
        pieces = shuffled.split([len(member) - sum(taken), *taken])
        for split, piece in zip(splits, pieces, strict=True):
            split.append(piece)
    empty = torch.zeros(0, dtype=torch.int64)
    return tuple(torch.cat([empty, *split]).sort().values for split in splits)


def _shares(counts: list[int], fraction: float) -> list[int]:
    """Return ``fraction`` of each count, rounded so that they add up to that of all."""
    exact = [fraction * count for count in counts]
    shares = [int(share) for share in exact]
    by_remainder = sorted(range(len(counts)), key=lambda i: shares[i] - exact[i])
    for i in by_remainder[: round(fraction * sum(counts)) - sum(shares)]:
        shares[i] += 1
    return shares


def class_counts(examples: Examples, classes: int) -> Int[Tensor, " classes"]:
    """Count the examples of each of ``classes`` classes.

    Example:
        >>> images = torch.zeros(3, 2, 2, 1, dtype=torch.uint8)
        >>> class_counts(Examples(images, torch.tensor([0, 2, 2])), 4)
        tensor([1, 0, 2, 0])
    """
    return examples.labels.bincount(minlength=classes)


def long_tailed(dataset: Dataset, factor: float, *, seed: int = 0) -> Dataset:
    """Thin out the training split: ``n_c = n_max * factor^(-c / (C - 1))`` examples of class ``c``.

    The classes are taken in the order of their labels, so the last is the rarest. Validation and
    test set stay as they are: scores on them are of the classes as they came.

    Args:
        dataset: A data set of ``C`` classes, at least 2, the largest with ``n_max`` examples.
        factor: Largest over smallest class of what is kept, at least 1.
        seed: Seed of which examples are kept; the same seed keeps the same.

    Returns:
        The data set with fewer training examples, in their order: ``n_c`` of a class, rounded
        down and at least 1; all of a class that has fewer.

    Raises:
        ConfigError: ``factor`` is below 1 or not finite, or there is but one class.

    Example:
        >>> images = torch.zeros(20, 2, 2, 1, dtype=torch.uint8)
        >>> split = RawSplit(images, torch.arange(20) % 2, ("a", "b"))
        >>> even = make_dataset("even", {"train": split, "test": split}, val_fraction=0.0)
        >>> class_counts(long_tailed(even, 5).train, 2)
        tensor([10,  2])

    References:
        Cui et al., "Class-balanced loss based on effective number of samples", 2019, section 5.1.
    """
    if not 1.0 <= factor < math.inf:
        raise ConfigError(f"imbalance must be at least 1 and finite, got {factor}")
    last = len(dataset.classes) - 1
    if last < 1:
        raise ConfigError(f"imbalance needs two classes, and {dataset.name} has {last + 1}")
    labels = dataset.train.labels.cpu()
    largest = int(labels.bincount().max())
    generator = torch.Generator().manual_seed(seed)
    kept = []
    for c in range(last + 1):
        members = (labels == c).nonzero().squeeze(1)
        shuffled = members[torch.randperm(len(members), generator=generator)]
        kept.append(shuffled[: max(1, int(largest / factor ** (c / last)))])
    index = torch.cat(kept).sort().values.to(dataset.train.labels.device)
    return dataclasses.replace(dataset, train=subset(dataset.train, index), cut=False)


def _check_examples(what: str, raw: RawSplit, classes: int) -> None:
    if len(raw.inputs) != len(raw.labels):
        raise DataError(f"{what}: {len(raw.inputs):,} inputs but {len(raw.labels):,} labels")
    for name, values in raw.amounts.items():
        if len(values) != len(raw.labels):
            raise DataError(
                f"{what}: {len(values):,} values of {name} but {len(raw.labels):,} labels"
            )
    if not len(raw.labels):
        raise DataError(f"{what}: no examples")
    low, high = int(raw.labels.min()), int(raw.labels.max())
    if low < 0 or high >= classes:
        raise DataError(f"{what}: labels must be in 0..{classes - 1}, got {low}..{high}")


def _check_alike(name: str, splits: Mapping[str, RawSplit]) -> None:
    forms = {split: _form(raw.inputs) for split, raw in splits.items()}
    for split, form in forms.items():
        if form != forms["train"]:
            raise DataError(
                f"{name}: the {split} split has inputs of {form}, the training split "
                f"{forms['train']}"
            )


def _form(inputs: Tensor | Stream | Rows) -> str:
    assert not isinstance(inputs, Rows)
    kind = "streamed" if isinstance(inputs, Stream) else str(inputs.dtype).removeprefix("torch.")
    kind = "float" if kind in ("float32", "float64") else kind
    return f"shape {item_shape(inputs)}, {kind}"
