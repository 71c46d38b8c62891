"""The figures of a run, drawn without a screen."""

import contextlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.text import Text
from torch import Tensor

from funcloss._files import replacing
from funcloss._names import short
from funcloss.decisions import CostCurve, Reliability, Sensitivity

_NAMED = 30  # classes whose names and counts are all written
_CELLS, _TICKS = 500, 25  # of a larger matrix, along each side
_FEW = 10  # examples in a bin below which its accuracy says little
_BLUE, _RED, _GREEN = "#1f5fa8", "#c0392b", "#2e8b57"


@dataclass(frozen=True)
class Drawn:
    """A finished run, as its figures need it."""

    records: Sequence[Mapping[str, Any]]  # of metrics.jsonl
    classes: Sequence[str]
    confusion: Tensor  # by argmax, counts, (classes, classes)
    reliability: Reliability  # of the probabilities that decisions are made by
    images: Tensor | None  # a few of the test set, as ``predictions`` takes them; None: no images
    truths: Sequence[str]  # of these images
    guesses: Sequence[str]
    curve: CostCurve | None = None  # of the same examples, of two classes
    sensitivity: Sequence[Sensitivity] = ()  # to the ratio of their costs
    what: str = "test set"  # what these examples are called


@contextlib.contextmanager
def own_style() -> Iterator[None]:
    """Draw in matplotlib's own style, whatever ``matplotlibrc`` lies in the working folder."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        yield


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, whole or not at all."""
    with own_style(), replacing(path) as beside, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # drawn as a box
        figure.savefig(beside, dpi=120, bbox_inches="tight")


def plain_text(texts: Iterable[Text]) -> None:
    """Let text be drawn as it is: what a class is called is no formula, with a ``$`` neither."""
    for text in texts:
        text.set_parse_math(False)


def curves(records: Sequence[Mapping[str, Any]]) -> Figure:
    """Training loss as a line and test loss as dots, over training examples seen."""
    figure = Figure(figsize=(7, 4.2))
    axes = figure.subplots()
    steps = [r for r in records if r["kind"] == "step"]
    axes.plot(
        [r["examples"] for r in steps], [r["loss"] for r in steps], color=_BLUE, label="training"
    )
    epochs = [r for r in records if r["kind"] == "epoch"]
    for part, color in (("validation", _GREEN), ("test", _RED)):
        seen = [r for r in epochs if part in r]
        if seen:
            losses = [r[part]["loss"] for r in seen]
            axes.plot([r["examples"] for r in seen], losses, "o", color=color, label=part)
    axes.set_xlabel("training examples seen")
    axes.set_ylabel("loss")
    axes.set_title("Loss in training and on unseen examples")
    axes.set_ylim(bottom=0)
    axes.legend()
    axes.grid(alpha=0.3)
    return figure


