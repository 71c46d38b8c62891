"""Run and sweep folders that are damaged, killed, shared, moved: one line, and nothing lost."""

import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import threading
from pathlib import Path

import matplotlib
import msgspec
import pytest
import torch
from conftest import StopAt, lines_of, resume, resume_sweep, swept

import funcloss
from funcloss import _files, _folders
from funcloss._files import half_name, replacing, write_csv, write_text
from funcloss._folders import folder_replacing, holding, settle
from funcloss._names import printable
from funcloss.app import runs
from funcloss.app.choice import finish
from funcloss.app.config import make_config, read_toml
from funcloss.app.decoding import Count, from_json, from_plain
from funcloss.app.report import run_figures
from funcloss.app.runs import folder
from funcloss.app.runs.log import logged
from funcloss.app.sweep import Axis
from funcloss.app.train import train
from funcloss.decisions import read_cost_matrix
from funcloss.errors import ConfigError, DataError, FunclossError, RunError

DEEP, LONG = "[" * 100_000, "9" * 5_000


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "rows.csv"
    values = torch.randn(80, 3, generator=torch.Generator().manual_seed(0)).tolist()
    rows = [f"{a:.3f},{b:.3f},{c:.3f},{'no' if a < 0 else 'yes'}" for a, b, c in values]
    path.write_text("\n".join(["a,b,c,label", *rows]) + "\n")
    return path


@pytest.fixture(scope="module")
def config(data):
    def made(**options):
        base = {"dataset": str(data), "target": "label", "model": "linear", "epochs": 3,
                "batch_size": 10, "log_every": 4, "audit_every": 0, "compile": "off",
                "schedule": "constant", "check": False, "data_dir": str(data.parent)}  # fmt: skip
        return make_config(base, options)

    return made


def plainly(patch):
    """Draw nothing, audit nothing at the end of a sweep."""
    patch.setattr(run_figures, "FIGURES", {})
    patch.setattr(finish, "frontier", lambda choice: None)
    patch.setattr(finish, "save_figure", lambda figure, path: None)
    patch.setattr(finish, "_audited", lambda *args: None)


@pytest.fixture(autouse=True)
def _plainly(monkeypatch):
    plainly(monkeypatch)


@pytest.fixture(scope="module")
def made(tmp_path_factory, config):
    """A finished run, and those that were stopped: a run, one with folds, a sweep."""
    place = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        plainly(patch)
        train(config(), place / "done")
        train(config(), place / "run", should_stop=StopAt(9))
        train(config(folds=2), place / "folds", should_stop=StopAt(32))
        train(config(epochs="auto"), place / "early", should_stop=StopAt(9))
        swept(config(), [Axis("class_weight", "yes", (1.0, 3.0))], place / "sweep", seeds=2,
              method="vmap", should_stop=StopAt(25))  # fmt: skip
    return place


def contents(place):
    return {
        str(path.relative_to(place)): path.read_bytes()
        for path in sorted(place.rglob("*"))
        if path.is_file()
    }


def header(**changes):
    """Change the header of a safetensors file; None takes a field out."""

    def change(content):
        end = 8 + int.from_bytes(content[:8], "little")
        front = json.loads(content[8:end])
        for name, text in changes.items():
            front["__metadata__"][name] = text
            if text is None:
                del front["__metadata__"][name]
        raw = json.dumps(front).encode()
        return len(raw).to_bytes(8, "little") + raw + content[end:]

    return change


def tensor(name, fill):
    """Fill the bytes of a tensor of a safetensors file."""

    def change(content):
        end = 8 + int.from_bytes(content[:8], "little")
        first, last = json.loads(content[8:end])[name]["data_offsets"]
        return content[: end + first] + fill * (last - first) + content[end + last :]

    return change


def text(old, new):
    def change(content):
        assert old in content.decode()
        return content.decode().replace(old, new).encode()

    return change


def to(content):
    return lambda old: content.encode() if isinstance(content, str) else content


def without(*names):
    def change(content):
        record = json.loads(content)
        inner = record
        for name in names[:-1]:
            inner = inner[name]
        del inner[names[-1]]
        return json.dumps(record).encode()

    return change


