"""Somebody's own model: by a factory, from torchvision, with first weights of its own."""

import itertools
import json
import os
import sys
import textwrap

import numpy as np
import pytest
import torch
from conftest import StopAt, but_learning, resume
from safetensors.torch import load_file, save_file
from torch import nn
from torch.testing import assert_close

from funcloss import models
from funcloss.app import data, runs
from funcloss.app.config import make_config, read_toml
from funcloss.app.options import EvaluateOptions
from funcloss.app.runs.network import make_model, try_model
from funcloss.app.train import train
from funcloss.errors import ConfigError

PREAMBLE = """
import torch
import torch.nn as nn
import torch.nn.functional as F
from funcloss import models

class Net(nn.Module):
    def __init__(self, shape=(3,), classes=2):
        super().__init__()
        self.first, self.second = nn.Linear(shape[0], 5), nn.Linear(5, classes)

    def forward(self, x):
        return self.second(self.first(x).relu())
"""
QUICK = ("--epochs", 1, "--batch-size", 4, "--compile", "off", "--audit-every", 0)
_numbers = itertools.count()


def accuracy_of(run):
    """The accuracy on the test set, as the summary of a run has it."""
    test = json.loads((run / "summary.json").read_text())["test"]
    return test["rules"]["argmax"]["accuracy"][0]


@pytest.fixture(autouse=True)
def _no_figures(monkeypatch):
    """Most of the time of runs as small as these would go into drawing."""
    monkeypatch.setattr("funcloss.app.report.run_figures.save_figure", lambda figure, path: None)


@pytest.fixture
def own(tmp_path, monkeypatch):
    """Write a module under a name of its own into the current folder; return its name."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    names = []

    def write(text="", preamble=PREAMBLE):
        names.append(f"own_model_{os.getpid()}_{next(_numbers)}")
        (tmp_path / f"{names[-1]}.py").write_text(preamble + textwrap.dedent(text))
        return names[-1]

    yield write
    for name in [n for n in sys.modules if any(own in n for own in names)]:
        del sys.modules[name]


def rows(n=40, classes=2):
    generator = np.random.default_rng(0)
    labels = np.arange(n) % classes
    return (generator.normal(size=(n, 3)) + labels[:, None]).astype(np.float32), labels


@pytest.fixture
def table(tmp_path):
    """A file of 40 examples of 3 features in 2 classes."""
    features, labels = rows()
    np.savez(tmp_path / "table.npz", images=features, labels=labels)
    return tmp_path / "table.npz"


@pytest.fixture
def fit(run_cli, tmp_path, table):
    """Train by the command into a new folder; return the folder, and what the command said."""
    numbers = itertools.count()

    def run(*args):
        given = () if "--dataset" in args else ("--dataset", table)
        folder = tmp_path / f"run{next(numbers)}"
        return folder, run_cli("train", "--run-dir", folder, *QUICK, *given, *args)

    return run


def tensors(run, file="model"):
    return runs.load_tensors(run / f"{file}.safetensors")[0]


def assert_same(run, other, names=None):
    for file in ("model", "checkpoint"):
        a, b = tensors(run, file), tensors(other, file)
        assert a.keys() == b.keys()
        assert [name for name in a if not torch.equal(a[name], b[name])] == []


# --- tensors ---

SCALED = """
    class Scaled(Net):
        def __init__(self, shape=(3,), classes=2, scale=4.0):
            super().__init__(shape, classes)
            self.register_buffer("scale", torch.tensor(scale), persistent=False)
            self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

        def forward(self, x):
            if self.training:
                self.steps += 1
            return super().forward(self.scale * x)

    def ten(shape, classes):
        return Scaled(shape, classes, scale=10.0)
