"""A data set in memory: its types, its parts, and the way from an index to a batch."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from funcloss.errors import ConfigError, DataError
from funcloss.typing import Batch


class Examples(NamedTuple):
    """Images and their labels, one tensor each, on one device."""

    images: UInt8[Tensor, "n height width channels"]  # NHWC: a permuted view is channels-last
    labels: Int[Tensor, " n"]


class Dataset(NamedTuple):
    """The parts of a data set, and what is needed to read a prediction on it."""

    name: str
    classes: tuple[str, ...]  # names, in the order of the labels
    train: Examples
    validation: Examples  # cut from the training set; may be empty
    test: Examples
    mean: Float[Tensor, " channels"]  # pixels in 0..1
    std: Float[Tensor, " channels"]
    note: str = ""  # what whoever reads the results must know of the data


def make_dataset(
    name: str,
    classes: tuple[str, ...],
    train: Examples,
    test: Examples | None,
    *,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    val_fraction: float = 0.1,
    note: str = "",
) -> Dataset:
    """Check images and labels, and part them into training, validation and test set.

    Args:
        name: Name of the data set.
        classes: Names of the classes, in the order of the labels.
        train: The training set, of which validation is cut.
        test: The test set; None cuts a stratified tenth of ``train`` first.
        mean: Mean of each channel, pixels in 0..1.
        std: Standard deviation of each channel.
        val_fraction: Part of what came as ``train`` that becomes validation.
        note: What whoever reads the results must know of the data.

    Returns:
        The data set. The parts depend on nothing but the labels, so every run sees the same.

    Raises:
        DataError: there are no images, images and labels differ in number, or a label is out of
            range.
    """
    for part, examples in (("training", train), ("test", test)):
        if examples is not None:
            _check_examples(f"{name}, {part} set", examples, len(classes))
    test_fraction = 0.1 if test is None else 0.0
    kept, validation, tested = stratified_split(train.labels, val_fraction, test_fraction)
    return Dataset(
        name=name,
        classes=classes,
        train=_subset(train, kept),
        validation=_subset(train, validation),
        test=_subset(train, tested) if test is None else test,
        mean=torch.tensor(mean),
        std=torch.tensor(std),
        note=note,
    )


def stratified_split(
    labels: Int[Tensor, " n"], *fractions: float, seed: int = 0
) -> tuple[Int[Tensor, " part"], ...]:
    """Part examples at random, each class in the same proportions.

    Args:
        labels: Class of each example, shape ``(n,)``.
        fractions: Part of each class that goes into the second part, the third, and so on.
        seed: Seed of the choice; the same seed gives the same parts.

    Returns:
        Indices of each part, in ascending order: first what is left, then one part a fraction.

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
    members = [(labels == label).nonzero().squeeze(1) for label in labels.unique()]
    parts: list[list[Tensor]] = [[] for _ in range(len(fractions) + 1)]
    sizes = [_shares([len(m) for m in members], fraction) for fraction in fractions]
    for i, member in enumerate(members):
        shuffled = member[torch.randperm(len(member), generator=generator)]
        taken = [size[i] for size in sizes]
        pieces = shuffled.split([len(member) - sum(taken), *taken])
        for part, piece in zip(parts, pieces, strict=True):
            part.append(piece)
    empty = torch.zeros(0, dtype=torch.int64)
    return tuple(torch.cat([empty, *part]).sort().values for part in parts)


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
    """Thin out the training part: ``n_c = n_max * factor^(-c / (C - 1))`` examples of class ``c``.

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
        >>> part = Examples(torch.zeros(20, 2, 2, 1, dtype=torch.uint8), torch.arange(20) % 2)
        >>> even = make_dataset("even", ("a", "b"), part, part, mean=(0.0,), std=(1.0,),
        ...                     val_fraction=0.0)
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
    return dataset._replace(train=_subset(dataset.train, index))


def normalised(
    images: UInt8[Tensor, "n height width channels"],
    mean: Float[Tensor, " channels"],
    std: Float[Tensor, " channels"],
) -> Float[Tensor, "n channels height width"]:
    """Return images as the network's input, ``(pixel / 255 - mean) / std``, channels-last.

    Args:
        images: Pixels in 0..255, shape ``(n, height, width, channels)``.
        mean: Mean of each channel, pixels in 0..1, shape ``(channels,)``.
        std: Standard deviation of each channel, shape ``(channels,)``.

    Returns:
        float32 of shape ``(n, channels, height, width)``, on the device of ``images``.

    Example:
        >>> white = torch.full((1, 2, 2, 1), 255, dtype=torch.uint8)
        >>> normalised(white, torch.tensor([0.0]), torch.tensor([0.5])).shape
        torch.Size([1, 1, 2, 2])
    """
    pixels = torch.addcmul(-mean / std, images.float(), 1.0 / (255.0 * std))
    return rearrange(pixels, "n h w c -> n c h w")


def take(dataset: Dataset, examples: Examples, index: Int[Tensor, " batch"]) -> Batch:
    """Return the batch of examples at ``index``, normalised as the data set says.

    Args:
        dataset: The data set, for its mean and standard deviation.
        examples: One of its parts.
        index: Which examples, shape ``(batch,)``, on their device.

    Returns:
        Inputs ``(batch, channels, height, width)`` and labels ``(batch,)``.
    """
    inputs = normalised(examples.images[index], dataset.mean, dataset.std)
    return Batch(inputs, examples.labels[index])


def resized(dataset: Dataset, size: int) -> Dataset:
    """Return the data set with images of ``size`` by ``size``, by antialiased interpolation.

    Args:
        dataset: A data set of images of any size.
        size: New height and width in pixels.

    Returns:
        The same examples, as uint8 images of the new size.
    """

    def resize(examples: Examples) -> Examples:
        pieces = [_interpolated(piece, size) for piece in examples.images.split(4096)]
        return Examples(torch.cat(pieces), examples.labels)

    return _with_parts(dataset, resize)


def moved(dataset: Dataset, device: torch.device | str) -> Dataset:
    """Return the data set with all of its tensors on ``device``."""
    moved_parts = _with_parts(dataset, lambda part: Examples(*(t.to(device) for t in part)))
    return moved_parts._replace(mean=dataset.mean.to(device), std=dataset.std.to(device))


def _with_parts(dataset: Dataset, change) -> Dataset:
    return dataset._replace(
        train=change(dataset.train),
        validation=change(dataset.validation),
        test=change(dataset.test),
    )


def _subset(examples: Examples, index: Tensor) -> Examples:
    return Examples(examples.images[index], examples.labels[index])


def _interpolated(images: Tensor, size: int) -> Tensor:
    pixels = rearrange(images, "n h w c -> n c h w").float()
    pixels = F.interpolate(pixels, size=(size, size), mode="bilinear", antialias=True)
    return rearrange(pixels.round().clamp(0, 255).to(torch.uint8), "n c h w -> n h w c")


def _check_examples(what: str, examples: Examples, classes: int) -> None:
    images, labels = examples
    if len(images) != len(labels):
        raise DataError(f"{what}: {len(images):,} images but {len(labels):,} labels")
    if len(labels) == 0:
        raise DataError(f"{what}: no images")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= classes:
        raise DataError(f"{what}: labels must be in 0..{classes - 1}, got {low}..{high}")
