"""A data set: its types, and the way from an index to a batch."""

import dataclasses
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int, UInt8
from torch import Tensor
from torch.utils._pytree import tree_map

from funcloss._names import listed
from funcloss.app.data.records import Column
from funcloss.app.data.streaming import Stream, item_shape
from funcloss.errors import ConfigError, DataError
from funcloss.typing import Batch, Inputs


@dataclasses.dataclass(frozen=True, eq=False)
class Examples:
    """Inputs and their labels on one device; inputs too large to hold are a stream."""

    # images (n, height, width, channels), uint8 or float: a permuted view is channels-last;
    # features (n, features), those of a table in float64; or whatever a model takes
    inputs: Tensor | Stream
    labels: Int[Tensor, " n"]
    # costs of each example by name, float64 on the CPU
    amounts: dict[str, Float[Tensor, " n"]] = dataclasses.field(default_factory=dict)
    costs: Float[Tensor, "n decisions"] | None = None  # made of them, for a loss that takes costs
    rows: Int[Tensor, " n"] | None = None  # in what they were read from, from 1; on the CPU
    files: tuple[str, ...] = ()  # of each example, where it has one of its own


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """The splits of a data set, and what is needed to read a prediction on it."""

    name: str
    classes: tuple[str, ...]  # names, in the order of the labels
    train: Examples
    validation: Examples  # may be empty
    test: Examples
    # of a channel, pixels in 0..1 where they are uint8; of a feature; empty: inputs go as they are
    mean: Float[Tensor, " channels"]
    std: Float[Tensor, " channels"]
    note: str = ""  # what readers of the results must know
    columns: tuple[Column, ...] = ()  # of a table
    notes: tuple[str, ...] = ()  # what was done in reading
    measured: bool = False  # mean and deviation are those of train
    cut: bool = False  # validation was cut from train, and has its class frequencies
    fingerprint: str = ""  # of the data as it was loaded, see :func:`fingerprint`

    @property
    def splits(self) -> dict[str, Examples]:
        """Training, validation and test examples by name."""
        return {"train": self.train, "validation": self.validation, "test": self.test}

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one input to a model: channels, height and width of an image."""
        shape = item_shape(self.train.inputs)
        return (shape[2], *shape[:2]) if self.has_images else shape

    @property
    def has_images(self) -> bool:
        """Whether the inputs are images, which can be resized and shown."""
        return len(item_shape(self.train.inputs)) == 3 and len(self.mean) > 0


def normalised(
    inputs: Tensor, mean: Float[Tensor, " channels"], std: Float[Tensor, " channels"]
) -> Tensor:
    """Return examples as a network takes them, ``(input - mean) / std``, images channels-last.

    Args:
        inputs: Images ``(n, height, width, channels)``, uint8 pixels standing for 0..1 in steps of
            1/255; or features ``(n, channels)``, which float64 keeps apart where float32 would
            round them to one number, as it does with times in seconds since 1970.
        mean: Mean of each channel, shape ``(channels,)``; empty: inputs go as they are.
        std: Standard deviation of each channel, shape ``(channels,)``.

    Returns:
        float32 of shape ``(n, channels, height, width)`` or ``(n, channels)``, on the device of
        ``inputs``.

    Example:
        >>> white = torch.full((1, 2, 2, 1), 255, dtype=torch.uint8)
        >>> normalised(white, torch.tensor([0.0]), torch.tensor([0.5])).shape
        torch.Size([1, 1, 2, 2])
    """
    if not len(mean):
        return inputs
    if mean.dtype == torch.float64:
        return ((inputs.double() - mean) / std).float()
    unit = 255.0 if inputs.dtype == torch.uint8 else 1.0
    scaled = torch.addcmul(-mean / std, inputs.float(), 1.0 / (unit * std))
    return rearrange(scaled, "n h w c -> n c h w") if scaled.dim() == 4 else scaled


def get_batch(dataset: Dataset, examples: Examples, index: Int[Tensor, " batch"]) -> Batch:
    """Return the batch of examples at ``index``, normalised by the data set's mean and deviation.

    Args:
        dataset: The data set, for its mean and standard deviation.
        examples: One of its splits.
        index: Which examples, shape ``(batch,)``, on their device.

    Returns:
        Inputs ``(batch, channels, height, width)`` of images, ``(batch, features)`` of a table,
        labels ``(batch,)``, and costs ``(batch, decisions)`` where the examples have some.

    Raises:
        DataError: a streamed input cannot be read.
    """
    if isinstance(examples.inputs, Stream):
        return next(iter_batches(dataset, examples, [index]))
    held = examples.inputs
    inputs = normalised(held[index.to(held.device)], dataset.mean, dataset.std)
    return _batch(inputs.to(index.device), examples, index)


def _batch(inputs: Inputs, examples: Examples, index: Tensor) -> Batch:
    costs = None if examples.costs is None else examples.costs[index]
    return Batch(inputs, examples.labels[index], costs=costs)


def iter_batches(
    dataset: Dataset, examples: Examples, indices: Iterable[Int[Tensor, " batch"]]
) -> Iterator[Batch]:
    """Yield the batches at one index after another, as :func:`get_batch` returns them.

    Streamed inputs are read ahead.

    Args:
        dataset: The data set, for its mean and standard deviation.
        examples: One of its splits.
        indices: Of each batch, on the device of the labels.

    Raises:
        DataError: a streamed input cannot be read.
    """
    inputs, device = examples.inputs, examples.labels.device
    if isinstance(inputs, Tensor):
        yield from (get_batch(dataset, examples, index) for index in indices)
        return
    indices = list(indices)
    read = inputs.batches(indices, pinned=device.type == "cuda")
    for index, piece in zip(indices, read, strict=True):
        there = tree_map(lambda x: x.to(device, non_blocking=True), piece)
        if isinstance(there, Tensor):
            there = normalised(there, dataset.mean, dataset.std)
        yield _batch(there, examples, index)


def fingerprint(dataset: Dataset) -> str:
    """Return a number, in hexadecimal, that other data does not have.

    It is made of the names of classes and columns, the labels, and the inputs that are held; of
    streamed ones their number counts, and name and size of each file.

    Example:
        >>> empty = Examples(torch.zeros(0, 2), torch.zeros(0, dtype=torch.int64))
        >>> part = Examples(torch.zeros(3, 2), torch.tensor([0, 1, 1]))
        >>> none = torch.zeros(0)
        >>> fingerprint(Dataset("mine", ("a", "b"), part, empty, empty, none, none))
        '72913a39957ee85e'
    """
    made = hashlib.blake2b(digest_size=8)
    made.update(repr((dataset.classes, dataset.columns)).encode())
    for examples in dataset.splits.values():
        inputs = examples.inputs
        held = [inputs] if isinstance(inputs, Tensor) else []
        made.update(repr((len(examples.labels), item_shape(inputs))).encode())
        for tensor in (examples.labels, *held):
            plain = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
            made.update(plain.numpy().data)
        for file in () if held else examples.files:
            made.update(f"{os.path.basename(file)} {os.stat(file).st_size} ".encode())
    return made.hexdigest()


def with_classes(dataset: Dataset, classes: tuple[str, ...]) -> Dataset:
    """Return the data set with its labels counted as ``classes`` are, matched by name.

    Raises:
        DataError: it has other classes.
    """
    if dataset.classes == classes:
        return dataset
    if sorted(dataset.classes) != sorted(classes):
        raise DataError(
            f"{dataset.name} has the classes {listed(dataset.classes, 8)}, and the run was trained "
            f"on {listed(classes, 8)}"
        )
    place = torch.tensor([classes.index(name) for name in dataset.classes])

    def relabel(examples: Examples) -> Examples:
        labels = place.to(examples.labels.device)[examples.labels]
        return dataclasses.replace(examples, labels=labels)

    return dataclasses.replace(_with_splits(dataset, relabel), classes=classes)


def resized(dataset: Dataset, size: int) -> Dataset:
    """Return the data set with images of ``size`` by ``size`` pixels, interpolated and antialiased.

    Raises:
        ConfigError: the inputs are not images in memory.
    """

    def resize(examples: Examples) -> Examples:
        if not dataset.has_images or isinstance(examples.inputs, Stream):
            raise ConfigError(f"image_size: {dataset.name} has no images that can be resized")
        pieces = [_interpolated(piece, size) for piece in examples.inputs.split(4096)]
        return dataclasses.replace(examples, inputs=torch.cat(pieces))

    return _with_splits(dataset, resize)


def moved(dataset: Dataset, device: torch.device | str) -> Dataset:
    """Return the data set with its tensors on ``device``.

    Streams stay where they are, and so does float64 where the device has none.
    """

    def there(tensor: Tensor) -> Tensor:
        absent = tensor.dtype == torch.float64 and torch.device(device).type == "mps"
        return tensor if absent else tensor.to(device)

    def move(examples: Examples) -> Examples:
        inputs = examples.inputs
        placed = there(inputs) if isinstance(inputs, Tensor) else inputs
        costs = None if examples.costs is None else examples.costs.to(device)
        labels = examples.labels.to(device)
        return dataclasses.replace(examples, inputs=placed, labels=labels, costs=costs)

    scale = {"mean": there(dataset.mean), "std": there(dataset.std)}
    return dataclasses.replace(_with_splits(dataset, move), **scale)


def subset(examples: Examples, index: Int[Tensor, " some"]) -> Examples:
    """Return the examples at ``index``."""
    inputs = examples.inputs
    held = isinstance(inputs, Tensor)
    chosen = inputs[index.to(inputs.device)] if held else inputs.some(index)
    place = index.cpu()
    return Examples(
        chosen,
        examples.labels[index],
        {name: values[place] for name, values in examples.amounts.items()},
        None if examples.costs is None else examples.costs[index],
        None if examples.rows is None else examples.rows[place],
        tuple(examples.files[i] for i in place.tolist()) if examples.files else (),
    )


def joined(first: Examples, second: Examples) -> Examples:
    """Return the examples of both, held in memory."""
    assert isinstance(first.inputs, Tensor)
    assert isinstance(second.inputs, Tensor)
    return Examples(
        torch.cat([first.inputs, second.inputs]),
        torch.cat([first.labels, second.labels]),
        {name: torch.cat([a, second.amounts[name]]) for name, a in first.amounts.items()},
        rows=None
        if first.rows is None or second.rows is None
        else torch.cat([first.rows, second.rows]),
        files=first.files + second.files,
    )


def as_pixels(examples: Examples) -> UInt8[Tensor, "n height width channels"]:
    """Return images to be shown, on the CPU: floating ones from their darkest to their lightest."""
    inputs = examples.inputs
    if isinstance(inputs, Stream):
        inputs = torch.cat([*inputs.batches([torch.arange(len(inputs))])])
    if inputs.dtype == torch.uint8:
        return inputs.cpu()
    low, high = inputs.min(), inputs.max()
    return (255 * (inputs - low) / (high - low).clamp(min=1e-12)).round().to(torch.uint8).cpu()


def _with_splits(dataset: Dataset, change: Callable[[Examples], Examples]) -> Dataset:
    changed = {name: change(examples) for name, examples in dataset.splits.items()}
    return dataclasses.replace(dataset, **changed)


def _interpolated(images: Tensor, size: int) -> Tensor:
    pixels = rearrange(images, "n h w c -> n c h w").float()
    pixels = F.interpolate(pixels, size=(size, size), mode="bilinear", antialias=True)
    if images.dtype == torch.uint8:
        pixels = pixels.round().clamp(0, 255).to(torch.uint8)
    return rearrange(pixels, "n c h w -> n h w c")
