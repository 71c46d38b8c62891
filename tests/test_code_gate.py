"""Code that a file names runs only where that is allowed, however the file spells it."""

import ast
import csv
import os
import shutil
import sys
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
import tomli_w
from conftest import StopAt, but_learning, resume, swept

import funcloss
from funcloss.app import runs, sweep
from funcloss.app.addresses import final, imported, is_address
from funcloss.app.audits import audit_run
from funcloss.app.config import (
    TrainConfig,
    check_code,
    code_in,
    make_config,
    read_toml,
    with_final_names,
)
from funcloss.app.train import train
from funcloss.errors import ConfigError

OPTIONS = {
    "dataset": "load",
    "validation_dataset": "one",
    "test_dataset": "one",
    "model": "Net",
    "loss": "loss",
}
CODE = """
import torch
from torch import nn
from torch.nn import functional as F

with open({mark!r}, "a") as file:
    file.write("x")

def one():
    labels = torch.arange(20) % 2
    return torch.randn(20, 3, generator=torch.Generator().manual_seed(1)), labels

def load():
    return {{part: one() for part in ("train", "validation", "test")}}

class Net(nn.Module):
    def __init__(self, shape, classes):
        super().__init__()
        self.fc = nn.Linear(shape[0], classes)

    def forward(self, x):
        return self.fc(x)

def loss(logits, labels, *, where=None):
    values = F.cross_entropy(logits, labels, reduction="none")
    return values if where is None else torch.where(where, values, 0.0)
"""
SPELLINGS = {
    "relative": "e.py:{name}",
    "dotted": "./e.py:{name}",
    "absolute": "{here}/e.py:{name}",
    "a dot within": "{here}/./e.py:{name}",
    "two slashes first": "/{here}/e.py:{name}",
    "two slashes within": "{here}//e.py:{name}",
    "up and down": "{here}/deep/../e.py:{name}",
    "home": "~/e.py:{name}",
    "linked folder": "{here}/linked/e.py:{name}",
    "linked file": "linked.py:{name}",
    "module": "{module}:{name}",
    "module in a package": "package.{module}:{name}",
    "a file of that text": "decoy.py:{name}",
    "a folder called as code": "x.py:y/e.py:{name}",
    "a space": "a b/e.py:{name}",
}
ELSEWHERE = ("module", "module in a package", "a file of that text", "a space")
ELSEWHERE += ("a folder called as code",)  # the others are one file
ROWS = {"epochs": 2, "batch_size": 4, "model": "linear", "compile": "off", "device": "cpu"}
ROWS |= {"threads": 1, "audit_every": 0, "target": "y", "check": False, "test_fraction": 0.2}
ROWS |= {"val_fraction": 0.3}
AXES = [sweep.Axis("learning_rate", "", (0.01, 0.1))]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run and a sweep that were stopped, and a run under floors that wants its plain one."""
    place = tmp_path_factory.mktemp("made")
    with (place / "rows.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("a", "b", "c", "y"))
        writer.writerows((i % 2, i % 5, 0.1 * i, i % 2) for i in range(40))
    config = make_config(ROWS, {"dataset": str(place / "rows.csv")})
    train(config, place / "run", should_stop=StopAt(3))
    swept(config, AXES, place / "sweep", should_stop=StopAt(3))
    floor = make_config(ROWS, {"dataset": config.dataset, "floor": {"1": 0.5}, "epochs": 1})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("funcloss.app.report.run_figures.save_figure", lambda figure, path: None)
        train(floor, place / "floor", should_stop=StopAt(8))
    assert (place / "floor" / "summary.json").exists()
    assert not (place / "floor" / "plain" / "summary.json").exists()
    return place


class Place:
    """A folder with folders of runs, and with code that leaves a mark."""

    def __init__(self, here: Path, made: Path):
        self.here, self.mark = here, here / "mark"
        self.module = f"gate_{os.getpid()}_{abs(hash(here))}"
        code = CODE.format(mark=str(self.mark))
        for folder in ("deep", "package", "x.py:y", "a b"):
            (here / folder).mkdir()
        for file in ("e.py", f"{self.module}.py", f"package/{self.module}.py", "decoy.py"):
            (here / file).write_text(code)
        for file in ("x.py", "x.py:y/e.py", "a b/e.py"):
            (here / file).write_text(code)
        (here / "linked").symlink_to(here)
        (here / "linked.py").symlink_to(here / "e.py")
        for name in OPTIONS.values():  # as an archive may bring along
            (here / f"decoy.py:{name}").write_text("")
        for name in ("run", "sweep", "floor"):
            shutil.copytree(made / name, here / name)
        shutil.copy(made / "rows.csv", here / "rows.csv")
        shutil.copy(made / "rows.csv", here / "other.csv")

    def spelt(self, spelling: str, option: str) -> str:
        return SPELLINGS[spelling].format(here=self.here, module=self.module, name=OPTIONS[option])

    def name(self, option: str, text: str, file: str = "run/config.toml") -> None:
        """Write an option into the TOML file of a run."""
        path = self.here / file
        path.write_text(tomli_w.dumps(tomllib.loads(path.read_text()) | {option: text}))

    @property
    def ran(self) -> bool:
        return self.mark.exists()


@pytest.fixture
def place(made, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("funcloss.app.report.run_figures.save_figure", lambda figure, path: None)
    monkeypatch.setattr(sys, "path", [*sys.path])
    before = set(sys.modules)
    found = Place(tmp_path, made)
    yield found
    for name in set(sys.modules) - before:
        if found.module in name or name == "package" or name.startswith("_tried_"):
            del sys.modules[name]


EVERY, DATA = set(OPTIONS), {"dataset", "validation_dataset", "test_dataset"}


def trained_again(run):
    train(make_config(read_toml(run / "config.toml"), {"epochs": 1}), "again")


def trained_as_loaded(run):
    train(runs.load(run).config, "again")


def swept_again(run):
    swept(make_config(read_toml(run / "config.toml")), AXES, "swept")


# What uses a run, and the options of which it imports the code. A tuple is a command.
USES = {
    "train --config": (("train", "--config", "run/config.toml", "--run-dir", "again"), EVERY),
    "train --config, typed over": (
        ("train", "--config", "run/config.toml", "--run-dir", "again", "--epochs", "1"),
        EVERY,
    ),
    "train --resume": (("train", "--resume", "run"), EVERY),
    "evaluate": (("evaluate", "run"), EVERY),
    "evaluate --split validation": (("evaluate", "run", "--split", "validation"), EVERY),
    "evaluate other data": (("evaluate", "run", "--dataset", "other.csv"), EVERY - DATA),
    "evaluate the same data": (("evaluate", "run", "--dataset", "rows.csv"), EVERY - DATA),
    "predict": (("predict", "run", "unlabelled.csv"), {"model"}),
    "audit": (("audit", "run"), EVERY),
    "sweep --config": (
        ("sweep", "--config", "run/config.toml", "--learning-rate", "0.1,0.2", "--out", "swept"),
        EVERY,
    ),
    "load": (runs.load, {"model"}),
    "evaluate_run": (runs.evaluate_run, EVERY),
    "resume": (resume, EVERY),
    "audit_run": (audit_run, EVERY),
    "train by a file": (trained_again, EVERY),
    "train as loaded": (trained_as_loaded, EVERY),
    "sweep by a file": (swept_again, EVERY),
}
REFUSED = [
    pytest.param(use, option, spelling, id=f"{name}, {option}, {spelling}")
    for name, (use, used) in USES.items()
    for option in used
    for spelling in (SPELLINGS if name in ("evaluate", "train --config", "resume") else ["home"])
]


def used(use, place, run_cli):
    """Use a run; return the error, as one line."""
    if isinstance(use, tuple):
        code, out, err = run_cli(*use)
        assert code == 2, out
        return err
    with pytest.raises(ConfigError) as error:
        use(place.here / "run")
    return str(error.value)


@pytest.mark.parametrize(("use", "option", "spelling"), sorted(REFUSED, key=lambda p: p.id))
def test_code_that_a_run_names_does_not_run(use, option, spelling, place, run_cli):
    text = place.spelt(spelling, option)
    assert is_address(text)
    place.name(option, text)
    before = {path.name for path in place.here.iterdir()}
    told = used(use, place, run_cli)
    assert not place.ran
    assert f"run/config.toml names code, which would be imported and run: {option} " in told
    assert f"{final(text)}; if it is yours, allow it with --allow-import" in told
    assert "in Python allow_import=True" in told
    assert {path.name for path in place.here.iterdir()} == before


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_code_that_is_allowed_runs_however_it_is_spelt(spelling, place, run_cli):
    place.name("loss", place.spelt(spelling, "loss"))
    assert run_cli("evaluate", "run", "--allow-import")[0] == 0
    assert place.mark.read_text() == "x"


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_code_that_is_typed_runs_however_it_is_spelt(spelling, place, run_cli):
    code, _, err = run_cli("evaluate", "run", "--dataset", place.spelt(spelling, "dataset"))
    assert (code, err) == (0, "")
    assert place.mark.read_text() == "x"


ALLOWED = {name: USES[name][0] for name in ("train --config", "train --resume")}


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("name", ALLOWED)
def test_code_that_is_allowed_runs(name, option, place, run_cli):
    place.name(option, place.spelt("relative", option))
    if option == "dataset":
        place.name("target", "")
    code, _, err = run_cli(*ALLOWED[name], "--allow-import")
    assert place.mark.read_text() == "x"
    if name == "train --resume" and option in DATA:  # the run did not begin on this data
        assert (code, err.count("has changed since run began")) == (1, 1)
    else:
        assert code == 0, err


@pytest.mark.parametrize("option", OPTIONS)
def test_code_that_is_typed_runs(option, place, run_cli):
    typed = {"dataset": "rows.csv", "target": "y"} if option != "dataset" else {}
    typed |= {"epochs": 0, "batch-size": 4, "run-dir": "new", "model": "linear"}
    typed |= {option: place.spelt("home", option)}
    args = [f"--{name.replace('_', '-')}={value}" for name, value in typed.items()]
    code, _, err = run_cli("train", "--no-check", *args)
    assert place.mark.read_text() == "x"
    assert code == 0, err


@pytest.mark.parametrize("option", OPTIONS)
def test_what_is_not_used_needs_no_leave(option, place, run_cli):
    (place.here / "unlabelled.csv").write_text("a,b,c\n0,0,0\n")
    place.name(option, place.spelt("a dot within", option))
    if option != "model":
        assert run_cli("predict", "run", "unlabelled.csv")[0] == 0
        assert runs.load("run").model is not None
    if option in DATA:
        assert run_cli("evaluate", "run", "--dataset", "other.csv")[0] == 0
    assert not place.ran


# These are paths, with code beside them that a glance may take for what is meant.
PATHS = {
    "a slash at its end": "e.py:load/",
    "missing, in a folder called as code": "x.py:y/rows.npz",
    "missing, at home": "~/x.py:y/rows.npz",
    "a folder called as code": "x.py:y/",
    "a folder called as code, absolute": "{here}/x.py:y/",
    "nothing after the colon": "e.py:",
    "a name with a space": "e.py:lo ad",
    "a name with a line": "e.py:load\n",
    "a module with a space": "e :load",
    "a folder and a colon": "{here}/e:load",
    "another suffix": "./e.PY:load",
    "not there once ~ is home": "~/missing.csv",
    "two colons": "e.py:load:load",
}


@pytest.mark.parametrize("text", PATHS.values(), ids=PATHS)
def test_what_does_not_read_as_code_is_a_path_even_where_code_is_allowed(text, place, run_cli):
    text = text.format(here=place.here)
    assert not is_address(text)
    assert not is_address(final(text))
    assert final(final(text)) == final(text)
    place.name("dataset", text)
    for allowed in ((), ("--allow-import",)):
        code, _, err = run_cli("evaluate", "run", *allowed)
        assert not place.ran
        assert code != 0
        assert "there is no /" in err or "target: for a table" in err


def test_what_is_there_does_not_decide_what_is_code(place):
    (place.here / "~").mkdir()
    for text in ("~/e.py:load", "e.py:load"):
        (place.here / text).write_text("")
        assert is_address(text)
        assert code_in({"dataset": text}) == {"dataset": text}
        made = make_config({"dataset": text})
        assert made.dataset == f"{place.here}/e.py:load"


def test_a_path_called_as_code_can_be_named(place, run_cli):
    shutil.copy(place.here / "rows.csv", place.here / "x.py:y" / "rows.csv")
    (place.here / "e.py:load").mkdir()
    code, _, err = run_cli("evaluate", "run", "--dataset", "x.py:y/rows.csv")
    assert (code, err) == (0, "")
    (place.here / "no").write_text("")
    code, _, err = run_cli("evaluate", "run", "--dataset", "none.py:y")
    assert "is written" not in err
    (place.here / "none.py:y").mkdir()
    code, _, err = run_cli("evaluate", "run", "--dataset", "none.py:y")
    assert code == 2
    assert err.endswith("; the path of that name is written none.py:y/\n".replace(
        "none", f"{place.here}/none"
    ))  # fmt: skip
    assert not place.ran


@pytest.mark.parametrize("text", ["~nobody-of-that-name/e.py:load", "~nobody-of-that-name/r.csv"])
def test_a_path_that_cannot_be_is_told(text, place, run_cli):
    place.name("dataset", text)
    code, _, err = run_cli("evaluate", "run", "--allow-import")
    assert code != 0
    assert "cannot be a path" in err
    assert not place.ran


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_the_data_of_a_run_is_its_own_however_it_is_typed(spelling, place, run_cli):
    """It is split as in the training, and needs no leave where it is typed."""
    place.name("dataset", place.spelt("absolute", "dataset"))
    place.name("target", "")
    place.name("test_dataset", place.spelt("absolute", "test_dataset"))
    typed = place.spelt(spelling, "dataset")
    code, _, err = run_cli("evaluate", "run", "--dataset", typed)
    ours = spelling not in ELSEWHERE
    assert place.ran != ours  # ours needs the run's test part, which nobody typed
    assert code == 2 if ours else code == 0
    assert ("names code" in err) == ours
    assert f"run: test_dataset {place.here}/e.py:one;" in err or not ours
    place.name("test_dataset", "")
    place.mark.unlink(missing_ok=True)
    code, _, err = run_cli("evaluate", "run", "--dataset", typed)
    assert (code, err) == (0, "")
    assert place.ran or not ours  # others may have been imported before


def test_data_that_is_typed_does_not_allow_other_code_of_the_run(place, run_cli):
    place.name("dataset", place.spelt("absolute", "dataset"))
    place.name("loss", place.spelt("absolute", "loss"))
    code, _, err = run_cli("evaluate", "run", "--dataset", "e.py:load")
    assert (code, place.ran) == (2, False)
    assert f"run: loss {place.here}/e.py:loss;" in err


@pytest.mark.parametrize("spelling", ["absolute", "a dot within", "home", "module"])
@pytest.mark.parametrize("option", OPTIONS)
def test_code_that_a_nested_run_names_does_not_run(option, spelling, place, run_cli):
    """What the baseline is, the run itself says."""
    place.name(option, place.spelt(spelling, option), "floor/plain/config.toml")
    for more in ((), ("--allow-import",)):
        code, _, err = run_cli("train", "--resume", "floor", *more)
        assert (code, place.ran) == (1 if more else 0, False), err
    assert "is finished" in err


def test_a_nested_run_that_is_finished_is_read_without_what_it_names(place, run_cli):
    assert run_cli("train", "--resume", "floor", "--quiet")[0] == 0
    for file in ("floor.json", "floor.html"):
        (place.here / "floor" / file).unlink()
    for option in OPTIONS:
        place.name(option, place.spelt("absolute", option), "floor/plain/config.toml")
    code, _, err = run_cli("train", "--resume", "floor")
    assert (code, but_learning(err)) == (0, "")
    assert (place.here / "floor" / "floor.json").exists()
    assert not place.ran


@pytest.mark.parametrize("option", OPTIONS)
def test_code_of_a_run_under_floors_or_of_a_sweep_does_not_run(option, place, run_cli):
    for file, args in (
        ("floor/config.toml", ("train", "--resume", "floor")),
        ("sweep/sweep.toml", ("sweep", "--resume", "sweep")),
    ):
        place.name(option, place.spelt("a dot within", option), file)
        code, _, err = run_cli(*args)
        assert (code, place.ran) == (2, False)
        assert f"{file} names code, which would be imported and run: {option} " in err


@pytest.mark.parametrize("option", ["loss", "model"])
def test_code_of_ones_own_trains_under_floors_and_goes_on(option, place, run_cli):
    """Nobody asks for leave in the process that was given the code."""
    text = place.spelt("relative", option)
    floor = {"dataset": "rows.csv", "floor": {"1": 0.5}, "epochs": 1, option: text}
    config = make_config(ROWS, floor)
    assert train(config, "whole").finished
    assert not train(config, "part", should_stop=StopAt(8)).finished
    assert run_cli("train", "--resume", "part")[0] == 2
    assert run_cli("train", "--resume", "part", "--allow-import", "--quiet")[0] == 0


def test_each_value_is_judged_by_where_it_came_from(place, run_cli):
    place.name("loss", place.spelt("absolute", "loss"))
    args = ("train", "--config", "run/config.toml", "--run-dir", "again", "--no-check")
    code, _, err = run_cli(*args, "--model", "e.py:Net")
    assert (code, place.ran) == (2, False)
    assert f"run: loss {place.here}/e.py:loss;" in err
    assert run_cli(*args, "--loss", "nll")[0] == 0
    assert not place.ran
    assert run_cli(*args, "--loss", "./e.py:loss", "--overwrite")[0] == 0
    assert place.mark.read_text() == "x"


def test_all_of_it_is_told_at_once(place, run_cli):
    for option in OPTIONS:
        place.name(option, place.spelt("relative", option))
    _, _, err = run_cli("audit", "run")
    listed = ", ".join(f"{o} {place.here}/e.py:{name}" for o, name in OPTIONS.items())
    assert f"run: {listed}; if" in err


def test_what_is_refused_is_neither_an_option_nor_in_a_file(place, run_cli):
    place.name("loss", place.spelt("absolute", "loss"))
    config = runs.folder.read_config(Path("run"), used=())
    assert config.refused_code == {f"{place.here}/e.py:loss": "run/config.toml"}
    runs.folder.write_config(Path("written.toml"), config, run={})
    assert "refused_code" not in Path("written.toml").read_text()
    assert "refused" not in run_cli("train", "--help")[1]
    place.name("refused_code", "")
    code, _, err = run_cli("evaluate", "run")
    assert (code, place.ran) == (1, False)
    assert "unknown option 'refused_code'" in err


def test_what_is_refused_stays_so_where_folders_move(place):
    place.name("dataset", f"{place.here}/deep/e.py:load")
    config = runs.folder.read_config(Path("run"), used=())
    (place.here / "deep").rename(place.here / "deeper")
    (place.here / "deep").symlink_to(place.here / "deeper")
    assert final(config.dataset) != config.dataset
    assert with_final_names(config).dataset in config.refused_code


def test_what_is_passed_in_python_needs_no_leave(place):
    place.name("loss", place.spelt("absolute", "loss"))
    config = runs.folder.read_config(Path("run"), used=())
    with pytest.raises(ConfigError, match="names code"):
        check_code(config)
    check_code(replace(config, loss="nll", model="e.py:Net"))
    check_code(TrainConfig(dataset="e.py:load"))
    train(replace(config, loss="nll", model="e.py:Net"), "again")
    assert place.mark.read_text() == "x"


def test_the_import_itself_is_barred(place):
    """Nothing is left to a look before: each use of a configuration meets the gate."""
    from funcloss.app.data import LoadOptions
    from funcloss.app.data.loading import load_own
    from funcloss.app.registry import loss_named
    from funcloss.app.runs.network import make_model
    from funcloss.app.runs.options import make_criterion

    refused = {f"{place.here}/e.py:{name}": "some/file" for name in OPTIONS.values()}
    data, one, model, loss = refused
    config = TrainConfig(dataset=data, model=model, loss=loss, refused_code=refused)
    table = str(place.here / "rows.csv")
    for use in (
        lambda: imported(loss, what="loss", refused=refused),
        lambda: loss_named(loss, refused=refused),
        lambda: make_criterion(loss, refused=refused),
        lambda: make_model(config, (3,), 2),
        lambda: load_own(LoadOptions(data), refused=refused),
        lambda: load_own(LoadOptions(table, target="y", test_dataset=one), refused=refused),
        lambda: funcloss.app.data.load_dataset(data, refused_code=refused),
        lambda: runs.setup.load_data(config),
    ):
        with pytest.raises(ConfigError, match="some/file names code"):
            use()
    assert not place.ran


PACKAGE = Path(funcloss.__file__).parent
GATED = {"imported": "refused", "loss_named": "refused", "make_criterion": "refused"}
GATED |= {"load_own": "refused", "load_dataset": "refused_code"}


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: p.stem)
def test_the_package_allows_nothing_by_itself(path):
    """Permission comes from a caller: no literal gives it, and no use of code goes without."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.keyword) and node.arg == "allow_import":
            assert not isinstance(node.value, ast.Constant), node.lineno
        if isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values, strict=True):
                if isinstance(key, ast.Constant) and key.value == "allow_import":
                    assert not isinstance(value, ast.Constant), node.lineno
        if isinstance(node, ast.arguments):
            for arg, default in zip(node.kwonlyargs, node.kw_defaults, strict=True):
                if arg.arg == "allow_import" and isinstance(default, ast.Constant):
                    assert default.value is False, node.lineno
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") in GATED:
            given = {keyword.arg for keyword in node.keywords}
            assert GATED[node.func.id] in given, node.lineno
