"""Somebody's own loss, and when somebody's code may run at all."""

import itertools
import json
import os
import sys
import textwrap

import numpy as np
import pytest
import torch
from conftest import StopAt, but_learning, resume, swept

from funcloss.app import runs, sweep
from funcloss.app.config import code_in, make_config, option_values, read_toml
from funcloss.app.train import train

PREAMBLE = """
import torch
from torch import Tensor, nn
from funcloss import losses

def cross_entropy(logits, labels, *, where=None):
    if where is not None:
        logits = torch.where(where[..., None], logits, 0.0)
        labels = torch.where(where, labels, 0)
    loss = -logits.log_softmax(-1).gather(-1, labels[..., None]).squeeze(-1)
    return loss if where is None else torch.where(where, loss, 0.0)
"""
QUICK = ("--model", "linear", "--epochs", 1, "--batch-size", 4, "--compile", "off")
_numbers = itertools.count()


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
        names.append(f"own_loss_{os.getpid()}_{next(_numbers)}")
        (tmp_path / f"{names[-1]}.py").write_text(preamble + textwrap.dedent(text))
        return names[-1]

    yield write
    forget(*names)


def forget(*names):
    """Let Python import modules of these names anew."""
    for name in [n for n in sys.modules if any(own in n for own in names)]:
        del sys.modules[name]


def write_table(path):
    """Write 40 examples of 3 features, 30 of class "often" and 10 of class "rare"."""
    labels = np.array(["often", "often", "rare", "often"] * 10)
    features = np.random.default_rng(0).normal(size=(40, 3)) + (labels == "rare")[:, None]
    np.savez(path, images=features.astype(np.float32), labels=labels)
    return path


@pytest.fixture
def table(tmp_path):
    return write_table(tmp_path / "table.npz")


@pytest.fixture
def fit(run_cli, tmp_path, table):
    """Train by the command into a new folder; return the folder, and what the command said."""
    numbers = itertools.count()

    def run(*args):
        given = () if {"--dataset", "--config"} & set(args) else ("--dataset", table)
        folder = tmp_path / f"run{next(numbers)}"
        quick = (*QUICK, "--audit-every", 0)
        return folder, run_cli("train", "--run-dir", folder, *quick, *given, *args)

    return run


def tensors(run, file="model"):
    return runs.load_tensors(run / f"{file}.safetensors")[0]


def assert_same(run, other):
    for file in ("model", "checkpoint"):
        a, b = tensors(run, file), tensors(other, file)
        assert a.keys() == b.keys()
        assert [name for name in a if not torch.equal(a[name], b[name])] == []


# --- a loss of one's own trains as the built-in one of the same formula ---

FORMULAS = {
    "plain": ("", "cross_entropy", ("cross_entropy",)),
    "without where": (
        """
        def mine(logits, labels):
            return -logits.log_softmax(-1).gather(-1, labels[..., None]).squeeze(-1)
        """,
        "mine",
        ("cross_entropy",),
    ),
    "of torch": (
        """
        def mine(logits, labels):
            return nn.functional.cross_entropy(logits, labels, reduction="none")
        """,
        "mine",
        ("cross_entropy",),
    ),
    "a module": ("mine = nn.CrossEntropyLoss(reduction='none')", "mine", ("cross_entropy",)),
    "an option": (
        """
        def mine(logits, labels, *, gamma: float | Tensor = 2.0, where=None):
            return losses.softmax_focal(logits, labels, gamma=gamma, where=where)
        """,
        "mine",
        ("softmax_focal", "--loss-option", "gamma=3"),
    ),
    "an option, postponed": (
        """
        def mine(logits, labels, *, gamma: "float" = 2.0, where=None):
            return losses.softmax_focal(logits, labels, gamma=gamma, where=where)
        """,
        "mine",
        ("softmax_focal", "--loss-option", "gamma=3"),
    ),
    "class weights": ("", "cross_entropy", ("cross_entropy", "--class-weight", "rare=5")),
    "class weights, their mean": (
        "",
        "cross_entropy",
        ("cross_entropy", "--class-weight", "rare=5", "--reduction", "weighted_mean"),
    ),
    "class prior": (
        """
        def mine(logits, labels, *, class_prior, tau: float = 1.0, where=None):
            return losses.logit_adjusted(
                logits, labels, class_prior=class_prior, tau=tau, where=where
            )
        """,
        "mine",
        ("logit_adjusted", "--loss-option", "tau=1.5"),
    ),
    "class counts": (
        """
        def mine(logits, labels, *, class_counts, where=None):
            return losses.balanced_softmax(logits, labels, class_counts=class_counts, where=where)
        """,
        "mine",
        ("balanced_softmax",),
    ),
    "cost matrix": (
        """
        def mine(logits, labels, *, cost_matrix, where=None):
            return losses.expected_cost(logits, labels, cost_matrix=cost_matrix, where=where)
        """,
        "mine",
        ("expected_cost", "--class-cost", "rare=4"),
    ),
}


