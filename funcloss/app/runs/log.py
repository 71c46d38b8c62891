"""The lines of ``metrics.jsonl`` and its like: what each holds, and reading them as a stream.

A log may have millions of lines. It is read once, a line at a time, and what is drawn of it is
thinned; a line that is damaged is lost alone.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired, TypedDict

import msgspec
import torch
from torch import Tensor

from funcloss._files import reading, replacing
from funcloss._json import or_nan
from funcloss.app.decoding import Count, Number, from_json
from funcloss.errors import RunError
from funcloss.training.loop import Progress

_LONGEST = 2**24  # bytes of a line
_MOST = 4_000  # records of a kind that are drawn


class StepLine(TypedDict):
    """The training since the report before, every ``log_every`` steps."""

    kind: Literal["step"]
    epoch: Count
    step: Count
    examples: Count
    steps: Annotated[int, msgspec.Meta(ge=1, le=10**15)]
    loss: Number
    seconds: Annotated[float, msgspec.Meta(ge=0)]
    images_per_second: Number


class SplitScores(TypedDict):
    """The scores on a split after an epoch."""

    n: Count
    loss: Number
    accuracy: Number
    recall: dict[str, Number]
    precision: dict[str, Number]


class EpochLine(TypedDict):
    """An epoch; the first is before the first step, and has no loss."""

    kind: Literal["epoch"]
    epoch: Count
    step: Count
    examples: Count
    loss: NotRequired[Number]
    seconds: NotRequired[Annotated[float, msgspec.Meta(ge=0)]]
    validation: NotRequired[SplitScores]
    test: NotRequired[SplitScores]


AuditLine = TypedDict(
    "AuditLine",
    {
        "kind": Literal["audit"],
        "epoch": Count,
        "step": Count,
        "class": str,
        "count": Count,
        "loss": Number,
        "share": Number,
        "expected_share": Number,
        "elasticity": Number,
        "norm": Number,
        "update_share": Number,
        "seconds": Annotated[float, msgspec.Meta(ge=0)],
    },
)


class LedgerLine(TypedDict):
    """The ledger after an epoch."""

    kind: Literal["ledger"]
    epoch: Count
    step: Count
    exact: bool
    samples: Count
    seconds: Annotated[float, msgspec.Meta(ge=0)]
    net: list[list[Number]] | None  # a row per held-out class; None of many classes


class ConstraintsLine(TypedDict):
    """A measurement of the constraints."""

    kind: Literal["constraints"]
    epoch: Count
    step: Count
    weights: dict[str, float]
    reached: dict[str, Number]
    accuracy: Number
    feasible: bool


class _Kind(msgspec.Struct):
    kind: str


_LINES: dict[str, Any] = {
    "step": StepLine,
    "epoch": EpochLine,
    "audit": AuditLine,
    "ledger": LedgerLine,
    "constraints": ConstraintsLine,
}
Lost = Callable[[str], None]  # called with a sentence if lines were lost


def metrics_line(text: bytes, where: str) -> dict[str, Any]:
    """Return a line of ``metrics.jsonl``.

    Raises:
        RunError: it is damaged.
    """
    kind = from_json(_Kind, text, where).kind
    if kind not in _LINES:
        raise RunError(f"{where} is damaged: there is no kind {kind[:40]!r}")
    return from_json(_LINES[kind], text, where)


def lines_of(
    path: Path, parse: Callable[[bytes, str], dict[str, Any]], lost: Lost = lambda text: None
) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Yield the lines of a file, each as it is and as what it holds, without what is damaged.

    The last line, if a kill cut it short, is left out without a word.

    Args:
        path: A file of a record per line; none is an empty one.
        parse: From a line, and what to call it, to its record.
        lost: As :data:`Lost`.

    Raises:
        RunError: the file cannot be read.
    """
    damaged, first, name = 0, "", str(path)
    if not path.exists():
        return
    with reading(path, RunError), path.open("rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(_LONGEST), b""), 1):
            if len(line) == _LONGEST:  # not ours: zeros, as a crash may leave them at the end
                too_long = "is damaged: it is too long; all from it on is left out"
                lost(f"{name}: line {number} {too_long}")
                break
            try:
                record = parse(line, f"{name}: line {number}")
            except RunError as error:
                if line.endswith(b"\n"):
                    damaged, first = damaged + 1, first or str(error)
            else:
                yield line if line.endswith(b"\n") else line + b"\n", record
    if damaged:
        others = f" (and {damaged - 1} more)" if damaged > 1 else ""
        lost(f"{first}; it is left out{others}, the other lines are kept")


def keep_lines(path: Path, lines: Iterable[bytes]) -> None:
    """Write a file of lines anew, one after another, whole or not at all."""
    with replacing(path) as beside, beside.open("wb") as file:
        file.writelines(lines)


def with_steps_before(
    progress: Progress, losses: Sequence[Tensor], seconds: float, batch_size: int
) -> Progress:
    """Return a report with the steps of its stretch that were taken before a stop, if any were.

    Args:
        progress: The steps since the stop.
        losses: Of all steps of the stretch.
        seconds: Of those before the stop.
        batch_size: Examples of a step.

    Returns:
        The report as it is without the stop, but for the clock.
    """
    steps = len(losses)
    if steps == progress.steps:
        return progress
    loss = float(torch.stack([*losses]).cpu().double().sum()) / steps
    seconds += progress.seconds
    rate = steps * batch_size / max(seconds, 1e-9)
    return replace(progress, steps=steps, loss=loss, seconds=seconds, images_per_second=rate)


class Thinned:
    """Some of a stream's items, evenly spread: all of a few, and never more than 4,000."""

    def __init__(self, join: Callable[[Any, Any], Any] = lambda first, second: second) -> None:
        """Hold nothing yet; ``join`` makes one of two neighbours, the later one if not given."""
        self.items: list[Any] = []
        self._join, self._of_each, self._of_last = join, 1, 0

    def add(self, item: Any) -> None:
        """Take the next item."""
        if self.items and self._of_last < self._of_each:
            self.items[-1] = self._join(self.items[-1], item)
            self._of_last += 1
        else:
            self.items.append(item)
            self._of_last = 1
        if len(self.items) == _MOST and self._of_last == self._of_each:
            pairs = zip(self.items[::2], self.items[1::2], strict=True)
            self.items = [self._join(first, second) for first, second in pairs]
            self._of_each = self._of_last = 2 * self._of_each


@dataclass(frozen=True)
class Logged:
    """What the log of a training comes to."""

    steps: list[StepLine]  # thinned
    epochs: list[dict[str, Any]]  # thinned; of their scores loss and accuracy
    seconds: float  # of all epochs
    audits: int
    audit_seconds: float

    @property
    def losses(self) -> list[tuple[float, int]]:
        """Mean loss and number of steps of each report."""
        return [(or_nan(r["loss"]), r["steps"]) for r in self.steps]


def logged(records: Iterable[Mapping[str, Any]]) -> Logged:
    """Return what the records of a training come to, in the memory of a few thousand of them."""
    steps, epochs, seconds = Thinned(_together), Thinned(), 0.0
    audits: list[float] = [0, 0.0, -1]  # how many, their seconds, step of the last
    for record in records:
        if record["kind"] == "step":
            steps.add(record)
        elif record["kind"] == "epoch":
            seconds += record.get("seconds", 0.0)
            epochs.add(_in_short(record))
        elif record["kind"] == "audit" and record["step"] != audits[2]:
            audits = [audits[0] + 1, audits[1] + record["seconds"], record["step"]]
    return Logged(steps.items, epochs.items, seconds, int(audits[0]), audits[1])


def _in_short(epoch: Mapping[str, Any]) -> dict[str, Any]:
    """Return the line of an epoch without the scores of each class."""
    kept = ("n", "loss", "accuracy")
    splits = {s: {k: epoch[s][k] for k in kept} for s in ("validation", "test") if s in epoch}
    return dict(epoch) | splits


def _together(first: StepLine, second: StepLine) -> StepLine:
    """Return one report of two neighbours; what is not known is NaN."""
    (a, m), (b, n) = ((or_nan(r["loss"]), r["steps"]) for r in (first, second))
    s, t = first["seconds"], second["seconds"]
    seen = s * or_nan(first["images_per_second"]) + t * or_nan(second["images_per_second"])
    return {
        **second,
        "steps": m + n,
        "loss": (m * a + n * b) / (m + n),
        "seconds": s + t,
        "images_per_second": seen / (s + t) if s + t else math.nan,
    }
