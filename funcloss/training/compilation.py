"""Whether to compile a step, and what came of it."""

import math
import os
import shutil
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from funcloss.errors import RunError
from funcloss.typing import Metrics

# Seconds to compile a step of a small network, and the part of a step's time that compiling saves:
# on the low side of what scripts/bench_train.py finds, so that doubtful cases stay eager.
_COST = {"cpu": 30.0, "cuda": 60.0}
_SAVING = {"cpu": 0.25, "cuda": 0.4}
_PROBES = 5


AnyStep = Callable[..., tuple[Any, Metrics]]  # (state, *inputs) -> (state, metrics)


class Compiled(NamedTuple):
    """A step ready to run, and how it was made so."""

    step_on: AnyStep
    on: bool
    note: str  # one line for the user
    seconds: float  # that compiling took


def prepare(
    step_on: AnyStep, mode: str, state: Any, inputs: tuple[Any, ...], steps: int
) -> Compiled:
    """Compile a step if asked to, or, on ``auto``, if its remaining steps will pay it back.

    Args:
        step_on: A pure step, ``(state, *inputs) -> (state, metrics)``; trying it changes nothing.
        mode: ``on``, ``off`` or ``auto``.
        state: A state to try it on; ``key`` tells the device.
        inputs: What else to try it on, all tensors.
        steps: How many steps are to come.

    Returns:
        The step to use, with a note that says why.

    Raises:
        RunError: ``mode`` is ``on`` and the step cannot be compiled here.
    """
    if mode == "off" or steps == 0:
        return Compiled(step_on, False, "eager", 0.0)
    if mode == "auto":
        device = state.key.device.type
        eager = steps * _step_seconds(step_on, state, inputs)
        gain, cost = eager * _SAVING.get(device, 0.0), _COST.get(device, math.inf)
        if gain <= cost:
            return Compiled(step_on, False, f"eager, for a training of about {eager:.0f} s", 0.0)
    try:
        compiled, seconds = _compiled(step_on, state, inputs)
    except Exception as error:  # the compiler is not ours, and fails in its own ways
        reason = _why(error)
        if mode == "on":
            raise RunError(f"the step cannot be compiled: {reason}; compile off runs it") from None
        return Compiled(step_on, False, f"eager, since compiling failed: {reason}", 0.0)
    return Compiled(compiled, True, f"compiled in {seconds:.1f} s", seconds)


def _compiled(step_on: AnyStep, state: Any, inputs: tuple[Any, ...]) -> tuple[AnyStep, float]:
    compiled = torch.compile(step_on, fullgraph=True, dynamic=False)
    began = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # inductor's, about itself
        # Twice: strides that change after the first step compile anew now, not in the training.
        after, _ = compiled(state, *inputs)
        compiled(after, *inputs)
    return compiled, time.perf_counter() - began


def _step_seconds(step_on: AnyStep, state: Any, inputs: tuple[Any, ...]) -> float:
    times = []
    for _ in range(2 + _PROBES):
        began = time.perf_counter()
        _, metrics = step_on(state, *inputs)
        float(metrics["loss"])  # waits for the device
        times.append(time.perf_counter() - began)
    return statistics.median(times[2:])


def _why(error: Exception) -> str:
    if shutil.which(os.environ.get("CXX", "")) is None and not any(map(shutil.which, _CXX)):
        return "there is no C++ compiler (g++ or clang++)"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


_CXX = ("g++", "clang++", "c++")
