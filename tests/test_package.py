"""The package as its users meet it: what importing loads, what depends on what, the README."""

import ast
import importlib
import json
import os
import re
import shlex
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from test_docs_site import SELF_CONTAINED

import funcloss
from funcloss.app.cli import app as shell

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "funcloss"

# Each room may import from those before it, and from its own; the application from all.
LIBRARY = [
    {
        "errors",
        "typing",
        "_checks",
        "_names",
        "_numbers",
        "_trees",
        "_files",
        "_folders",
        "_json",
        "__init__",
    },
    {"losses", "reduction"},
    {"combinators", "keys", "_dropout"},
    {"modules", "objectives", "_custom_vjp", "transforms"},
    {"laws"},
    {"optim"},
    {"models", "decisions"},
    {"training"},
    {"audit", "constraints", "sensitivity"},
    {"integrations"},
]
APPLICATION = [
    {"app", "app.addresses", "app.decoding"},
    {"app.config", "app.options", "app.registry", "app.data", "app.report"},
    {"app.runs"},
    {"app.audits", "app.outcome"},
    {"app.choice"},
    {"app.sweep", "app.train"},
    {"app.cli"},
    {"__main__"},
]
ROOMS = [*LIBRARY, *APPLICATION]
PUBLIC_ROOMS = sorted(set.union(*LIBRARY) - {"__init__"})


def room_of(module: str) -> int:
    name = module.removeprefix("funcloss").strip(".") or "__init__"
    parts = name.split(".")
    for name in (".".join(parts[:2]), parts[0]):
        for i, names in enumerate(ROOMS):
            if name in names:
                return i
    raise AssertionError(f"no room of {module}")


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("funcloss"):
            plain = node.module == "funcloss"
            names |= {f"funcloss.{a.name}" for a in node.names} if plain else {node.module}
    return {n for n in names if not n.startswith("funcloss.__version")}


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: p.stem)
def test_imports_point_one_way(path):
    if path == PACKAGE / "__init__.py":
        pytest.skip("it re-exports, when asked")
    here = room_of(".".join(path.relative_to(PACKAGE).with_suffix("").parts))
    later = {name for name in imported(path) if room_of(name) > here}
    assert not later


def test_every_image_is_opened_with_the_formats_that_may_be_read():
    calls = [
        (path.stem, {keyword.arg for keyword in node.keywords})
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "Image.open"
    ]
    assert calls
    assert [where for where, given in calls if "formats" not in given] == []


def loaded_by(code: str) -> set[str]:
    code += "; import sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


ROOMS_ALONE = """
import importlib, json, os, sys
import torch, numpy, jaxtyping  # once: each room then in a process that has nothing else
for room in sys.argv[1:]:
    if not (child := os.fork()):
        importlib.import_module(f"funcloss.{room}")
        print(json.dumps([room, list(sys.modules)]), flush=True)
        os._exit(0)
    os.waitpid(child, 0)
"""


@pytest.fixture(scope="module")
def loaded_by_room() -> dict[str, list[str]]:
    """All that is imported when a room is, and nothing of ours before it."""
    command = [sys.executable, "-c", ROOMS_ALONE, *PUBLIC_ROOMS]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return dict(json.loads(line) for line in done.stdout.splitlines())


@pytest.mark.parametrize("room", PUBLIC_ROOMS)
def test_a_room_of_the_library_loads_torch_and_library_rooms_only(room, loaded_by_room):
    heavy = ["torchvision", "matplotlib", "PIL", "jinja2", "rich", "typer", "safetensors", "einops"]
    heavy += ["sklearn", "scipy"]
    modules = loaded_by_room[room]
    assert f"funcloss.{room}" in modules
    assert not {m.partition(".")[0] for m in modules} & set(heavy)
    assert not [m for m in modules if m.startswith("funcloss.app")]


