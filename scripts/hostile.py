"""Damage every kind of file that is read, and watch what the commands do.

    python scripts/hostile.py --cases 1000 --json hostile.json

A case copies a sound file or folder, damages one file in it, runs one command on it and asks:

- the exit code is 0, or 1 or 2 with one line that begins with ``error:``, and no traceback;
- it takes less than 20 seconds and less than 2 GB of memory;
- after a failure every file is as it was, but for a training that had begun and diverged.

The damage is drawn from a seed: bytes are cut, flipped, zeroed, repeated or replaced, values of
JSON and TOML become others of a wrong type, size or depth, and a pipe, a folder, a link to itself
or an enormous file with nothing in it takes the place of the file. A command that ends well may
have read a damage that nobody can see, such as a flipped bit of an image.

Each command runs in a process of its own, forked from one in which all is imported.
"""

import contextlib
import dataclasses
import gzip
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import tomllib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import tomli_w
import torch
import typer
from PIL import Image
from safetensors.torch import save_file

from funcloss.app.cli import main as command
from funcloss.app.config import make_config
from funcloss.app.train import train

SECONDS, MEMORY = 20, 2 * 10**9  # that a command may take
QUICK = ("--epochs", "1", "--batch-size", "8", "--model", "linear", "--compile", "off")
QUICK += ("--device", "cpu", "--audit-every", "0", "--threads", "1", "--workers", "0")


@dataclass(frozen=True)
class Target:
    """A file to be damaged, and the commands that read it."""

    place: str  # relative to the folder of sound files
    commands: tuple[tuple[str, ...], ...]  # "@" stands for the copy of that folder


@dataclass(frozen=True)
class Outcome:
    """What a command did with a damaged file."""

    file: str
    damage: str
    arguments: tuple[str, ...]
    code: int
    said: str  # on stderr
    seconds: float
    memory: int  # bytes at the peak, of this process alone
    wrong: str  # what it should not have done; empty: nothing


# Sound files


def sound(folder: Path) -> list[Target]:
    """Fill a folder with a sound file of each kind, and return what to damage."""
    rng = np.random.default_rng(0)
    rows = np.column_stack([rng.normal(size=(60, 2)).round(4), np.arange(60) % 2])
    frame = pd.DataFrame(rows, columns=["a", "b", "y"]).astype({"y": int})
    frame["word"] = np.where(rows[:, 0] > 0, "up", "down")
    frame.to_csv(folder / "rows.csv", index=False)
    frame.to_parquet(folder / "rows.parquet")
    with gzip.open(folder / "rows.csv.gz", "wt") as file:
        file.write(frame.to_csv(index=False))
    images = rng.integers(0, 256, (40, 8, 8), dtype=np.uint8)
    labels = np.arange(40) % 2
    np.savez(folder / "arrays.npz", images=images, labels=labels)
    save_file(
        {"images": torch.from_numpy(images), "labels": torch.from_numpy(labels)},
        folder / "arrays.safetensors",
    )
    for i, (image, label) in enumerate(zip(images[:24], labels[:24], strict=True)):
        place = folder / "pictures" / "ab"[label]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(place / f"{i}.{('png', 'jpg', 'bmp')[i % 3]}")
    raw = folder / "published" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name, n in (("train", 60), ("t10k", 20)):
        pixels = rng.integers(0, 256, n * 28 * 28, dtype=np.uint8).tobytes()
        digits = (np.arange(n) % 10).astype(np.uint8).tobytes()
        head = b"\0\0\x08\x03" + b"".join(k.to_bytes(4, "big") for k in (n, 28, 28))
        (raw / f"{name}-images-idx3-ubyte").write_bytes(head + pixels)
        (raw / f"{name}-labels-idx1-ubyte").write_bytes(
            b"\0\0\x08\x01" + n.to_bytes(4, "big") + digits
        )
    (folder / "costs.csv").write_text(",0,1\n0,0,1\n1,20,0\n")
    (folder / "own.toml").write_text(
        'epochs = 1\nbatch_size = 8\nmodel = "linear"\n[cost]\n"1,0" = 9\n'
    )
    table = {"dataset": str(folder / "rows.csv"), "target": "y", "cost": {"1,0": 5}}
    options = dict(zip([q[2:].replace("-", "_") for q in QUICK[::2]], QUICK[1::2], strict=True))
    plain = {k: int(v) if v.isdecimal() else v for k, v in options.items()}
    train(make_config(plain, table), folder / "done", show=_silent)
    asked = iter([False] * 3)
    train(
        make_config(plain, table, {"epochs": 4}),
        folder / "stopped",
        show=_silent,
        should_stop=lambda: next(asked, True),
    )
    train(make_config(plain, table, {"folds": 3, "epochs": 2}), folder / "folded", show=_silent)
    _half_a_sweep(folder)
    trained = ("train", *QUICK, "--run-dir", "@/new", "--dataset")
    data = {
        "rows.csv": ("@/rows.csv", "--target", "y"),
        "rows.parquet": ("@/rows.parquet", "--target", "y"),
        "rows.csv.gz": ("@/rows.csv.gz", "--target", "y"),
        "arrays.npz": ("@/arrays.npz",),
        "arrays.safetensors": ("@/arrays.safetensors",),
        "pictures/a/0.png": ("@/pictures",),
        "pictures/b/1.jpg": ("@/pictures",),
        "pictures/a/2.bmp": ("@/pictures",),
        "costs.csv": ("@/rows.csv", "--target", "y", "--cost-matrix", "@/costs.csv"),
    }
    found = [Target(place, ((*trained, *rest),)) for place, rest in data.items()]
    idx = ("mnist", "--data-dir", "@/published")
    for part in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3"):
        found.append(Target(f"published/MNIST/raw/{part}-ubyte", ((*trained, *idx),)))
    named = ("train", "--config", "@/own.toml", "--dataset", "@/rows.csv", "--target", "y")
    found.append(Target("own.toml", ((*named, "--run-dir", "@/new"),)))
    on_new = (("predict", "@/done", "@/rows.csv"), ("evaluate", "@/done"))
    found.append(Target("done/model.safetensors", on_new))
    found.append(Target("done/config.toml", (*on_new, ("audit", "@/done"))))
    found.append(Target("done/checkpoint.safetensors", (("audit", "@/done"),)))
    for name in ("summary.json", "metrics.jsonl"):
        found.append(Target(f"done/{name}", (("audit", "@/done"), ("train", "--resume", "@/done"))))
    for name in ("checkpoint.safetensors", "config.toml", "metrics.jsonl", "model.safetensors"):
        found.append(Target(f"stopped/{name}", (("train", "--resume", "@/stopped"),)))
    found.append(Target("folded/folds.safetensors", (("evaluate", "@/folded"),)))
    for file in sorted((folder / "swept").iterdir()):
        if file.suffix in (".toml", ".json", ".jsonl", ".safetensors"):
            found.append(Target(f"swept/{file.name}", (("sweep", "--resume", "@/swept"),)))
    return found


