"""States and models as safetensors files: plain tensors and a header of text, nothing that runs."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import msgspec
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from funcloss._files import reading, replacing
from funcloss._trees import Tree, flatten, unflatten
from funcloss.app.decoding import from_json, from_plain
from funcloss.errors import RunError
from funcloss.training.step import preferred_layout

Header = TypeVar("Header")


def save_tensors(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
    """Write tensors and a header to ``path``, whole or not at all; the same ones to the same bytes.

    Args:
        path: The file to make or replace.
        tensors: Tensors by name, on any device.
        header: What JSON can hold, by name.

    Raises:
        RunError: the file cannot be written; what was there is as it was.
    """
    plain = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
    content = memoryview(save(plain))
    # The header is put in by hand: safetensors writes it in another order each time.
    end = 8 + int.from_bytes(content[:8], "little")
    text = {name: json.dumps(header[name]) for name in sorted(header)}
    front = json.dumps({"__metadata__": text, **json.loads(bytes(content[8:end]))}).encode()
    front += b" " * (-len(front) % 8)
    with replacing(path) as beside:
        beside.write_bytes(b"".join((len(front).to_bytes(8, "little"), front, content[end:])))


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what :func:`save_tensors` wrote, or another program.

    Args:
        path: A safetensors file.

    Returns:
        Tensors by name, on the CPU, and the header: what is no JSON in it as text.

    Raises:
        RunError: the file cannot be read or is not of this format.
    """
    with _opened(path) as file:
        header = {name: _from_text(value) for name, value in (file.metadata() or {}).items()}
        return _tensors(file), header


def load_record(path: Path, kind: type[Header]) -> tuple[dict[str, Tensor], Header]:
    """Read what :func:`save_tensors` wrote, with a header of a declared type.

    Args:
        path: A safetensors file.
        kind: The dataclass that its header must make.

    Returns:
        Tensors by name, on the CPU, and the header.

    Raises:
        RunError: the file cannot be read, is not of this format or has another header.
    """
    with _opened(path) as file:
        header = _header(path, file, kind)  # before any tensor: it may be of another program
        return _tensors(file), header


def load_header(path: Path, kind: type[Header]) -> Header:
    """Read the header alone of what :func:`load_record` reads, and raise as it does."""
    with _opened(path) as file:
        return _header(path, file, kind)


def _header(path: Path, file: Any, kind: type[Header]) -> Header:
    text, wanted = file.metadata() or {}, get_type_hints(kind)
    found = {n: from_json(object, text[n], f"{path}: {n}") for n in wanted if n in text}
    return from_plain(kind, found, f"{path}: its header")


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """Open a safetensors file; it checks that its length is what its header says."""
    with (
        reading(path, RunError, kind="a safetensors file", broken=(SafetensorError,)),
        safe_open(path, framework="pt") as file,
    ):
        yield file


def _tensors(file: Any) -> dict[str, Tensor]:
    return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def _from_text(value: str) -> Any:
    try:
        return msgspec.json.decode(value)
    except (msgspec.DecodeError, RecursionError):  # of another program
        return value


def restore(template: Tree, tensors: Mapping[str, Tensor], *, of: Any = "the checkpoint") -> Tree:
    """Return a state of the form of ``template`` from the tensors that :func:`flatten` gave.

    Args:
        template: A state of the same model and optimiser.
        tensors: Tensors by path.
        of: What they are from, for the error.

    Returns:
        The state, on the device and in the memory layout of ``template``.

    Raises:
        RunError: a tensor is missing, of another shape or dtype, or belongs nowhere.
    """
    expected = flatten(template)
    for path in expected.keys() | tensors.keys():
        if path not in tensors or path not in expected:
            where = "has no" if path not in tensors else "has an unknown"
            raise RunError(f"{of} {where} tensor {path}: it is of another model")
        want, got = expected[path], tensors[path]
        if want.shape != got.shape or want.dtype != got.dtype:
            raise RunError(
                f"{of} has a {path} of {got.dtype} {tuple(got.shape)}, the model one of "
                f"{want.dtype} {tuple(want.shape)}: it is of another model"
            )
    # Cloned: what lies anywhere in a file is aligned otherwise, and some kernels then round so.
    placed = {p: preferred_layout(tensors[p].to(t.device).clone()) for p, t in expected.items()}
    return unflatten(template, placed)


def beneath(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the tensors whose path begins with a prefix, by the rest of it.

    Args:
        tensors: Tensors by path.
        prefix: The first name of the paths wanted.

    Returns:
        Tensors by path beneath it.

    Example:
        >>> import torch
        >>> list(beneath({"state/step": torch.tensor(0), "hyper/a": torch.tensor(1)}, "state"))
        ['step']
    """
    start = f"{prefix}/"
    return {p.removeprefix(start): t for p, t in tensors.items() if p.startswith(start)}
