"""How much the shares and conflicts of the whole hang on its single batches."""

import torch
from torch import Tensor

from funcloss.audit.gram import balance
from funcloss.audit.inner import Layers, grams
from funcloss.audit.result import Spread
from funcloss.typing import Grads

_MOST, _FEWEST = 8, 4  # batches that the deviations come from


class BatchSample:
    """Class gradients of the first full batches, in half precision: a spread needs no digits."""

    def __init__(self, room: float) -> None:
        """Keep no more than ``room`` bytes."""
        self.room = room
        self.batches, self.batch_size = 0, 0
        self.kept: list[tuple[Grads, int]] = []

    def add(self, sums: Grads, size: int, counted: int) -> None:
        """Take in a batch: its class gradients, its size, and how many of it count."""
        self.batch_size = self.batch_size or size
        if size < self.batch_size or not counted:
            return
        self.batches += 1
        needed = sum(part.numel() * 2 for part in sums.values())
        if len(self.kept) < _MOST and needed * (len(self.kept) + 1) <= self.room:
            halved = {name: part.to(torch.bfloat16) for name, part in sums.items()}
            self.kept.append((halved, counted))

    def spread(
        self, sums: Grads, n: int, gram: Tensor, class_weights: Tensor, layers: Layers
    ) -> Spread | None:
        """Return the standard deviations, by the jackknife; None where too few batches are kept.

        A share is no mean over batches: ``<g_c, g> / |g|^2`` is not linear. So each kept batch is
        left out in turn: with ``r`` its part of the examples, what is left has the inner products
        ``(K - r (X + X') + r^2 S) / (1 - r)^2``, where ``X`` are those of the batch with the whole
        and ``S`` those within the batch. ``(1 / r - 1)`` times the deviation of the results is what
        single batches would deviate by.

        Args:
            sums: Class gradients of the whole, side by side.
            n: Examples of the whole.
            gram: ``<G_a, G_b>`` of the whole.
            class_weights: Costs, on the CPU.
            layers: Which parameters make up a layer.

        References:
            Efron and Stein, "The jackknife estimate of variance", 1981.
        """
        if len(self.kept) < _FEWEST:
            return None
        shares, conflicts = [], []
        for halved, counted in self.kept:
            batch = {name: part.to(sums[name]) for name, part in halved.items()}
            part = counted / n
            across = grams(batch, sums, layers).sum(0) / (counted * n)
            within = grams(batch, batch, layers).sum(0) / counted**2
            left = (gram - part * (across + across.T) + part**2 * within) / (1.0 - part) ** 2
            now = balance(left, torch.ones(len(left)), class_weights)
            shares.append(now.share * (1.0 / part - 1.0))
            conflicts.append(now.conflict * (1.0 / part - 1.0))
        return Spread(
            self.batches,
            self.batch_size,
            torch.stack(shares).std(0),
            torch.stack(conflicts).std(0).fill_diagonal_(0.0),
            len(self.kept),
        )
