"""Readers of the archives' own formats, which trust nothing that they read."""

import gzip
import hashlib
import math
import pickletools
import struct
import tarfile
import zlib
from pathlib import Path

import torch
from torch import Tensor

from funcloss.errors import DataError

_CIFAR_SHAPE = (3, 32, 32)


def check_md5(path: Path, md5: str) -> None:
    """Raise ``DataError`` unless the file at ``path`` has the published checksum."""
    try:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False))
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None
    if found.hexdigest() != md5:
        raise DataError(
            f"{path} is damaged or not the published file (md5 {found.hexdigest()}, expected "
            f"{md5}): delete it and try again, it will be fetched anew"
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
    try:
        content = path.read_bytes()
        if path.suffix == ".gz":
            content = gzip.decompress(content)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path} is damaged: {error}; delete it and try again") from None
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None
    header = 4 + 4 * dims
    magic = int.from_bytes(content[:4], "big")
    if len(content) < header or magic != 0x800 + dims:
        raise DataError(
            f"{path} is not a file of {dims} axes in MNIST's format (magic number {magic:#x}, "
            f"expected {0x800 + dims:#x}): delete it and try again"
        )
    shape = struct.unpack(f">{dims}I", content[4:header])
    if len(content) - header != math.prod(shape):
        raise DataError(
            f"{path} is damaged: {len(content) - header:,} bytes of data where its header says "
            f"{math.prod(shape):,}; delete it and try again"
        )
    if math.prod(shape) == 0:
        return torch.zeros(shape, dtype=torch.uint8)
    return torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=header).reshape(shape)


def read_cifar(path: Path, members: list[str]) -> tuple[Tensor, Tensor]:
    """Read batches of CIFAR-10 straight out of their archive.

    The batches are pickles. They are not loaded, which would run what they say: the listing of
    their instructions is searched for the one string of pixels and the one list of labels.

    Args:
        path: The archive ``cifar-10-python.tar.gz``.
        members: Names of the batches in it.

    Returns:
        Images, uint8 ``(n, 32, 32, 3)``, and labels, int64 ``(n,)``.

    Raises:
        DataError: the archive cannot be read or a batch is not what it should be.
    """
    images, labels = [], []
    try:
        with tarfile.open(path) as archive:
            for member in members:
                file = archive.extractfile(member)
                if file is None:
                    raise DataError(f"{path}: {member} is not a file")
                pixels, classes = _scan_cifar_batch(file.read())
                flat = torch.frombuffer(bytearray(pixels), dtype=torch.uint8)
                images.append(flat.reshape(-1, *_CIFAR_SHAPE).permute(0, 2, 3, 1))
                labels.append(torch.tensor(classes, dtype=torch.int64))
    except (tarfile.TarError, KeyError, EOFError, ValueError, RuntimeError, zlib.error) as error:
        raise DataError(f"{path} is damaged: {error}; delete it and try again") from None
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from None
    return torch.cat(images).contiguous(), torch.cat(labels)


def _scan_cifar_batch(content: bytes) -> tuple[bytes, list[int]]:
    """Find the pixels, the one string of their length, and the integers after the word labels."""
    pixels, labels, key = b"", [], None
    for opcode, arg, _ in pickletools.genops(content):
        if isinstance(arg, str | bytes):
            text = arg.encode("latin-1") if isinstance(arg, str) else arg
            if len(text) > len(pixels) and len(text) % math.prod(_CIFAR_SHAPE) == 0:
                pixels = text
            elif len(text) < 32:
                key = text
        elif opcode.name.startswith("BININT") and key == b"labels":
            labels.append(arg)
    if not pixels or not labels:
        raise ValueError("a batch has no pixels or no labels")
    return pixels, labels
