"""Images as pixels: files, or any data set of pictures, decoded within a bound of memory."""

import contextlib
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import torch
from jaxtyping import UInt8
from PIL import EpsImagePlugin, Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset

from funcloss._files import reading, usable_memory
from funcloss.app.data.records import InputSchema, LoadOptions, RawSplit
from funcloss.app.data.streaming import Stream, last_line
from funcloss.errors import ConfigError, DataError

# Not all that Pillow knows: an EPS it gives to Ghostscript to run.
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF")
IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
_GREY = ("1", "L", "LA")
_ORIENTATION = 0x0112  # the tag of EXIF
_MOST_PIXELS = 90_000_000  # of one file: Pillow holds 4 bytes of each, twice while it converts
_AT_ONCE = 64_000_000  # pixels of all files that threads decode at the same time
_AHEAD = 64  # images read before the first of them is taken
_LISTED = 10  # files that an error names
_HELD = 0.25  # of the machine's memory may go into images

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

    def read(path: str | Path) -> Tensor:
        with _open_image(path) as picture:
            return _pixels(picture, str(path), size, channels, invert=invert)

    pixels = torch.empty(len(paths), *size, channels, dtype=torch.uint8)
    for i, image in enumerate(_each(read, paths, str)):
        pixels[i] = image
    return pixels


def _pixels(
    picture: Image.Image,
    what: str,
    size: tuple[int, ...] | None,
    channels: int,
    *,
    invert: bool = False,
) -> Tensor:
    """Return the pixels of an image, ``what`` naming it in errors."""
    _check_picture(picture, what)
    if size is not None:  # a JPEG is decoded at a half, a quarter or an eighth of its size
        picture.draft(None, (2 * max(size), 2 * max(size)))
    with _decoding.taking(picture.width * picture.height):
        picture.load()
        if _orientation(picture) != 1:
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


def _check_picture(picture: Image.Image, what: str) -> None:
    """Raise ``DataError`` unless an image is of 8 bits and of a size that can be held."""
    if picture.mode.startswith(("I", "F")):
        raise DataError(f"{what} has more than 8 bits per pixel: save it with 8")
    if picture.width * picture.height > _MOST_PIXELS:
        raise _too_large(what)


def _too_large(what: str) -> DataError:
    return DataError(f"{what} has more than {_MOST_PIXELS // 10**6} megapixels: save it smaller")


def _orientation(picture: Image.Image) -> int:
    """Return how an image is turned, 1 for upright; a broken EXIF block turns nothing."""
    try:
        return picture.getexif().get(_ORIENTATION, 1)
    except Exception:  # whatever Pillow's parser of it raises
        return 1


@contextlib.contextmanager
def _open_image(path: str | Path) -> Iterator[Image.Image]:
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
            with _open_image(self.items[i]) as picture:
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
            _check_picture(picture, self.name(i))
            height, width = picture.height, picture.width
            # Asked for an EXIF block that is not there, a PNG is decoded; a TIFF turns its size.
            says = any("exif" in str(key) or "xmp" in str(key) for key in picture.info)
            if says and picture.format != "TIFF" and _orientation(picture) >= 5:
                height, width = width, height
            return (height, width), picture.mode in _GREY

    def decoded(self, i: int) -> None:
        """Raise ``DataError`` unless one can be decoded."""
        with self.opened(i) as (picture, _):
            _pixels(picture, self.name(i), (8, 8), 3)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        """Return pixels and label of one."""
        assert self.form is not None
        size, channels = self.form.size, self.form.channels
        with self.opened(i) as (picture, label):
            image = _pixels(picture, self.name(i), size if self.form.resize else None, channels)
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
        headers = [*_each(_header, every[::step], _name)]
    except DataError:
        for _ in _each(_decode, every, _name):  # all that are broken, not the headers alone
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
    for i, (image, label) in enumerate(_each(pictures.__getitem__, range(n), pictures.name)):
        pixels[i], labels[i] = image, label
    return pixels, labels


def _each(
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
    names = ", ".join(islice(failed, _LISTED))
    more = f" and {len(failed) - _LISTED:,} more" if len(failed) > _LISTED else ""
    return DataError(
        f"{len(failed):,} of {n:,} images cannot be read, {names}{more}: replace or remove them; "
        f"of the first: {first}"
    )


@contextlib.contextmanager
def _without_pillows_warnings() -> Iterator[None]:
    """Keep to ourselves what Pillow warns of odd files: an error says it, or it does not matter."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="PIL")
        yield