# seconds each; the others' laws are those of the built-in losses
CHECKED = ("plain", "class prior")


@pytest.mark.parametrize("kind", FORMULAS)
def test_a_loss_of_ones_own_trains_as_the_built_in_one(kind, own, fit):
    text, name, (built_in, *args) = FORMULAS[kind]
    check = "--check" if kind in CHECKED else "--no-check"
    mine, (code, _, err) = fit("--loss", f"{own(text)}:{name}", *args, check)
    assert code == 0
    assert (but_learning(err) == "") is (kind in CHECKED)
    theirs, (code, _, _) = fit("--loss", built_in, *args)
    assert code == 0
    a, b = tensors(mine), tensors(theirs)
    for key in a:  # log(prior) may be taken in another order
        torch.testing.assert_close(
            a[key], b[key], rtol=0, atol=1e-6 if kind == "class prior" else 0
        )
    a, b = (json.loads((run / "summary.json").read_text()) for run in (mine, theirs))
    assert a["test"]["rules"]["argmax"]["recall"] == b["test"]["rules"]["argmax"]["recall"]
    assert a["test"]["loss"] == pytest.approx(b["test"]["loss"], rel=1e-6)
    assert a["class_weight"] == b["class_weight"]


def test_a_loss_in_a_file_is_called_by_its_path(own, fit, tmp_path):
    place = own()
    mine, (code, _, err) = fit("--loss", f"{place}.py:cross_entropy")
    theirs, _ = fit()
    assert (code, but_learning(err)) == (0, "")
    assert_same(mine, theirs)
    # wherever one is, it means the same
    assert read_toml(mine / "config.toml")["loss"] == f"{tmp_path / place}.py:cross_entropy"


def test_its_options_are_asked_for_by_name(own, fit):
    text = "def mine(logits, labels, *, tau: float, where=None): return tau * cross_entropy("
    address = f"{own(text + 'logits, labels, where=where)')}:mine"
    for args, said in (
        ((), f"loss {address} needs the loss_option tau=NUMBER"),
        (("--loss-option", "tua=1"), "has no option 'tua' (did you mean 'tau'?); it has tau"),
    ):
        run, (code, _, err) = fit("--loss", address, *args)
        assert code == 2
        assert said in err
        assert not run.exists()
    run, (code, _, err) = fit("--loss", address, "--loss-option", "tau=2")
    assert (code, but_learning(err)) == (0, "")


def test_a_default_that_is_a_float_is_an_option_too(own, fit):
    text = """
    def mine(logits, labels, *, tau=1.0, where=None):
        return tau * cross_entropy(logits, labels, where=where)
    """
    run, (code, _, err) = fit("--loss", f"{own(text)}:mine", "--loss-option", "tau=2")
    assert (code, but_learning(err)) == (0, "")
    twice, _ = fit("--loss", f"{own(text.replace('tau=1.0', 'tau: float = 2.0'))}:mine")
    assert_same(run, twice)