def _half_a_sweep(folder: Path) -> None:
    """Stop a sweep after some of its steps."""
    from funcloss.app.sweep import sweep
    from funcloss.app.sweep.axes import Axis
    from funcloss.app.sweep.plan import SweepSpec

    options = {"dataset": str(folder / "rows.csv"), "target": "y", "model": "linear", "epochs": 4}
    config = make_config(options, {"batch_size": 8, "device": "cpu", "compile": "off"})
    spec = SweepSpec(config, (Axis("class_weight", "1", (1.0, 4.0)),), seeds=2)
    asked = iter([False] * 6)
    sweep(spec, folder / "swept", show=_silent, should_stop=lambda: next(asked, True))


def _silent(event: object) -> None:
    """Show nothing."""


# Damage


def damaged(content: bytes, name: str, draw: random.Random) -> tuple[str, bytes | None]:
    """Return what was done, and the damaged bytes; None: the file is to be replaced by another."""
    if name.endswith((".json", ".jsonl", ".toml")) and draw.random() < 0.6:
        return _restructured(content, name, draw)
    if name.endswith(".safetensors") and draw.random() < 0.5:
        return _other_header(content, draw)
    ways: dict[str, Callable[[], bytes | None]] = {
        "cut": lambda: content[: draw.randrange(len(content) + 1)],
        "empty": lambda: b"",
        "flipped": lambda: _flipped(content, draw),
        "zeroed": lambda: _over(content, draw, lambda n: bytes(n)),
        "random": lambda: _over(content, draw, lambda n: draw.randbytes(n)),
        "lines": lambda: _shuffled(content, draw),
        "twice": lambda: content + content,
        "text": lambda: _over(content, draw, lambda n: draw.choice(_TEXTS)),
        "replaced": lambda: None,
    }
    way = draw.choice([*ways])
    return way, ways[way]()


_TEXTS = (b"\0", b"\xff\xfe", b"\x1b[2J", b"nan", b"1e999", b"9" * 5000, b"-", b"[" * 9999, b'"')


def _flipped(content: bytes, draw: random.Random) -> bytes:
    made = bytearray(content)
    for _ in range(draw.choice((1, 1, 8, 64))):
        made[draw.randrange(len(made))] ^= 1 << draw.randrange(8)
    return bytes(made)


