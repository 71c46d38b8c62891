"""Images from files: one at a time, or a folder of class folders."""

import contextlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import UInt8
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset

from funcloss.app.data.raw import Raw, ordered, physical_memory
from funcloss.app.data.streaming import Stream
from funcloss.errors import ConfigError, DataError

_FORMATS = ("PNG", "JPEG")  # not all that Pillow knows: an EPS it gives to Ghostscript to run
_SUFFIXES = (".png", ".jpg", ".jpeg")
_PARTS = {"train": "train", "val": "validation", "valid": "validation", "validation": "validation"}
_PARTS |= {"test": "test"}
_LOOKED_AT = 2_000  # files whose size and colours are read before any is decoded
_GREY = ("1", "L", "LA")
_DEEP = ("I", "F", "I;16", "I;16B", "I;16L")  # more than 8 bits a pixel
_AT_ONCE = 64
_HELD = 0.25  # of the machine's memory may go into images


def read_image(
    path: str | Path, size: tuple[int, ...] | None, channels: int, *, invert: bool = False
) -> UInt8[Tensor, "height width channels"]:
    """Read one image file as pixels, what is transparent on black.

    Args:
        path: The file.
        size: Height and width to bring it to; None: its own.
        channels: 1: grey; 3: red, green and blue.
        invert: Swap dark and light, what is transparent being white before.

    Raises:
        DataError: it cannot be read, or is not a PNG or JPEG image of 8 bits a channel.
    """
    with open_image(path) as file:
        if file.mode in _DEEP:
            raise DataError(f"{path} has more than 8 bits a pixel: save it with 8")
        picture = file.convert("RGBA")
        ground = Image.new("RGBA", picture.size, "white" if invert else "black")
        flat = Image.alpha_composite(ground, picture).convert("L" if channels == 1 else "RGB")
        image = flat if size is None else flat.resize((size[1], size[0]))
    if invert:
        image = ImageOps.invert(image)
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return pixels.reshape(image.height, image.width, channels)


