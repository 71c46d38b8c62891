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

# What members have each to themselves; the counter and the key are one for all.
_OWN = TrainState(params=0, buffers=0, opt_state=0, step=None, key=None)  # type: ignore[arg-type]


class Members(NamedTuple):
    """The states of all members of one seed, in groups of which each is one program."""

    groups: dict[str, TrainState]  # tensors with a leading axis over the members of the group
    step: Int[Tensor, ""]
    key: Int[Tensor, ""]


@dataclass(frozen=True)
class Group:
    """Members that are trained by one program."""

    train_step: TrainStep
    hyper: Hyper  # stacked, as the state is
    size: int
    stacked: bool  # False: a single member, without the leading axis


MembersStep = Callable[[Members, Tensor], tuple[Members, Metrics]]


def make_groups(train_step: TrainStep, hypers: Sequence[Hyper], width: int) -> list[Group]:
    """Part members into groups of a width.

    Args:
        train_step: The pure step of a single member.
        hypers: What each member is given.
        width: Members in one program; 1: each alone, with the step as it is.

    Returns:
        The groups, the members in order.
    """
    if width == 1:
        return [Group(train_step, hyper, 1, False) for hyper in hypers]
    mapped = vmap(train_step, in_dims=(_OWN, None, 0), out_dims=(_OWN, 0))  # pyright: ignore[reportArgumentType]
    pieces = [hypers[i : i + width] for i in range(0, len(hypers), width)]
    return [Group(mapped, stacked_hypers(piece), len(piece), True) for piece in pieces]


def init_members(state: TrainState, groups: Sequence[Group]) -> Members:
    """Return the states of members that all begin at one state.

    Args:
        state: Where each begins.
        groups: The groups.

    Returns:
        The states; those of a group share a counter and the key.
    """

    def begin(group: Group) -> TrainState:
        if not group.stacked:
            return state
        return mapped(
            lambda t, own: t.expand(group.size, *t.shape).contiguous() if own == 0 else t,
            state,
            _OWN,
        )

    states = {str(i): begin(group) for i, group in enumerate(groups)}
    return Members(states, state.step, state.key)


def mapped(change: Callable[..., Tensor], tree: Any, axes: Any) -> Any:
    """Return a state with each tensor changed, told the axis of its members or None."""
    if isinstance(tree, Tensor):
        return change(tree, axes)
    if isinstance(tree, dict):
        return {
            k: mapped(change, v, axes[k] if isinstance(axes, dict) else axes)
            for k, v in tree.items()
        }
    branches = axes._asdict() if hasattr(axes, "_asdict") else dict.fromkeys(tree._fields, axes)
    return type(tree)(**{k: mapped(change, v, branches[k]) for k, v in tree._asdict().items()})


def member_state(members: Members, groups: Sequence[Group], number: int) -> TrainState:
    """Return the state of one member, as its training alone would have it.

    Args:
        members: The states of all.
        groups: The groups.
        number: Which member, from 0.

    Returns:
        Its state.
    """
    name, place = located(groups, number)
    state = members.groups[str(name)]
    if not groups[name].stacked:
        return state
    return mapped(lambda t, own: preferred_layout(t[place].clone()) if own == 0 else t, state, _OWN)


def member_hyper(groups: Sequence[Group], number: int) -> Hyper:
    """Return what one member is given.

    Args:
        groups: The groups.
        number: Which member, from 0.

    Returns:
        Its ``hyper``.
    """
    name, place = located(groups, number)
    group = groups[name]
    return {k: v[place] if group.stacked else v for k, v in group.hyper.items()}


def located(groups: Sequence[Group], number: int) -> tuple[int, int]:
    """Return the group that a member is in, and its place there.

    Raises:
        IndexError: there are fewer members.
    """
    for name, group in enumerate(groups):
        if number < group.size:
            return name, number
        number -= group.size
    raise IndexError(f"there are {number} members fewer")


def make_members_step(
    groups: Sequence[Group],
) -> Callable[[Members, Batch], tuple[Members, Metrics]]:
    """Return the step of all members on the same examples.

    Args:
        groups: The groups.

    Returns:
        ``(members, batch) -> (members, metrics)``; ``metrics["loss"]`` is the mean over the members
        whose loss is finite, ``metrics["losses"]`` has each.
    """

    def step_on(members: Members, batch: Batch) -> tuple[Members, Metrics]:
        states, losses = {}, []
        for (name, state), group in zip(members.groups.items(), groups, strict=True):
            state, metrics = group.train_step(state, batch, group.hyper)
            states[name] = state
            losses.append(metrics["loss"].reshape(-1))
        each = torch.cat(losses)
        finite = each.isfinite()
        mean = torch.where(finite, each, 0.0).sum() / finite.sum()
        return Members(states, members.step + 1, members.key), {"loss": mean, "losses": each}

    return step_on


@dataclass(frozen=True)
class Width:
    """How many members go into one program, and why."""

    width: int
    note: str  # one line for the user


def choose_width(model: nn.Module, members: int) -> Width:
    """Return whether to train members in one program or in a loop.

    Mapped over members, a convolution is a grouped one, which CPUs do slowly.

    Args:
        model: The network of every member, on its device.
        members: How many there are.

    Returns:
        All members; 1, which is a loop, for a model with convolutions that is not on CUDA.

    Example:
        >>> from funcloss import models
        >>> choose_width(models.linear(), 16)
        Width(width=16, note='16 members in one program')
    """
    if members == 1:
        return Width(1, "one member")
    convolves = any(isinstance(module, _ConvNd) for module in model.modules())
    if convolves and next(model.parameters()).device.type != "cuda":
        return Width(1, f"{members} members in a loop: the model has convolutions")
    return Width(members, f"{members} members in one program")