def _over(content: bytes, draw: random.Random, make: Callable[[int], bytes]) -> bytes:
    start = draw.randrange(len(content))
    n = min(draw.choice((1, 4, 100, 4096)), len(content) - start)
    return content[:start] + make(n) + content[start + n :]


def _shuffled(content: bytes, draw: random.Random) -> bytes:
    lines = content.split(b"\n")
    for _ in range(draw.choice((1, 3))):
        i = draw.randrange(len(lines))
        change = draw.choice(("drop", "repeat", "swap"))
        if change == "drop" and len(lines) > 1:
            del lines[i]
        elif change == "repeat":
            lines.insert(i, lines[i])
        else:
            j = draw.randrange(len(lines))
            lines[i], lines[j] = lines[j], lines[i]
    return b"\n".join(lines)


def _wrong_values(draw: random.Random) -> Any:
    deep: Any = 0
    for _ in range(draw.choice((3, 500))):
        deep = [deep]
    values = [None, True, 0, -1, 2**70, 1.5, -4e18, "", "x", "/etc/passwd", [], {}, [[1]], deep]
    return draw.choice([*values, {"a": 1}, "\x1b[31m", 10**15, float("nan")])


def _changed(value: Any, draw: random.Random) -> Any:
    """Return a tree of plain values with one of them wrong, missing or added."""
    if isinstance(value, dict) and value and draw.random() < 0.85:
        key = draw.choice([*value])
        way = draw.random()
        if way < 0.15:
            return {k: v for k, v in value.items() if k != key}
        if way < 0.25:
            return {**value, "unknown": _wrong_values(draw)}
        return {**value, key: _changed(value[key], draw)}
    if isinstance(value, list) and value and draw.random() < 0.7:
        i = draw.randrange(len(value))
        return [*value[:i], _changed(value[i], draw), *value[i + draw.randrange(2) :]]
    return _wrong_values(draw)


def _restructured(content: bytes, name: str, draw: random.Random) -> tuple[str, bytes]:
    try:
        if name.endswith(".toml"):
            changed = _changed(tomllib.loads(content.decode()), draw)
            changed = changed if isinstance(changed, dict) else {"x": changed}
            return "values", tomli_w.dumps(_without_none(changed)).encode()
        if name.endswith(".json"):
            return "values", json.dumps(_changed(json.loads(content), draw)).encode()
        lines = content.decode().splitlines()
        i = draw.randrange(len(lines))
        lines[i] = json.dumps(_changed(json.loads(lines[i]), draw))
        return "values", ("\n".join(lines) + "\n").encode()
    except (ValueError, TypeError, IndexError, RecursionError):  # no such text can be made of it
        return "empty", b""


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_none(v) for k, v in value.items() if v is not None}
    return [_without_none(v) for v in value if v is not None] if isinstance(value, list) else value


def _other_header(content: bytes, draw: random.Random) -> tuple[str, bytes]:
    """Change the header of a safetensors file: a tensor's place or a fact."""
    n = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + n])
    facts = header.get("__metadata__", {})
    if facts and draw.random() < 0.6:
        key = draw.choice([*facts])
        try:
            facts[key] = json.dumps(_changed(json.loads(facts[key]), draw))
        except ValueError:
            facts[key] = "x"
    else:
        header = _changed(header, draw)
    try:
        made = json.dumps(header).encode()
    except RecursionError:
        made = b"{}"
    return "header", len(made).to_bytes(8, "little") + made + content[8 + n :]


def replace_file(path: Path, draw: random.Random) -> str:
    """Put something that is no regular file, or an enormous one, in the place of a file."""
    path.unlink()
    way = draw.choice(("pipe", "folder", "loop", "sparse", "gone"))
    if way == "pipe":
        os.mkfifo(path)
    elif way == "folder":
        path.mkdir()
    elif way == "loop":
        path.symlink_to(path)
    elif way == "sparse":
        with path.open("wb") as file:
            file.truncate(5 * 10**9)
    return way


# One case


def run_case(base: Path, target: Target, work: Path, draw: random.Random) -> Outcome:
    """Damage a copy of the sound files, and run one of the commands that read it."""
    place = work / "case"
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(base, place)
    _move(place, base)
    path = place / target.place
    way, content = damaged(path.read_bytes(), path.name, draw)
    if content is None:
        way = replace_file(path, draw)
    else:
        path.write_bytes(content)
    arguments = tuple(a.replace("@", str(place)) for a in draw.choice(target.commands))
    before = _state(place)
    code, said, seconds, memory = forked(arguments, work)
    wrong = _judged(code, said, seconds, memory)
    begun = "is not finite at step" in said  # of numbers that are too large: its folder is whole
    if not wrong and code and not begun and (changed := _difference(before, _state(place))):
        wrong = f"changed {changed}"
    said = said.replace(str(place), "@")
    return Outcome(target.place, way, arguments, code, said, seconds, memory, wrong)


