"""Many trainings in one program: the stateless step mapped over states and ``hyper``."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.func import vmap
from torch.nn.modules.conv import _ConvNd

from funcloss.app.sweep.axes import stacked_hypers
from funcloss.training.step import TrainState, TrainStep, preferred_layout
from funcloss.typing import Batch, Hyper, Metrics

# What trials have each to themselves; the counter and the key are one for all.
_OWN = TrainState(params=0, buffers=0, opt_state=0, step=None, key=None)  # type: ignore[arg-type]


class EnsembleState(NamedTuple):
    """The states of all trials of one seed, in groups of which each is one program."""

    groups: dict[str, TrainState]  # tensors with a leading axis over the trials of the group
    step: Int[Tensor, ""]
    key: Int[Tensor, ""]


@dataclass(frozen=True)
class VmapGroup:
    """EnsembleState that are trained by one program."""

    train_step: TrainStep
    hyper: Hyper  # stacked, as the state is
    size: int
    stacked: bool  # False: a single trial, without the leading axis


EnsembleStep = Callable[[EnsembleState, Tensor], tuple[EnsembleState, Metrics]]


def make_groups(train_step: TrainStep, hypers: Sequence[Hyper], width: int) -> list[VmapGroup]:
    """Part trials into groups of a width.

    Args:
        train_step: The pure step of a single trial.
        hypers: What each trial is given.
        width: EnsembleState in one program; 1: each alone, with the step as it is.

    Returns:
        The groups, the trials in order.
    """
    if width == 1:
        return [VmapGroup(train_step, hyper, 1, False) for hyper in hypers]
    mapped = vmap(train_step, in_dims=(_OWN, None, 0), out_dims=(_OWN, 0))  # pyright: ignore[reportArgumentType]
    pieces = [hypers[i : i + width] for i in range(0, len(hypers), width)]
    return [VmapGroup(mapped, stacked_hypers(piece), len(piece), True) for piece in pieces]


def init_trials(state: TrainState, groups: Sequence[VmapGroup]) -> EnsembleState:
    """Return the states of trials that all begin at one state.

    Args:
        state: Where each begins.
        groups: The groups.

    Returns:
        The states; those of a group share a counter and the key.
    """

    def begin(group: VmapGroup) -> TrainState:
        if not group.stacked:
            return state
        return mapped(
            lambda t, own: t.expand(group.size, *t.shape).contiguous() if own == 0 else t,
            state,
            _OWN,
        )

    states = {str(i): begin(group) for i, group in enumerate(groups)}
    return EnsembleState(states, state.step, state.key)


def mapped(change: Callable[..., Tensor], tree: Any, axes: Any) -> Any:
    """Return a state with each tensor changed, told the axis of its trials or None."""
    if isinstance(tree, Tensor):
        return change(tree, axes)
    if isinstance(tree, dict):
        return {
            k: mapped(change, v, axes[k] if isinstance(axes, dict) else axes)
            for k, v in tree.items()
        }
    branches = axes._asdict() if hasattr(axes, "_asdict") else dict.fromkeys(tree._fields, axes)
    return type(tree)(**{k: mapped(change, v, branches[k]) for k, v in tree._asdict().items()})


def trial_state(trials: EnsembleState, groups: Sequence[VmapGroup], number: int) -> TrainState:
    """Return the state of one trial, as its training alone would have it.

    Args:
        trials: The states of all.
        groups: The groups.
        number: Which trial, from 0.

    Returns:
        Its state.
    """
    name, place = located(groups, number)
    state = trials.groups[str(name)]
    if not groups[name].stacked:
        return state
    return mapped(lambda t, own: preferred_layout(t[place].clone()) if own == 0 else t, state, _OWN)


def trial_hyper(groups: Sequence[VmapGroup], number: int) -> Hyper:
    """Return what one trial is given.

    Args:
        groups: The groups.
        number: Which trial, from 0.

    Returns:
        Its ``hyper``.
    """
    name, place = located(groups, number)
    group = groups[name]
    return {k: v[place] if group.stacked else v for k, v in group.hyper.items()}


def located(groups: Sequence[VmapGroup], number: int) -> tuple[int, int]:
    """Return the group that a trial is in, and its place there.

    Raises:
        IndexError: there are fewer trials.
    """
    for name, group in enumerate(groups):
        if number < group.size:
            return name, number
        number -= group.size
    raise IndexError(f"there are {number} trials fewer")


def make_trials_step(
    groups: Sequence[VmapGroup],
) -> Callable[[EnsembleState, Batch], tuple[EnsembleState, Metrics]]:
    """Return the step of all trials on the same examples.

    Args:
        groups: The groups.

    Returns:
        ``(trials, batch) -> (trials, metrics)``; ``metrics["loss"]`` is the mean over the trials
        whose loss is finite, ``metrics["losses"]`` has each.
    """

    def step_on(trials: EnsembleState, batch: Batch) -> tuple[EnsembleState, Metrics]:
        states, losses = {}, []
        for (name, state), group in zip(trials.groups.items(), groups, strict=True):
            state, metrics = group.train_step(state, batch, group.hyper)
            states[name] = state
            losses.append(metrics["loss"].reshape(-1))
        each = torch.cat(losses)
        finite = each.isfinite()
        mean = torch.where(finite, each, 0.0).sum() / finite.sum()
        return EnsembleState(states, trials.step + 1, trials.key), {"loss": mean, "losses": each}

    return step_on


@dataclass(frozen=True)
class VmapSize:
    """How many trials go into one program, and why."""

    size: int
    note: str  # one line for the user


def choose_vmap_size(model: nn.Module, trials: int) -> VmapSize:
    """Return whether to train trials in one program or in a loop.

    Mapped over trials, a convolution is a grouped one, which CPUs do slowly.

    Args:
        model: The network of every trial, on its device.
        trials: How many there are.

    Returns:
        All trials; 1, which is a loop, for a model with convolutions that is not on CUDA.

    Example:
        >>> from funcloss import models
        >>> choose_vmap_size(models.linear(), 16)
        VmapSize(size=16, note='16 trials in one program')
    """
    if trials == 1:
        return VmapSize(1, "one trial")
    convolves = any(isinstance(module, _ConvNd) for module in model.modules())
    if convolves and next(model.parameters()).device.type != "cuda":
        return VmapSize(1, f"{trials} trials in a loop: the model has convolutions")
    return VmapSize(trials, f"{trials} trials in one program")