def test_a_file_that_was_mended_is_read_again(own, fit, tmp_path):
    place = own("def mine(logits, labels): return logits.sum(-1).item()")
    _, (code, _, err) = fit("--loss", f"{place}.py:mine")
    assert code == 2
    assert "mine fails on logits" in err
    file = tmp_path / f"{place}.py"
    text = file.read_text().replace("logits.sum(-1).item()", "cross_entropy(logits, labels)")
    file.write_text(text)
    os.utime(file, ns=(1, 1))  # a clock may be coarse
    _, (code, _, err) = fit("--loss", f"{place}.py:mine")
    assert (code, but_learning(err)) == (0, "")


def test_the_command_tries_a_loss_that_is_told_of_the_data(own, tmp_path, run_cli):
    text = """
    def mine(logits, labels, *, class_counts, cost_matrix):
        weights = (class_counts / class_counts.sum()).to(logits.dtype).expand_as(logits)
        log_p = logits.log_softmax(-1)
        costs = cost_matrix.to(logits.dtype).sum(-1).expand_as(logits)
        return -(weights * costs * log_p).gather(-1, labels[..., None]).squeeze(-1)
    """
    code, out, err = run_cli("check", f"{own(text)}:mine", "--classes", "4")
    assert (code, but_learning(err)) == (0, ""), out
    assert "one value per example" in out


def test_the_option_of_a_loss_is_swept(own, table, tmp_path, run_cli):
    text = """
    def mine(logits, labels, *, gamma: float = 2.0, where=None):
        return losses.softmax_focal(logits, labels, gamma=gamma, where=where)
    """
    found = []
    args = (*QUICK, "--dataset", table, "--loss-option", "gamma=0,4", "--no-check")
    for name, loss in (("mine", f"{own(text)}:mine"), ("theirs", "softmax_focal")):
        code, out, _ = run_cli("sweep", "--out", tmp_path / name, *args, "--loss", loss)
        assert code == 0
        assert "gamma=4" in out
        found.append(tensors(tmp_path / name / "chosen"))
    assert all(torch.equal(found[0][key], found[1][key]) for key in found[0])


# --- what is no loss ---

BROKEN = """
def mine(logits, labels, *, where=None):
    return -logits.softmax(-1).gather(-1, labels[..., None]).squeeze(-1).log()
"""
REFUSED = [
    pytest.param("mine = 3", "mine", r"must be a function of logits.*a int", id="number"),
    pytest.param("mine = nn.CrossEntropyLoss", "mine", r"must be a function.*a class", id="class"),
    pytest.param("", "mean", r"has no 'mean'", id="gone"),
    pytest.param("1 / 0", "mine", r"cannot import own_loss_\w+: ZeroDivisionError", id="no import"),
    pytest.param("def mine(z, y): raise KeyError('q')", "mine", r"fails on logits \(2, 2\).*'q'",
                 id="raises"),
    pytest.param("def mine(z): return z", "mine", r"fails on logits.*TypeError", id="one argument"),
    pytest.param("def mine(z, y): return 1.0", "mine", r"one value an example.*got a float",
                 id="no tensor"),
    pytest.param("def mine(z, y): return z", "mine", r"one value an example.*got \(2, 2\)",
                 id="a value a logit"),
    pytest.param("def mine(z, y): return nn.functional.cross_entropy(z, y)", "mine",
                 r"one value an example.*got \(\): leave out the mean", id="reduced"),
]  # fmt: skip


@pytest.mark.parametrize("check", ["--check", "--no-check"])
@pytest.mark.parametrize(("text", "name", "match"), REFUSED)
def test_what_is_no_loss_is_refused_checked_or_not(text, name, match, check, own, fit):
    run, (code, _, err) = fit("--loss", f"{own(text)}:{name}", check)
    assert err.count("\n") == 1
    assert err.startswith("error: ")
    pytest.raises(ValueError, _raise, err).match(match)
    assert code == 2
    assert not run.exists()


