"""Pictures of a data set, files or the items of another, brought to one form: held or streamed."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import EpsImagePlugin, Image
from torch import Tensor
from torch.utils.data import Dataset

from funcloss._files import reading, usable_memory
from funcloss.app.data.images import check_picture, each, open_image, orientation_of, pixels_of
from funcloss.app.data.records import InputSchema, LoadOptions, RawSplit
from funcloss.app.data.streaming import Stream, last_line
from funcloss.errors import ConfigError, DataError

_GREY = ("1", "L", "LA")
_HELD = 0.25  # of the machine's memory may go into images


@dataclass(frozen=True)
class Form:
    """Size and channels of all images of a data set."""

    size: tuple[int, ...]  # height and width
    channels: int
    resize: bool  # bring all images to the size, else require it


class Pictures(Dataset[Any]):
    """Images and their labels, as pixels once a form is given, when they are asked for."""

    def __init__(self, items: Any, targets: Tensor | None, form: Form | None = None) -> None:
        """Keep paths of files, or a data set of ``(picture, label)``, and the labels, if known."""
        self.items, self.targets, self.form = items, targets, form

    def __len__(self) -> int:
        """Return how many there are."""
        return len(self.items)

    @property
    def of_files(self) -> bool:
        """Whether they are files, and not the items of a data set."""
        return self.targets is not None and isinstance(self.items, list)

    def name(self, i: int) -> str:
        """Return what errors call one."""
        return self.items[i] if self.of_files else f"image {i}"

    @contextlib.contextmanager
    def opened(self, i: int) -> Iterator[tuple[Image.Image, int]]:
        """Give one picture and its label."""
        if self.of_files:
            assert self.targets is not None
            with open_image(self.items[i]) as picture:
                yield picture, int(self.targets[i])
        else:
            picture, label = self.item(i)
            broken = (SyntaxError, ValueError)
            with picture, reading(self.name(i), kind="an image", broken=broken):
                yield picture, int(label)

    def item(self, i: int) -> tuple[Any, Any]:
        """Return one item of a data set."""
        EpsImagePlugin.gs_binary = False  # torchvision opens any format: an EPS is never run
        try:
            return self.items[i]
        except Exception as error:  # somebody else's code
            kind = type(error).__name__
            raise DataError(f"image {i} cannot be read: {kind}: {last_line(error)}") from None

    def header(self, i: int) -> tuple[tuple[int, int], bool]:
        """Return height and width of one once it is upright, and whether it is grey."""
        with self.opened(i) as (picture, _):
            check_picture(picture, self.name(i))
            height, width = picture.height, picture.width
            # Asked for an EXIF block that is not there, a PNG is decoded; a TIFF turns its size.
            says = any("exif" in str(key) or "xmp" in str(key) for key in picture.info)
            if says and picture.format != "TIFF" and orientation_of(picture) >= 5:
                height, width = width, height
            return (height, width), picture.mode in _GREY

    def decoded(self, i: int) -> None:
        """Raise ``DataError`` unless one can be decoded."""
        with self.opened(i) as (picture, _):
            pixels_of(picture, self.name(i), (8, 8), 3)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        """Return pixels and label of one."""
        assert self.form is not None
        size, channels = self.form.size, self.form.channels
        with self.opened(i) as (picture, label):
            image = pixels_of(picture, self.name(i), size if self.form.resize else None, channels)
        if image.shape[:2] != size:
            raise _several_sizes(size, "others", tuple(image.shape[:2]), self.name(i))
        return image, label


def read_pictures(
    pictures: Mapping[str, Pictures],
    classes: Mapping[str, tuple[str, ...]],
    options: LoadOptions,
    schema: InputSchema | None,
    *,
    probed: int = 0,
) -> dict[str, RawSplit]:
    """Bring the pictures of each split to one form, and hold them or make streams of them.

    Args:
        pictures: By split.
        classes: By split.
        options: Size, and whether to stream; ``auto`` does what would fill more than a quarter of
            the memory.
        schema: Of the model that the images are brought to the size and channels of.
        probed: How many pictures stand for the form of all; 0: all are looked at.

    Raises:
        ConfigError: the images have several sizes and none was asked for.
        DataError: some cannot be read; it lists them.
    """
    every = [(those, i) for those in pictures.values() for i in range(len(those))]
    step = -(-len(every) // probed) if probed else 1
    try:
        headers = [*each(_header, every[::step], _name)]
    except DataError:
        for _ in each(_decode, every, _name):  # all that are broken, not the headers alone
            pass
        raise
    if schema is not None and schema.image_shape:
        channels, *size = schema.image_shape
        form = Form(tuple(size), channels, resize=True)
    else:
        form = _form_of(headers, [_name(one) for one in every[::step]], options.image_size)
    large = len(every) * form.size[0] * form.size[1] * form.channels > _HELD * usable_memory()
    streams = options.stream == "on" or (options.stream == "auto" and large)
    found = {}
    for split, those in pictures.items():
        formed = Pictures(those.items, those.targets, form)
        if streams:
            shape = (*form.size, form.channels)
            inputs = Stream(formed, torch.arange(len(formed)), shape, options.workers)
            labels = torch.as_tensor(inputs.labels())
        else:
            inputs, labels = _held(formed)
        found[split] = RawSplit(inputs, labels, classes[split])
    return found


def _header(one: tuple[Pictures, int]) -> tuple[tuple[int, int], bool]:
    return one[0].header(one[1])


def _decode(one: tuple[Pictures, int]) -> None:
    one[0].decoded(one[1])


def _name(one: tuple[Pictures, int]) -> str:
    return one[0].name(one[1])


def _form_of(
    headers: Sequence[tuple[tuple[int, int], bool]], names: Sequence[str], image_size: int
) -> Form:
    """Return the size and channels that images with such headers are brought to."""
    channels = 1 if all(grey for _, grey in headers) else 3
    if image_size:
        return Form((image_size, image_size), channels, resize=True)
    first: dict[tuple[int, int], str] = {}
    for (size, _), name in zip(headers, names, strict=True):
        first.setdefault(size, name)
    (size, name), *others = first.items()
    if others:
        raise _several_sizes(size, name, *others[0])
    return Form(size, channels, resize=False)


def _several_sizes(
    size: tuple[int, ...], path: str, other: tuple[int, ...], other_path: str
) -> ConfigError:
    return ConfigError(
        f"the images have several sizes, {size[0]}x{size[1]} ({path}) and {other[0]}x{other[1]} "
        f"({other_path}), height first: say with image_size what to bring them to"
    )


def _held(pictures: Pictures) -> tuple[Tensor, Tensor]:
    """Return all pixels and labels."""
    assert pictures.form is not None
    n, form = len(pictures), pictures.form
    pixels = torch.empty(n, *form.size, form.channels, dtype=torch.uint8)
    labels = torch.empty(n, dtype=torch.int64)

    def keep(i: int) -> None:
        pixels[i], labels[i] = pictures[i]

    for _ in each(keep, range(n), pictures.name):
        pass
    return pixels, labels
