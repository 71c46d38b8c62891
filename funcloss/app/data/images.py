"""Images as pixels: one file, a folder of class folders, or any data set of pictures."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import UInt8
from PIL import EpsImagePlugin, Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset

from funcloss._files import reading
from funcloss.app.data.records import InputSchema, LoadOptions, RawSplit, ordered, physical_memory
from funcloss.app.data.streaming import Stream, last_line
from funcloss.errors import ConfigError, DataError

_FORMATS = ("PNG", "JPEG")  # not all that Pillow knows: an EPS it gives to Ghostscript to run
IMAGES = (".png", ".jpg", ".jpeg")
_SPLITS = {"train": "train", "val": "validation", "valid": "validation", "validation": "validation"}
_SPLITS |= {"test": "test"}
_LOOKED_AT = 2_000  # files whose size and colours are read before any is decoded
_GREY = ("1", "L", "LA")
_DEEP = ("I", "F", "I;16", "I;16B", "I;16L")  # more than 8 bits per pixel
_AT_ONCE = 64
_HELD = 0.25  # of the machine's memory may go into images


def read_image(
    path: str | Path, size: tuple[int, ...] | None, channels: int, *, invert: bool = False
) -> UInt8[Tensor, "height width channels"]:
    """Read one image file as pixels, transparent ones on black.

    Args:
        path: The file.
        size: Height and width to bring it to; None: its own.
        channels: 1: grey; 3: red, green and blue.
        invert: Swap dark and light, transparent pixels being white before.

    Raises:
        DataError: it cannot be read, or is not a PNG or JPEG image of 8 bits per channel.
    """
    with open_image(path) as picture:
        return _pixels(picture, str(path), size, channels, invert=invert)


def _pixels(
    picture: Image.Image, what: str, size: tuple[int, ...] | None, channels: int, *, invert: bool
) -> Tensor:
    """Return the pixels of an image, ``what`` naming it in errors."""
    if picture.mode in _DEEP:
        raise DataError(f"{what} has more than 8 bits per pixel: save it with 8")
    picture = picture.convert("RGBA")
    ground = Image.new("RGBA", picture.size, "white" if invert else "black")
    image = Image.alpha_composite(ground, picture).convert("L" if channels == 1 else "RGB")
    image = image if size is None else image.resize((size[1], size[0]))
    image = ImageOps.invert(image) if invert else image
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return pixels.reshape(image.height, image.width, channels)


@contextlib.contextmanager
def open_image(path: str | Path) -> Iterator[Image.Image]:
    """Open an image file, a PNG or JPEG whatever its name says, to be decoded within.

    Raises:
        DataError: it cannot be read or decoded, or is of another format.
    """
    try:
        with Image.open(path, formats=_FORMATS) as file:
            yield file
    except UnidentifiedImageError:
        formats = " and ".join(_FORMATS)
        raise DataError(f"{path} is not an image that can be read: {formats} are") from None
    except Image.DecompressionBombError:
        raise DataError(f"{path} is not an image of a sensible size") from None
    except (OSError, SyntaxError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"cannot read {path}: {reason}") from None


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

    @contextlib.contextmanager
    def opened(self, i: int) -> Iterator[tuple[Image.Image, str, int]]:
        """Give one picture, its name and its label."""
        if self.targets is not None and isinstance(self.items, list):
            with open_image(self.items[i]) as picture:
                yield picture, self.items[i], int(self.targets[i])
        else:
            (picture, label), name = self.item(i), f"image {i}"
            with picture, reading(name, kind="an image", broken=(SyntaxError, ValueError)):
                yield picture, name, int(label)

    def item(self, i: int) -> tuple[Any, Any]:
        """Return one item of a data set."""
        EpsImagePlugin.gs_binary = False  # torchvision opens any format: an EPS is never run
        try:
            return self.items[i]
        except Exception as error:  # somebody else's code
            kind = type(error).__name__
            raise DataError(f"image {i} cannot be read: {kind}: {last_line(error)}") from None

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        """Return pixels and label of one."""
        assert self.form is not None
        size, channels = self.form.size, self.form.channels
        with self.opened(i) as (picture, name, label):
            wanted = size if self.form.resize else None
            image = _pixels(picture, name, wanted, channels, invert=False)
        if image.shape[:2] != size:
            raise _several_sizes(size, "others", tuple(image.shape[:2]), name)
        return image, label


def read_folder(
    folder: Path, options: LoadOptions, schema: InputSchema | None = None
) -> dict[str, RawSplit]:
    """Read a folder of class folders of PNG and JPEG files, or of such folders ``train``, ``test``.

    Args:
        folder: Holds a folder per class, named as it; or ``train`` and perhaps ``validation``
            (``val``) and ``test``, each of which does.
        options: Size, and whether to stream.
        schema: Of the model that the images are brought to the size and channels of.

    Returns:
        The splits that are there, by name.

    Raises:
        ConfigError: the images have several sizes and none was asked for.
        DataError: there are no classes or no images, or a file cannot be read.
    """
    folders = {f.name: f for f in _folders(folder)}
    if "train" in folders and set(folders) <= set(_SPLITS):
        found = {_SPLITS[name]: _class_files(path) for name, path in folders.items()}
        if len(found) < len(folders):
            raise DataError(f"{folder} has two folders of one split: {', '.join(folders)}")
    else:
        found = {"train": _class_files(folder)}
    classes = {split: ordered(groups) for split, groups in found.items()}
    pictures = {split: _of_files(groups, classes[split]) for split, groups in found.items()}
    return read_pictures(pictures, classes, options, schema)


def read_pictures(
    pictures: Mapping[str, Pictures],
    classes: Mapping[str, tuple[str, ...]],
    options: LoadOptions,
    schema: InputSchema | None,
    *,
    looked_at: int = _LOOKED_AT,
) -> dict[str, RawSplit]:
    """Bring the pictures of each split to one form, and hold them or make streams of them.

    The form is the schema's, else that of ``looked_at`` pictures. ``auto`` streams what would fill
    more than a quarter of the memory. Raises as :func:`read_folder` does.
    """
    if schema is not None and schema.image_shape:
        channels, *size = schema.image_shape
        form = Form(tuple(size), channels, resize=True)
    else:
        form = _form_of([*pictures.values()], options.image_size, looked_at)
    pixels = sum(map(len, pictures.values())) * form.size[0] * form.size[1] * form.channels
    large = pixels > _HELD * physical_memory()
    streams = options.stream == "on" or (options.stream == "auto" and large)
    found = {}
    for split, those in pictures.items():
        formed = Pictures(those.items, those.targets, form)
        if streams:
            shape = (*form.size, form.channels)
            inputs = Stream(formed, torch.arange(len(formed)), shape, options.workers)
            labels = torch.as_tensor(inputs.labels())
        else:
            inputs, labels = _decoded(formed)
        found[split] = RawSplit(inputs, labels, classes[split])
    return found


def _folders(folder: Path) -> list[Path]:
    with reading(folder):
        return sorted(f for f in folder.iterdir() if f.is_dir() and not f.name.startswith("."))


def _class_files(folder: Path) -> dict[str, list[Path]]:
    """Return the image files of each class folder, in the order of their names."""
    found = {}
    for group in _folders(folder):
        files = sorted(
            f for f in group.rglob("*") if f.suffix.lower() in IMAGES and not f.name.startswith(".")
        )
        if not files:
            raise DataError(f"{group}: the folder of a class has no PNG or JPEG file")
        found[group.name] = files
    if not found:
        raise DataError(
            f"{folder} holds no class folders: put the images of each class into a folder of its "
            "name"
        )
    return found


def _of_files(groups: Mapping[str, Sequence[Path]], classes: tuple[str, ...]) -> Pictures:
    counts = torch.tensor([len(groups[name]) for name in classes])
    labels = torch.arange(len(classes)).repeat_interleave(counts)
    return Pictures([str(file) for name in classes for file in groups[name]], labels)


def _form_of(pictures: Sequence[Pictures], image_size: int, looked_at: int) -> Form:
    """Return size and channels of pictures, ``looked_at`` of them at most."""
    sizes: dict[tuple[int, ...], str] = {}
    channels = 1
    every = [(those, i) for those in pictures for i in range(len(those))]
    for those, i in every[:: -(-len(every) // looked_at)]:
        with those.opened(i) as (picture, name, _):
            sizes.setdefault((picture.height, picture.width), name)
            grey = picture.mode in (*_GREY, *_DEEP)
        channels = channels if grey else 3
    if image_size:
        return Form((image_size, image_size), channels, resize=True)
    (size, name), *others = sizes.items()
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


def _decoded(pictures: Pictures) -> tuple[Tensor, Tensor]:
    """Return all pixels and labels, decoded on threads: Pillow lets go of Python's lock."""
    assert pictures.form is not None
    n, form = len(pictures), pictures.form
    pixels = torch.empty(n, *form.size, form.channels, dtype=torch.uint8)
    labels = torch.empty(n, dtype=torch.int64)
    with ThreadPoolExecutor() as pool:
        for start in range(0, n, _AT_ONCE):
            some = range(start, min(start + _AT_ONCE, n))
            for i, (image, label) in zip(some, pool.map(pictures.__getitem__, some), strict=True):
                pixels[i], labels[i] = image, label
    return pixels, labels
