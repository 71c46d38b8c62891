"""How much shares and conflicts differ from batch to batch, to first order around the whole."""

import torch
from torch import Tensor

from funcloss.audit.inner import Layers, grams
from funcloss.audit.result import Spread
from funcloss.typing import Grads

_MOST, _FEWEST = 8, 3  # batches that the deviations come from


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
        if size < self.batch_size:
            return
        self.batches += 1
        needed = sum(part.numel() * 2 for part in sums.values())
        if len(self.kept) < _MOST and needed * (len(self.kept) + 1) <= self.room:
            halved = {name: part.to(torch.bfloat16) for name, part in sums.items()}
            self.kept.append((halved, counted))

    def spread(
        self, sums: Grads, n: int, gram: Tensor, class_weights: Tensor, layers: Layers
    ) -> Spread | None:
        """Return the standard deviations; None where too few batches are kept.

        A share is no mean over batches: ``<g_c, g> / |g|^2`` is not linear. So its deviation is
        that of its first-order change by one batch, ``<g_c^b - g_c, g> + <g_c, g^b - g>`` and so
        on, for which the inner products of each batch with the whole are enough.

        Args:
            sums: Class gradients of the whole, side by side.
            n: Examples of the whole.
            gram: ``<G_a, G_b>`` of the whole.
            class_weights: Costs, on the CPU.
            layers: Which parameters make up a layer.
        """
        if len(self.kept) < _FEWEST:
            return None
        w = class_weights.to(gram)
        weighted = w[:, None] * gram * w
        share = weighted.sum(1) / weighted.sum()
        length = gram.diagonal().clamp(min=0.0).sqrt()
        between = length[:, None] * length
        cosine = gram / between
        shares, cosines = [], []
        for halved, counted in self.kept:
            batch = {name: part.to(sums[name]) for name, part in halved.items()}
            # away[c, a] = <G_c of the batch less G_c, G_a>
            away = grams(batch, sums, layers).sum(0) / (max(counted, 1) * n) - gram
            costly = w[:, None] * away * w
            shares.append(
                (costly.sum(1) + costly.sum(0) - 2.0 * share * costly.sum()) / weighted.sum()
            )
            own = away.diagonal() / gram.diagonal()
            cosines.append((away + away.T) / between - cosine * (own[:, None] + own))
        return Spread(
            self.batches,
            self.batch_size,
            torch.stack(shares).std(0),
            torch.stack(cosines).std(0).fill_diagonal_(0.0),
        )