"""


def test_a_buffer_that_no_state_dict_keeps_goes_wherever_the_model_does(
    own, fit, run_cli, tmp_path
):
    """It is kept beside the others: what is read is the tensor that was trained with."""
    module = own(SCALED)
    name, other = f"{module}:Scaled", f"{module}:ten"
    features, labels = rows()
    lines = [
        "a,b,c,y",
        *(",".join(map(str, [*x, y])) for x, y in zip(features, labels, strict=True)),
    ]
    (tmp_path / "rows.csv").write_text("\n".join(lines))
    of_rows = ("--dataset", tmp_path / "rows.csv", "--target", "y")
    run, (code, _, err) = fit("--model", name, *of_rows)
    assert code == 0, err
    kept = tensors(run)
    assert float(kept["scale"]) == 4.0
    assert int(kept["steps"]) == 8  # 32 examples by 4
    loaded = runs.load(run, allow_import=True)
    assert float(loaded.model.scale) == 4.0
    for args in (
        ("evaluate", run, "--allow-import"),
        ("predict", run, tmp_path / "rows.csv", "--allow-import"),
        ("audit", run, "--allow-import", "--out", tmp_path / "audit"),
    ):
        code, _, err = run_cli(*args)
        assert code == 0, err
    again, (code, _, err) = fit("--model", other, *of_rows, "--init", run / "model.safetensors")
    assert code == 0, err
    assert float(tensors(again)["scale"]) == 4.0  # of the file, not of the factory
    floored, (code, _, err) = fit("--model", name, *of_rows, "--floor", "0=0.1", "--floor-every", 2)
    assert code == 0, err
    assert float(tensors(floored)["scale"]) == 4.0


# --- factories ---

GOOD = [
    pytest.param("", "Net", 32, id="class with defaults"),
    pytest.param("def make(shape, classes): return Net(shape, classes)", "make", 32, id="function"),
    pytest.param("def make(): return Net()", "make", 32, id="function without arguments"),
    pytest.param(
        "def make(shape, classes, width=4): return Net(shape, classes)",
        "make",
        32,
        id="function with an option",
    ),
    pytest.param("make = lambda shape, classes: Net(shape, classes)", "make", 32, id="lambda"),
    pytest.param("class Place:\n    make = Net", "Place.make", 32, id="attribute of an attribute"),
    pytest.param(
        """
        class Two(Net):
            def __init__(self, shape, classes):
                super().__init__(shape, classes)
        """,
        "Two",
        32,
        id="class of two arguments",
    ),
    pytest.param(
        "def make(shape, classes=2): return Net(shape, classes)",
        "make",
        32,
        id="function with a default",
    ),
    pytest.param(
        "import functools\nmake = functools.partial(Net, classes=2)", "make", 32, id="partial"
    ),
    pytest.param(
        "def make(shape, classes): return nn.Sequential(nn.Flatten(), nn.Linear(3, 2))",
        "make",
        8,
        id="sequence",
    ),
    pytest.param(
        "def make(): return torch.nn.Sequential(Net(), nn.Dropout(0.5))", "make", 32, id="dropout"
    ),
]


@pytest.mark.parametrize(("text", "name", "parameters"), GOOD)
def test_a_factory_makes_the_model(text, name, parameters, own, fit):
    address = f"{own(text)}:{name}"
    run, (code, _, err) = fit("--model", address)
    assert (code, but_learning(err)) == (0, "")
    summary = json.loads((run / "summary.json").read_text())
    assert summary["parameters"] == parameters
    assert summary["model"] == address
    assert runs.load(run, allow_import=True).model.training is False


def test_a_factory_in_a_file_is_called_by_its_path(own, fit, tmp_path):
    place = own()
    mine, (code, _, err) = fit("--model", f"{place}.py:Net")
    assert (code, but_learning(err)) == (0, "")
    # wherever one is, it means the same
    assert read_toml(mine / "config.toml")["model"] == f"{tmp_path / place}.py:Net"
    theirs, _ = fit("--model", f"{place}:Net")
    assert_same(mine, theirs)


def test_a_factory_trains_to_the_bits_of_the_model_that_it_makes(own, fit):
    place = own("def make(shape, classes): return models.mlp(shape, classes)")
    mine, (code, _, _) = fit("--model", f"{place}:make")
    theirs, _ = fit("--model", "mlp")
    assert code == 0
    assert_same(mine, theirs)


def test_a_model_is_drawn_from_the_seed_alone(own, fit):
    place = own()
    address = f"{place}:Net"
    torch.manual_seed(5)
    first, _ = fit("--model", address, "--seed", 3)
    torch.manual_seed(6)
    state = torch.get_rng_state()
    second, _ = fit("--model", address, "--seed", 3)
    third, _ = fit("--model", address, "--seed", 4)
    assert_same(first, second)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(tensors(first)["first.weight"], tensors(third)["first.weight"])


def net(body):
    return f"class Bad(Net):\n    def forward(self, x):\n        {body}\n"


REFUSED = [
    pytest.param(
        "made = Net()", "made", r"is a module: name a function that makes it", id="module"
    ),
    pytest.param(
        "made = 3", "made", r"must be a function that returns an nn\.Module.*int", id="int"
    ),
    pytest.param(
        "def make(): return 3", "make", r"must return an nn\.Module, got a int", id="no module"
    ),
    pytest.param(
        "def make(): pass", "make", r"must return an nn\.Module, got a NoneType", id="None"
    ),
    pytest.param(
        "def make(): raise OSError('no weights')",
        "make",
        r":make\(\) raised OSError: no weights",
        id="raises",
    ),
    pytest.param(
        "def make(): raise SystemExit(0)", "make", r":make\(\) raised SystemExit", id="ends"
    ),
    pytest.param(
        "def make(shape): return Net()",
        "make",
        r"raised TypeError.*takes nothing, or the shape of an input and the number of cl",
        id="one argument",
    ),
    pytest.param(
        "def make(a, b, c): return Net()",
        "make",
        r"raised TypeError.*takes nothing, or",
        id="three arguments",
    ),
    pytest.param(
        "def make(*, shape, classes): return Net()",
        "make",
        r"raised TypeError.*takes",
        id="keywords",
    ),
    pytest.param("", "Nett", r"has no 'Nett'; did you mean Net\?", id="near name"),
    pytest.param("1 / 0", "Net", r"cannot import own_model_\w+: ZeroDivisionError", id="no import"),
    pytest.param(
        "def make(): return Net(classes=3)",
        "make",
        r"must give logits of shape \(4, 2\).*got \(4, 3\)",
        id="three logits",
    ),
    pytest.param(
        net("return super().forward(x).argmax(1)"),
        "Bad",
        r"must give logits.*got \(4,\)",
        id="classes",
    ),
    pytest.param(
        net("return super().forward(x), x"), "Bad", r"must give logits.*got a tuple", id="tuple"
    ),
    pytest.param(
        net("return {'logits': super().forward(x)}"), "Bad", r"must give logits.*a dict", id="dict"
    ),
    pytest.param(
        net("return x.view(7, 7)"), "Bad", r"fails on inputs of shape \(4, 3\)", id="fails"
    ),
    pytest.param(
        "def make(): return Net(shape=(4,))",
        "make",
        r"fails on inputs of shape \(4, 3\).*mat1 and mat2",
        id="other inputs",
    ),
    pytest.param(
        "def make(): return Net().double()", "make", r"fails on inputs.*Double", id="double"
    ),
    pytest.param(
        "def make(): return nn.Flatten()",
        "make",
        r"has no parameter that requires a grad",
        id="no parameter",
    ),
    pytest.param(
        "def make(): return Net().requires_grad_(False)",
        "make",
        r"has no parameter that requires a grad",
        id="all frozen",
    ),
    pytest.param(
        net("return super().forward(x + torch.randn_like(x))"),
        "Bad",
        r"randn_like draws from torch's global generator",
        id="noise",
    ),
    *(
        pytest.param(
            "from torch.utils.checkpoint import checkpoint\n"
            + net(f"return checkpoint(super().forward, x, use_reentrant={reentrant})"),
            "Bad",
            r"uses gradient checkpointing \(torch\.utils\.checkpoint\).*: turn it off, such as by",
            id=f"checkpointing, reentrant: {reentrant}",
        )
        for reentrant in (True, False)
    ),
    pytest.param(
        """
        class Same(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x): return x.clone()
            @staticmethod
            def backward(ctx, slope): return slope

        class Bad(Net):
            def forward(self, x): return Same.apply(super().forward(x))
        """,
        "Bad",
        r"fails on inputs of shape .*override the setup_context",
        id="old function",
    ),
    pytest.param(
        net("return super().forward(x) * torch.empty(1, 1).bernoulli_(0.5)"),
        "Bad",
        r"bernoulli_: the first axis must be the batch of 4 examples.*mode='row'",
        id="depth of a batch",
    ),
    pytest.param(
        "def make(): return nn.LazyLinear(2)",
        "make",
        r"model own_model_\w+:make .*(lazy|Lazy|unin)",
        id="lazy",
    ),
    pytest.param(
        "def make(): return Net().to('meta')", "make", r"model own_model_\w+:make .*meta", id="meta"
    ),
]


@pytest.mark.parametrize(("text", "name", "match"), REFUSED)
def test_what_is_no_model_for_the_data_is_refused(text, name, match, own, fit):
    run, (code, _, err) = fit("--model", f"{own(text)}:{name}")
    assert err.count("\n") == 1
    assert err.startswith("error: ")
    pytest.raises(ConfigError, _raise, err).match(match)
    assert code == 2
    assert not run.exists()


def _raise(text):
    raise ConfigError(text)


NAMES = [
    pytest.param("mpl", r"model must be one of .*'mpl' \(did you mean 'mlp'\?\)", id="near name"),
    pytest.param(
        "net.py", r"module:name or file\.py:name; got \'net\.py\'", id="file without a name"
    ),
    pytest.param("mine.net", r"module:name or file\.py:name; got \'mine\.net\'", id="dots"),
    pytest.param("./net", r"module:name or file\.py:name; got \'\./net\'", id="path"),
    pytest.param(
        "nowhere_at_all:net", r"cannot import nowhere_at_all: ModuleNotFoundError", id="gone"
    ),
    pytest.param("nowhere.py:net", r"no file .*nowhere\.py", id="no file"),
    pytest.param(":net", r"module:name or file\.py:name; got ':net'", id="no module"),
    pytest.param("json:", r"module:name or file\.py:name; got 'json:'", id="no name"),
    pytest.param(
        "torchvision:resnet81",
        r"no model 'resnet81' \(did you mean 'resnet18'\?\)",
        id="near torchvision",
    ),
    pytest.param("torchvision:", r"torchvision has no model ''", id="torchvision alone"),
    pytest.param("torchvision:fcn_resnet50", r"fcn_resnet50", id="no classifier"),
    pytest.param(
        "torchvision:resnet18", r"takes images, and the inputs are of shape \(3,\)", id="no images"
    ),
]


@pytest.mark.parametrize(("name", "match"), NAMES)
def test_a_name_that_is_of_no_model_is_refused(name, match, fit, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run, (code, _, err) = fit("--model", name)
    assert err.count("\n") == 1
    assert err.startswith("error: ")
    pytest.raises(ConfigError, _raise, err).match(match)
    assert code == 2
    assert not run.exists()


STEPS = [
    pytest.param(
        """
        def make(shape, classes):
            return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, classes))
        """,
        "make",
        ("--batch-size", 1),
        id="batch norm, one example",
    ),
    pytest.param(
        net("assert len(x) == 2; return super().forward(x)"), "Bad", (), id="two examples"
    ),
]


@pytest.mark.parametrize(("text", "name", "args"), STEPS)
def test_a_model_that_fails_on_a_batch_is_one_line(text, name, args, own, fit):
    run, (code, _, err) = fit("--model", f"{own(text)}:{name}", *args)
    assert err.splitlines()[-1].startswith("error: ")
    assert f":{name}" in err
    assert code == 2
    assert not run.exists()


# --- what models are made of ---

KINDS = """
class Normed(nn.Module):
    def __init__(self, shape, classes):
        super().__init__()
        self.norm, self.head = nn.BatchNorm1d(shape[0], momentum=0.5), nn.Linear(shape[0], classes)
    def forward(self, x): return self.head(self.norm(x))

