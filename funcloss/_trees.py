"""Trees of tensors: the leaves by path, and back."""

from collections.abc import Mapping
from typing import Any, TypeVar

from torch import Tensor
from torch.utils._pytree import GetAttrKey, MappingKey, tree_flatten_with_path, tree_unflatten

Tree = TypeVar("Tree")  # tensors in NamedTuples and dicts


def flatten(tree: Any) -> dict[str, Tensor]:
    """Return the tensors of nested NamedTuples and dicts by path.

    Example:
        >>> import torch
        >>> list(flatten({"params": {"w": torch.zeros(1)}, "step": torch.tensor(0)}))
        ['params/w', 'step']
    """
    leaves, _ = tree_flatten_with_path(tree)
    return {"/".join(map(_name, path)): leaf for path, leaf in leaves}


def unflatten(template: Tree, tensors: Mapping[str, Tensor]) -> Tree:
    """Return a tree of the form of ``template`` from the tensors that :func:`flatten` gave."""
    leaves, form = tree_flatten_with_path(template)
    return tree_unflatten([tensors["/".join(map(_name, path))] for path, _ in leaves], form)


def _name(key: Any) -> str:
    if isinstance(key, GetAttrKey):
        return key.name
    assert isinstance(key, MappingKey)
    return str(key.key)
