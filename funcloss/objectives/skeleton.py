"""A module's structure without its tensors, to be called with any."""

import copy
import threading
import types
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from funcloss.errors import ConfigError

# What guards or reports something and holds no number of the model: shared, not copied.
_SHARED = (
    type(threading.Lock()),
    type(threading.RLock()),
    threading.Condition,
    threading.Event,
    threading.Thread,
    threading.local,
    types.ModuleType,
)
_PLAIN = (
    str, bytes, int, float, complex, bool, type(None), type, types.FunctionType,
    types.BuiltinFunctionType, types.CodeType, torch.dtype, torch.device, weakref.ref,
)  # fmt: skip


def skeleton_of(model: nn.Module) -> nn.Module:
    """Return a copy of a module, in its present mode, with parameters and buffers on ``meta``.

    No tensor of the model's is copied but those that it keeps in plain attributes, as activations
    are kept: the copy has their values, without history. Locks and threads are shared with the
    model, and so is the owner of a hook that is a method of something else.

    Raises:
        ConfigError: an attribute of the model cannot be copied; which one.

    Example:
        >>> skeleton_of(nn.Linear(2, 3)).weight.device
        device(type='meta')
    """
    memo: dict[int, Any] = {}
    for p in model.parameters():
        if nn.parameter.is_lazy(p):
            raise ConfigError("the model has a lazy parameter: call it once on a batch before")
        memo[id(p)] = nn.Parameter(p.detach().to("meta"), requires_grad=p.requires_grad)
    for b in model.buffers():
        memo[id(b)] = b.detach().to("meta")
    modules = {id(m) for m in model.modules()}
    for _, thing in _reached(model):
        if id(thing) in memo:
            continue
        foreign = isinstance(thing, types.MethodType) and id(thing.__self__) not in modules
        if isinstance(thing, Tensor) and not thing.is_leaf:
            memo[id(thing)] = thing.detach().clone()
        elif foreign or isinstance(thing, _SHARED):
            memo[id(thing)] = thing
    try:
        skeleton = copy.deepcopy(model, memo)
        if all(t.is_meta for t in (*skeleton.parameters(), *skeleton.buffers())):
            return skeleton  # ``to`` assigns data, which a transform does not allow
        return skeleton.to("meta")
    except Exception as error:  # whatever an attribute raises when it is copied
        name, why = _culprit(model, memo, error)
        raise ConfigError(
            f"the model cannot be copied because of {name} ({why}): delete the attribute before, "
            "or give it a __deepcopy__"
        ) from error


def _reached(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield what a module holds, in its attributes and containers, by its path."""
    seen: set[int] = set()
    ahead: list[tuple[str, Any]] = [("model", model)]
    while ahead:
        path, thing = ahead.pop()
        if id(thing) in seen or isinstance(thing, _PLAIN):
            continue
        seen.add(id(thing))
        yield path, thing
        if isinstance(thing, (Tensor, types.MethodType, *_SHARED)):
            continue
        if isinstance(thing, dict):
            ahead += [(f"{path}[{key!r}]", value) for key, value in thing.items()]
        elif isinstance(thing, list | tuple | set | frozenset):
            ahead += [(f"{path}[{i}]", value) for i, value in enumerate(thing)]
        elif isinstance(thing, nn.Module):
            own = {k: v for k, v in vars(thing).items() if k not in _REGISTERS}
            named = own | thing._parameters | thing._buffers | thing._modules
            ahead += [(f"{path}.{name}", value) for name, value in named.items()]
        else:
            ahead += [(f"{path}.{name}", v) for name, v in getattr(thing, "__dict__", {}).items()]


_REGISTERS = {"_parameters", "_buffers", "_modules"}


def _culprit(model: nn.Module, memo: dict[int, Any], error: Exception) -> tuple[str, str]:
    """Return the innermost attribute that cannot be copied, and why."""
    found = ("it", f"{type(error).__name__}: {error}")
    for path, thing in _reached(model):
        try:
            copy.deepcopy(thing, dict(memo))
        except Exception as own:
            if path.startswith(found[0]) or found[0] == "it":
                found = path, f"{type(thing).__name__}: {str(own).splitlines()[0]}"
    return found