def _move(place: Path, base: Path) -> None:
    """Let the run folders of a copy name the copy's data."""
    for config in place.rglob("*.toml"):
        text = config.read_text()
        if str(base) in text:
            config.write_text(text.replace(str(base), str(place)))


def _judged(code: int, said: str, seconds: float, memory: int) -> str:
    lines = [line for line in said.splitlines() if not line.startswith(("warning:", " "))]
    if code < 0:
        return "hung" if seconds >= SECONDS else f"ended by signal {-code}"
    if memory > MEMORY:
        return f"took {memory / 1e9:.1f} GB"
    if code not in (0, 1, 2):
        return f"exit code {code}"
    if "Traceback" in said:
        return "traceback"
    if code and [line[:6] for line in lines] != ["error:"]:
        return "not one line of error"
    return ""


def forked(
    arguments: Sequence[str], work: Path, most: float = SECONDS
) -> tuple[int, str, float, int]:
    """Run a command in a process of its own, killed after ``most`` seconds.

    Returns:
        Exit code, stderr, seconds and memory.
    """
    begun, said = time.monotonic(), work / "stderr"
    child = os.fork()
    if not child:
        code = 70
        try:
            os.setsid()
            with open(os.devnull, "w") as out, said.open("w") as err:
                os.dup2(out.fileno(), 1)
                os.dup2(err.fileno(), 2)
            sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
            sys.argv = ["funcloss", *arguments]
            os.chdir(work)
            command()
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            with contextlib.suppress(OSError):
                sys.stderr.flush()
            os._exit(code)
    while time.monotonic() - begun < most:
        done, status, usage = os.wait4(child, os.WNOHANG)
        if done:
            break
        time.sleep(0.002)
    else:
        os.killpg(child, signal.SIGKILL)
        _, status, usage = os.wait4(child, 0)
    seconds = time.monotonic() - begun
    unit = 1 if sys.platform == "darwin" else 1024
    text = said.read_text(errors="replace")
    return os.waitstatus_to_exitcode(status), text, seconds, usage.ru_maxrss * unit


def _state(place: Path) -> dict[str, str]:
    """Return what each file is, by name."""
    found = {}
    for path in sorted(place.rglob("*")):
        name = str(path.relative_to(place))
        if path.is_symlink():
            found[name] = "link"
        elif path.is_file():
            small = path.stat().st_size < 10**8
            found[name] = hashlib.md5(path.read_bytes()).hexdigest() if small else "large"
        else:
            found[name] = "folder" if path.is_dir() else "other"
    return found


def _difference(before: dict[str, str], after: dict[str, str]) -> str:
    names = sorted(n for n in before.keys() | after.keys() if before.get(n) != after.get(n))
    return ", ".join(names[:5])


def cases(n: int, seed: int, only: str = "") -> Iterator[Outcome]:
    """Yield the outcomes of ``n`` cases, the targets in turn."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        base, work = Path(folder, "sound").resolve(), Path(folder, "work").resolve()
        base.mkdir()
        work.mkdir()
        targets = [t for t in sound(base) if only in t.place]
        for i in range(n):
            yield run_case(base, targets[i % len(targets)], work, random.Random(seed * 10**6 + i))


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    cases_: Annotated[int, typer.Option("--cases", help="How many.")] = 1000,
    seed: Annotated[int, typer.Option(help="Of the damage.")] = 0,
    only: Annotated[str, typer.Option(help="Files whose name has this in it.")] = "",
    output: Annotated[Path | None, typer.Option("--json", help="Where the outcomes go.")] = None,
) -> None:
    """Count what the commands do with damaged files."""
    every = []
    for i, outcome in enumerate(cases(cases_, seed, only)):
        every.append(outcome)
        if outcome.wrong:
            args = " ".join(outcome.arguments[:2])
            print(f"{i}: {outcome.file}, {outcome.damage}, {args}: {outcome.wrong}")
            print("   ", "\n    ".join(outcome.said.splitlines()[-4:]))
    codes = Counter(outcome.code for outcome in every)
    right = sum(not outcome.wrong for outcome in every)
    slowest = max(outcome.seconds for outcome in every)
    largest = max(outcome.memory for outcome in every)
    print(f"{right} of {len(every)} right; exit codes {dict(sorted(codes.items()))}; at most "
          f"{slowest:.1f} s and {largest / 1e9:.2f} GB")  # fmt: skip
    if output is not None:
        output.write_text(json.dumps([dataclasses.asdict(outcome) for outcome in every], indent=1))
    raise typer.Exit(int(right < len(every)))


if __name__ == "__main__":
    app()
