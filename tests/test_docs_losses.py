"""docs/losses.md: every loss is there, ours and those that its readers come from."""

import re
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

import funcloss
from funcloss import losses
from funcloss.app.registry import LOSSES

DOCUMENT = (Path(__file__).parent.parent / "docs" / "losses.md").read_text()

OPTAX = """
binary_dice_loss convex_kl_divergence cosine_distance cosine_similarity ctc_loss
ctc_loss_with_forward_probs dice_loss generalized_kl_divergence hinge_loss huber_loss kl_divergence
kl_divergence_with_log_targets l2_loss log_cosh make_fenchel_young_loss
multiclass_generalized_dice_loss multiclass_hinge_loss multiclass_perceptron_loss
multiclass_sparsemax_loss ntxent perceptron_loss poly_loss_cross_entropy ranking_softmax_loss
safe_softmax_cross_entropy sigmoid_binary_cross_entropy sigmoid_focal_loss smooth_labels
softmax_cross_entropy softmax_cross_entropy_with_integer_labels sparsemax_loss squared_error
triplet_margin_loss
"""  # optax.losses of optax 0.2.8


def column(header: str) -> list[str]:
    """Return the cells of every column of that name, over all tables."""
    cells = []
    for table in re.findall(r"(?:^\|.*\|\n)+", DOCUMENT, re.M):
        head, _, *rows = ([c.strip() for c in r[1:-1].split("|")] for r in table.splitlines())
        assert all(len(row) == len(head) for row in rows), f"a row of {head} has other columns"
        if header in head:
            cells += [row[head.index(header)] for row in rows]
    return cells


def named(cells: list[str]) -> set[str]:
    return set(re.findall(r"`(\w+)`", " ".join(cells)))


def torch_losses() -> set[str]:
    kinds = ("_loss", "cross_entropy", "cross_entropy_with_logits", "kl_div")
    return {name for name in dir(F) if name.endswith(kinds) and not name.startswith("_")}


def test_every_loss_of_ours_has_a_row_and_no_row_another_name():
    """Written by hand, or in the table that the site makes of the registry."""
    assert "\n<!-- names: loss -->\n" in DOCUMENT
    made = {name for name, row in LOSSES.items() if row.address == f"funcloss.losses:{name}"}
    assert named(column("loss")) <= set(losses.__all__)
    assert named(column("loss")) | made == set(losses.__all__)


@pytest.mark.parametrize(
    ("header", "names"),
    [
        ("torch.nn.functional", torch_losses()),
        ("torch.nn", {name for name in dir(torch.nn) if "Loss" in name}),
        ("optax.losses", OPTAX.split()),
    ],
)
def test_every_loss_of_another_library_has_a_row(header, names):
    assert set(names) <= named(column(header))


def test_what_stands_for_them_here_exists():
    called = set(re.findall(r"(?<![\w.])(\w+)\(", " ".join(column("here"))))
    assert called
    assert called <= {*losses.__all__, *funcloss.__all__}