@contextlib.contextmanager
def open_image(path: str | Path) -> Iterator[Image.Image]:
    """Open an image file, a PNG or JPEG whatever its name says; nothing else is looked into.

    Args:
        path: The file.

    Yields:
        The image, to be decoded within.

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


class ImageFiles(Dataset[Any]):
    """Image files and their labels, decoded when they are asked for."""

    def __init__(
        self,
        paths: Sequence[str],
        targets: Tensor,
        *,
        size: tuple[int, ...],
        channels: int,
        resize: bool,
    ) -> None:
        """Keep what is needed to read them; ``resize``: bring all to ``size``, else require it."""
        self.paths, self.targets = paths, targets
        self.size, self.channels, self.resize = size, channels, resize

    def __len__(self) -> int:
        """Return how many there are."""
        return len(self.paths)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        """Return pixels and label of one."""
        path = self.paths[i]
        image = read_image(path, self.size if self.resize else None, self.channels)
        if image.shape[:2] != self.size:
            raise _several_sizes(self.size, "others", tuple(image.shape[:2]), path)
        return image, int(self.targets[i])


def read_folder(
    folder: Path,
    *,
    image_size: int = 0,
    image_shape: tuple[int, ...] = (),
    stream: str = "auto",
    workers: int = 0,
) -> dict[str, Raw]:
    """Read a folder of class folders of PNG and JPEG files, or of such folders ``train``, ``test``.

    Args:
        folder: Holds a folder a class, named as it; or ``train`` and perhaps ``validation``
            (``val``) and ``test``, each of which does.
        image_size: Height and width to bring all images to; 0: they have one.
        image_shape: Channels, height and width that a model takes, to bring all images to; empty:
            as ``image_size`` and the files say.
        stream: ``on``: read them when they are needed; ``off``: hold them; ``auto``: hold them if
            they fill no more than a quarter of the memory.
        workers: Processes that read ahead.

    Returns:
        The parts that are there, by name.

    Raises:
        ConfigError: the images have several sizes and none was asked for.
        DataError: there are no classes or no images, or a file cannot be read.
    """
    folders = {f.name: f for f in _folders(folder)}
    if "train" in folders and set(folders) <= set(_PARTS):
        found = {_PARTS[name]: _class_files(path) for name, path in folders.items()}
        if len(found) < len(folders):
            raise DataError(f"{folder} has two folders of one part: {', '.join(folders)}")
    else:
        found = {"train": _class_files(folder)}
    files = [file for part in found.values() for group in part.values() for file in group]
    form = _Form(image_shape[1:], image_shape[0]) if image_shape else _form_of(files, image_size)
    size = len(files) * form.size[0] * form.size[1] * form.channels
    resize = bool(image_size or image_shape)
    streams = stream == "on" or (stream == "auto" and size > _HELD * physical_memory())
    return {
        name: _read(part, form, resize=resize, streams=streams, workers=workers)
        for name, part in found.items()
    }


class _Form(NamedTuple):
    """What all images are brought to."""

    size: tuple[int, ...]  # height and width
    channels: int


def _folders(folder: Path) -> list[Path]:
    try:
        return sorted(f for f in folder.iterdir() if f.is_dir() and not f.name.startswith("."))
    except OSError as error:
        raise DataError(f"cannot read {folder}: {error.strerror}") from None


def _class_files(folder: Path) -> dict[str, list[Path]]:
    """Return the image files of each class folder, in the order of their names."""
    found = {}
    for group in _folders(folder):
        files = sorted(
            f
            for f in group.rglob("*")
            if f.suffix.lower() in _SUFFIXES and not f.name.startswith(".")
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


def _form_of(files: list[Path], image_size: int) -> _Form:
    """Return size and channels, as the headers of the files have them, of many a part of them."""
    sizes: dict[tuple[int, ...], Path] = {}
    channels = 1
    for path in files[:: -(-len(files) // _LOOKED_AT)]:
        with open_image(path) as image:
            sizes.setdefault((image.height, image.width), path)
            grey = image.mode in (*_GREY, *_DEEP)
        channels = channels if grey else 3
    if image_size:
        return _Form((image_size, image_size), channels)
    (size, path), *others = sizes.items()
    if others:
        raise _several_sizes(size, str(path), *others[0])
    return _Form(size, channels)


def _several_sizes(
    size: tuple[int, ...], path: str, other: tuple[int, ...], other_path: str | Path
) -> ConfigError:
    return ConfigError(
        f"the images have several sizes, {size[0]}x{size[1]} ({path}) and {other[0]}x{other[1]} "
        f"({other_path}), height first: say with image_size what to bring them to"
    )


def _read(
    part: dict[str, list[Path]], form: _Form, *, resize: bool, streams: bool, workers: int
) -> Raw:
    classes = ordered(part)
    paths = [str(file) for name in classes for file in part[name]]
    labels = torch.arange(len(classes)).repeat_interleave(
        torch.tensor([len(part[name]) for name in classes])
    )
    files = ImageFiles(paths, labels, size=form.size, channels=form.channels, resize=resize)
    if streams:
        shape = (*form.size, form.channels)
        return Raw(Stream(files, torch.arange(len(files)), shape, workers), labels, classes)
    return Raw(_decoded(files), labels, classes)


def _decoded(files: ImageFiles) -> Tensor:
    """Decode all, a few hundred at a time on threads: Pillow lets go of Python's lock."""
    pixels = torch.empty(len(files), *files.size, files.channels, dtype=torch.uint8)
    with ThreadPoolExecutor() as pool:
        for start in range(0, len(files), _AT_ONCE):
            stop = min(start + _AT_ONCE, len(files))
            for i, (image, _) in enumerate(pool.map(files.__getitem__, range(start, stop)), start):
                pixels[i] = image
    return pixels