class Tied(nn.Module):
    def __init__(self, shape, classes):
        super().__init__()
        self.one, self.two, self.head = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, classes)
        self.two.weight = self.one.weight
    def forward(self, x): return self.head(self.two(self.one(x).tanh()))

class Frozen(Net):
    def __init__(self, shape, classes):
        super().__init__(shape, classes)
        self.first.requires_grad_(False)

class Dropped(Net):
    def forward(self, x): return self.second(F.dropout(self.first(x).relu(), 0.5, self.training))
"""


RANDOM = """
class Encoder(nn.Module):
    def __init__(self, shape, classes):
        super().__init__()
        self.encoder = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.3, batch_first=True)
        self.embed, self.head = nn.Linear(1, 4), nn.Linear(4, classes)
    def forward(self, x): return self.head(self.encoder(self.embed(x[..., None])).mean(1))

class Recurrent(nn.Module):
    def __init__(self, shape, classes):
        super().__init__()
        self.net, self.head = nn.LSTM(1, 4, 2, dropout=0.3), nn.Linear(4, classes)
    def forward(self, x): return self.head(self.net(x.T[..., None])[0][-1])

class Deep(Net):
    def forward(self, x):
        keep = x.new_empty(len(x), 1).bernoulli_(0.7) if self.training else 0.7
        return self.second(self.first(x).relu() * keep / 0.7)
