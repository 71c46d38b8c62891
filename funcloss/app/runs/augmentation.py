"""Training images varied at random: shifted, turned and mirrored, by the keys of the examples."""

import math
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from funcloss.keys import example_keys, fold_in
from funcloss.training.step import TrainStep
from funcloss.typing import Batch

_SHIFT = 1 / 8  # of the height or width, each way
_TURN = math.radians(10.0)  # each way
_STREAM = 2**31  # folded into the keys of examples: no dropout mask draws from what comes of it


class _Keyed(Protocol):
    """What is looked at of a state."""

    @property
    def key(self) -> Tensor: ...
    @property
    def step(self) -> Tensor: ...


def augmented(state: _Keyed, batch: Batch, augment: str) -> Batch:
    """Return the batch as the step of a state sees it, each image varied by the key of its place.

    Nothing is drawn from torch's generator, so that a resumed run sees the same images.

    Args:
        state: Before the step; its key and number decide.
        batch: Images ``(batch, channels, height, width)``.
        augment: ``light``: shift by up to an eighth of the size, and turn by up to 10 degrees; what
            comes in from beyond an edge is the colour of the edge. ``flip``: also mirror left and
            right, every other image. ``off``: as they are.

    Example:
        >>> from typing import NamedTuple
        >>> class State(NamedTuple):
        ...     key: Tensor
        ...     step: Tensor
        >>> batch = Batch(torch.rand(4, 1, 8, 8), torch.zeros(4).long())
        >>> varied = augmented(State(torch.tensor(1), torch.tensor(0)), batch, "light")
        >>> varied.inputs.shape, torch.equal(varied.inputs, batch.inputs)
        (torch.Size([4, 1, 8, 8]), False)
    """
    if augment == "off":
        return batch
    assert isinstance(batch.inputs, Tensor)
    n, _, height, width = batch.inputs.shape
    keys = fold_in(example_keys(state.key, state.step, n), torch.full_like(state.key, _STREAM))
    drawn = fold_in(keys[:, None], torch.arange(4, device=keys.device)).float() / 2**32
    turn, down, right, side = (2 * drawn - 1)[..., None, None].unbind(1)  # each in [-1, 1)
    mirror = torch.where(side < 0, -1.0, 1.0) if augment == "flip" else torch.ones_like(side)
    y = torch.linspace(1 / height - 1, 1 - 1 / height, height, device=keys.device)[:, None]
    x = torch.linspace(1 / width - 1, 1 - 1 / width, width, device=keys.device)
    cos, sin, long = (_TURN * turn).cos(), (_TURN * turn).sin(), height / width
    # Where each pixel comes from; the image reaches from -1 to 1 each way, and so 2 is all of it.
    from_x = mirror * (cos * x - sin * long * y) + 2 * _SHIFT * right
    from_y = sin / long * x + cos * y + 2 * _SHIFT * down
    grid = torch.stack(torch.broadcast_tensors(from_x, from_y), -1).to(batch.inputs.dtype)
    images = F.grid_sample(batch.inputs, grid, padding_mode="border", align_corners=False)
    return batch._replace(inputs=images)


def augmenting(train_step: TrainStep, augment: str) -> TrainStep:
    """Return the pure training step on images that are varied first."""
    if augment == "off":
        return train_step
    return lambda state, batch, hyper: train_step(state, augmented(state, batch, augment), hyper)