def _raise(text):
    raise ValueError(text)


LAWS = [
    pytest.param(BROKEN, "extremes: at predictions of", id="underflows"),
    pytest.param(
        """
        def mine(logits, labels, *, where=None):
            if float(logits.detach().max()) > 50:
                logits = logits / 2
            return cross_entropy(logits, labels, where=where)
        """,
        "map over examples: ",
        id="branches on values",
    ),
    pytest.param(
        """
        def mine(logits, labels, *, where=None):
            loss = cross_entropy(logits, labels)
            return loss if where is None else loss * where
        """,
        "masked = dropped",
        id="multiplies by the mask",
    ),
    pytest.param(
        """
        def mine(logits, labels, *, where=None):
            loss = cross_entropy(logits, labels, where=where)
            return loss / (1 + loss.mean())
        """,
        "map over examples",
        id="couples examples",
    ),
]


@pytest.mark.parametrize(("text", "law"), LAWS)
def test_the_laws_that_a_loss_breaks_are_listed(text, law, own, fit):
    loss = f"{own(text)}:mine"
    assert_listed(loss, law, *fit("--loss", loss))


def test_the_laws_are_tried_before_a_sweep(own, table, tmp_path, run_cli):
    loss, out = f"{own(BROKEN)}:mine", tmp_path / "out"
    args = (*QUICK, "--dataset", table, "--loss", loss, "--learning-rate", "0.1,0.2")
    assert_listed(loss, "extremes: ", out, run_cli("sweep", "--out", out, *args))


def assert_listed(loss, law, out, said):
    code, _, err = said
    assert code == 2
    first, *lines = err.splitlines()
    assert first == f"error: loss {loss} is wrong:"
    assert any(line.startswith(f"  {law}") for line in lines)
    assert "no-check" in lines[-1]
    assert "Traceback" not in err
    assert not out.exists()


def test_a_loss_that_works_on_batches_trains_and_one_line_says_so(own, fit):
    text = """
    weights = torch.tensor([1.0, 5.0])

    def mine(logits, labels):
        return nn.functional.cross_entropy(logits, labels, reduction="none") * weights[labels]
    """
    loss = f"{own(text)}:mine"
    _, (code, _, err) = fit("--loss", loss)
    assert code == 0
    line = but_learning(err)
    assert line.startswith(f"warning: loss {loss} works on batches: ")
    assert line.count("\n") == 1
    assert "weights.gather(0, labels.reshape(-1)).reshape(labels.shape)" in line


def test_a_loss_that_breaks_laws_trains_if_it_is_wished(own, fit):
    run, (code, _, err) = fit("--loss", f"{own(BROKEN)}:mine", "--no-check")
    assert code == 0
    loss = read_toml(run / "config.toml")["loss"]
    assert but_learning(err) == f"warning: the laws were not tried on the loss {loss}\n"
    theirs, _ = fit()
    for name, tensor in tensors(theirs).items():
        torch.testing.assert_close(tensors(run)[name], tensor, rtol=1e-4, atol=1e-5)


# --- whose code may run ---

MARKED = """
from pathlib import Path

with Path("imported").open("a") as file:
    file.write("x")

from funcloss import models
import numpy as np

def make(shape, classes): return models.linear(shape, classes)

def load():
    with np.load("table.npz") as file:
        return file["images"], file["labels"]
"""
KINDS = {"model": "make", "loss": "cross_entropy", "dataset": "load"}


