"""Files of MNIST's format, and checksums: readers that trust nothing that they read."""

import gzip
import hashlib
import math
import struct
import zlib
from io import BufferedReader
from pathlib import Path

import torch
from torch import Tensor

from funcloss._files import physical_memory, reading
from funcloss.errors import DataError

_PIECE = 2**24  # bytes that are read at once


def check_md5(path: Path, md5: str) -> None:
    """Raise ``DataError`` unless the file at ``path`` has the published checksum."""
    with reading(path), path.open("rb") as file:
        found = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False))
    if found.hexdigest() != md5:
        raise DataError(
            f"{path} is damaged or not the published file (md5 {found.hexdigest()}, expected "
            f"{md5}): delete it and try again, it will be fetched again"
        )


def read_idx(path: Path, dims: int) -> Tensor:
    """Read a file of MNIST's format, packed or not.

    The format is a magic number (0, 0, 8 for uint8, number of axes), each axis as a big-endian
    32-bit integer, and the bytes.

    Args:
        path: The file; a name that ends in ``.gz`` is unpacked.
        dims: How many axes it must have: 3 for images, 1 for labels.

    Returns:
        uint8 tensor of the shape that the file states.

    Raises:
        DataError: the file cannot be read, is not of this format or not of the stated length.
    """
    opened = gzip.open if path.suffix == ".gz" else open
    try:
        with reading(path), opened(path, "rb") as file:
            header = file.read(4 + 4 * dims)
            magic = int.from_bytes(header[:4], "big")
            if len(header) < 4 + 4 * dims or magic != 0x800 + dims:
                raise DataError(
                    f"{path} is not a file of {dims} axes in MNIST's format (magic number "
                    f"{magic:#x}, expected {0x800 + dims:#x}): delete it and try again"
                )
            shape = struct.unpack(f">{dims}I", header[4:])
            if math.prod(shape) > physical_memory():
                raise DataError(f"{path} is damaged: {shape} is more than this machine can hold")
            content = _content(file, math.prod(shape))
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path} is damaged: {error}; delete it and try again") from None
    if len(content) != math.prod(shape):
        more = " and more" * (len(content) > math.prod(shape))
        raise DataError(
            f"{path} is damaged: {len(content):,} bytes of data{more} where its header says "
            f"{math.prod(shape):,}; delete it and try again"
        )
    if not content:
        return torch.zeros(shape, dtype=torch.uint8)
    return torch.frombuffer(content, dtype=torch.uint8).reshape(shape)


def _content(file: BufferedReader | gzip.GzipFile, size: int) -> bytearray:
    """Return what follows, a byte more than ``size`` at most, in the memory that is there."""
    content = bytearray()
    while len(content) <= size and (piece := file.read(min(_PIECE, size + 1 - len(content)))):
        content += piece
    return content
