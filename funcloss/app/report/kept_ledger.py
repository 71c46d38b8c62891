"""The ledger of a run as a record, for what reads it and what reports on it."""

from dataclasses import dataclass

from torch import Tensor

from funcloss.audit import Ledger


@dataclass(frozen=True, eq=False)
class KeptLedger:
    """The ledger of a run, as its folder has it."""

    classes: tuple[str, ...]
    parts: tuple[str, ...]  # names of the columns
    weights: Tensor  # (classes,) class weights of the training, float64
    exact: bool  # every step was measured
    ledger: Ledger  # over the training so far
    epochs: Tensor  # (epochs,) int64: their numbers, at whose ends it was kept
    nets: Tensor  # (epochs, classes, parts): the sums so far there; none of very many classes
    seconds: float  # that it took
    training_seconds: float  # that the steps took without it
    samples: int  # steps that were measured
    first: int  # the step that it begins before; 0: the training's first
    note: str  # why it is not of the whole training; empty: it is
    judged_on: str  # split whose losses they are: validation, or train where there is none
    examples: Tensor  # (seen,) int64: training examples of weighted classes, by index
    labels: Tensor  # (seen,) int64: of each
    effects: Tensor  # (seen, classes): on each class's held-out loss, to first order, summed

    @property
    def judged(self) -> str:
        """Return what the examples are called whose losses they are."""
        return "held-out" if self.judged_on == "validation" else "training"

    def behind(self, k: int, c: int, most: int = 8) -> list[tuple[int, float]]:
        """Return the examples of class ``c`` that raised the loss of ``k`` most, with how much.

        To first order, over the steps that were measured, each at its own.
        """
        own = (self.labels == c).nonzero()[:, 0]
        effect = self.effects[own, k]
        first = effect.argsort(descending=True, stable=True)[:most]
        rows = zip(self.examples[own[first]].tolist(), effect[first].tolist(), strict=True)
        return [(index, value) for index, value in rows if value > 0]