"""


@pytest.mark.parametrize("name", ["Encoder", "Recurrent", "Deep"])
def test_what_a_model_draws_within_is_repeated_resumed_and_audited(
    name, own, fit, run_cli, tmp_path, table
):
    address = f"{own(RANDOM)}:{name}"
    whole, (code, _, err) = fit("--model", address)
    assert (code, but_learning(err)) == (0, "")
    options = {"model": address, "dataset": str(table), "epochs": 1, "audit_every": 0}
    config = make_config(options, {"batch_size": 4, "compile": "off", "device": "cpu"})
    assert not train(config, tmp_path / "part", should_stop=StopAt(3)).finished
    code, _, err = run_cli("train", "--resume", tmp_path / "part", "--allow-import")
    assert (code, but_learning(err)) == (0, "")
    assert_same(whole, tmp_path / "part")
    code, _, err = run_cli("audit", whole, "--allow-import", "--out", tmp_path / "audit")
    assert (code, but_learning(err)) == (0, "")


def test_batch_norm_keeps_its_running_mean(own, fit):
    run, (code, _, err) = fit("--model", f"{own(KINDS)}:Normed", "--batch-size", 32)
    assert (code, but_learning(err)) == (0, "")
    kept = tensors(run)
    # One step of momentum 1/2 on all 32 examples, which are scaled to mean 0 and variance 1.
    assert kept["norm.num_batches_tracked"] == 1
    assert_close(kept["norm.running_mean"], torch.zeros(3), atol=1e-6, rtol=0)
    assert_close(kept["norm.running_var"], torch.full((3,), 0.5 + 0.5 * 32 / 31))
    loaded = runs.load(run, allow_import=True)
    assert torch.equal(loaded.model.norm.running_var, kept["norm.running_var"])
    judged = runs.evaluate_run(run, EvaluateOptions(allow_import=True)).evaluation
    assert judged.argmax.accuracy.value == accuracy_of(run)


def test_tied_weights_stay_tied(own, fit, run_cli):
    address = f"{own(KINDS)}:Tied"
    run, (code, _, err) = fit("--model", address)
    assert (code, but_learning(err)) == (0, "")
    summary = json.loads((run / "summary.json").read_text())
    assert summary["parameters"] == 3 * 3 + 3 + 3 + 8
    loaded = runs.load(run, allow_import=True).model
    assert loaded.two.weight is loaded.one.weight
    assert torch.equal(loaded.one.weight, tensors(run)["one.weight"])
    for command in ("evaluate", "audit"):
        assert run_cli(command, run, "--allow-import")[0] == 0
    judged = runs.evaluate_run(run, EvaluateOptions(allow_import=True)).evaluation
    assert judged.argmax.accuracy.value == accuracy_of(run)
    args = ("--model", address, "--init", run / "model.safetensors", "--epochs", 0)
    again, (code, _, err) = fit(*args)
    assert (code, but_learning(err)) == (0, "")
    assert all(torch.equal(t, tensors(again)[name]) for name, t in tensors(run).items())


def test_tied_weights_are_trained_by_both_of_their_uses(own, fit, table):
    address = f"{own(KINDS)}:Tied"
    args = ("--optimizer", "sgd", "--momentum", 0, "--schedule", "constant", "--batch-size", 32)
    args = ("--model", address, *args, "--learning-rate", 0.5)
    before, _ = fit(*args, "--epochs", 0)
    run, _ = fit(*args)
    given = data.load_dataset(str(table))
    batch = data.get_batch(given, given.train, torch.arange(32))  # all there are, in one step
    one = {name: t.clone().requires_grad_() for name, t in tensors(before).items()}
    hidden = (batch.inputs @ one["one.weight"].T + one["one.bias"]).tanh()
    hidden = hidden @ one["one.weight"].T + one["two.bias"]
    logits = hidden @ one["head.weight"].T + one["head.bias"]
    nn.functional.cross_entropy(logits, batch.targets).backward()
    for name, tensor in one.items():
        assert_close(tensors(run)[name], (tensor - 0.5 * tensor.grad).detach(), msg=name)


def test_what_is_frozen_stays_as_it_was(own, fit):
    address = f"{own(KINDS)}:Frozen"
    before, _ = fit("--model", address, "--epochs", 0)
    run, (code, _, err) = fit("--model", address)
    assert (code, but_learning(err)) == (0, "")
    first, last = tensors(before), tensors(run)
    same = {name: torch.equal(first[name], last[name]) for name in first}
    assert same == {
        "first.weight": True, "first.bias": True, "second.weight": False, "second.bias": False,
    }  # fmt: skip
    assert not any("opt_state" in n and "first." in n for n in tensors(run, "checkpoint"))


@pytest.mark.parametrize("kind", ["Normed", "Tied", "Frozen", "Dropped"])
def test_a_model_resumes_to_the_same_bits(kind, own, table, tmp_path):
    options = {"model": f"{own(KINDS)}:{kind}", "dataset": str(table), "epochs": 2}
    options |= {"batch_size": 8, "compile": "off", "device": "cpu"}
    config = make_config(options)
    train(config, tmp_path / "whole")
    stopped = train(config, tmp_path / "part", should_stop=StopAt(3))
    assert not stopped.finished
    assert resume(tmp_path / "part", allow_import=True).finished
    assert_same(tmp_path / "whole", tmp_path / "part")


INPUTS = """
from funcloss.app import data
from torch.utils.data import Dataset
import numpy as np

