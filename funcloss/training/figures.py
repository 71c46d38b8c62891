"""The figures of a run, drawn without a screen."""

import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.text import Text
from torch import Tensor

from funcloss._files import replacing

_BLUE, _RED, _GREEN = "#1f5fa8", "#c0392b", "#2e8b57"


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, whole or not at all."""
    with replacing(path) as beside, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # drawn as a box
        figure.savefig(beside, dpi=120, bbox_inches="tight")


def plain_text(texts: Iterable[Text]) -> None:
    """Let text be drawn as it is: what a class is called is no formula, with a ``$`` neither."""
    for text in texts:
        text.set_parse_math(False)


def curves(records: Sequence[dict[str, Any]]) -> Figure:
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
        axes.imshow(image.squeeze(), cmap="gray" if image.shape[-1] == 1 else None)
        right = truth == guess
        title = f"Prediction: {guess}\nTruth: {truth}"
        plain_text([axes.set_title(title, fontsize=10, color="black" if right else _RED)])
    figure.tight_layout()
    return figure


def confusion(matrix: Tensor, classes: Sequence[str]) -> Figure:
    """Confusion matrix, rows the truth, coloured by the part of each true class.

    Args:
        matrix: Counts, shape ``(classes, classes)``.
        classes: Names of the classes.

    Returns:
        The figure.
    """
    counts = matrix.numpy()
    parts = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    size = 2.5 + 0.5 * len(classes)
    figure = Figure(figsize=(size, size))
    axes = figure.subplots()
    axes.imshow(parts, cmap="Blues", vmin=0, vmax=1)
    axes.set_xticks(range(len(classes)), classes, rotation=45, ha="right")
    axes.set_yticks(range(len(classes)), classes)
    plain_text([*axes.get_xticklabels(), *axes.get_yticklabels()])
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    axes.set_title("Confusion matrix, test set")
    for row, column in np.argwhere(counts):
        color = "white" if parts[row, column] > 0.5 else "black"
        text = f"{counts[row, column]:,}"
        axes.text(column, row, text, ha="center", va="center", color=color, fontsize=8)
    return figure