def test_importing_funcloss_loads_nothing_and_its_losses_load_torch_at_most():
    assert "torch" not in loaded_by("import funcloss")
    heavy = {"torchvision", "matplotlib", "typer", "rich", "einops", "PIL", "safetensors"}
    modules = loaded_by("import funcloss; funcloss.losses.cross_entropy; funcloss.mean")
    assert "torch" in modules
    assert not heavy & modules
    assert not [m for m in modules if m.startswith(("funcloss.training", "funcloss.app.data"))]


def test_every_public_name_is_there_and_no_other():
    for name in funcloss.__all__:
        assert getattr(funcloss, name) is not None
    assert set(funcloss.__all__) <= set(dir(funcloss))
    with pytest.raises(AttributeError, match="has no attribute 'cross_entrpy'"):
        _ = funcloss.cross_entrpy


@pytest.mark.parametrize(
    "name",
    ["losses", "app.data", "app.runs", "app.sweep", "app.audits", "training", "optim", "keys"]
    + ["models", "laws", "objectives", "transforms", "audit", "constraints", "sensitivity"],
)
def test_what_is_public_is_documented(name):
    module = importlib.import_module(f"funcloss.{name}")
    public = getattr(module, "__all__", [n for n in vars(module) if not n.startswith("_")])
    for item in public:
        thing = getattr(module, item)
        if callable(thing) and getattr(thing, "__module__", "").startswith("funcloss"):
            assert thing.__doc__, f"{name}.{item}"


README = (ROOT / "README.md").read_text()
PAGES = sorted((ROOT / "docs").rglob("*.md"))
ALONE = [ROOT / "docs" / page for page in SELF_CONTAINED]  # whose Python has a test of its own
FRAMEWORKS = ROOT / "docs" / "existing-loop.md"  # tried by test_existing_loop
SHOWING = [
    page
    for page in PAGES
    if page != FRAMEWORKS
    and re.search("^```bash$" if page in ALONE else "^```(bash|python)$", page.read_text(), re.M)
]


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.M | re.S)


# A block that is run, and the output that is shown right below it, "..." where some is left out.
SHOWN = re.compile(r"^```(bash|python)\n(.*?)^```\n(?:\n```text\n(.*?)^```)?", re.M | re.S)


def worded(text: str) -> str:
    """Return an output with its numbers masked: they differ by machine and version of torch."""
    return " ".join(re.sub(r"\d+(?:[.,]\d+)*(?:e[-+]?\d+)?", "N", text).split())


def run_as_shown(block, monkeypatch, capsys):
    for line in block.splitlines():
        if line.startswith(("funcloss ", "funcloss-train")):
            words = shlex.split(line)
            monkeypatch.setattr(sys, "argv", words)
            program = shell.main_train if words[0] == "funcloss-train" else shell.main
            with pytest.raises(SystemExit) as end:
                program()
            assert not end.value.code, capsys.readouterr().err


def on_full_mnist(block: str) -> bool:
    """Whether the commands of a block take the data that a machine may not have."""
    return "--recipe" in block or "--dataset mnist " in block


def test_what_the_readme_shows_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for block in blocks("bash"):
        if not on_full_mnist(block):
            run_as_shown(block, monkeypatch, capsys)
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), {})


