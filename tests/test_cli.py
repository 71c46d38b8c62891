import csv
import json
import re
import shlex
import subprocess
import sys

import pytest
import typer.testing
from conftest import help_without
from PIL import Image

from funcloss import errors
from funcloss.app import config, data, options
from funcloss.app.cli import app as shell

FAST = ["--dataset", "mnist-sample", "--model", "linear", "--compile", "off", "--epochs", "1"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    run = tmp_path_factory.mktemp("cli") / "run"
    code = subprocess.run(
        [sys.executable, "-m", "funcloss", "train", *FAST, "--run-dir", str(run)],
        capture_output=True,
        text=True,
    )
    assert code.returncode == 0, code.stderr
    return run, code.stdout, code.stderr


def test_training_prints_plain_lines_when_piped(made):
    run, out, err = made
    assert re.search(r"^step: eager$", out, re.M)
    assert re.search(r"^training linear on mnist-sample, .*, step 0 of 31, into ", out, re.M)
    assert re.search(r"^epoch 1/1  training loss \d\.\d{4}  validation loss .* accuracy", out, re.M)
    assert re.search(r"^test accuracy \d\d\.\d\d% on 500 examples of mnist-sample; run folder", out,
                     re.M)  # fmt: skip
    assert "\x1b" not in out
    assert err.count("\n") == 1
    assert err.startswith("warning: 5,000 digits of MNIST's training set")
    assert f"funcloss evaluate {run}" in out


def test_what_to_try_next_can_be_tried(made, run_cli, tmp_path, monkeypatch):
    _, out, _ = made
    monkeypatch.chdir(tmp_path)
    commands = [shlex.split(line) for line in re.findall(r"^  (funcloss.*)$", out, re.M)]
    assert [command[0] for command in commands] == ["funcloss-train", "funcloss"]
    assert commands[0][1:] == ["--recipe", "article"]
    code, table, _ = run_cli(*commands[1][1:])
    assert code == 0
    part = r" +[\d.]+% +[\d.]+% to [\d.]+%"  # with its interval
    rows = re.findall(rf"^\d +50{part}{part} +[01]\.\d{{4}}$", table, re.M)
    assert len(rows) == 20  # by two rules


def test_both_names_are_one_command(run_cli, tmp_path):
    options = [*FAST, "--quiet", "--run-dir"]
    code, first, _ = run_cli(*options, tmp_path / "a", program=shell.main_train)
    assert code == 0
    code, second, _ = run_cli("train", *options, tmp_path / "b")
    assert code == 0
    assert first.replace("/a", "") == second.replace("/b", "")
    assert first.count("\n") == 1


def test_the_command_line_goes_before_the_file_and_the_file_before_the_recipe(run_cli, tmp_path):
    file = tmp_path / "c.toml"
    file.write_text('dataset = "mnist-sample"\nmodel = "linear"\nepochs = 2\nseed = 5\n')
    run = tmp_path / "run"
    code, _, _ = run_cli("train", "--recipe", "fast", "--config", file, "--epochs", 1, "--quiet",
                         "--class-weight", "9=5", "--class-weight", "4=2.5", "--betas", "0.5,0.6",
                         "--run-dir", run)  # fmt: skip
    assert code == 0
    resolved = config.read_toml(run / "config.toml")
    assert resolved["batch_size"] == 256  # recipe
    assert (resolved["model"], resolved["seed"]) == ("linear", 5)  # file
    assert resolved["epochs"] == 1  # command line
    assert resolved["class_weight"] == {"9": 5.0, "4": 2.5}
    assert resolved["betas"] == [0.5, 0.6]


REFUSED = [
    (["train", "--model", "lenet"], "model must be one of auto, linear, mlp"),
    (["train", "--class-weight", "9"], "class_weight must be CLASS=WEIGHT, as in 9=5; got '9'"),
    (["train", "--class-weight", "=5"], "class_weight must be CLASS=WEIGHT"),
    (["train", "--class-weight", "9=many"], "class_weight: 'many' is not a number"),
    (["train", "--class-weight", "9=nan"], "class_weight 9 must be finite"),
    (["train", "--class-weight", "9=-1"], "class_weight 9 must be at least 0"),
    (["train", "--class-weight", "9=1", "--class-weight", "9=2"], "class '9' is given twice"),
    (["train", "--betas", "0.9"], "betas must be two numbers"),
    (["train", "--betas", "0.9;0.9"], "betas: '0.9;0.9' is not a number"),
    (
        ["train", "--momentum", "0.5", "--optimizer", "adam"],
        "--momentum is an option of --optimizer sgd, and the optimizer is adam: leave --momentum",
    ),
    (["train", "--decay-every", "2"], "--decay-every is an option of --schedule step"),
    (["train", "--recipe", "fat"], "no recipe 'fat'"),
    (["train", "--config", "none.toml"], "cannot read none.toml: No such file"),
    (["train", "--epochs", "-1"], "epochs must be at least 0"),
    (["train", "--resume", "x", "--epochs", "9"], "leave out --epochs"),
    (["train", "--resume", "x", "--seed", "0", "--no-nesterov"], "leave out --nesterov, --seed"),
    (["train", "--seed", "1" + 400 * "0"], "seed must be at least 0 and at most"),
    (
        ["evaluate", "RUN", "--device", "gpu"],
        "device must be one of auto, cpu, cuda, mps;",
    ),
    (["train", "--resume", "x", "--run-dir", "y", "--overwrite"], "leave out --run-dir, --overw"),
    (["evaluate", "x", "--split", "all"], "split must be one of test, validation, train"),
    (["evaluate", "x", "--dataset", "auto"], "dataset must be one of mnist, fashion-mnist"),
]


@pytest.mark.parametrize(("args", "message"), REFUSED, ids=[" ".join(a) for a, _ in REFUSED])
def test_a_bad_request_is_one_line_on_stderr_and_exit_code_2(made, run_cli, args, message, tmp_path,
                                                             monkeypatch):  # fmt: skip
    monkeypatch.chdir(tmp_path)
    code, out, err = run_cli(*[made[0] if a == "RUN" else a for a in args])
    assert code == 2
    assert out == ""
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "args",
    [
        ["train", "--epochs", "three"],
        ["train", "--bogus"],
        ["audit", "run", "--examples", "many"],
        ["audit", "run", "another"],
        ["evaluate"],
        ["fly"],
    ],
    ids=" ".join,
)
def test_what_typer_refuses_is_exit_code_2_too(run_cli, args):
    code, _, err = run_cli(*args)
    assert code == 2
    assert "Traceback" not in err


