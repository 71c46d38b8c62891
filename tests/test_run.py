import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import Killed, StopAt, kill_at_write, resume
from torch.testing import assert_close

import funcloss
from funcloss import training
from funcloss._files import half_name
from funcloss.app import audits, runs
from funcloss.app.config import make_config, read_toml
from funcloss.app.options import AuditOptions, EvaluateOptions
from funcloss.app.runs import folder
from funcloss.app.train import train
from funcloss.errors import ConfigError, DataError, RunError

SMALL = {
    "dataset": "mnist-sample",
    "model": "article-cnn",
    "optimizer": "sgd",
    "learning_rate": 0.05,
    "epochs": 2,
    "batch_size": 100,
    "log_every": 10,
    "compile": "off",
}


def config(**options):
    return make_config(SMALL, options)


def weights(run):
    return runs.load_tensors(Path(run) / "checkpoint.safetensors")[0]


def same(a, b):
    """Whether two runs ended in the same state and the same model."""
    files = "checkpoint.safetensors", "model.safetensors"
    pairs = [[runs.load_tensors(Path(run) / file)[0] for run in (a, b)] for file in files]
    return all(x.keys() == y.keys() and all(map(torch.equal, x.values(), y.values()))
               for x, y in pairs)  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run, its summary and the events on the way."""
    events = []
    run = tmp_path_factory.mktemp("runs") / "finished"
    outcome = train(config(class_weight={"9": 2}), run, show=events.append)
    return run, outcome, events


def test_a_run_leaves_all_of_it_in_its_folder(finished):
    run, outcome, _ = finished
    assert outcome.finished
    assert outcome.folder == run
    assert sorted(f.name for f in run.iterdir()) == [
        "checkpoint.safetensors",
        "config.toml",
        "confusion.png",
        "curves.png",
        "ledger.safetensors",
        "metrics.jsonl",
        "model.safetensors",
        "predictions.png",
        "reliability.png",
        "summary.json",
    ]
    assert all((run / f"{n}.png").read_bytes()[:4] == b"\x89PNG" for n in
               ("curves", "predictions", "confusion", "reliability"))  # fmt: skip


def test_the_summary_says_what_was_reached(finished):
    run, outcome, _ = finished
    summary = json.loads((run / "summary.json").read_text())
    assert summary == outcome.summary
    argmax = summary["test"]["rules"]["argmax"]
    assert argmax["accuracy"][0] > 0.75
    assert list(argmax["recall"]) == list("0123456789")
    assert summary["test"]["n"] == summary["validation"]["n"] == 500
    assert summary["class_weight"] == {"9": 2.0}
    assert (summary["steps"], summary["examples"]) == (80, 8000)
    assert summary["parameters"] == 21_840
    assert "not comparable" in summary["dataset_note"]


def test_every_report_and_epoch_is_a_line(finished):
    run, _, events = finished
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if r["kind"] == "step"] == [10, 20, 30, 40, 50, 60, 70, 80]
    epochs = [r for r in records if r["kind"] == "epoch"]
    assert [(r["epoch"], r["step"], r["examples"]) for r in epochs] == [
        (0, 0, 0),
        (1, 40, 4000),
        (2, 80, 8000),
    ]
    assert epochs[0]["test"]["accuracy"] < 0.4 < epochs[-1]["test"]["accuracy"]
    warned = [e.text for e in events if isinstance(e, runs.Note) and e.warning]
    assert "not comparable" in warned[0]
    assert sum(isinstance(e, training.Progress) for e in events) == 8
    assert sum(isinstance(e, runs.EpochReport) for e in events) == 2


def test_the_resolved_configuration_makes_the_same_run_again(finished, tmp_path):
    run, _, _ = finished
    resolved = read_toml(run / "config.toml")
    assert resolved["device"] in ("cpu", "cuda", "mps")
    assert resolved["threads"] == torch.get_num_threads()
    train(make_config(resolved), tmp_path / "again")
    assert same(run, tmp_path / "again")


def test_a_run_loads_as_a_plain_model(finished, sample):
    run, outcome, _ = finished
    loaded = funcloss.load(run)
    assert loaded.classes == sample.classes
    assert loaded.input_shape == (1, 28, 28)
    assert not loaded.model.training
    with torch.no_grad():
        logits = loaded.model(
            funcloss.app.data.normalised(sample.test.inputs, loaded.mean, loaded.std)
        )
    accuracy = (logits.argmax(-1) == sample.test.labels).double().mean()
    assert_close(accuracy.item(), outcome.summary["test"]["rules"]["argmax"]["accuracy"][0])
    again = torch.func.functional_call(
        loaded.model,
        {**loaded.params, **loaded.buffers},
        (funcloss.app.data.normalised(sample.test.inputs, loaded.mean, loaded.std),),
    )
    assert_close(again.detach(), logits)


@pytest.mark.parametrize("at", [1, 13, 40, 41, 79])
def test_a_run_that_is_stopped_goes_on_to_the_same_bits(tmp_path, finished, at):
    whole, _, _ = finished
    run = tmp_path / "run"
    made = config(class_weight={"9": 2})
    outcome = train(made, run, should_stop=StopAt(at))
    assert not outcome.finished
    assert not (run / "summary.json").exists()
    assert resume(run).finished
    assert same(run, whole)
    steps = [r["step"] for r in [*folder.records_of(run)] if r["kind"] == "epoch"]
    assert steps == [0, 40, 80]


@pytest.mark.long
@pytest.mark.slow
def test_killed_at_any_write_the_run_goes_on_to_the_same_bits(tmp_path, monkeypatch):
    made = config(model="linear", epochs=2)
    train(made, tmp_path / "whole")
    for at in range(1, 20):
        run = tmp_path / f"run{at}"
        monkeypatch.setattr(runs.lifecycle, "_SAVED_EVERY", 0.0)  # a checkpoint after each epoch
        kill_at_write(monkeypatch, at)
        try:
            train(made, run)
        except Killed:
            monkeypatch.undo()
            if run.exists():
                assert resume(run).finished
        else:
            monkeypatch.undo()
            break
        if run.exists():
            assert same(run, tmp_path / "whole")
            assert len([*folder.records_of(run)]) == len([*folder.records_of(tmp_path / "whole")])
    assert at > 10


@pytest.mark.slow
def test_a_stop_does_not_change_what_is_said_of_the_epoch(tmp_path):
    train(config(), tmp_path / "whole")
    train(config(), tmp_path / "run", should_stop=StopAt(39))
    resume(tmp_path / "run")
    whole, run = ([*folder.records_of(tmp_path / name)] for name in ("whole", "run"))
    for a, b in zip(*([r for r in rs if r["kind"] == "epoch"] for rs in (whole, run)), strict=True):
        assert a.get("loss", 0) == pytest.approx(b.get("loss", 0), rel=1e-6)
        assert a["test"] == b["test"]
    seconds = sum(r["seconds"] for r in run if r["kind"] == "step")
    assert folder.read_summary(tmp_path / "run")["train_seconds"] == pytest.approx(seconds)


def test_a_training_that_diverges_ends_and_leaves_valid_json(tmp_path):
    made = config(model="linear", learning_rate=1e38)
    with pytest.raises(RunError, match=r"at step \d+, though .* a smaller learning_rate"):
        train(made, tmp_path / "run")
    text = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert "NaN" not in text
    assert "Infinity" not in text


ROOT = """
import torch