@pytest.mark.slow
def test_what_the_readme_shows_of_full_mnist_runs(data_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FUNCLOSS_DATA_DIR", str(data_dir))
    shown = [block for block in blocks("bash") if on_full_mnist(block) and "funcloss" in block]
    assert shown
    for block in shown:
        run_as_shown(block, monkeypatch, capsys)
    said = capsys.readouterr().out
    for part in ("raised the recall of class 9 from ", "and raised that of class 4 (by "):
        assert part in " ".join(said.split())
    assert (tmp_path / "runs" / "costly" / "audit.html").exists()


# Lightning's, on one page: of torch, on how it walks a tree, and of machines with many cores.
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*does not have many wor")
# torch 2.6's own, of an exported program that it reads back
@pytest.mark.filterwarnings("ignore:.*get_attr:UserWarning")
@pytest.mark.parametrize("page", SHOWING, ids=lambda page: str(page.relative_to(ROOT / "docs")))
def test_what_the_documentation_shows_runs(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for language, block, output in SHOWN.findall(page.read_text()):
        if language == "bash":  # as on the page: what one writes, the next one reads
            run_as_shown(block, monkeypatch, capsys)
        else:
            exec(compile(block, page.name, "exec"), names)
        said = worded(capsys.readouterr().out)
        for part in map(worded, output.split("...\n")):
            assert part in said
            said = said[said.index(part) + len(part) :]
    for file in tmp_path.rglob("summary.json"):  # no run that is shown has learnt nothing
        summary = json.loads(file.read_text())
        if summary.get("epochs") and "test" in summary:
            test = summary["test"]
            assert test["rules"]["argmax"]["accuracy"][0] > 1.1 / len(test["prior"]), file


@pytest.mark.slow
def test_the_other_commands_of_the_documents_are_those_of_the_tests_themselves():
    ci = (ROOT / ".ci" / "run").read_text()
    pages = [block for page in PAGES for block in blocks("bash", page.read_text())]
    for block in (*blocks("bash"), *pages):
        for line in block.splitlines():
            if line.startswith("pip install"):
                install, _ = line.split(" && ")
                assert install.replace("pip install", "pip install -q") in ci
            elif line.startswith("python "):
                script = ROOT / shlex.split(line)[1]
                done = subprocess.run([sys.executable, script, "--help"], capture_output=True,
                                      text=True, check=True)  # fmt: skip
                for option in re.findall(r"--[a-z-]+", line):
                    assert option in done.stdout


def built(kind: str, tree: Path, folder: Path) -> Path:
    """A distribution of a source tree, as its build backend makes it."""
    folder.mkdir()
    code = f"from hatchling.build import build_{kind} as build; print(build({str(folder)!r}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=tree, capture_output=True, text=True,
                          check=True)  # fmt: skip
    return folder / done.stdout.split()[-1]


def contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    return built("wheel", ROOT, tmp_path_factory.mktemp("dist") / "wheel")


def test_the_wheel_has_all_of_it_and_nothing_else(wheel):
    names = set(contents(wheel))
    for kind in ("*.py", "*.toml", "*.j2", "py.typed"):
        for file in PACKAGE.rglob(kind):
            assert str(file.relative_to(ROOT)) in names
    tops = {name.partition("/")[0] for name in names}
    assert tops == {"funcloss", f"funcloss-{funcloss.__version__}.dist-info"}


def test_the_source_distribution_builds_the_same_wheel(wheel, tmp_path):
    sdist = built("sdist", ROOT, tmp_path / "sdist")
    with tarfile.open(sdist) as archive:
        safe = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}  # from 3.11.4 on
        archive.extractall(tmp_path / "unpacked", **safe)
    (tree,) = (tmp_path / "unpacked").iterdir()
    assert contents(built("wheel", tree, tmp_path / "wheel")) == contents(wheel)
    for name in ("tests", "notebooks", "docs", "scripts", "CHANGELOG.md", "LICENSE"):
        assert (tree / name).exists()


