"""The page on loops that are there already: each block runs, and prints what is shown."""

import contextlib
import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

PAGE = Path(__file__).parent.parent / "docs" / "existing-loop.md"
STEPS = re.findall(
    r"^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```)?", PAGE.read_text(), re.M | re.S
)
(FIRST, SHOWN), *OTHERS = STEPS
PACKAGES = {  # that a block imports: what must be installed
    "pytorch_lightning": "lightning", "transformers": "transformers", "accelerate": "accelerate",
    "skorch": "skorch", "ignite": "ignite", "fastai": "fastai",
}  # fmt: skip


def name_of(block):
    if "def groups" in block:
        return "tokens"
    if "held_out" in block:
        return "ledger"
    found = [PACKAGES[name] for name in re.findall(r"^from (\w+)", block, re.M) if name in PACKAGES]
    if found:
        return found[0]
    made = re.search(r"init_process_group|LossSpec|through", block)
    return {"through": "plain", "LossSpec": "own pass"}.get(made[0], "processes")


BLOCKS = {name_of(code): code for code, _ in OTHERS}


def numbers(text):
    return [int(n) for n in re.findall(r"-?\d+(?=%)", text)]


def test_the_page_has_a_block_for_each_loop():
    assert len(BLOCKS) == len(OTHERS) == len(PACKAGES) + 5


@pytest.fixture(scope="module")
def first():
    """What the first block leaves to the others."""
    names = {}
    with contextlib.redirect_stdout(io.StringIO()):
        exec(compile(FIRST, PAGE.name, "exec"), names)
    return names


def test_the_page_begins_with_what_is_found(capsys):
    exec(compile(FIRST, PAGE.name, "exec"), {})
    said = capsys.readouterr().out
    assert re.sub(r"-?\d+%", "", said).split() == re.sub(r"-?\d+%", "", SHOWN).split()
    assert len(numbers(said)) == len(numbers(SHOWN))
    assert all(abs(a - b) <= 1 for a, b in zip(numbers(said), numbers(SHOWN), strict=True))


QUIET = [
    "ignore:.*isinstance.treespec, LeafSpec:FutureWarning",
    "ignore:.*does not have many workers",
    "ignore:The number of training batches",
    "ignore:.*torch.jit.script. is deprecated:FutureWarning",  # fastai's, when imported
]


@pytest.mark.filterwarnings(*QUIET)
@pytest.mark.parametrize("name", [name for name in BLOCKS if name not in ("processes", "ledger")])
def test_each_block_runs_with_few_lines_added(name, first, tmp_path, monkeypatch, capsys):
    block = BLOCKS[name]
    for package in {*re.findall(r"^from (\w+)", block, re.M)} & {*PACKAGES}:
        pytest.importorskip(package)
    if "funcloss.integrations.transformers" in block:
        pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    exec(compile(block, PAGE.name, "exec"), {**first, "__name__": "page"})
    if name == "tokens":
        return
    said = capsys.readouterr().out.splitlines()[-1]
    share = re.fullmatch(r"share of 9: (-?\d+)%(.*)", said)
    assert share is not None, said
    assert 5 <= int(share[1]) <= 200  # expected: 36 %
    assert share[2].strip() == "" or "clipped or scaled, by a factor" in share[2]
    assert added(block) < 10


def test_the_ledger_of_the_page_is_what_is_shown(first, capsys):
    (shown,) = [text for code, text in OTHERS if code == BLOCKS["ledger"]]
    exec(compile(BLOCKS["ledger"], PAGE.name, "exec"), {**first})
    said, pattern = capsys.readouterr().out, r"[+-]\d+(?:\.\d)?|[\d.]+%"
    assert re.sub(pattern, "", said).split() == re.sub(pattern, "", shown).split()
    for a, b in zip(re.findall(pattern, said), re.findall(pattern, shown), strict=True):
        assert abs(float(a.strip("%")) - float(b.strip("%"))) <= max(
            0.1, 0.05 * abs(float(b.strip("%")))
        )


@pytest.mark.slow
def test_the_block_of_several_processes_runs(tmp_path):
    (tmp_path / "ddp.py").write_text(BLOCKS["processes"])
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*command, "--nproc-per-node", "2", "ddp.py"],
        cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"share of 9: -?\d+% *\n", done.stdout)


def added(block):
    """Return how many lines are marked as added, to the end of the indented where it says so."""
    count, inside = 0, None
    for line in block.splitlines():
        indent = len(line) - len(line.lstrip())
        if inside is not None and line.strip():
            if indent > inside:
                count += 1
                continue
            inside = None
        if "# added" in line:
            count += 1
            inside = indent if "to the end" in line else None
    return count
