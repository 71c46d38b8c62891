"""The figures of a run stay small, however many classes there are and whatever they are called."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import PEAK
from PIL import Image

from funcloss.app.report import run_figures as figures
from funcloss.decisions import reliability

LONG = "a name that goes on and on, " * 400


def counts_of(classes):
    random = torch.Generator().manual_seed(0)
    counts = torch.randint(0, 3, (classes, classes), generator=random)
    return counts + 4 * classes * torch.eye(classes, dtype=torch.int64)


@pytest.mark.slow
@pytest.mark.parametrize("classes", [1, 2, 30, 31, 100, 500, 501, 1000])
def test_a_confusion_matrix_has_a_bounded_size(classes, tmp_path):
    names = [LONG if i % 2 else f"class {i}" for i in range(classes)]
    figures.save_figure(figures.confusion(counts_of(classes), names), tmp_path / "x.png")
    with Image.open(tmp_path / "x.png") as image:
        assert max(image.size) < 2_100
    assert (tmp_path / "x.png").stat().st_size < 1_500_000


MEMORY = """
import torch
from pathlib import Path
from funcloss.app.report import run_figures as figures

def draw(classes):
    names = [f"class {i} " + "x" * 5000 for i in range(classes)]
    counts = torch.full((classes, classes), 7)
    figures.save_figure(figures.confusion(counts, names), Path(sys.argv[1]))

draw(2)
before = peak()
for classes in (30, 100, 1000):
    draw(classes)
    print(peak() - before)
"""


@pytest.mark.slow
def test_a_confusion_matrix_needs_little_memory(tmp_path):
    command = [sys.executable, "-c", PEAK + MEMORY, str(tmp_path / "x.png")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert all(float(line) < 300 for line in done.stdout.split()), done.stdout


def test_up_to_thirty_classes_every_count_and_name_is_written():
    counts = counts_of(30)
    axes = figures.confusion(counts, [f"class {i}" for i in range(30)]).axes[0]
    assert len(axes.texts) == int((counts > 0).sum())
    assert [t.get_text() for t in axes.get_yticklabels()] == [f"class {i}" for i in range(30)]
    assert axes.get_title() == "Confusion matrix, test set"


def test_a_large_matrix_is_an_image_of_the_fractions_with_some_names():
    counts = counts_of(200)
    axes = figures.confusion(counts, [f"class {i}" for i in range(200)]).axes[0]
    assert not axes.texts
    shown = np.asarray(axes.images[0].get_array())
    np.testing.assert_allclose(shown, counts / counts.sum(1, keepdim=True))
    ticks = axes.get_yticks().tolist()
    assert len(ticks) <= 25
    assert [t.get_text() for t in axes.get_yticklabels()] == [f"class {i:.0f}" for i in ticks]
    assert axes.get_title() == "Confusion matrix, test set: 200 classes"


def test_neighbours_are_joined_where_a_cell_would_be_less_than_a_point():
    counts = counts_of(1001)
    axes = figures.confusion(counts, [str(i) for i in range(1001)]).axes[0]
    shown = np.asarray(axes.images[0].get_array())
    assert shown.shape == (334, 334)
    rows = counts[3:6]
    assert shown[1, 2] == pytest.approx(float(rows[:, 6:9].sum() / rows.sum()))
    assert shown[333, 333] == pytest.approx(
        float(counts[999:, 999:].sum() / counts[999:].sum())
    )  # two are left over
    assert axes.get_yticklabels()[1].get_text() == str(3 * int(axes.get_yticks()[1]))
    assert axes.get_title().endswith("1,001 classes\neach cell joins 3 by 3 neighbouring classes")


def test_a_class_without_examples_is_an_empty_row():
    for classes in (3, 40):
        counts = counts_of(classes)
        counts[1] = 0
        axes = figures.confusion(counts, [str(i) for i in range(classes)]).axes[0]
        assert not np.asarray(axes.images[0].get_array())[1].any()


def test_long_names_are_cut_above_images(tmp_path):
    images = torch.zeros(6, 4, 4, 1, dtype=torch.uint8)
    drawn = figures.predictions(images, [LONG] * 6, ["short"] * 6)
    assert drawn.axes[0].get_title() == "Prediction: short\nTruth: a name that goes…"
    figures.save_figure(drawn, tmp_path / "x.png")
    with Image.open(tmp_path / "x.png") as image:
        assert max(image.size) < 1_000


def test_the_curves_of_a_long_training_are_of_one_size(tmp_path):
    records = [
        {"kind": "step", "examples": i, "loss": None if i % 7 == 0 else 1 / (1 + i)}
        for i in range(20_000)
    ]
    figures.save_figure(figures.curves(records), tmp_path / "x.png")
    with Image.open(tmp_path / "x.png") as image:
        assert max(image.size) < 1_000


def test_a_reliability_diagram_shows_accuracy_and_number_of_each_bin(tmp_path):
    confidence = torch.tensor([0.95] * 40 + [0.7] * 4).double()
    log_probs = torch.stack([confidence, 1 - confidence], 1).log()
    labels = torch.tensor([0] * 30 + [1] * 10 + [0] * 3 + [1])
    figure = figures.reliability(reliability(log_probs, labels))
    top, bottom = figure.axes
    named = {line.get_label(): line.get_xydata() for line in top.lines}
    np.testing.assert_allclose(named["bin of examples"], [[0.95, 0.75]])
    np.testing.assert_allclose(named["fewer than 10 examples"], [[0.7, 0.75]])
    assert [text.get_text() for text in bottom.texts] == ["4", "40"]
    error = (40 * 0.2 + 4 * 0.05) / 44
    assert top.get_title().endswith(f"calibration error {error:.4f}")
    figures.save_figure(figure, tmp_path / "x.png")
    with Image.open(tmp_path / "x.png") as image:
        assert max(image.size) < 1_000


def test_a_reliability_diagram_of_a_model_that_diverged_is_drawn(tmp_path):
    bins = reliability(torch.full((5, 3), torch.nan), torch.tensor([0, 1, 2, 0, 1]))
    figures.save_figure(figures.reliability(bins), tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