STATE = "state/step"
DAMAGED = {
    "a checkpoint cut short": ("run", "checkpoint.safetensors", lambda c: c[: len(c) // 2]),
    "a checkpoint of zeros": ("run", "checkpoint.safetensors", lambda c: bytes(len(c))),
    "no step": ("run", "checkpoint.safetensors", header(step=None)),
    "step of text": ("run", "checkpoint.safetensors", header(step='"9"')),
    "step -4e18": ("run", "checkpoint.safetensors", header(step="-4000000000000000000")),
    "step of 5,000 digits": ("run", "checkpoint.safetensors", header(step=LONG)),
    "a nested step": ("run", "checkpoint.safetensors", header(step=DEEP)),
    "another step": ("run", "checkpoint.safetensors", header(step="8")),
    "an environment that is none": ("run", "checkpoint.safetensors", header(environment="[1]")),
    "a state at -1": ("run", "checkpoint.safetensors", tensor(STATE, b"\xff")),
    "params of NaN": ("run", "checkpoint.safetensors", tensor("state/params/fc.weight", b"\xff")),
    "a best step beyond": ("early", "checkpoint.safetensors", tensor("best/step", b"\x01")),
    "losses of NaN": ("run", "checkpoint.safetensors", tensor("unreported", b"\xff")),
    "nested TOML": ("run", "config.toml", to(f"epochs = {DEEP}")),
    "a long number": ("run", "config.toml", to(f"epochs = {LONG}")),
    "no [run]": ("run", "config.toml", lambda c: c.partition(b"[run]")[0]),
    "no model": ("run", "config.toml", text('model = "linear"\n', "")),
    "an empty one": ("run", "config.toml", to("")),
    "version 0": ("run", "config.toml", text("\nversion = 2\n", "\nversion = 0\n")),
    "a version of text": ("run", "config.toml", text("\nversion = 2\n", '\nversion = "1"\n')),
    "a nested summary": ("done", "summary.json", to(DEEP)),
    "a summary of a list": ("done", "summary.json", to("[]")),
    "a summary of digits": ("done", "summary.json", to(LONG)),
    "a summary without scores": ("done", "summary.json", without("test", "rules")),
    "a summary without argmax": ("done", "summary.json", without("test", "rules", "argmax")),
    "a summary without costs": ("done", "summary.json", without("costs")),
    "folds of less than none": ("folds", "folds.safetensors", header(done="-1")),
    "labels of no class": ("folds", "folds.safetensors", tensor("labels", b"\x7f")),
    "0 seeds": ("sweep", "sweep.toml", text("\nseeds = 2\n", "\nseeds = 0\n")),
    "seeds of text": ("sweep", "sweep.toml", text("\nseeds = 2\n", '\nseeds = "x"\n')),
    "1e12 seeds": ("sweep", "sweep.toml", text("\nseeds = 2\n", "\nseeds = 1_000_000_000_000\n")),
    "a value that is none": ("sweep", "sweep.toml", text("3.0", "nan")),
    "a seed cut short": ("sweep", "seed-0.safetensors", lambda c: c[:100]),
    "a seed at another step": ("sweep", "seed-1.safetensors", header(step="3")),
}
TAKE_UP = {"sweep": resume_sweep}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_file_is_one_line_that_names_it_and_changes_nothing(case, made, tmp_path):
    which, name, change = DAMAGED[case]
    place = shutil.copytree(made / which, tmp_path / which)
    path = place / name
    path.write_bytes(change(path.read_bytes()))
    before = contents(place)
    with pytest.raises(RunError) as error:
        TAKE_UP.get(which, resume)(place)
    said = str(error.value)
    assert name in said
    assert "\n" not in said
    assert len(said) < 500
    assert contents(place) == before


MODELS = {
    "classes that are none": header(classes="[]"),
    "a class more": header(classes='["no", "yes", "perhaps"]'),
    "one class twice": header(classes='["no", "no"]'),
    "a column less": header(columns='["a", "b"]'),
    "a mean less": header(mean="[0.0, 0.0]"),
    "no deviation": header(std="[0.0, 1.0, 1.0]"),
    "a huge input": header(input_shape="[2000000000]", columns="[]"),
    "an input below 0": header(input_shape="[-3]"),
    "weights of text": header(class_weights='["x", "y"]'),
    "images of tables": header(images="true"),
    "no calibration": header(calibration=None),
    "half a calibration": header(calibration='{"prior": [0.5, 0.5]}'),
    "temperature 0": header(calibration='{"temperature": 0}'),
    "another file": to("no model"),
}


@pytest.mark.parametrize("case", MODELS)
def test_a_model_whose_header_does_not_agree_is_refused(case, made, tmp_path):
    place = shutil.copytree(made / "done", tmp_path / "run")
    path = place / "model.safetensors"
    path.write_bytes(MODELS[case](path.read_bytes()))
    with pytest.raises(RunError, match=r"model\.safetensors") as error:
        funcloss.load(place)
    assert "\n" not in str(error.value)


def no_file(path, kind):
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "loop":
        path.symlink_to(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        with path.open("wb") as file:
            file.truncate(2**40)


@pytest.mark.parametrize("kind", ["pipe", "folder", "loop", "device", "5 GB of nothing"])
@pytest.mark.parametrize("name", ["checkpoint.safetensors", "model.safetensors", "config.toml"])
def test_what_is_no_file_of_a_sensible_size_is_not_opened(name, kind, made, tmp_path):
    place = shutil.copytree(made / "run", tmp_path / "run")
    no_file(place / name, kind)
    if name == "model.safetensors" and kind.startswith("5"):
        pytest.skip("nobody reads it: it is written anew")
    with pytest.raises(RunError, match="run"):
        resume(place)


@pytest.mark.parametrize("kind", ["pipe", "device", "5 GB of nothing"])
def test_no_reader_of_files_waits_for_a_pipe_or_fills_the_memory(kind, tmp_path):
    path = tmp_path / "x"
    no_file(path, kind)
    for read in (read_toml, read_cost_matrix):
        with pytest.raises(ConfigError, match="cannot read .*x"):
            read(path)
    with pytest.raises(DataError, match="cannot read .*x"), _files.csv_rows(path) as rows:
        next(rows)


JSON = {
    "nested": (f'{{"more": {DEEP}', "x is damaged: it is nested too deeply"),
    "of 5,000 digits": (f'{{"step": {LONG}}}', "x: step is damaged: integer value out of range"),
    "below 0": ('{"step": -1}', "x: step is damaged: expected int >= 0"),
    "beyond": ('{"step": 1e400}', "x: step is damaged"),
    "no field": ("{}", "x is damaged: it has no step"),
    "another type": ('{"step": "1"}', "x: step is damaged: expected int, got str"),
    "no JSON": ("{", "x is damaged: "),
    "no UTF-8": (b'{"step": "\xff"}', "x.* is damaged: "),
}


class Stepped(msgspec.Struct):
    step: Count


@pytest.mark.parametrize("case", JSON)
def test_what_is_decoded_is_what_was_declared(case):
    content, said = JSON[case]
    with pytest.raises(RunError, match=said):
        from_json(Stepped, content, "x")
    assert from_plain(Stepped, {"step": 3, "more": 1}, "x").step == 3


# The log.


def without_clock(place):
    """Which steps a sampled ledger measures is a matter of the clock too."""
    clock = ("seconds", "images_per_second", "exact", "samples", "net")
    return [{k: v for k, v in r.items() if k not in clock} for r in lines_of(place)]


@pytest.mark.parametrize("stops", [(1,), (9,), (13, 2), (3, 3, 3), (16,)])
def test_a_log_has_the_same_lines_after_stops(stops, made, config, tmp_path):
    train(config(), tmp_path / "run", should_stop=StopAt(stops[0]))
    for stop in stops[1:]:
        resume(tmp_path / "run", should_stop=StopAt(stop))
    resume(tmp_path / "run")
    log, whole = (place / "metrics.jsonl" for place in (tmp_path / "run", made / "done"))
    assert without_clock(log) == without_clock(whole)


def test_a_sweep_s_log_has_the_same_lines_after_a_stop(made, config, tmp_path):
    place = shutil.copytree(made / "sweep", tmp_path / "sweep")
    resume_sweep(place)
    whole = tmp_path / "whole"
    swept(config(), [Axis("class_weight", "yes", (1.0, 3.0))], whole, seeds=2, method="vmap")
    assert without_clock(place / "steps.jsonl") == without_clock(whole / "steps.jsonl")
    assert (
        contents(place / "chosen")["model.safetensors"]
        == (contents(whole / "chosen")["model.safetensors"])
    )


LINES = {
    "not JSON": b"{\n",
    "of another type": b'{"kind": "step", "step": "x"}\n',
    "at -4e18": b'{"kind": "epoch", "epoch": 1, "step": -4000000000000000000, "examples": 1}\n',
    "of no kind": b'{"kind": "nothing", "step": 1}\n',
    "nested": DEEP.encode() + b"\n",
}


@pytest.mark.parametrize("case", LINES)
def test_a_damaged_line_is_lost_alone_and_said(case, made, tmp_path):
    place, notes = shutil.copytree(made / "run", tmp_path / "run"), []
    log = place / "metrics.jsonl"
    before = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(b"".join([LINES[case], *before[1:]]))  # the line of epoch 0
    assert resume(place, show=notes.append).finished
    said = [n.text for n in notes if isinstance(n, runs.Note) and "line 1 is damaged" in n.text
            or isinstance(n, runs.Note) and "line 1: " in n.text]  # fmt: skip
    assert len(said) == 1
    assert log.read_bytes().startswith(b"".join(before[1:]))
    assert [r["epoch"] for r in lines_of(log) if r["kind"] == "epoch"] == [1, 2, 3]


def test_a_long_log_is_thinned_and_adds_up():
    step = {"kind": "step", "epoch": 1, "steps": 2, "seconds": 0.5, "images_per_second": 8.0}
    records = (
        {**step, "step": 2 * i, "examples": 4 * i, "loss": float(i)} for i in range(1, 30_001)
    )
    found = logged(records)
    assert 2_000 <= len(found.steps) <= 4_000
    assert sum(n for _, n in found.losses) == 60_000
    mean = sum(loss * n for loss, n in found.losses) / 60_000
    assert mean == pytest.approx(15_000.5)
    assert found.steps[-1]["examples"] == 120_000
    assert {r["images_per_second"] for r in found.steps} == {8.0}


# Kills, locks, moves.


def test_a_folder_is_of_one_process(made, config, tmp_path):
    place = shutil.copytree(made / "run", tmp_path / "run")
    before = contents(place)
    with holding(place):
        for use in (resume, lambda run: train(config(epochs=0), run, overwrite=True)):
            with pytest.raises(RunError, match="run is in use by another process"):
                use(place)
    assert contents(place) == before
    assert resume(place).finished


def test_a_process_that_ends_in_any_way_lets_its_folder_go(tmp_path):
    code = (
        "import os, pathlib, sys; from funcloss._folders import holding\n"
        "with holding(pathlib.Path(sys.argv[1])):\n"
        "    print('held', flush=True); sys.stdin.read()"
    )
    child = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], text=True,
                             stdin=subprocess.PIPE, stdout=subprocess.PIPE)  # fmt: skip
    assert child.stdout is not None
    assert child.stdout.readline() == "held\n"
    with pytest.raises(RunError, match="in use"), holding(tmp_path):
        pass
    child.send_signal(signal.SIGKILL)
    child.communicate()
    with holding(tmp_path):
        pass


@pytest.mark.parametrize("how", ["moved", "removed", "moved and made anew"])
def test_a_folder_that_goes_away_while_it_trains_is_one_line(how, config, tmp_path):
    place, asked = tmp_path / "run", []

    def should_stop():
        asked.append(1)
        if len(asked) == 3:
            shutil.rmtree(place) if how == "removed" else place.rename(tmp_path / "elsewhere")
            if how == "moved and made anew":
                place.mkdir()
        return False

    with pytest.raises(RunError, match="run was moved or removed while this process wrote to it"):
        train(config(), place, should_stop=should_stop)
    assert not place.exists() or not any(place.iterdir())
    if how != "removed":
        assert resume(tmp_path / "elsewhere").finished


KILLS = """
import os, sys
from pathlib import Path
from funcloss._folders import folder_replacing, settle

place, real, left = Path(sys.argv[1]), os.rename, [0]

def rename(*paths):
    left[0] -= 1
    if left[0] == 0:
        os._exit(9)
    real(*paths)

def wholly(run):
    return {p.name: p.read_text() for p in run.iterdir()}

os.rename = rename
new = {name: "new" for name in ("a", "b", "sign")}
for start in ("old", "empty", "none"):
    for at in range(1, 9):
        run = place / f"{start}{at}"
        if start != "none":
            run.mkdir(parents=True)
        if start == "old":
            (run / "sign").write_text("old")
        if not (child := os.fork()):
            left[0] = at
            with folder_replacing(run, last="sign") as beside:
                for name in new:
                    (beside / name).write_text("new")
            os._exit(0)
        killed = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        left[0] = 0
        settle(run, last="sign")
        found = wholly(run) if run.exists() else None
        before = {"old": {"sign": "old"}, "empty": {}, "none": None}[start]
        assert found == new or (killed and found == before), (start, at, found)
        assert not list(place.glob(".*")), (start, at)
        if not killed:
            break
    print(start, at)
"""


def test_killed_at_any_rename_the_old_folder_or_the_new_one_is_found_whole(tmp_path):
    command = [sys.executable, "-c", KILLS, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:3] == ["old 3", "empty 5", "none 2"]


def test_a_run_between_two_renames_is_found_by_any_command(made, tmp_path):
    place = tmp_path / "run"
    shutil.copytree(made / "done", place.with_name(f"{left_name('run')}-abcdefgh-old"))
    assert funcloss.load(place).classes == ("no", "yes")
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def left_name(stem):
    """Return the name that a process which is gone gave."""
    gone = subprocess.Popen(["true"])
    gone.wait()
    return half_name(stem).replace(str(os.getpid()), str(gone.pid))


def test_what_a_kill_left_goes_with_the_next_command_and_nothing_else(made, config, tmp_path):
    place = shutil.copytree(made / "run", tmp_path / "run")
    gone = left_name("checkpoint")
    lives = half_name("checkpoint").replace(str(os.getpid()), "1") + ".safetensors"
    elsewhere = f".checkpoint-00000000-{gone.rpartition('-')[2]}.safetensors"  # another machine's
    for name in (f"{gone}.safetensors", lives, elsewhere):
        (place / name).write_text("half")
    (place / f"{left_name('chosen')}-abcdefgh").mkdir()
    resume(place)
    assert {p.name for p in place.iterdir() if p.name.startswith(".")} == {lives, elsewhere}
    beside = tmp_path / f"{left_name('run')}-abcdefgh"
    beside.mkdir()
    train(config(epochs=0), place, overwrite=True)
    assert not beside.exists()


# What is written.


def test_identical_trainings_write_identical_files(made, config, tmp_path):
    train(config(), tmp_path / "again")
    again, once = contents(tmp_path / "again"), contents(made / "done")
    for name in ("model.safetensors", "checkpoint.safetensors"):
        assert again[name] == once[name]


def test_a_link_is_followed_and_a_mode_kept(tmp_path):
    target = tmp_path / "there" / "file.txt"
    target.parent.mkdir()
    target.write_text("old")
    target.chmod(0o600)
    link = tmp_path / "link.txt"
    link.symlink_to(target)
    write_text(link, "new")
    assert link.is_symlink()
    assert target.read_text() == "new"
    assert stat.S_IMODE(target.stat().st_mode) == 0o600
    assert [p.name for p in target.parent.iterdir()] == ["file.txt"]


def test_a_pipe_is_written_to_and_stays_one(tmp_path):
    path, got = tmp_path / "pipe", []
    os.mkfifo(path)
    reader = threading.Thread(target=lambda: got.append(path.read_text()))
    reader.start()
    write_text(path, "rows")
    reader.join(10)
    assert got == ["rows"]
    assert path.is_fifo()
    end, start = os.pipe()
    write_text(Path(f"/dev/fd/{start}"), "more")
    os.close(start)
    with os.fdopen(end) as file:
        assert file.read() == "more"
    write_text(Path("/dev/null"), "nothing")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)


