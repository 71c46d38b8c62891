"""States and models as safetensors files: plain tensors and a header of text, nothing that runs."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from funcloss._files import replacing
from funcloss._trees import Tree, flatten, unflatten
from funcloss.errors import RunError
from funcloss.training.step import preferred_layout


def save_tensors(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
    """Write tensors and a header to ``path``, whole or not at all.

    Args:
        path: The file to make or replace.
        tensors: Tensors by name, on any device.
        header: What JSON can hold, by name.

    Raises:
        RunError: the file cannot be written; what was there is as it was.
    """
    plain = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
    text = {name: json.dumps(value) for name, value in header.items()}
    with replacing(path) as beside:
        beside.write_bytes(save(plain, metadata=text))


def load_tensors(
    path: Path, *, needs: Sequence[str] = ()
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what :func:`save_tensors` wrote, or another program.

    Args:
        path: A safetensors file.
        needs: What the header must hold.

    Returns:
        Tensors by name, on the CPU, and the header.

    Raises:
        RunError: the file cannot be read or is not of this format.
    """
    try:
        with safe_open(path, framework="pt") as file:
            text = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            header = {name: _from_text(value) for name, value in text.items()}
    except (OSError, SafetensorError) as error:
        raise RunError(f"cannot read {path}: {error}") from None
    if missing := [name for name in needs if name not in header]:
        raise RunError(f"{path} is not of a run: its header has no {' nor '.join(missing)}")
    return tensors, header


def _from_text(value: str) -> Any:
    try:
        return json.loads(value)
    except json.JSONDecodeError:  # of another program
        return value


def restore(template: Tree, tensors: Mapping[str, Tensor]) -> Tree:
    """Return a state of the form of ``template`` from the tensors that :func:`flatten` gave.

    Args:
        template: A state of the same model and optimiser.
        tensors: Tensors by path.

    Returns:
        The state, on the device and in the memory layout of ``template``.

    Raises:
        RunError: a tensor is missing, of another shape or dtype, or belongs nowhere.
    """
    expected = flatten(template)
    for path in expected.keys() | tensors.keys():
        if path not in tensors or path not in expected:
            where = "has no" if path not in tensors else "has an unknown"
            raise RunError(f"the checkpoint {where} tensor {path}: it is of another model")
        want, got = expected[path], tensors[path]
        if want.shape != got.shape or want.dtype != got.dtype:
            raise RunError(
                f"the checkpoint's {path} is {got.dtype} {tuple(got.shape)}, the model's "
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
