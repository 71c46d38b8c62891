"""Standard errors of shares and conflicts, by leaving out a batch at a time."""

import math

import torch
from torch import Tensor

from funcloss.audit.data import MaskedBatch
from funcloss.audit.gram import balance
from funcloss.audit.inner import grams_in_place, layers_of
from funcloss.audit.result import StandardErrors
from funcloss.typing import Grads

_MOST, _FEWEST = 8, 4  # batches that are left out in turn


class Jackknife:
    """Class gradients of the first full batches, in half precision: an error needs few digits."""

    def __init__(self, most_bytes: float) -> None:
        """Keep no more than ``most_bytes``."""
        self.most_bytes = most_bytes
        self.batches, self.batch_size = 0, 0
        self.kept: list[tuple[Grads, int]] = []

    def add(self, sums: Grads, batch: MaskedBatch) -> None:
        """Take in a batch and its class gradients."""
        self.batch_size = self.batch_size or batch.batch_size
        if batch.batch_size < self.batch_size:
            return
        self.batches += 1
        needed = sum(part.numel() * 2 for part in sums.values())
        if len(self.kept) < _MOST and needed * (len(self.kept) + 1) <= self.most_bytes:
            halved = {name: part.to(torch.bfloat16) for name, part in sums.items()}
            self.kept.append((halved, len(batch)))

    def standard_errors(
        self, sums: Grads, n: int, gram: Tensor, class_weights: Tensor
    ) -> StandardErrors | None:
        """Return the errors of the whole's shares and conflicts; None where too few are kept.

        A share is no mean over batches: ``<g_c, g> / |g|^2`` is not linear. So each kept batch is
        left out in turn: with ``r`` its part of the examples, what is left has the inner products
        ``(K - r (X + X') + r^2 S) / (1 - r)^2``, where ``X`` are those of the batch with the whole
        and ``S`` those within the batch. ``(1 / r - 1)`` times the deviation of the results is the
        standard deviation from batch to batch.

        References:
            Efron and Stein, "The jackknife estimate of variance", 1981.
        """
        if len(self.kept) < _FEWEST:
            return None
        layers, shares, conflicts = layers_of(sums), [], []
        found = []
        for halved, _ in self.kept:
            batch = {name: part.to(sums[name]) for name, part in halved.items()}
            pair = (grams_in_place(batch, other, layers).sum(0) for other in (sums, batch))
            found.append(torch.stack([*pair]))
        products = torch.stack(found).cpu().double()
        for (across, within), (_, counted) in zip(products, self.kept, strict=True):
            part = counted / n
            across, within = across / (counted * n), within / counted**2
            left = (gram - part * (across + across.T) + part**2 * within) / (1.0 - part) ** 2
            now = balance(left, torch.ones(len(left)), class_weights)
            shares.append(now.share * (1.0 / part - 1.0))
            conflicts.append(now.conflict * (1.0 / part - 1.0))
        root = math.sqrt(self.batches)
        return StandardErrors(
            self.batches,
            self.batch_size,
            torch.stack(shares).std(0) / root,
            torch.stack(conflicts).std(0).fill_diagonal_(0.0) / root,
            len(self.kept),
        )
