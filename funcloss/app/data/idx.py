"""Files of MNIST's format, and checksums: readers that trust nothing that they read."""

import gzip
import hashlib
import math
import struct
import zlib
from pathlib import Path

import torch
from torch import Tensor

from funcloss._files import reading
from funcloss.errors import DataError

_MOST_PACKED = 1032  # bytes that gzip can make of one


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
    packed = path.suffix == ".gz"
    header = 4 + 4 * dims
    broken = (gzip.BadGzipFile, EOFError, zlib.error)
    with (
        reading(path, kind="sound, delete it and try again", broken=broken),
        gzip.open(path) if packed else path.open("rb") as file,
    ):
        start = file.read(header)
        magic = int.from_bytes(start[:4], "big")
        if len(start) < header or magic != 0x800 + dims:
            raise DataError(
                f"{path} is not a file of {dims} axes in MNIST's format (magic number {magic:#x}, "
                f"expected {0x800 + dims:#x}): delete it and try again"
            )
        shape = struct.unpack(f">{dims}I", start[4:])
        n, most = math.prod(shape), path.stat().st_size * (_MOST_PACKED if packed else 1)
        if not n:
            raise DataError(f"{path} holds nothing: its header says {_by(shape)}")
        content = bytearray(file.read(n + 1)) if n <= most else b""  # one more: to its end
    if len(content) != n:
        raise DataError(
            f"{path} is damaged: its header says {_by(shape)}, {n:,} bytes, and it has "
            f"{'more' if len(content) > n else 'fewer'}; delete it and try again"
        )
    return torch.frombuffer(content, dtype=torch.uint8).reshape(shape)


def _by(shape: tuple[int, ...]) -> str:
    return " x ".join(f"{size:,}" for size in shape)