def focal(logits, labels, *, gamma: float = 0.5):
    loss = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    return (1 - torch.exp(-loss)) ** gamma * loss
"""


def test_a_loss_whose_gradient_is_nan_is_named_with_its_step_example_and_option(tmp_path, run_cli):
    (tmp_path / "mine.py").write_text(ROOT)
    command = ("train", "--dataset", "mnist-sample", "--model", "linear", "--optimizer", "sgd",
               "--compile", "off", "--epochs", "1", "--log-every", "10", "--batch-size", "100",
               "--learning-rate", "20", "--loss", f"{tmp_path / 'mine.py'}:focal", "--no-check",
               "--run-dir", tmp_path / "run")  # fmt: skip
    code, _, err = run_cli(*command)
    assert code == 1
    last = err.splitlines()[-1]
    assert re.search(
        r"mine.py:focal is not finite at step \d+: its gradient is not for example", last
    )
    assert "gamma=0.5 (at 1 it is finite)" in last
    assert "learning_rate" not in err


LEARNS = {
    "rises": (("--learning-rate", "30", "--quiet"), "the training loss did not fall, from"),
    "none": (("--epochs", "0", "--seed", "2"), "the model was not trained, set epochs to 1"),
    "fine": (("--learning-rate", "0.05"), ""),
}


@pytest.mark.parametrize("case", LEARNS)
def test_a_training_that_learns_nothing_says_so_at_its_end(tmp_path, run_cli, case):
    options, said = LEARNS[case]
    command = ("train", "--dataset", "mnist-sample", "--model", "linear", "--optimizer", "sgd",
               "--compile", "off", "--epochs", "1", "--log-every", "10", "--batch-size", "100",
               "--run-dir", tmp_path / "run", *options)  # fmt: skip
    code, out, err = run_cli(*command)
    assert code == 0
    warnings = folder.read_summary(tmp_path / "run")["warnings"]
    told = [f"warning: {text}" for text in warnings]
    lines = err.splitlines()
    assert lines[len(lines) - len(told) :] == told
    assert any(said in text for text in warnings) == bool(said)
    if said:
        assert "times the weight in the loss" not in out
    _, _, again = run_cli("train", "--resume", tmp_path / "run")
    assert again.splitlines() == told


def test_an_empty_folder_is_filled_and_a_link_followed(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    train(config(epochs=0), Path("."))
    train(config(epochs=0, seed=3), str(tmp_path / "link"), overwrite=True)
    assert folder.read_summary(tmp_path / "here")["seed"] == 3
    assert sorted(p.name for p in tmp_path.iterdir()) == ["here", "link"]
    assert (tmp_path / "link").is_symlink()
    with pytest.raises(ConfigError, match="cannot use .* as run folder: File name too long"):
        train(config(), tmp_path / ("x" * 300))


def test_the_configuration_of_a_run_serves_another_model(tmp_path):
    train(config(epochs=0, model="lenet5"), tmp_path / "a")
    options = read_toml(tmp_path / "a" / "config.toml")
    summary = train(make_config(options, {"model": "fast-cnn"}), tmp_path / "b").summary
    assert summary["parameters"] == 215_194


def test_stopped_at_the_last_step_it_is_finished(tmp_path):
    assert train(config(epochs=1), tmp_path / "run", should_stop=StopAt(40)).finished


def test_resuming_twice_and_resuming_what_is_finished(tmp_path):
    run = tmp_path / "run"
    train(config(), run, should_stop=StopAt(5))
    resume(run, should_stop=StopAt(30))
    resume(run)
    before = {f.name: f.stat().st_mtime_ns for f in run.iterdir()}
    notes = []
    outcome = resume(run, show=notes.append)
    assert outcome.finished
    assert outcome.summary["steps"] == 80
    assert "nothing to resume" in notes[0].text
    assert {f.name: f.stat().st_mtime_ns for f in run.iterdir()} == before


def test_a_changed_environment_is_named_on_resuming(tmp_path, monkeypatch):
    run = tmp_path / "run"
    train(config(), run, should_stop=StopAt(5))
    real = folder.environment()
    monkeypatch.setattr(folder, "environment", lambda: {**real, "torch": "1.0"})
    notes = []
    resume(run, show=notes.append)
    warnings = [n.text for n in notes if isinstance(n, runs.Note) and n.warning]
    assert any(f"torch was {torch.__version__}, is 1.0" in text for text in warnings)


def test_a_used_folder_is_not_overwritten_unless_asked_to(tmp_path, finished):
    run, _, _ = finished
    before = (run / "summary.json").read_bytes()
    with pytest.raises(ConfigError, match="holds a run already: resume it, overwrite it or name"):
        train(config(), run)
    assert (run / "summary.json").read_bytes() == before
    copy = tmp_path / "copy"
    train(config(epochs=0), copy)
    train(config(epochs=0, seed=7), copy, overwrite=True)
    assert json.loads((copy / "summary.json").read_text())["seed"] == 7
    assert sorted(p.name for p in tmp_path.iterdir()) == ["copy"]


def test_a_folder_of_something_else_is_never_overwritten(tmp_path):
    precious = tmp_path / "thesis.tex"
    precious.write_text("ten years")
    for path in (tmp_path, precious):
        with pytest.raises(ConfigError, match="is not a run folder"):
            train(config(), path, overwrite=True)
    assert precious.read_text() == "ten years"


FOREIGN = {
    "a web site": ('baseURL = "https://example.org"\n[params]\nname = "x"\n', "unknown option"),
    "options alone": ('dataset = "mnist-sample"\nepochs = 2\n', "has no version under"),
    "a run without a version": ('epochs = 2\n[run]\ncommand = "x"\n', "has no version under"),
    "a version that is none": ('epochs = 2\n[run]\nversion = "1"\n', "has no version under"),
    "a run that is no table": ("epochs = 2\nrun = 1\n", "has no version under"),
    "no TOML": ("epochs = [\n", "is not TOML"),
    "a newer run": ("[run]\nversion = 3\n", "newer funcloss: format 3, this one reads 2"),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_a_config_of_something_else_is_no_run_to_replace(tmp_path, case):
    content, reason = FOREIGN[case]
    here = tmp_path / "site"
    here.mkdir()
    (here / "config.toml").write_text(content)
    for overwrite in (False, True):
        with pytest.raises(ConfigError, match="is not a run folder to replace") as error:
            train(config(epochs=0), here, overwrite=overwrite)
        assert reason in str(error.value)
        assert "overwrite" not in str(error.value)
    assert (here / "config.toml").read_text() == content


LEFT = {
    "notes.txt": "notes.txt",
    "mine.png": "mine.png",
    "predictions.csv": "predictions.csv",
    "seed-of-mine.safetensors": "seed-of-mine.safetensors",
    "web/index.html": "web/",
    "plain/notes.txt": "plain/notes.txt",
    "tensorboard/notes.txt": "tensorboard/notes.txt",
    "model.safetensors.bak/x": "model.safetensors.bak/",
    ".git/config": ".git/",
}


@pytest.mark.parametrize("name", LEFT)
def test_what_else_lies_in_a_run_folder_is_named_and_kept(tmp_path, name):
    run = tmp_path / "run"
    train(config(epochs=0), run)
    (run / name).parent.mkdir(exist_ok=True)
    (run / name).write_text("ten years")
    for overwrite in (False, True):
        with pytest.raises(ConfigError, match="holds a run and what funcloss did not write") as e:
            train(config(epochs=0), run, overwrite=overwrite)
        assert f"write: {LEFT[name]}; move that away or name another folder" in str(e.value)
        assert "overwrite" not in str(e.value)
    assert (run / name).read_text() == "ten years"
    assert (run / "summary.json").exists()


def test_of_many_files_a_few_are_named(tmp_path):
    train(config(epochs=0), tmp_path)
    for i in range(9):
        (tmp_path / f"{i}.txt").touch()
    with pytest.raises(ConfigError, match=r"0.txt, 1.txt, .*, 4.txt and 4 more; move"):
        train(config(epochs=0), tmp_path, overwrite=True)


def test_a_file_that_comes_while_the_data_is_read_is_kept(tmp_path, monkeypatch):
    run, real = tmp_path / "run", runs.lifecycle.make_setup
    train(config(epochs=0), run)

    def slow(made):
        (run / "notes.txt").write_text("ten years")
        return real(made)

    monkeypatch.setattr(runs.lifecycle, "make_setup", slow)
    with pytest.raises(ConfigError, match=r"did not write: notes\.txt"):
        train(config(epochs=0), run, overwrite=True)
    assert (run / "notes.txt").read_text() == "ten years"


def test_all_that_a_run_leaves_is_its_own(tmp_path):
    pytest.importorskip("tensorboard")
    run = tmp_path / "run"
    made = config(epochs=1, audit_every=20, tensorboard=True)
    train(made, run)
    audits.write_report(audits.audit_run(run, AuditOptions(examples=100)), run)
    for left in (half_name("model") + ".png", f"{half_name('plain')}-a1_b2c3d/config.toml"):
        (run / left).parent.mkdir(exist_ok=True)
        (run / left).touch()  # by a kill
    assert (run / "tensorboard").is_dir()
    assert (run / "audit_history.png").exists()
    assert folder.foreign(run) == []
    train(config(epochs=0), run, overwrite=True)
    assert not (run / "audit.html").exists()


def test_a_run_of_a_newer_format_is_refused_wherever_one_is_read(tmp_path):
    run = tmp_path / "run"
    train(config(), run, should_stop=StopAt(5))
    path = run / "config.toml"
    text = path.read_text()
    assert "\n[run]\nversion = 2\n" in text
    path.write_text(text.replace("\nversion = 2\n", "\nversion = 3\n"))
    reads = (
        resume,
        runs.evaluate_run,
        funcloss.load,
        audits.audit_run,
        resume,
        lambda run: runs.predict_files(run, []),
    )
    said = r"config\.toml was made by a newer funcloss: format 3, this one reads 2; update funcloss"
    for read in reads:
        with pytest.raises(RunError, match=said):
            read(run)
    with pytest.raises(ConfigError, match=said):
        read_toml(path)
    path.write_text(text.replace("\nversion = 2\n", "\n"))  # of before there were versions
    assert resume(run).finished


def test_a_failing_overwrite_loses_nothing(tmp_path):
    run = tmp_path / "run"
    train(config(epochs=0), run)
    with pytest.raises(ConfigError, match="no class 'ten'"):
        train(config(class_weight={"ten": 2}), run, overwrite=True)
    assert (run / "summary.json").exists()


@pytest.mark.long
@pytest.mark.slow
def test_a_full_disk_keeps_the_last_whole_checkpoint(tmp_path, monkeypatch):
    run = tmp_path / "run"
    real = Path.write_bytes
    left = [3]  # two files before the first step, one after the first epoch

    def write_bytes(path, content):
        left[0] -= 1
        if left[0] < 0:
            real(path, content[: len(content) // 2])
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(path, content)

    monkeypatch.setattr(Path, "write_bytes", write_bytes)
    with pytest.raises(RunError, match="cannot write .*safetensors: No space left on device"):
        train(config(), run)
    assert not [f for f in run.iterdir() if f.name.startswith(".")]
    assert int(weights(run)["state/step"]) == 40
    monkeypatch.undo()
    resume(run)
    train(config(), tmp_path / "whole")
    assert same(run, tmp_path / "whole")


def test_a_disk_that_is_full_from_the_start_leaves_nothing(tmp_path, monkeypatch):
    def full(path, content):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(RunError, match="No space left on device"):
        train(config(), tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"cannot make .*: (Not a directory|File exists)"):
        train(config(epochs=0), tmp_path / "file" / "run")


@pytest.mark.parametrize("name", ["checkpoint.safetensors", "config.toml", "summary.json"])
def test_a_damaged_run_is_one_line(tmp_path, name):
    run = tmp_path / "run"
    train(config(), run, should_stop=StopAt(5))
    (run / name).write_bytes((run / name).read_bytes()[:50] if name != "summary.json" else b"{")
    with pytest.raises(RunError, match=name):
        resume(run)


def test_tensors_of_another_program_are_refused(tmp_path):
    run = tmp_path / "run"
    train(config(), run, should_stop=StopAt(5))
    for name in ("checkpoint.safetensors", "model.safetensors"):
        runs.save_tensors(run / name, {"w": torch.zeros(1)}, {})
    with pytest.raises(RunError, match="checkpoint.safetensors: its header is damaged: it has no"):
        resume(run)
    with pytest.raises(RunError, match="model.safetensors: its header is damaged: it has no step"):
        funcloss.load(run)


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    run, other = tmp_path / "run", tmp_path / "other"
    train(config(), run, should_stop=StopAt(5))
    train(config(model="mlp"), other, should_stop=StopAt(5))
    (run / "checkpoint.safetensors").write_bytes((other / "checkpoint.safetensors").read_bytes())
    with pytest.raises(RunError, match="it is of another model"):
        resume(run)


def test_what_is_no_run_is_one_line(tmp_path):
    for use in (resume, funcloss.load):
        with pytest.raises(RunError, match="is not a run folder: it has no config.toml"):
            use(tmp_path)


REFUSED = [
    ({"class_weight": {"ten": 2}}, "no class 'ten'; the classes are 0, 1, 2"),
    ({"class_weight": {"10": 2}}, "no class '10'"),
    ({"class_weight": dict.fromkeys("0123456789", 0)}, "every class weighs 0"),
    ({"batch_size": 4001}, "batch_size 4001 is more than the 4,000 training examples"),
    (
        {"image_size": 8},
        "1×8×8 are too small for .* 16x16 and larger: use image_size",
    ),
    ({"pixel_mean": [0.1, 0.2], "pixel_std": [1, 1]}, "must have a number a channel: 1"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED, ids=[str(o) for o, _ in REFUSED])
def test_what_the_data_does_not_have_is_refused_before_anything_is_written(
    tmp_path, options, message
):
    with pytest.raises(ConfigError, match=message):
        train(config(**options), tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_an_absent_device_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="device cuda is not on this machine"):
        train(config(device="cuda"), tmp_path / "run")
    with pytest.raises(ConfigError, match="amp bf16 needs device cuda, and here it is"):
        train(config(amp="bf16"), tmp_path / "run")


@pytest.mark.parametrize(
    "options",
    [
        {"model": "linear", "loss": "squared_error", "learning_rate": 3e-4},
        {
            "model": "mlp",
            "loss": "nll",
            "optimizer": "adamw",
            "weight_decay": 0.1,
            "learning_rate": 0.01,
        },
        {"model": "lenet5", "schedule": "step", "nesterov": True, "clip_norm": 1.0},
        {
            "model": "cifar-cnn",
            "schedule": "cosine",
            "image_size": 16,
            "optimizer": "adam",
            "learning_rate": 0.003,
        },
        {"model": "linear", "class_weight": {"9": 5}, "reduction": "weighted_mean"},
        {
            "model": "fast-cnn",
            "val_fraction": 0.0,
            "optimizer": "adam",
            "schedule": "one-cycle",
            "learning_rate": 0.01,
        },
        {"model": "linear", "pixel_mean": [0.5], "pixel_std": [0.5], "dampening": 0.1},
    ],
    ids=str,
)
def test_every_option_trains(tmp_path, options):
    outcome = train(config(**{"epochs": 1, **options}), tmp_path / "run")
    assert outcome.summary["test"]["rules"]["argmax"]["accuracy"][0] > 0.5
    assert ("validation" in outcome.summary) == (options.get("val_fraction") != 0.0)


def test_a_cost_on_a_class_raises_its_recall(tmp_path):
    recall = []
    for weight in (1, 20):
        made = config(model="linear", class_weight={"9": weight})
        summary = train(made, tmp_path / f"{weight}").summary
        recall.append(summary["test"]["rules"]["argmax"]["recall"]["9"][0])
    assert recall[1] > recall[0]


def test_tensorboard_gets_the_scalars(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = tmp_path / "run"
    train(config(model="linear", tensorboard=True), run)
    events = EventAccumulator(str(run / "tensorboard")).Reload()
    assert [e.step for e in events.Scalars("loss/train")] == [10, 20, 30, 40, 50, 60, 70, 80]
    assert [e.step for e in events.Scalars("accuracy/test")] == [0, 40, 80]


def test_without_tensorboard_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'funcloss\[tensorboard\]'"):
        train(config(tensorboard=True), tmp_path / "run")


def test_evaluating_a_run_gives_what_its_summary_says(finished):
    run, outcome, _ = finished
    judged = runs.evaluate_run(run)
    scores = outcome.summary["test"]["rules"]["argmax"]
    assert judged.evaluation.argmax.accuracy.value == scores["accuracy"][0]
    assert judged.evaluation.loss == pytest.approx(outcome.summary["test"]["loss"], rel=1e-5)
    validation = runs.evaluate_run(run, EvaluateOptions(split="validation")).evaluation
    scores = outcome.summary["validation"]["rules"]["argmax"]
    assert validation.argmax.accuracy.value == scores["accuracy"][0]


def test_a_run_can_be_judged_on_another_data_set(finished, data_dir):
    run, _, _ = finished
    judged = runs.evaluate_run(run, EvaluateOptions(dataset="mnist", data_dir=str(data_dir)))
    assert len(judged.evaluation.labels) == 10_000
    assert judged.evaluation.argmax.accuracy.value > 0.75
    clothes = runs.evaluate_run(
        run, EvaluateOptions(dataset="fashion-mnist", data_dir=str(data_dir))
    )
    assert clothes.evaluation.argmax.accuracy.value < 0.4
    assert clothes.evaluation.rule.costs.classes[0] == "T-shirt/top"


def test_image_files_are_recognised_at_any_size(finished, sample, tmp_path):
    from PIL import Image, ImageOps

    run, _, _ = finished
    logits = runs.evaluate_run(run).evaluation.logits
    sure = logits.softmax(-1).max(-1).values.topk(5).indices.tolist()
    paths = []
    for i in sure:
        image = Image.fromarray(sample.test.inputs[i].squeeze().numpy())
        image.resize((70, 70)).convert("RGB").save(tmp_path / f"{i}.png")
        ImageOps.invert(image).save(tmp_path / f"{i}-dark.png")
        paths.append(tmp_path / f"{i}.png")
    guesses = runs.predict_files(run, paths).decisions.names
    assert guesses == [str(int(logits[i].argmax())) for i in sure]
    dark = [path.with_name(f"{path.stem}-dark.png") for path in paths]
    assert runs.predict_files(run, dark, invert=True).decisions.names == guesses
    (tmp_path / "no.png").write_text("no image")
    eps = "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 28 28\n%%EndComments\n{ } loop\n"
    (tmp_path / "eps.png").write_text(eps)
    for name in ("no.png", "eps.png"):
        with pytest.raises(DataError, match=rf"{name} is not an image .* PNG, .* and TIFF are$"):
            runs.predict_files(run, [tmp_path / name])


def start(run, *options):
    command = [sys.executable, "-m", "funcloss", "train", "--run-dir", str(run), "--dataset"]
    command += ["mnist-sample", "--model", "article-cnn", "--optimizer", "sgd", "--log-every", "5"]
    return subprocess.Popen(
        [*command, "--learning-rate", "0.05", "--compile", "off", "--batch-size", "20", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for(process, word):
    for line in process.stdout:
        if word in line:
            return
    pytest.fail(f"the command ended without {word!r}")


def test_ctrl_c_finishes_the_step_saves_and_says_how_to_go_on(tmp_path):
    run = tmp_path / "run"
    process = start(run, "--epochs", "1")
    wait_for(process, "step 20 ")
    process.send_signal(signal.SIGINT)
    rest, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert f"go on with: funcloss-train --resume {run}" in rest
    assert "Traceback" not in rest
    assert 20 <= int(weights(run)["state/step"]) < 200
    resume(run)
    train(config(batch_size=20, epochs=1, log_every=5), tmp_path / "whole")
    assert same(run, tmp_path / "whole")


def kill_and_resume(run, after, *options):
    process = start(run, *options)
    time.sleep(after)
    process.kill()
    process.communicate()
    while not (run / "summary.json").exists():
        if (run / "config.toml").exists():
            runs.load_tensors(run / "checkpoint.safetensors")  # whole at any moment
            assert resume(run).finished
        else:  # killed before there was a run: nothing but a hidden folder beside it
            start(run, *options).communicate()


def test_a_run_that_is_killed_goes_on_to_the_same_bits(tmp_path):
    train(config(batch_size=20, log_every=5), tmp_path / "whole")
    run = tmp_path / "run"
    process = start(run, "--epochs", "2")
    wait_for(process, "epoch 1/2")
    process.kill()
    process.communicate()
    assert resume(run).finished
    assert same(run, tmp_path / "whole")


@pytest.fixture(scope="module")
def timed(tmp_path_factory):
    """A run that nothing stops, and the seconds that it takes."""
    run, began = tmp_path_factory.mktemp("timed") / "whole", time.monotonic()
    start(run, "--epochs", "4").communicate()
    return run, time.monotonic() - began


MOMENTS = torch.rand(20, generator=torch.Generator().manual_seed(0)).tolist()


@pytest.mark.slow
@pytest.mark.parametrize(
    "moment", [*MOMENTS[:4], *(pytest.param(m, marks=pytest.mark.long) for m in MOMENTS[4:])]
)
def test_killed_at_any_of_twenty_moments_it_ends_in_the_same_weights(moment, timed, tmp_path):
    whole, seconds = timed
    kill_and_resume(tmp_path / "run", moment * seconds, "--epochs", "4")
    assert same(tmp_path / "run", whole), f"killed after {moment * seconds:.2f} of {seconds:.2f} s"


def test_no_file_is_left_open_to_everyone_or_half_written(finished):
    run, _, _ = finished
    assert not [f for f in run.iterdir() if f.name.startswith(".")]
    assert os.stat(run).st_mode & 0o777 == 0o755