FAILING = [
    (["train", "--resume", "nothing"], "nothing is not a run folder: it has no config.toml"),
    (["evaluate", "nothing"], "nothing is not a run folder"),
    (["predict", "nothing", "x.png"], "nothing is not a run folder"),
    (["train", "--dataset", "kmnist", "--data-dir", "."], "train-images-idx3-ubyte.gz is not in"),
]


@pytest.mark.parametrize(("args", "message"), FAILING, ids=[" ".join(a) for a, _ in FAILING])
def test_a_failure_is_one_line_on_stderr_and_exit_code_1(run_cli, args, message, tmp_path,
                                                         monkeypatch):  # fmt: skip
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("funcloss.app.data.fetch.answering", lambda urls, **how: [])
    code, out, err = run_cli(*args)
    assert code == 1
    assert out == ""
    assert message in err
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_predictions_are_written_as_csv(made, run_cli, tmp_path):
    run, _, _ = made
    path = tmp_path / "p.csv"
    code, _, _ = run_cli("evaluate", run, "--split", "validation", "--csv", path)
    assert code == 0
    rows = list(csv.DictReader(path.read_text().splitlines()))
    assert len(rows) == 500
    columns = ["file", "row", "label", "decision", "probability", "expected_cost"]
    columns += [f"{what} {c}" for what in ("probability", "cost") for c in range(10)]
    assert list(rows[0]) == columns
    assert (rows[6]["file"], rows[6]["row"]) == ("mnist-sample, validation", "7")
    hits = sum(row["label"] == row["decision"] for row in rows)
    summary = json.loads((run / "summary.json").read_text())
    assert hits / 500 == pytest.approx(summary["validation"]["rules"]["argmax"]["accuracy"][0])
    assert all(0 < float(row["probability"]) <= 1 for row in rows)
    code, _, err = run_cli("evaluate", run, "--csv", tmp_path / "no" / "p.csv")
    assert code == 1
    assert "cannot write" in err


