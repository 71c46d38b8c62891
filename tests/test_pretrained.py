"""Pretrained weights, frozen layers and varied images: no network is needed to test them."""

import re

import numpy as np
import pytest
import torch
import torchvision
from conftest import StopAt, resume
from safetensors.torch import load_file
from test_own_data import pixels
from torch.func import vmap
from torch.testing import assert_close

from funcloss.app import runs
from funcloss.app.config import make_config
from funcloss.app.runs.augmentation import augmented
from funcloss.app.runs.checkpoint import restore
from funcloss.app.runs.folder import records_of
from funcloss.app.runs.network import make_model
from funcloss.app.runs.pretrained import pretrained_form, pretrained_tensors
from funcloss.app.runs.setup import make_setup
from funcloss.app.train import train
from funcloss.errors import ConfigError
from funcloss.keys import make_key
from funcloss.typing import Batch

NET = "torchvision:shufflenet_v2_x0_5"


@pytest.fixture(scope="module")
def weights():
    """What would come from torchvision's server: a network of its own for 1,000 classes."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        model = torchvision.models.get_model(NET.partition(":")[2], weights=None)
        return {
            n: t + 0.01 * torch.rand_like(t) if t.dim() else t
            for n, t in model.state_dict().items()
        }


@pytest.fixture
def at_hand(weights, monkeypatch):
    """Let torchvision find these weights; return how often it was asked, and with what."""
    asked = []

    def get_state_dict(self, **options):
        asked.append(options)
        return dict(weights)

    monkeypatch.setattr("torchvision.models._api.WeightsEnum.get_state_dict", get_state_dict)
    monkeypatch.setattr("funcloss.app.runs.pretrained.check_network", lambda urls: None)
    return asked


@pytest.fixture
def images(tmp_path):
    """Twenty-four images, the class in their brightness."""
    labels = np.arange(24) % 3
    made = (pixels(24, 16, 16, 3) // 3 + 70 * labels[:, None, None, None]).astype(np.uint8)
    np.savez(tmp_path / "own.npz", images=made, labels=labels)
    return tmp_path / "own.npz"


def config(images, **options):
    plain = {"dataset": str(images), "model": NET, "batch_size": 4, "epochs": 2, "device": "cpu"}
    plain |= {"compile": "off", "image_size": 16, "log_every": 1}
    return make_config(plain, options)


def tensors(run):
    return load_file(run / "model.safetensors")


def test_size_and_scale_are_what_the_weights_expect(images, at_hand):
    setup = make_setup(config(images, pretrained=True, image_size=0))
    assert setup.config.image_size == 224
    assert setup.config.pixel_mean == (0.485, 0.456, 0.406)
    assert setup.dataset.input_shape == (3, 224, 224)
    assert_close(setup.dataset.std, torch.tensor([0.229, 0.224, 0.225]))
    given = config(images, pretrained=True, pixel_mean=[0.5] * 3, pixel_std=[0.2] * 3)
    given = make_setup(given).config
    assert (given.image_size, given.pixel_mean) == (16, (0.5, 0.5, 0.5))
    assert [options["weights_only"] and options["check_hash"] for options in at_hand] == [True] * 2
    assert pretrained_form("torchvision:inception_v3").mean == (0.5, 0.5, 0.5)


@pytest.mark.parametrize("freeze", [False, True])
def test_all_but_the_head_begins_from_them_and_the_head_alone_is_trained_if_frozen(
    freeze, weights, images, at_hand
):
    setup = make_setup(config(images, pretrained=True, freeze=freeze))
    state, head = setup.state, {"fc.weight", "fc.bias"}
    start = state.params | state.buffers
    assert [n for n in weights if not torch.equal(start[n], weights[n])] == ["fc.weight", "fc.bias"]
    trained = {n for n, _ in torchvision.models.get_model(NET.partition(":")[2]).named_parameters()}
    assert set(state.params) == (head if freeze else trained)
    assert "randomly initialised because of another shape: fc.weight, fc.bias" in setup.notes[-1]


def test_a_run_keeps_what_is_frozen_and_resumes_without_the_weights(
    weights, images, at_hand, tmp_path
):
    options = {"augment": "flip", "audit_every": 2, "epochs": 1}
    asked = config(images, pretrained=True, freeze=True, **options)
    train(asked, tmp_path / "run")
    after = tensors(tmp_path / "run")
    kept = {name for name, tensor in weights.items() if torch.equal(after[name], tensor)}
    assert weights.keys() - kept == {"fc.weight", "fc.bias"}  # BatchNorm's statistics are kept
    kinds = {line["kind"] for line in [*records_of(tmp_path / "run")]}
    assert "audit" in kinds  # as it could not be if BatchNorm learnt

    part, n = tmp_path / "part", len(at_hand)
    assert not train(asked, part, should_stop=StopAt(3)).finished
    assert resume(part).finished
    assert all(torch.equal(t, tensors(part)[name]) for name, t in after.items())
    assert len(runs.evaluate_run(tmp_path / "run").evaluation.labels) == 2
    assert len(at_hand) == n + 1  # to begin, and not to resume or to evaluate


@pytest.mark.slow
@pytest.mark.parametrize("name", ["efficientnet_b0", "convnext_tiny", "swin_t"])
def test_all_layers_of_a_net_with_stochastic_depth_are_trained(name, images, tmp_path, monkeypatch):
    made = torchvision.models.get_model(name, weights=None).state_dict()
    monkeypatch.setattr("torchvision.models._api.WeightsEnum.get_state_dict", lambda *_, **__: made)
    monkeypatch.setattr("funcloss.app.runs.pretrained.check_network", lambda urls: None)
    options = {"model": f"torchvision:{name}", "image_size": 32, "epochs": 1, "audit_every": 0}
    asked = config(images, pretrained=True, **options)
    for run in ("run", "again"):
        train(asked, tmp_path / run)
    after, again = tensors(tmp_path / "run"), tensors(tmp_path / "again")
    assert all(torch.equal(after[n], again[n]) for n in after)
    moved = {
        n for n in after if after[n].shape != made[n].shape or not torch.equal(after[n], made[n])
    }
    trained = dict(torchvision.models.get_model(name, weights=None).named_parameters())
    assert len(trained.keys() - moved) == 0


def test_a_checkpoint_is_read_into_memory_aligned_as_that_of_a_training(tmp_path):
    """Some convolutions round by where in memory their weights begin: resumed runs would differ."""
    state = {f"{i}": torch.rand(3) for i in range(9)}
    runs.save_tensors(tmp_path / "x.safetensors", state, {})
    read = restore(state, runs.load_tensors(tmp_path / "x.safetensors")[0])
    assert {t.data_ptr() % 16 for t in read.values()} == {0}


def test_grey_images_are_taken_as_three_equal_channels(weights, images, at_hand, tmp_path):
    three = make_model(config(images), (3, 32, 32), 3)
    one = make_model(config(images), (1, 32, 32), 3)
    name, grey = "conv1.0.weight", torch.rand(2, 1, 32, 32)
    taken = pretrained_tensors(NET, one)[0][name]
    conv = torch.nn.functional.conv2d
    expected = conv(grey.repeat(1, 3, 1, 1), pretrained_tensors(NET, three)[0][name])
    assert_close(conv(grey, taken), expected)
    with np.load(images) as kept:
        np.savez(tmp_path / "grey.npz", images=kept["images"][..., 0], labels=kept["labels"])
    setup = make_setup(config(tmp_path / "grey.npz", pretrained=True))
    assert setup.config.pixel_mean == (pytest.approx(0.449),)


@pytest.mark.parametrize(
    ("error", "match"),
    [
        (None, r"are not there: there is no network.*put https://\S+\.pth into"),
        (
            RuntimeError("invalid hash value (expected 'f', got 'e')"),
            r"cannot be read: invalid hash",
        ),
        (EOFError(), r"cannot be read: EOFError; delete it, or train without pretrained"),
    ],
)
def test_weights_that_cannot_be_had_are_one_line(
    error, match, images, monkeypatch, tmp_path, run_cli
):
    def get_state_dict(self, **options):
        raise error

    monkeypatch.setattr("torchvision.models._api.WeightsEnum.get_state_dict", get_state_dict)
    monkeypatch.setattr(
        "funcloss.app.data.fetch.answering", lambda urls, **_: [] if error is None else urls
    )
    args = ("--dataset", images, "--model", NET, "--pretrained", "--image-size", 32)
    code, _, err = run_cli("train", *args, "--batch-size", 4, "--run-dir", tmp_path / "run")
    assert (code, len(err.splitlines())) == (1, 1)
    assert re.search(match, err)
    assert not (tmp_path / "run").exists()


REFUSED = [
    ({"pretrained": True, "model": "fast-cnn"}, "of torchvision's models, got model fast-cnn"),
    ({"pretrained": True, "init": "x.safetensors"}, "pretrained and init both"),
    ({"freeze": True}, "freeze .* random: add pretrained or init"),
    ({"freeze": True, "model": "auto"}, "freeze .* random: add pretrained or init"),
    ({"pretrained": True, "model": "torchvision:resnet81"}, "no model 'resnet81' .*did you mean"),
    ({"augment": "heavy"}, "augment must be one of off, light, flip"),
    ({"model": "torchvision:vit_b_16", "image_size": 30}, "vit_b_16 .*30"),
]


@pytest.mark.parametrize(("options", "match"), REFUSED, ids=[str(o) for o, _ in REFUSED])
def test_what_does_not_go_together_is_refused(options, match, images):
    with pytest.raises(ConfigError, match=match):
        make_setup(config(images, **options))


def test_a_table_is_not_augmented(tmp_path):
    np.savez(
        tmp_path / "own.npz", X=np.random.default_rng(0).normal(size=(24, 3)), y=np.arange(24) % 2
    )
    with pytest.raises(ConfigError, match="augment is for images, and own has none"):
        make_setup(make_config({"dataset": str(tmp_path / "own.npz"), "augment": "light"}))


class State:
    """A state, as far as images look at it."""

    def __init__(self, seed=0, step=0):
        self.key, self.step = make_key(seed), torch.tensor(step)


def varied(images, augment="light", **state):
    labels = torch.zeros(len(images), dtype=torch.int64)
    return augmented(State(**state), Batch(images, labels), augment).inputs


def test_images_depend_on_key_step_and_place_alone():
    torch.manual_seed(0)
    images = torch.rand(6, 3, 16, 12)
    before = torch.get_rng_state()
    first = varied(images, seed=3, step=5)
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(first, varied(images, seed=3, step=5))
    assert torch.equal(first[:2], varied(images[:2], seed=3, step=5))
    for other in ({"seed": 4, "step": 5}, {"seed": 3, "step": 6}):
        assert not torch.isclose(first, varied(images, **other)).flatten(1).all(1).any()
    assert torch.equal(varied(images, "off"), images)

    def step(key):
        state = State()
        state.key = key
        return augmented(state, Batch(images, torch.zeros(6).long()), "flip").inputs

    keys = torch.stack([make_key(seed) for seed in range(3)])
    each = torch.stack([step(key) for key in keys])
    assert_close(vmap(step)(keys), each)
    assert_close(torch.compile(step, backend="aot_eager", fullgraph=True)(keys[1]), each[1])


def test_images_are_shifted_and_turned_as_far_as_is_said():
    """Of a white square on black the centre moves by an eighth at most, and the axes turn by 10."""
    size, n = 64, 400
    place = torch.linspace(-1, 1, size)
    y, x = torch.meshgrid(place, place, indexing="ij")
    bar = ((x.abs() < 0.5) & (y.abs() < 0.1)).float()
    seen = varied(bar.expand(n, 1, -1, -1)).squeeze(1)
    mass = seen.sum((1, 2))
    assert_close(mass, bar.sum().expand(n), rtol=0.05, atol=0)
    right, down = ((seen * c).sum((1, 2)) / mass for c in (x, y))
    for moved in (right, down):
        assert moved.abs().max() < 0.29  # 2 / 8 of -1..1, and what a turn around the middle adds
        assert moved.std() > 0.1
    dx, dy = x - right[:, None, None], y - down[:, None, None]
    angle = 0.5 * torch.atan2(
        2 * (seen * dx * dy).sum((1, 2)), (seen * (dx**2 - dy**2)).sum((1, 2))
    )
    degrees = angle.rad2deg()
    assert 9.0 < degrees.abs().max() < 10.3
    half = varied((x > 0).float().expand(n, 1, -1, -1), "flip").squeeze(1)
    left = half[:, :, :16].mean((1, 2)) > half[:, :, -16:].mean((1, 2))
    assert 0.4 < left.float().mean() < 0.6
    assert not (varied((x > 0).float().expand(n, 1, -1, -1))[:, 0, 32, 0] > 0.5).any()
