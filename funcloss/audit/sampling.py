"""Which steps of a training a ledger measures, and what waits to be measured."""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from funcloss.keys import fold_in, make_key
from funcloss.typing import Params


class Waiting(NamedTuple):
    """Memory of measured steps whose effect is measured later, each at a step of its own.

    What a gradient does through the optimiser's memory, at every later step, is estimated at one
    of them, drawn with the probability that it has: ``(1 - r) r^t``, ``t`` steps on.
    """

    due: Int[Tensor, " waiting"]  # at which step
    scale: Float[Tensor, " waiting"]  # of what is measured there
    every: Float[Tensor, " waiting"]  # length of the block that it was drawn in; 0: of none
    memory: Params  # in rows, ``(waiting, parts, ...)``; empty: nothing waits

    @staticmethod
    def none() -> "Waiting":
        """Return that nothing waits."""
        nothing = torch.zeros(0, dtype=torch.float64)
        return Waiting(nothing.long(), nothing, nothing, {})

    @staticmethod
    def of(due: int, scale: float, every: float, memory: Params) -> "Waiting":
        """Return that the memory of one step waits."""
        held = {name: m[None] for name, m in memory.items()}
        scales, lengths = torch.tensor([[scale], [every]], dtype=torch.float64)
        return Waiting(torch.tensor([due]), scales, lengths, held)

    def and_(self, other: "Waiting") -> "Waiting":
        """Return what waits in both."""
        held = {n: torch.cat([self.memory[n], m]) if self.memory else m
                for n, m in other.memory.items()}  # fmt: skip
        due, scale, every = (torch.cat(both) for both in zip(self[:3], other[:3], strict=True))
        return Waiting(due, scale, every, held)

    def at(self, step: int) -> tuple["Waiting", "Waiting"]:
        """Return what is due at a step, and what waits on."""
        here = self.due == step
        if not bool(here.any()):
            return Waiting.none(), self
        return self._some(here), self._some(~here)

    def each(self) -> list[tuple[Params, float, float]]:
        """Return the memory of each step, its scale, and the length of its block."""
        rows = zip(self.scale.tolist(), self.every.tolist(), strict=True)
        return [({n: m[i] for n, m in self.memory.items()}, *row) for i, row in enumerate(rows)]

    def _some(self, which: Tensor) -> "Waiting":
        if not bool(which.any()):
            return Waiting.none()
        place = which.nonzero()[:, 0]
        held = {n: m[place.to(m.device)] for n, m in self.memory.items()}
        return Waiting(self.due[which], self.scale[which], self.every[which], held)


class Sampling(NamedTuple):
    """One step of each block is measured; the blocks follow one another."""

    since: Int[Tensor, ""]  # the first step that may be sampled
    ends: Int[Tensor, ""]  # the first step of the next block
    chosen: Int[Tensor, ""]  # the step of this block that is measured
    every: Int[Tensor, ""]  # the length of this block
    samples: Int[Tensor, ""]  # that have been measured
    total: Float[Tensor, "classes parts"]  # the sum of what they gave
    squares: Float[Tensor, "classes parts"]  # the sum of its squares
    squares_of_sum: Float[Tensor, " classes"]  # that of the squares of its rows' sums
    waiting: Waiting


def no_sample(since: Tensor, like: Tensor, waiting: Waiting) -> Sampling:
    """Return the sampling of steps that begins at one.

    Args:
        since: The number of that step.
        like: Zeros, ``(classes, parts)``.
        waiting: The memory of the steps before.
    """
    none = torch.zeros_like(since)
    return Sampling(since, since, since - 1, none, none, like, like, like[:, 0], waiting)


def drawn(seed: int, step: int, purpose: int) -> torch.Generator:
    """Return a generator for one purpose at one step: the same in a training that is resumed."""
    key = fold_in(fold_in(make_key(seed), torch.tensor(step)), torch.tensor(purpose))
    return torch.Generator().manual_seed(int(key))


def geometric(keeps: float, generator: torch.Generator) -> int:
    """Return ``t`` with probability ``(1 - keeps) keeps^t``."""
    if not keeps:
        return 0
    uniform = 1.0 - float(torch.rand((), generator=generator, dtype=torch.float64))  # above 0
    return int(math.log(uniform) / math.log(keeps))


def in_block(sampling: Sampling, step: int, every: int, generator: torch.Generator) -> Sampling:
    """Return the sampling with a new block of ``every`` steps, if one begins at this step."""
    if step < int(sampling.ends):
        return sampling
    place = int(torch.randint(every, (), generator=generator))
    ends, chosen, length = map(torch.tensor, (step + every, step + place, every))
    return sampling._replace(ends=ends, chosen=chosen, every=length)


def with_sample(sampling: Sampling, found: Tensor) -> Sampling:
    """Return the sampling with what one more measured step gave: an estimate of a block's sum."""
    of_sum = found.sum(1)
    return sampling._replace(
        samples=sampling.samples + 1,
        total=sampling.total + found,
        squares=sampling.squares + found.square(),
        squares_of_sum=sampling.squares_of_sum + of_sum.square(),
    )


def variances(sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Return the variances of the sum of all samples, and of its rows' sums.

    By the jackknife, ``n / (n - 1) sum (x - mean)^2``; what still waits is a sample of 0. Samples
    of blocks that follow one another differ by less, so that errors are rather too large.
    """
    n = int(sampling.samples) + len(sampling.waiting.due)
    if n < 2:
        unknown = torch.full_like(sampling.squares, torch.inf)
        return unknown, unknown[:, 0]
    total = sampling.total
    pairs = (sampling.squares, total), (sampling.squares_of_sum, total.sum(1))
    entries, sums = (((n * s - t.square()) / (n - 1)).clamp(min=0.0) for s, t in pairs)
    return entries, sums


def every_for(share: float, spent: float, trained: float, steps: int, samples: int) -> int:
    """Return how long a block is to be so that measuring takes a share of the training's time.

    Args:
        share: Of the time.
        spent: Seconds that measuring took so far.
        trained: Seconds of the training without it.
        steps: Of the training so far.
        samples: Measured so far.

    Example:
        >>> every_for(0.1, spent=1.0, trained=10.0, steps=100, samples=10)
        10
    """
    if not samples or not steps or not trained:
        return 1
    one = spent / samples
    room = (spent + one) / share - trained
    return max(1, math.ceil(round(room / (trained / steps), 6)))


def every_within(budget: float, cost: float, steps: int) -> int:
    """Return how long blocks are to be so that measuring takes a number of seconds.

    Args:
        budget: Seconds that are left for it.
        cost: Of a sample.
        steps: That are left.

    Example:
        >>> every_within(2.0, cost=0.1, steps=400), every_within(-1.0, cost=0.1, steps=400)
        (20, 40000)
    """
    longest = 100 * steps  # most likely none is measured any more
    if budget * longest <= cost * steps:
        return longest
    return max(1, math.ceil(cost * steps / budget))