def test_images_are_predicted_one_line_each(made, run_cli, tmp_path, sample):
    run, _, _ = made
    paths = [tmp_path / "a.png", tmp_path / "b.png"]
    for path, image in zip(paths, sample.test.inputs, strict=False):
        Image.fromarray(image.squeeze().numpy()).save(path)
    code, out, _ = run_cli("predict", run, *paths)
    assert code == 0
    assert [bool(re.match(rf"{re.escape(str(path))}: \d \(\d+\.\d%\)$", line)) for path, line in
            zip(paths, out.splitlines(), strict=True)] == [True, True]  # fmt: skip
    code, _, err = run_cli("predict", run, tmp_path / "none.png")
    assert code == 1
    assert "cannot read" in err


def test_versions_and_help(run_cli):
    for program, args in ((shell.main, []), (shell.main, ["train"]), (shell.main_train, [])):
        code, out, _ = run_cli(*args, "--version", program=program)
        assert (code, out) == (0, "funcloss 0.1.0\n")
    result = typer.testing.CliRunner().invoke(shell.train_app, ["--help"], env={"COLUMNS": "200"})
    assert result.exit_code == 0
    for field in config.fields():
        assert f"--{field.name.replace('_', '-')}" in result.output


RECORDS = {
    "train": config.TrainConfig,
    "audit": options.AuditOptions,
    "check": options.CheckOptions,
    "evaluate": options.EvaluateOptions,
}


@pytest.mark.parametrize("command", RECORDS)
def test_help_has_an_option_for_every_row_of_a_record_and_loads_no_torch(command):
    shown = help_without(command, "torch", "numpy")
    for row in config.fields(RECORDS[command]):
        assert (row.option.flag or f"--{row.name.replace('_', '-')}") in shown
        assert all(choice in shown for choice in row.option.choices)


@pytest.mark.parametrize(
    ("record", "given", "message"),
    [
        (options.AuditOptions, {"split": "all"}, "split must be one of train, validation, test"),
        (options.AuditOptions, {"examples": 1}, "examples must be at least 2, got 1"),
        (options.AuditOptions, {"memory": "much"}, "memory must be a number, got 'much'"),
        (options.EvaluateOptions, {"dataset": "auto"}, "dataset must be one of mnist, .*a path"),
        (
            options.EvaluateOptions,
            {"prior": {"9": 1.5}},
            "prior 9 must be at least 0 and at most",
        ),
        (options.EvaluateOptions, {"class_cost": 5}, "class_cost must be a table of numbers"),
        (options.CheckOptions, {"task": "speech"}, "task must be one of classification"),
        (options.CheckOptions, {"batch_size": 1}, "batch_size must be at least 2"),
    ],
)
def test_a_record_refuses_in_python_what_its_command_refuses(record, given, message):
    assert record() == record()
    with pytest.raises(errors.ConfigError, match=message):
        record(**given)


def test_a_reader_that_closes_the_pipe_early_ends_it_quietly(made):
    run, _, _ = made
    command = f"{sys.executable} -m funcloss evaluate {run} | head -1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert "Traceback" not in done.stderr
    assert done.stdout.startswith("cost: every mistake costs 1")


def test_the_first_line_of_an_auto_run_without_network_says_so(run_cli, monkeypatch, tmp_path):
    monkeypatch.setattr("funcloss.app.data.fetch.answering", lambda urls, **how: [])
    args = ["--model", "linear", "--epochs", 1, "--run-dir", tmp_path / "r", "--data-dir", tmp_path]
    code, _, err = run_cli(*args, program=shell.main_train)
    assert code == 0
    assert err.startswith("warning: mnist: train-images-idx3-ubyte.gz is not in")
    assert err.count("\n") == 1
    note = json.loads((tmp_path / "r" / "summary.json").read_text())["dataset_note"]
    assert "there is no network" in note
    assert data.load_dataset("mnist-sample").note in note


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        type("OutOfMemoryError", (RuntimeError,), {})(
            "CUDA out of memory. Tried to allocate 9 GiB"
        ),
    ],
    ids=["Python", "CPU", "GPU"],
)
def test_out_of_memory_anywhere_is_one_line(error, run_cli, monkeypatch, tmp_path):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr("funcloss.app.train.train", fail)
    code, out, err = run_cli(
        "train", "--model", "linear", "--dataset", "mnist-sample", "--run-dir", tmp_path / "r"
    )
    assert (code, out) == (1, "")
    assert err.startswith("error: not enough memory: try a smaller --batch-size")
    assert err.count("\n") == 1