kept = np.load("table.npz")
features, labels = torch.tensor(kept["images"]), torch.tensor(kept["labels"])
kept.close()

class Parts(Dataset):
    classes = ["0", "1"]
    def __init__(self, form): self.form = form
    def __len__(self): return len(labels)
    def __getitem__(self, i):
        one, two = features[i, :1], features[i, 1:]
        return ({"two": two, "one": one} if self.form == "dict" else (one, two)), int(labels[i])

def whole(): return features, labels
def as_tuple(): return Parts("tuple")
def as_dict(): return Parts("dict")

class One(Net): pass
class Two(Net):
    def __init__(self): super().__init__()
    def forward(self, one, two): return super().forward(torch.cat([one, two], -1))
"""


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("form", ["tuple", "dict"])
def test_a_model_may_take_several_inputs(form, workers, own, fit, run_cli):
    place = own(INPUTS)
    together, _ = fit("--dataset", f"{place}:whole", "--model", f"{place}:One")
    args = ("--dataset", f"{place}:as_{form}", "--model", f"{place}:Two", "--workers", workers)
    run, (code, _, err) = fit(*args)
    assert code == 0
    assert_same(together, run)
    code, out, _ = run_cli("evaluate", run, "--allow-import")
    assert code == 0
    accuracy = accuracy_of(together)
    assert f"accuracy {accuracy:.2%}" in out


# --- torchvision ---

TORCHVISION = [
    pytest.param("resnet18", id="resnet18"),
    pytest.param("mobilenet_v3_small", id="mobilenet_v3_small"),
    pytest.param("squeezenet1_0", id="squeezenet1_0"),
    pytest.param("efficientnet_b0", id="efficientnet_b0"),
    pytest.param("convnext_tiny", id="convnext_tiny", marks=pytest.mark.slow),
    pytest.param("swin_t", id="swin_t", marks=pytest.mark.slow),
    pytest.param("vgg11", id="vgg11", marks=pytest.mark.slow),  # 130 million parameters
]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvision_has_models_of_any_channels_and_classes(name, channels):
    config = make_config({"model": f"torchvision:{name}", "seed": 1})
    model = make_model(config, (channels, 32, 32), 7)
    first = next(layer for layer in model.modules() if isinstance(layer, nn.Conv2d))
    assert first.in_channels == channels
    try_model(model, name, torch.randn(2, channels, 32, 32), 7)
    assert model.eval()(torch.randn(2, channels, 32, 32)).shape == (2, 7)
    again = make_model(config, (channels, 32, 32), 7)
    assert all(map(torch.equal, model.state_dict().values(), again.state_dict().values()))


@pytest.mark.parametrize("channels", [1, 3])
def test_a_model_of_torchvision_trains(channels, fit, tmp_path, run_cli):
    shape = (16, 32, 32, channels)
    images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    np.savez(tmp_path / "images.npz", images=images, labels=np.arange(16) % 2)
    args = ("--dataset", tmp_path / "images.npz", "--model", "torchvision:mobilenet_v3_small")
    run, (code, _, err) = fit(*args, "--test-fraction", 0.25)
    assert (code, but_learning(err)) == (0, "")
    code, out, err = run_cli("evaluate", run)  # torchvision's code is not the run's own
    assert (code, but_learning(err)) == (0, "")
    accuracy = accuracy_of(run)
    assert f"accuracy {accuracy:.2%}" in out


# --- which model suits the data ---

AUTO = [
    pytest.param((20, 12, 12), "fast-cnn", id="images"),
    pytest.param((20, 11, 30, 3), "mlp", id="low images"),
    pytest.param((20, 5), "mlp", id="features"),
]


@pytest.mark.parametrize(("shape", "expected"), AUTO)
def test_auto_is_what_suits_the_data(shape, expected, fit, tmp_path):
    inputs = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    np.savez(tmp_path / "own.npz", images=inputs, labels=np.arange(20) % 2)
    run, (code, _, err) = fit("--dataset", tmp_path / "own.npz", "--epochs", 0)
    assert (code, but_learning(err)) == (0, "")
    assert read_toml(run / "config.toml")["model"] == expected


# --- first weights ---


@pytest.fixture
def weights(fit):
    """The model of a finished run, of 3 features and 2 classes."""
    run, _ = fit("--model", "mlp", "--seed", 5)
    return run / "model.safetensors"


def test_first_weights_are_those_of_the_file(weights, fit):
    run, (code, _, err) = fit("--model", "mlp", "--init", weights, "--epochs", 0)
    assert (code, but_learning(err)) == (0, "")
    before, after = load_file(weights), tensors(run)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert read_toml(run / "config.toml")["init"] == str(weights)


def test_the_file_may_be_of_another_program(weights, fit, tmp_path):
    save_file(load_file(weights), tmp_path / "theirs.safetensors", metadata={"format": "pt"})
    args = ("--model", "mlp", "--init", tmp_path / "theirs.safetensors")
    run, (code, _, err) = fit(*args, "--epochs", 0)
    assert (code, but_learning(err)) == (0, "")
    assert torch.equal(tensors(run)["fc1.weight"], load_file(weights)["fc1.weight"])


def test_a_head_for_other_classes_begins_anew_and_it_is_said(weights, fit, tmp_path):
    features, labels = rows(60, 3)
    np.savez(tmp_path / "three.npz", images=features, labels=labels)
    args = ("--dataset", tmp_path / "three.npz", "--model", "mlp", "--seed", 9, "--epochs", 0)
    run, (code, out, err) = fit(*args, "--init", weights)
    drawn, _ = fit(*args)
    assert (code, but_learning(err)) == (0, "")
    taken, plain, before = tensors(run), tensors(drawn), load_file(weights)
    head = [name for name in taken if taken[name].shape != before[name].shape]
    assert sorted(head) == ["fc3.bias", "fc3.weight"]
    for name in taken:
        expected = plain if name in head else before
        assert torch.equal(taken[name], expected[name]), name
    assert f"loaded {len(taken) - 2} of {len(taken)} tensors of init: {weights.name}" in out
    assert all(name in out for name in head)


BAD_WEIGHTS = [
    pytest.param("linear", None, 2, r"of another model: it (lacks|has an unknown) fc", id="other"),
    pytest.param("mlp", b"nothing", 1, r"first weights are a \.safetensors file", id="no tensors"),
    pytest.param("mlp", "gone", 1, r"init: .*gone\.safetensors", id="missing"),
    pytest.param("mlp", {}, 2, r"of another model: it lacks", id="empty"),
]


@pytest.mark.parametrize(("model", "content", "expected", "match"), BAD_WEIGHTS)
def test_weights_of_no_use_are_refused(model, content, expected, match, weights, fit, tmp_path):
    path = weights
    if content is not None:
        path = tmp_path / ("gone.safetensors" if content == "gone" else "bad.safetensors")
    if isinstance(content, bytes):
        path.write_bytes(content)
    if content == {}:
        save_file({}, path)
    run, (code, _, err) = fit("--model", model, "--init", path)
    assert err.count("\n") == 1
    pytest.raises(ConfigError, _raise, err).match(match)
    assert code == expected
    assert not run.exists()


def test_a_file_of_pytorch_is_no_file_of_first_weights(fit, tmp_path):
    torch.save(models.mlp((3,), 2).state_dict(), tmp_path / "weights.pt")
    run, (code, _, err) = fit("--model", "mlp", "--init", tmp_path / "weights.pt")
    assert (code, err.count("\n")) == (1, 1)
    assert "weights.pt" in err
    assert "first weights are a .safetensors file" in err
    assert not run.exists()


def test_a_run_needs_its_first_weights_only_to_begin(weights, table, tmp_path, run_cli):
    options = {"model": "mlp", "dataset": str(table), "init": str(weights), "epochs": 2}
    config = make_config(options, {"batch_size": 8, "compile": "off", "device": "cpu"})
    train(config, tmp_path / "whole")
    assert not train(config, tmp_path / "part", should_stop=StopAt(3)).finished
    weights.unlink()
    assert run_cli("evaluate", tmp_path / "whole")[0] == 0
    code, _, err = run_cli("train", "--resume", tmp_path / "part")
    assert (code, but_learning(err)) == (0, "")
    assert_same(tmp_path / "whole", tmp_path / "part")