@pytest.fixture(scope="module", params=KINDS)
def marking(request, tmp_path_factory):
    """A finished run whose model, loss or data is code that marks its import, and its module."""
    place, kind = tmp_path_factory.mktemp("marked"), request.param
    name = f"own_loss_{os.getpid()}_{next(_numbers)}"
    (place / f"{name}.py").write_text(PREAMBLE + MARKED)
    write_table(place / "table.npz")
    options = {"dataset": str(place / "table.npz"), "model": "linear", "epochs": 1, "batch_size": 4}
    options |= {"compile": "off", "device": "cpu", kind: f"{name}:{KINDS[kind]}"}
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(place)
        patch.chdir(place)
        train(make_config(options), place / "run")
    assert (place / "imported").read_text() == "x"
    return place / "run", name


@pytest.fixture
def marked(marking, monkeypatch):
    """The same, to be found by Python, and the mark that is there once its code has run."""
    run, name = marking
    monkeypatch.syspath_prepend(run.parent)
    monkeypatch.chdir(run.parent)
    mark = run.parent / "imported"
    mark.unlink(missing_ok=True)
    forget(name)
    yield run, name, mark
    forget(name)


COMMANDS = {
    "evaluate": ("evaluate", "{run}"),
    "audit": ("audit", "{run}"),
    "resume": ("train", "--resume", "{run}"),
    "config": ("train", "--config", "{run}/config.toml", "--run-dir", "{out}/again"),
    "config, typed over": (
        "train", "--config", "{run}/config.toml", "--run-dir", "{out}/again", "--epochs", "2",
    ),
    "sweep": ("sweep", "--config", "{run}/config.toml", "--learning-rate", "0.1,0.2",
              "--out", "{out}/sweep"),
}  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_code_that_a_folder_or_file_names_does_not_run(command, marked, tmp_path, run_cli):
    run, name, mark = marked
    args = [arg.format(run=run, out=tmp_path) for arg in COMMANDS[command]]
    code, _, err = run_cli(*args)
    assert not mark.exists()
    assert not any(name in module for module in sys.modules)
    assert code == 2
    assert err.count("\n") == 1
    assert f"{name}:" in err
    assert "names code, which would be imported and run" in err
    assert "--allow-import" in err
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("command", ["evaluate", "audit", "config", "sweep"])
def test_code_that_is_allowed_runs(command, marked, tmp_path, run_cli):
    run, _, mark = marked
    args = [arg.format(run=run, out=tmp_path) for arg in COMMANDS[command]]
    code, _, err = run_cli(*args, "--allow-import")
    assert (code, but_learning(err)) == (0, "")
    assert mark.read_text() == "x"


def stopped_run(config, folder):
    return train(config, folder, should_stop=StopAt(3))


def stopped_sweep(config, folder):
    axes = [sweep.Axis("learning_rate", "", (0.01, 0.1))]
    return swept(config, axes, folder, should_stop=StopAt(3))


RESUMED = [
    pytest.param(stopped_run, "train", train, id="run"),
    pytest.param(
        stopped_sweep,
        "sweep",
        lambda config, folder: swept(
            config, [sweep.Axis("learning_rate", "", (0.01, 0.1))], folder
        ),
        id="sweep",
    ),
]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("stopped", "command", "whole"), RESUMED)
def test_it_is_resumed_where_code_is_allowed(
    stopped, command, whole, kind, own, table, tmp_path, run_cli
):
    name = own(MARKED)
    options = {"dataset": str(table), "model": "linear", "epochs": 2, "batch_size": 8}
    options |= {"compile": "off", "device": "cpu"} | {kind: f"{name}:{KINDS[kind]}"}
    config = make_config(options)
    whole(config, tmp_path / "whole")
    assert not stopped(config, tmp_path / "part").finished
    (tmp_path / "imported").unlink()
    forget(name)
    code, _, err = run_cli(command, "--resume", tmp_path / "part")
    assert (code, (tmp_path / "imported").exists()) == (2, False)
    assert "--allow-import" in err
    code, _, err = run_cli(command, "--resume", tmp_path / "part", "--allow-import")
    assert (code, but_learning(err)) == (0, "")
    inner = "chosen" if command == "sweep" else "."
    assert_same(tmp_path / "whole" / inner, tmp_path / "part" / inner)