@pytest.mark.parametrize("name", [".", "", "folder", "loop", "a\0b", "no/where", "x" * 300])
def test_where_nothing_can_be_written_is_one_line(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    Path("loop").symlink_to("loop")
    with pytest.raises(RunError, match="cannot write"), replacing(Path(name)) as beside:
        beside.write_text("")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folder", "loop"]


def test_no_cell_of_a_table_is_a_formula(tmp_path):
    cells = ["=1+1", "@SUM(A1)", "+x", "-x", "-0.5", "+1e-3", -2.0, "a=b", "", "\tx", "\udcff"]
    write_csv(tmp_path / "x.csv", [cells])
    with _files.csv_rows(tmp_path / "x.csv") as rows:
        assert next(rows) == ["'=1+1", "'@SUM(A1)", "'+x", "'-x", "-0.5", "+1e-3", "-2.0", "a=b",
                              "", "'\tx", "\\udcff"]  # fmt: skip


def test_figures_are_drawn_in_our_style_whatever_the_folder_s(monkeypatch):
    monkeypatch.setitem(matplotlib.rcParams, "axes.facecolor", "black")
    with run_figures.own_style():
        assert matplotlib.rcParams["axes.facecolor"] == "white"
    assert matplotlib.rcParams["axes.facecolor"] == "black"


def test_a_training_goes_on_when_nobody_reads_what_it_prints(data, tmp_path, monkeypatch):
    options = ("train", "--dataset", data, "--target", "label", "--model", "linear", "--epochs",
               "2", "--batch-size", "10", "--compile", "off", "--no-check")  # fmt: skip
    for name in ("pipe", "full"):
        end, start = os.pipe()
        os.close(end)
        if name == "full":
            os.close(start)
            start = os.open("/dev/full", os.O_WRONLY)
        stream = os.fdopen(start, "w")
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", stream)
            patch.setattr(sys, "argv", ["funcloss", *map(str, options), "--run-dir",
                                        str(tmp_path / name)])  # fmt: skip
            with pytest.raises(SystemExit) as ended:
                funcloss.app.cli.main()
        stream.close()
        assert ended.value.code == 0
        assert folder.read_summary(tmp_path / name) is not None


def test_what_users_call_things_reaches_no_terminal_raw(data, tmp_path, run_cli):
    name = os.fsdecode(b"n\xff\x1b[31mred")
    code, out, err = run_cli("train", "--dataset", data, "--target", "label", "--model", "linear",
                             "--epochs", "1", "--batch-size", "10", "--compile", "off",
                             "--no-check", "--run-dir", tmp_path / name)  # fmt: skip
    assert code == 0, err
    assert printable(name) in out
    code, more, err = run_cli("evaluate", f"{name}x")
    assert code == 1
    assert err == f"error: {printable(name)}x is not a run folder: it has no config.toml\n"
    assert "\x1b" not in out + err


def test_a_data_set_whose_name_is_not_utf_8_is_one_line(data, tmp_path):
    path = tmp_path / os.fsdecode(b"\xff.csv")
    shutil.copy(data, path)
    with pytest.raises(ConfigError, match="its name is not UTF-8, rename"):
        make_config({"dataset": str(path)})


REFUSED = {
    "threads": ({"threads": 1024}, "threads 1024: this machine has"),
    "a large cost": ({"class_cost": {"yes": 1e300}}, "1e\\+300, which is beyond 1e\\+15"),
    "a large negative one": ({"cost": {"yes,no": -1e300}}, "beyond"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_overflow_or_hang_is_refused(case, config, tmp_path):
    options, said = REFUSED[case]
    with pytest.raises(FunclossError, match=said):
        train(config(**options), tmp_path / "run")
    assert not any(tmp_path.iterdir())


def test_settling_what_is_whole_changes_nothing(made):
    before = contents(made)
    settle(made / "run", last="config.toml")
    with (
        pytest.raises(RunError, match="cannot make"),
        folder_replacing(made / "run" / "config.toml" / "x", last=""),
    ):
        pass
    assert contents(made) == before
    assert not _folders._OPEN