@pytest.mark.slow
def test_what_is_installed_of_the_wheel_trains_and_audits(wheel, tmp_path):
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", tmp_path / "site"]
    subprocess.run([*pip, wheel], check=True)
    here = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}

    def run(*args):
        line = [sys.executable, "-P", "-m", "funcloss", *args]
        done = subprocess.run(line, cwd=tmp_path, env=here, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    where = [sys.executable, "-P", "-c", "import funcloss; print(funcloss.__file__)"]
    found = subprocess.run(where, env=here, capture_output=True, text=True, check=True).stdout
    assert found.startswith(str(tmp_path / "site"))
    assert funcloss.__version__ in run("--version")
    quick = ("--model", "linear", "--epochs", "1", "--dataset", "mnist-sample")
    run("train", "--recipe", "fast", *quick, "--run-dir", "run")
    run("audit", "run", "--examples", "200")
    assert "<html" in (tmp_path / "run" / "audit.html").read_text()


SCRIPTS = [
    "accuracy.py --recipe fast=1 --runs {out}/accuracy",
    pytest.param(
        "bench_train.py --rounds 1 --steps 2 --json {out}/figures.json", marks=pytest.mark.long
    ),
    "bench_losses.py --rounds 2 --only nll --json {out}/figures.json",
    "bench_audit.py --rounds 2 --only article --examples 512 --no-peers --json {out}/figures.json",
    "bench_sweep.py --model linear --rounds 1 --steps 2 --dataset mnist-sample",
    pytest.param("floors.py --recipe fast --seeds 1 --floor 9=0.9", marks=pytest.mark.long),
    "long_tail.py --seeds 1 --epochs 1 --only focal --out {out}/tail",
    "ledger.py --steps 2 --held-out 40 --only linear",
    "counterfactual.py --quick --out {out}/trainings.jsonl",
    pytest.param("bench_watch.py --only many --rounds 3", marks=pytest.mark.long),
    pytest.param(
        "costs_table.py --quick --cache {out}/cache --json {out}/figures.json",
        marks=pytest.mark.long,
    ),
]


@pytest.mark.slow
@pytest.mark.parametrize("line", SCRIPTS, ids=lambda line: line.partition(".")[0])
def test_a_script_runs(line, tmp_path, data_dir, monkeypatch):
    monkeypatch.setenv("FUNCLOSS_DATA_DIR", str(data_dir))
    command = shlex.split(f"scripts/{line.format(out=tmp_path)}")
    subprocess.run([sys.executable, *command], cwd=ROOT, check=True)
    assert ("--json" in command) == (tmp_path / "figures.json").exists()


def test_the_readme_is_finished():
    assert "@@" not in README


# inductor may turn add(a @ b, c, alpha=0.5) into a @ b + c.
PRODUCTS = {"addmm", "addmv", "addr", "addbmm", "baddbmm", "sspaddmm"}
SCALED = {
    "alpha": {"add", "sub", "subtract", "rsub"} | PRODUCTS,
    "beta": PRODUCTS,
    "value": {"addcmul", "addcdiv"},
}


def scaled_in_torch(source):
    """The lines that call arithmetic of torch with a factor of its own."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            owner, name = ast.unparse(node.func.value), node.func.attr.rstrip("_")
            of_torch = owner.split(".")[0] in ("torch", "F")
            for keyword in node.keywords:
                known = name in SCALED.get(keyword.arg, ())
                # The beta of smooth L1 is no factor.
                factor = keyword.arg in ("alpha", "beta") and name != "smooth_l1_loss"
                if known or (of_torch and factor):
                    yield node.lineno


def test_no_arithmetic_of_torch_is_given_a_factor():
    found = {
        f"{path.relative_to(ROOT)}:{line}"
        for path in PACKAGE.rglob("*.py")
        for line in scaled_in_torch(path.read_text(encoding="utf-8"))
    }
    assert found == set(), "write a + c * b: the compiler may drop alpha, beta and value"


@pytest.mark.parametrize(
    ("code", "lines"),
    [
        ("torch.add(g, v, alpha=m)", 1),
        ("g.sub_(v, alpha=0.5)", 1),
        ("torch.addcmul(v, g, g, value=1 - b)", 1),
        ("x.addmm_(a, b, beta=0.5)", 1),
        ("F.celu(x, alpha=2.0)", 1),
        ("torch.lerp(a, b, 0.1) + torch.addmm(a, b, c)", 0),
        ("losses.smooth_l1(p, t, beta=0.5) + axes.grid(alpha=0.3)", 0),
        ("F.pad(x, (1, 1), value=0.0)", 0),
    ],
)
def test_a_factor_is_found_in_arithmetic_of_torch_alone(code, lines):
    assert len(list(scaled_in_torch(code))) == lines
