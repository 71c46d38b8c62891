"""``scripts/counterfactual.py``: its trainings are paired, and its statistics those it names."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from funcloss.app import data

PLACE = Path(__file__).parents[1] / "scripts" / "counterfactual.py"


@pytest.fixture(scope="module")
def study():
    spec = importlib.util.spec_from_file_location("counterfactual", PLACE)
    module = importlib.util.module_from_spec(spec)
    sys.modules["counterfactual"] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("weight", "every"), [(1.0, 1), (5.0, 1), (1.0, 2)])
def test_only_the_weight_parts_a_training_from_its_pair(study, weight, every):
    digits = data.load_dataset(data.LoadOptions("mnist-sample", val_fraction=0.0))
    settings = study.Settings("mnist-sample", weight, steps=4, every=every, held_out=2)
    plain = study.train("article-cnn", digits, settings, 1, None)
    weighted = study.train("article-cnn", digits, settings, 1, 9)
    assert (weighted["losses"] == plain["losses"]) == (weight == 1.0)
    if weight == 1.0:
        assert weighted["due_to"] == [0.0] * 10
    else:
        assert all(weighted["due_to"])
        assert weighted["residual"] < 0.02


def test_columns_are_of_the_other_classes_and_paired_by_seed(study):
    found = [
        {"seed": seed, "label": label, "losses": [10.0 * seed, seed + up, 3.0], "due_to": [up] * 3}
        for seed in (0, 1)
        for label, up in ((None, 0.0), (0, 0.5 + seed))
    ]
    measured, told = study.columns(found, 0)
    assert measured.tolist() == [[0.5, 0.0], [1.5, 0.0]]
    assert told.tolist() == [[0.5, 0.5], [1.5, 1.5]]


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ([1.0, 2.0, 3.0], [10.0, 20.0, 90.0], 1.0),
        ([1.0, 2.0, 3.0], [5.0, 0.0, -5.0], -1.0),
        ([1.0, 2.0, 3.0, 4.0, 5.0], [5.0, 6.0, 7.0, 8.0, 7.0], 0.8 / 0.95**0.5),  # a tie
    ],
)
def test_the_correlation_is_spearmans(study, a, b, expected):
    found = study.spearman(torch.tensor(a), torch.tensor(b))
    torch.testing.assert_close(found, torch.tensor(expected).double())


def test_equal_values_have_no_correlation(study):
    assert study.spearman(torch.zeros(3), torch.arange(3.0)).isnan()


def test_halves_of_seeds_that_agree_have_the_ceiling_one(study):
    line = torch.tensor([3.0, 1.0, 2.0, 5.0]).double()
    correlation, per_seed, ceiling, own, *_ = study.compared(line.repeat(4, 1), -line.repeat(4, 1))
    assert correlation == "-1.00 [-1.00, -1.00]"
    assert (per_seed, ceiling, own) == ("-1.00 to -1.00", "1.00", "1.00")