def test_a_file_called_as_the_code_does_not_open_the_door(marked, run_cli, tmp_path):
    run, name, mark = marked
    named = code_in(option_values(make_config(read_toml(run / "config.toml"))))
    (address,) = named.values()
    there = run.parent / address  # what came in one archive with the run, say
    there.write_text("")
    for command in ("evaluate", "config"):
        code, _, _ = run_cli(*(arg.format(run=run, out=tmp_path) for arg in COMMANDS[command]))
        assert not mark.exists()
        assert code != 0
    there.unlink()


UNKNOWN = "torchvision has no data set"
TORCHVISION = [
    pytest.param("dataset", "torchvision:datasets.mnist.os.getcwd", UNKNOWN, id="data"),
    pytest.param("dataset", "torchvision:get_image_backend", UNKNOWN, id="data of its own"),
    pytest.param("test_dataset", "torchvision:datasets.mnist.os.getcwd", UNKNOWN, id="test split"),
    pytest.param("loss", "torchvision:ops.sigmoid_focal_loss", "--allow-import", id="loss"),
]


@pytest.mark.parametrize(("option", "address", "said"), TORCHVISION)
def test_only_models_and_data_sets_of_torchvision_go_without_leave(
    option, address, said, table, tmp_path, run_cli
):
    assert code_in({"model": "torchvision:resnet18", "dataset": "torchvision:EMNIST"}) == {}
    lines = {"dataset": str(table), option: address}
    text = "".join(f'{name} = "{value}"\n' for name, value in lines.items())
    (tmp_path / "config.toml").write_text(text)
    args = ("--config", tmp_path / "config.toml", "--run-dir", tmp_path / "run")
    code, _, err = run_cli("train", *args)
    assert code == 2
    assert said in err
    assert not (tmp_path / "run").exists()


def test_data_that_is_typed_does_not_allow_the_code_of_the_run(own, fit, tmp_path, run_cli):
    stranger, mine = own(MARKED), own(MARKED.replace("imported", "typed"))
    run, _ = fit("--loss", f"{stranger}:cross_entropy")
    (tmp_path / "imported").unlink()
    forget(stranger)
    code, _, err = run_cli("evaluate", run, "--dataset", f"{mine}:load")
    assert not (tmp_path / "imported").exists()
    assert code == 2
    assert "--allow-import" in err


def test_data_that_is_typed_needs_no_leave(own, fit, tmp_path, run_cli):
    run, _ = fit()
    name = own(MARKED)
    code, out, err = run_cli("evaluate", run, "--dataset", f"{name}:load")
    assert code == 0
    assert (tmp_path / "imported").read_text() == "x"
    assert "on 40 examples" in out


def test_the_library_asks_as_well(marked, tmp_path):
    run, _, mark = marked
    from funcloss.app.audits import audit_run
    from funcloss.errors import ConfigError

    for use in (runs.evaluate_run, resume, audit_run):
        with pytest.raises(ConfigError, match="names code"):
            use(run)
    assert not mark.exists()


def test_a_model_alone_needs_leave_for_its_own_code_alone(marked, run_cli, tmp_path):
    run, name, mark = marked
    own_model = read_toml(run / "config.toml")["model"].startswith(name)
    code, _, err = run_cli("predict", run, tmp_path / "none.csv")
    assert not mark.exists()
    assert code == 2
    assert ("--allow-import" in err) == own_model
    if not own_model:
        assert runs.load(run).model is not None


def test_other_data_needs_no_leave_for_the_data_of_the_run(marked, run_cli):
    run, name, mark = marked
    named = read_toml(run / "config.toml")["dataset"].startswith(name)
    code, out, _ = run_cli("evaluate", run, "--dataset", run.parent / "table.npz")
    if named:
        assert code == 0
        assert "on 40 examples of table, test" in out
    assert not mark.exists()
