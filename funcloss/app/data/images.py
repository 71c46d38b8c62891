"""Image files as pixels, decoded on threads within a bound of memory."""

import contextlib
import logging
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import TypeVar

import torch
from jaxtyping import UInt8
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from funcloss._names import listed
from funcloss.errors import DataError

# Not all that Pillow knows: an EPS it gives to Ghostscript to run.
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF")
IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
_ORIENTATION = 0x0112  # the tag of EXIF
_MOST_PIXELS = 90_000_000  # of one file: Pillow holds 4 bytes of each, twice while it converts
_AT_ONCE = 64_000_000  # pixels of all files that threads decode at the same time
_AHEAD = 64  # images read before the first of them is taken
_LISTED = 10  # files that an error names

logging.getLogger("PIL").addHandler(logging.NullHandler())  # its errors are raised as well

T = TypeVar("T")
Item = TypeVar("Item")


class _Budget:
    """Lets threads take what fits into a budget, and one of them more than all of it."""

    def __init__(self, most: int) -> None:
        self._left, self._most, self._changed = most, most, threading.Condition()

    @contextlib.contextmanager
    def taking(self, amount: int) -> Iterator[None]:
        """Wait until ``amount`` is left, and hold it within."""
        amount = min(amount, self._most)
        with self._changed:
            self._changed.wait_for(lambda: self._left >= amount)
            self._left -= amount
        try:
            yield
        finally:
            with self._changed:
                self._left += amount
                self._changed.notify_all()


_decoding = _Budget(_AT_ONCE)


def read_images(
    paths: Sequence[str | Path], size: tuple[int, int], channels: int, *, invert: bool = False
) -> UInt8[Tensor, "n height width channels"]:
    """Read image files as pixels, upright by their EXIF orientation, transparent ones on black.

    Args:
        paths: The files.
        size: Height and width to bring them to.
        channels: 1: grey; 3: red, green and blue.
        invert: Swap dark and light, transparent pixels being white before.

    Returns:
        The pixels of each, in the order of the paths.

    Raises:
        DataError: some cannot be read, or are not images of 8 bits per channel in one of the
            formats PNG, JPEG, WebP, BMP and TIFF; it lists them.
    """
    pixels = torch.empty(len(paths), *size, channels, dtype=torch.uint8)

    def read(i: int) -> None:
        with open_image(paths[i]) as picture:
            pixels[i] = pixels_of(picture, str(paths[i]), size, channels, invert=invert)

    for _ in each(read, range(len(paths)), lambda i: str(paths[i])):
        pass
    return pixels


def pixels_of(
    picture: Image.Image,
    what: str,
    size: tuple[int, ...] | None,
    channels: int,
    *,
    invert: bool = False,
) -> Tensor:
    """Return the pixels of an image, ``what`` naming it in errors."""
    check_picture(picture, what)
    full = picture.width * picture.height
    if size is not None:  # a JPEG is decoded at a half, a quarter or an eighth of its size
        picture.draft(None, (2 * max(size), 2 * max(size)))
    whole = "progressive" in picture.info  # all of such a JPEG is held, whatever comes of it
    with _decoding.taking(full if whole else picture.width * picture.height):
        picture.load()
        if orientation_of(picture) != 1:
            picture = ImageOps.exif_transpose(picture)
        clear = picture.has_transparency_data
        mode = "RGBA" if clear else "L" if channels == 1 else "RGB"
        picture = picture if picture.mode == mode else picture.convert(mode)
        picture = picture if size is None else picture.resize((size[1], size[0]))
        if clear:
            ground = Image.new("RGBA", picture.size, "white" if invert else "black")
            picture = Image.alpha_composite(ground, picture)
            picture = picture.convert("L" if channels == 1 else "RGB")
        picture = ImageOps.invert(picture) if invert else picture
        pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
    return pixels.reshape(picture.height, picture.width, channels)


def check_picture(picture: Image.Image, what: str) -> None:
    """Raise ``DataError`` unless an image is of 8 bits and of a size that can be held."""
    if picture.mode.startswith(("I", "F")):
        raise DataError(f"{what} has more than 8 bits per pixel: save it with 8")
    if picture.width * picture.height > _MOST_PIXELS:
        raise _too_large(what)


def _too_large(what: str) -> DataError:
    return DataError(f"{what} has more than {_MOST_PIXELS // 10**6} megapixels: save it smaller")


def orientation_of(picture: Image.Image) -> int:
    """Return how an image is turned, 1 for upright; a broken EXIF block turns nothing."""
    try:
        return picture.getexif().get(_ORIENTATION, 1)
    except Exception:  # whatever Pillow's parser of it raises
        return 1


@contextlib.contextmanager
def open_image(path: str | Path) -> Iterator[Image.Image]:
    """Open an image file, of our formats whatever its name says, to be decoded within.

    Raises:
        DataError: it cannot be read or decoded, or is of another format.
    """
    try:
        with Image.open(path, formats=_FORMATS) as file:
            yield file
    except UnidentifiedImageError:
        formats = f"{', '.join(_FORMATS[:-1])} and {_FORMATS[-1]}"
        raise DataError(f"{path} is not an image that can be read: {formats} are") from None
    except Image.DecompressionBombError:
        raise _too_large(str(path)) from None
    except (OSError, SyntaxError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"cannot read {path}: {reason}") from None


def each(
    read: Callable[[Item], T], items: Sequence[Item], name: Callable[[Item], str]
) -> Iterator[T]:
    """Yield what is read of each item, on threads: Pillow lets go of Python's lock.

    Raises:
        DataError: some cannot be read; the others are tried first, and it lists those.
    """
    failed: dict[str, DataError] = {}
    with _without_pillows_warnings(), ThreadPoolExecutor() as pool:
        todo = iter(items)
        while some := [*islice(todo, _AHEAD)]:
            for item, future in [(item, pool.submit(read, item)) for item in some]:
                try:
                    yield future.result()
                except DataError as error:
                    failed[name(item)] = error
    if failed:
        raise _listing(failed, len(items))


def _listing(failed: Mapping[str, DataError], n: int) -> DataError:
    first, *others = failed.values()
    if not others:
        return first
    return DataError(
        f"{len(failed):,} of {n:,} images cannot be read, {listed([*failed], _LISTED)}: replace or "
        f"remove them; of the first: {first}"
    )


@contextlib.contextmanager
def _without_pillows_warnings() -> Iterator[None]:
    """Keep to ourselves what Pillow warns of odd files: an error says it, or it does not matter."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="PIL")
        yield
