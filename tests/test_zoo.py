"""A sample of ``scripts/zoo.py``: models in training mode, against passes of one class each."""

import importlib
import sys
from pathlib import Path

import pytest
import torch

SCRIPTS = Path(__file__).parents[1] / "scripts"
SAMPLE = [
    "U-Net, BatchNorm, by pixel",
    "LSTM, dropout",
    "graph network, by node",
    "mixture of experts, top 2",
    "checkpoint, non-reentrant",
    "checkpoint, reentrant",
    "tied embedding",
    "sparse embedding, momentum",
    "spectral_norm",
    "has a lock",
    "frozen first layer",
    "contrastive loss",
    "a penalty in the loss",
    "autocast, bfloat16",
    "DataParallel",
    "ConvNeXt, small",
    "DenseNet, small",
]

pytestmark = pytest.mark.quick


@pytest.fixture(scope="module")
def zoo():
    sys.path.insert(0, str(SCRIPTS))
    yield importlib.import_module("zoo")
    sys.path.remove(str(SCRIPTS))


@pytest.fixture
def row_of(zoo):
    rows = {row.name: row for row in zoo.ROWS}
    return lambda name: rows[name]


@pytest.mark.parametrize("name", SAMPLE)
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_a_model_in_training_mode_is_split_by_class(zoo, row_of, name):
    assert not zoo.examined(row_of(name)).wrong


@pytest.mark.parametrize("what", ["class_parts", "tell_step"])
def test_what_is_wrong_is_found(zoo, row_of, monkeypatch, what):
    """The parts of two classes change places; or the step is told of half the gradient."""
    module = importlib.import_module("funcloss.audit.watch")
    right = getattr(module, what)

    def parts(*args):
        found = right(*args)
        first, last = list(found)[:2]
        return {**found, first: found[last], last: found[first]}

    def told(optimizer, params, grads, *args, **options):
        return right(optimizer, params, [g / 2 for g in grads], *args, **options)

    monkeypatch.setattr(module, what, {"class_parts": parts, "tell_step": told}[what])
    assert zoo.examined(row_of("has a lock")).wrong
    assert torch.get_default_dtype() == torch.float32