def predictions(
    images: Tensor, truths: Sequence[str], guesses: Sequence[str], *, columns: int = 3
) -> Figure:
    """Images, each with the class that the model gives it and the true one.

    Args:
        images: uint8, shape ``(n, height, width, channels)``, on the CPU.
        truths: Name of the true class of each image.
        guesses: Name of the predicted class of each image.
        columns: Images side by side.

    Returns:
        The figure.
    """
    rows = -(-len(truths) // columns)
    figure = Figure(figsize=(2.2 * columns, 2.4 * rows))
    grid = np.atleast_2d(figure.subplots(rows, columns))
    for axes in grid.flat:
        axes.axis("off")
    for axes, image, truth, guess in zip(grid.flat, images.numpy(), truths, guesses, strict=False):
        grey = image.shape[-1] == 1
        axes.imshow(image[..., 0] if grey else image, cmap="gray" if grey else None)
        right = truth == guess
        title = f"Prediction: {short(guess)}\nTruth: {short(truth)}"
        plain_text([axes.set_title(title, fontsize=10, color="black" if right else _RED)])
    figure.tight_layout()
    return figure


def confusion(matrix: Tensor, classes: Sequence[str], what: str = "test set") -> Figure:
    """Confusion matrix, rows the truth, coloured by the fraction of each true class.

    Up to 30 classes are all named, with the counts in the cells. Beyond that the figure has a fixed
    size and names every few classes; beyond 500 classes a cell joins neighbouring ones.

    Args:
        matrix: Counts, shape ``(classes, classes)``.
        classes: Names of the classes.
        what: What the examples are called.

    Returns:
        The figure.
    """
    total, counts = len(classes), matrix.numpy()
    each = -(-total // _CELLS)  # classes in a cell
    if each > 1:
        starts = range(0, total, each)
        counts = np.add.reduceat(np.add.reduceat(counts, starts, axis=0), starts, axis=1)
    parts = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    named = total <= _NAMED
    size = 2.5 + 0.5 * total if named else 10.0
    figure = Figure(figsize=(size, size))
    axes = figure.subplots()
    # In a large matrix a mistake is a faint point: the square root makes it visible.
    norm = PowerNorm(1.0 if named else 0.5, vmin=0, vmax=1)
    image = axes.imshow(parts, cmap="Blues", norm=norm, interpolation="nearest")
    every = 1 if named else -(-len(counts) // _TICKS)
    places = range(0, len(counts), every)
    names = [short(classes[place * each]) for place in places]
    axes.set_xticks(places, names, rotation=45 if named else 90, ha="right" if named else "center")
    axes.set_yticks(places, names)
    plain_text([*axes.get_xticklabels(), *axes.get_yticklabels()])
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    if named:
        axes.set_title(f"Confusion matrix, {what}")
        _write_counts(axes, counts, parts)
    else:
        joined = f"\neach cell joins {each} by {each} neighbouring classes" if each > 1 else ""
        axes.set_title(f"Confusion matrix, {what}: {total:,} classes{joined}")
        figure.colorbar(image, ax=axes, label="fraction of the true class", shrink=0.75)
    return figure


def _write_counts(axes: Axes, counts: np.ndarray, parts: np.ndarray) -> None:
    for row, column in np.argwhere(counts):
        color = "white" if parts[row, column] > 0.5 else "black"
        text = f"{counts[row, column]:,}"
        axes.text(column, row, text, ha="center", va="center", color=color, fontsize=8)


def reliability(bins: Reliability, what: str = "test set") -> Figure:
    """Accuracy over confidence in bins of the confidence, and below it the examples of each bin.

    Args:
        bins: The data of the diagram.
        what: What the examples are called.

    Returns:
        The figure.
    """
    figure = Figure(figsize=(5.6, 6.6), layout="constrained")
    grid = {"height_ratios": (3, 1)}
    top, bottom = figure.subplots(2, 1, sharex=True, gridspec_kw=grid)
    top.plot((0, 1), (0, 1), "--", color="grey", linewidth=1, label="perfectly calibrated")
    count, confidence, accuracy = bins.count.numpy(), bins.confidence.numpy(), bins.accuracy.numpy()
    seen, many = count > 0, count >= _FEW
    top.vlines(confidence[seen], confidence[seen], accuracy[seen], color=_RED, alpha=0.5, zorder=1)
    top.plot(confidence[many], accuracy[many], "o", color=_BLUE, label="bin of examples")
    if (few := seen & ~many).any():
        label = f"fewer than {_FEW} examples"
        top.plot(
            confidence[few], accuracy[few], "o", color=_BLUE, markerfacecolor="white", label=label
        )
    top.set_ylabel("accuracy")
    top.set_ylim(-0.03, 1.03)
    top.set_title(f"Confidence against accuracy, {what}\ncalibration error {bins.error:.4f}")
    top.legend(loc="upper left")
    top.grid(alpha=0.3)
    width = 1 / len(count)
    edges = np.arange(len(count)) * width
    bottom.bar(edges, count, width, align="edge", color=_BLUE, alpha=0.6, edgecolor="white")
    for edge, n in zip(edges[seen], count[seen], strict=True):
        bottom.text(edge + width / 2, n * 1.1, f"{n:,}", ha="center", va="bottom", fontsize=6.5)
    bottom.set_yscale("log")
    bottom.set_ylim(0.7, 4 * count.max())
    bottom.set_ylabel("examples")
    bottom.set_xlim(-0.015, 1.015)
    bottom.set_xlabel("confidence: probability of the most likely class")
    return figure


def threshold(
    curve: CostCurve, sensitivity: Sequence[Sensitivity], what: str = "test set"
) -> Figure:
    """Expected cost over the threshold; and over the cost of a miss, if it is not what was thought.

    Args:
        curve: The expected cost at each threshold.
        sensitivity: To the cost of missing the positive class.
        what: What the examples are called.

    Returns:
        The figure.
    """
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.step(curve.thresholds, curve.costs, where="post", color=_BLUE)
    label = f"threshold in use, {curve.threshold:.3g}: {curve.cost:.4g}"
    left.axvline(curve.threshold, color=_RED, linestyle="--", label=label)
    place, least = curve.lowest
    label = f"least on these examples, {place:.3g}: {least:.4g}"
    left.plot([place], [least], "o", color=_GREEN, label=label)
    left.set_xlabel(f"threshold on the probability of {short(curve.positive)}")
    left.set_ylabel("expected cost per example")
    left.set_title(f"Expected cost at each threshold, {what}")
    factors = [row.factor for row in sensitivity]
    right.plot(factors, [row.kept for row in sensitivity], "o-", color=_RED,
               label=f"at the threshold in use, {curve.threshold:.3g}")  # fmt: skip
    right.plot(factors, [row.right for row in sensitivity], "o--", color=_BLUE,
               label="at the threshold for that cost")  # fmt: skip
    right.set_xscale("log", base=2)
    right.set_xticks(factors, [f"{factor:g} x" for factor in factors])
    right.set_xlabel(f"cost of missing {short(curve.positive)}, against what was given")
    right.set_title("If the costs are other than given")
    for axes in (left, right):
        axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
        plain_text([axes.xaxis.label])
    return figure


# The figures of a run by name of the file; None: it has none of that kind.
FIGURES: dict[str, Callable[[Drawn], Figure | None]] = {
    "curves.png": lambda run: curves(run.records),
    "confusion.png": lambda run: confusion(run.confusion, run.classes, run.what),
    "reliability.png": lambda run: reliability(run.reliability, run.what),
    "threshold.png": lambda run: (
        None if run.curve is None else threshold(run.curve, run.sensitivity, run.what)
    ),
    "predictions.png": lambda run: (
        None if run.images is None else predictions(run.images, run.truths, run.guesses)
    ),
}
