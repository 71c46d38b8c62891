"""A model as a function of its tensors: what of the model is copied, shared, or refused by name."""

import threading

import pytest
import torch
from torch import nn

from funcloss import losses
from funcloss.audit import audit, watch
from funcloss.errors import ConfigError
from funcloss.objectives import make_forward
from funcloss.objectives.skeleton import skeleton_of
from funcloss.objectives.supervised import split_tensors

X, LABELS = torch.randn(6, 3, generator=torch.Generator().manual_seed(0)), torch.arange(6) % 3


class Net(nn.Module):
    """Two layers, and what an attribute of theirs is set to."""

    def __init__(self, keep=lambda self: None):
        super().__init__()
        self.inner, self.head = nn.Linear(3, 3), nn.Linear(3, 3)
        self.register_buffer("shift", torch.ones(3), persistent=False)
        self.keep = keep

    def forward(self, x):
        self.act = torch.tanh(self.inner(x + self.shift))
        self.keep(self)
        return self.head(self.act)


def activations(net):
    net(X)


def in_containers(net):
    net(X)
    net.cache = {"all": [net.act, (net.act,)]}


def lock(net):
    net.lock, net.both = threading.Lock(), [threading.RLock(), threading.Event()]


def generator(net):
    net.random = torch.Generator().manual_seed(3)


def old_weight_norm(net):
    torch.nn.utils.weight_norm(net.inner)
    net(X)


class Trainer:
    """Whose method is a hook, and which cannot be copied."""

    def __init__(self):
        self.calls = 0

    def hook(self, module, args, output):
        self.calls += 1

    def __deepcopy__(self, memo):
        raise AssertionError("a trainer was copied")


def hook(net):
    net.inner.register_forward_hook(Trainer().hook)


def doubling_hook(net):
    net.inner.register_forward_hook(lambda module, args, output: 2 * output)


KEPT = [activations, in_containers, lock, generator, old_weight_norm, hook, doubling_hook]


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("prepare", KEPT)
def test_a_model_that_keeps_things_is_a_function_of_its_tensors(prepare):
    torch.manual_seed(0)
    net = Net()
    prepare(net)
    forward = make_forward(net)
    params, buffers = split_tensors(net)
    expected = net(X)
    found, _ = forward(params, buffers, X)
    torch.testing.assert_close(found, expected)
    doubled, _ = forward({n: 2 * p for n, p in params.items()}, buffers, X)
    assert not torch.allclose(doubled, expected)
    torch.testing.assert_close(net(X), expected)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("prepare", KEPT)
def test_a_model_that_keeps_things_is_watched_and_audited(prepare):
    torch.manual_seed(0)
    net = Net()
    prepare(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    seen = watch(net, optimizer, losses.cross_entropy)(X, LABELS)
    found = audit(net, None, losses.cross_entropy, (X, LABELS))
    torch.testing.assert_close(seen.balance.share, found.balance.share, rtol=1e-4, atol=1e-5)


def test_no_parameter_and_no_buffer_is_copied(monkeypatch):
    net = Net()
    net.tied = net.inner

    def refuse(self, memo):
        raise AssertionError("a tensor was copied")

    monkeypatch.setattr(nn.Parameter, "__deepcopy__", refuse)
    monkeypatch.setattr(torch.Tensor, "__deepcopy__", refuse)
    made = skeleton_of(net)
    assert {t.device.type for t in [*made.parameters(), *made.buffers()]} == {"meta"}
    assert made.tied is made.inner
    assert made.inner is not net.inner


def test_a_tensor_in_a_plain_attribute_is_a_copy():
    net = Net()
    net(X)
    before = net.act.clone()
    made = skeleton_of(net)
    made.act.zero_()
    assert torch.equal(net.act, before)


@pytest.mark.parametrize(
    ("prepare", "says"),
    [
        (lambda net: setattr(net.head, "rows", iter_of()), r"model\.head\.rows \(generator: "),
        (lambda net: setattr(net, "log", [open_file()]), r"model\.log\[0\] \(TextIOWrapper: "),
    ],
)
def test_what_cannot_be_copied_is_named(prepare, says):
    net = Net()
    prepare(net)
    with pytest.raises(ConfigError, match="the model cannot be copied because of " + says):
        make_forward(net)
    with pytest.raises(ConfigError, match=says):
        audit(net, None, losses.cross_entropy, (X, LABELS))
    for thing in getattr(net, "log", []):
        thing.close()


def iter_of():
    return (i for i in range(3))


def open_file():
    return open(__file__)


def test_the_mode_is_that_of_the_model_and_a_lazy_one_is_refused():
    assert not skeleton_of(Net().eval()).training
    assert skeleton_of(Net().train()).training
    with pytest.raises(ConfigError, match="lazy parameter: call it once"):
        skeleton_of(nn.Sequential(nn.LazyLinear(3)))
