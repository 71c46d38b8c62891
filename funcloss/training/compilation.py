"""Whether to compile a step, and the check that the compiled step is right."""

import math
import os
import shutil
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from funcloss._trees import flatten
from funcloss.errors import RunError
from funcloss.typing import Metrics

AnyStep = Callable[..., tuple[Any, Metrics]]  # (state, *inputs) -> (state, metrics)

_CHECKED = 3  # steps: momentum enters at the second
_NUDGES = 3  # of the weights, at each of these
_ROOM = 6.0  # times what a nudge changes


@dataclass(frozen=True)
class Compiled:
    """A step ready to run, and how it was made so."""

    step_on: AnyStep
    on: bool
    note: str  # one line for the user
    seconds: float  # that compiling took
    warning: bool = False  # whether the compiled step was wrong, and is not used


def prepare(step_on: AnyStep, mode: str, state: Any, inputs: tuple[Any, ...]) -> Compiled:
    """Compile a step if asked to, or, on ``auto``, on CUDA, and check it against the eager step.

    Three compiled steps from ``state`` are compared with eager ones. They may differ by rounding:
    by a few times what the eager step itself changes by when the weights are moved by a few units
    of rounding. If they differ by more, the compiler is wrong and the eager step is used.

    Args:
        step_on: A pure step, ``(state, *inputs) -> (state, metrics)``; trying it changes nothing.
        mode: ``on``, ``off`` or ``auto``.
        state: A :class:`TrainState` to try it on; ``key`` tells the device.
        inputs: What else to try it on, all tensors.

    Returns:
        The step to use, with a note that says why.

    Raises:
        RunError: ``mode`` is ``on`` and the step cannot be compiled here.
    """
    device = state.key.device.type
    if mode == "off" or (mode == "auto" and device != "cuda"):
        return Compiled(step_on, False, "eager", 0.0)
    try:
        compiled, steps, seconds = _compiled(step_on, state, inputs)
    except Exception as failure:  # the compiler is not ours, and fails in its own ways
        reason = _why(failure)
        if mode == "on":
            raise RunError(f"the step cannot be compiled: {reason}; compile off runs it") from None
        return Compiled(step_on, False, f"eager, since compiling failed: {reason}", 0.0)
    for number, (before, results) in enumerate(steps, 1):
        if error := _error(step_on, before, inputs, results):
            note = f"eager, since compiled step {number} is wrong: {error}"
            return Compiled(step_on, False, note, seconds, warning=True)
    return Compiled(compiled, True, f"compiled in {seconds:.1f} s", seconds)


def _compiled(step_on: AnyStep, state: Any, inputs: tuple[Any, ...]):
    """Return the compiled step, its first steps, ``(state, results)`` each, and the seconds."""
    compiled = torch.compile(step_on, fullgraph=True, dynamic=False)
    began, steps = time.perf_counter(), []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # inductor's, about itself
        # Strides that change after the first step compile once more now, not in the training.
        for _ in range(_CHECKED):
            results = compiled(state, *inputs)
            steps.append((state, results))
            state, _ = results
    return compiled, steps, time.perf_counter() - began


def _error(step_on: AnyStep, state: Any, inputs: tuple[Any, ...], results: Any) -> str:
    """Return which result of a compiled step is off by more than rounding, or nothing."""
    with _Narrowest() as narrowest:
        eager = _tensors(*step_on(state, *inputs))
    nudge = narrowest.nudge(state.key.device.type)
    got, before = _tensors(*results), flatten(state)
    change = _changes(eager, before)
    spread = dict.fromkeys(change, 0.0)
    for seed in range(_NUDGES):
        near = _nudged(state, nudge, seed)
        other = _changes(_tensors(*step_on(near, *inputs)), flatten(near))
        spread = {name: max(s, _distance(other[name], change[name])) for name, s in spread.items()}
    for name, tensor in eager.items():
        error = _distance(_wide(got[name]), _wide(tensor))
        size = _norm(change[name])
        stored = _eps(tensor) * _norm(_wide(tensor))  # rounding of the result itself
        room = _ROOM * (spread[name] + nudge * size) + stored
        if not error <= room:
            return (
                f"{name.removeprefix('params/')} is off by {error:.2g}, of a change of {size:.2g}; "
                f"rounding explains {room:.1g}"
            )
    return ""


def _tensors(state: Any, metrics: Metrics) -> dict[str, Tensor]:
    return flatten(state) | {"loss": metrics["loss"]}


def _changes(after: dict[str, Tensor], before: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: _wide(t) - _wide(before[n]) if n in before else _wide(t) for n, t in after.items()}


def _nudged(state: Any, nudge: float, seed: int) -> Any:
    """Return the state with every weight made larger or smaller by a small part of itself."""
    generator = torch.Generator().manual_seed(seed)

    def moved(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor
        up = torch.randint(2, tensor.shape, generator=generator, dtype=torch.int8).to(tensor)
        return tensor * (1.0 + nudge * (2.0 * up - 1.0))

    params = {name: moved(t) for name, t in state.params.items()}
    buffers = {name: moved(t) for name, t in state.buffers.items()}
    return state._replace(params=params, buffers=buffers)


def _wide(tensor: Tensor) -> Tensor:
    widest = torch.float32 if tensor.device.type == "mps" else torch.float64
    return tensor.to(torch.promote_types(tensor.dtype, widest))


def _distance(a: Tensor, b: Tensor) -> float:
    """Return the norm of the difference; infinite where only one of the two is finite."""
    apart = torch.where(a.isfinite() | b.isfinite(), a - b, 0.0)
    return float(apart.nan_to_num(nan=math.inf, posinf=math.inf, neginf=-math.inf).norm())


def _norm(a: Tensor) -> float:
    """Return the norm of what is finite."""
    return float(torch.where(a.isfinite(), a, 0.0).norm())


def _eps(tensor: Tensor) -> float:
    return torch.finfo(tensor.dtype).eps if tensor.is_floating_point() else 0.0


class _Narrowest(TorchDispatchMode):
    """Notes the least precise floating point type that is computed in."""

    eps = 0.0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: D105
        out = func(*args, **(kwargs or {}))
        self.eps = max(self.eps, *(_eps(t) for t in tree_leaves(out) if isinstance(t, Tensor)), 0.0)
        return out

    def nudge(self, device: str) -> float:
        """Return the part of itself by which to move a weight, so that all is rounded otherwise."""
        single = torch.finfo(torch.float32).eps
        if self.eps == single and device == "cuda":
            return 2.0**-13  # an eighth of a unit of TF32, which convolutions compute in
        # Half precision adds up in float32; otherwise the error is that of long sums.
        return self.eps / 8.0 if self.eps > single else 32.0 * self.eps


def _why(error: Exception) -> str:
    if shutil.which(os.environ.get("CXX", "")) is None and not any(map(shutil.which, _CXX)):
        return "there is no C++ compiler (g++ or clang++)"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


_CXX = ("g++", "clang++", "c++")
