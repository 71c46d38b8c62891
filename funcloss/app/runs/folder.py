"""The files of a run folder, and what must hold of them."""

import json
import os
import platform
import re
import shlex
import sys
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import msgspec
import tomli_w
import torch

from funcloss import __version__
from funcloss._files import HALF, write_text
from funcloss._folders import settle
from funcloss._json import jsonable
from funcloss._names import printable
from funcloss.app.config import (
    CODE,
    FORMAT,
    TrainConfig,
    check_code,
    make_config,
    option_values,
    read_record,
    recorded_format,
)
from funcloss.app.decoding import from_plain, read_json
from funcloss.app.report.run_figures import FIGURES
from funcloss.app.runs.log import Lost, lines_of, metrics_line
from funcloss.app.runs.summary import Summary
from funcloss.errors import ConfigError, RunError

CONFIG, METRICS, SUMMARY = "config.toml", "metrics.jsonl", "summary.json"
MODEL, CHECKPOINT = "model.safetensors", "checkpoint.safetensors"
# All that is ever written into the folder of a run or a sweep, and the folders in it.
_WRITTEN = (
    *(CONFIG, METRICS, SUMMARY, MODEL, CHECKPOINT, "folds.safetensors", "ledger.safetensors"),
    *(*FIGURES, "events.out.tfevents.*"),
    *("audit.html", "audit.json", "audit_classes.csv", "audit_pairs.csv", "audit_examples.csv"),
    *("audit_ledger.csv",),
    *("audit_share.png", "audit_conflict.png", "audit_impact.png", "audit_norms.png"),
    *("audit_examples.png", "audit_history.png", "audit_elasticity.png"),
    *("floor.html", "floor.json", "frontier.png"),
    *("sweep.toml", "sweep.html", "sweep.json", "sweep.csv", "steps.jsonl", "trials.jsonl"),
    *("seed-[0-9]*.safetensors", "folds-[0-9]*.safetensors"),
)
SIGNS = {"run": CONFIG, "sweep": "sweep.toml"}  # what tells such a folder
_FOLDERS = ("plain", "chosen", "tensorboard", "seed-[0-9]*")
_NAMED = 5  # files in an error


def check_free(path: Path, *, overwrite: bool, what: str = "run") -> None:
    """Raise ``ConfigError`` unless a new run or sweep may be made at ``path``.

    What may be replaced is known by its ``config.toml`` or ``sweep.toml``, which must parse and
    have a table of its kind and the version of the format.

    Args:
        path: The folder to make.
        overwrite: What is there already may go if it is of the same kind, and no other file lies
            in it.
        what: What is made, ``run`` or ``sweep``.
    """
    sign = SIGNS[what]
    settle(path, last=sign)
    try:
        if not path.exists() or (path.is_dir() and not any(path.iterdir())):
            return
        others = foreign(path) if path.is_dir() else []
    except OSError as error:
        raise ConfigError(f"cannot use {path} as {what} folder: {error.strerror}") from None
    not_one = f"{path} is there and is not a {what} folder"
    if not path.is_dir() or not (path / sign).exists():
        raise ConfigError(f"{not_one}: name another one")
    try:
        options, tables = read_record(path / sign)
        make_config(options)
    except ConfigError as error:
        raise ConfigError(f"{not_one} to replace: name another one ({error})") from None
    if what not in tables or recorded_format(tables) is None:
        raise ConfigError(
            f"{not_one} to replace: name another one ({sign} has no version under [run])"
        )
    if others:
        more = f" and {len(others) - _NAMED} more" if len(others) > _NAMED else ""
        raise ConfigError(
            f"{path} holds a {what} and what funcloss did not write: "
            f"{', '.join(others[:_NAMED])}{more}; move that away or name another folder"
        )
    if not overwrite:
        raise ConfigError(
            f"{path} holds a {what} already: resume it, overwrite it or name another folder"
        )


def foreign(path: Path) -> list[str]:
    """Return what lies in the folder of a run or a sweep and is none of its files.

    Args:
        path: The folder.

    Returns:
        Names relative to it, sorted; of a folder that is none of its own, that alone.
    """
    found = []
    for item in sorted(path.iterdir()):
        name = item.name
        if HALF.fullmatch(name):  # what a kill left
            continue
        if item.is_dir() and not item.is_symlink():
            own = any(fnmatchcase(name, pattern) for pattern in _FOLDERS)
            found += [f"{name}/{n}" for n in foreign(item)] if own else [f"{name}/"]
        elif not any(fnmatchcase(name, pattern) for pattern in _WRITTEN):
            found.append(name)
    return found


def environment() -> dict[str, Any]:
    """Return what must be the same for two runs to be the same to the bit."""
    return {
        "funcloss": __version__,
        "torch": torch.__version__,
        "numpy": metadata.version("numpy"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": _processor(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }


def _processor() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Return a line for each part of the environment that is not what it was."""
    return [
        f"{name} was {before.get(name)}, is {now.get(name)}"
        for name in now
        if before.get(name) != now.get(name)
    ]


def write_config(
    path: Path, config: TrainConfig, *, run: dict[str, Any], **tables: dict[str, Any]
) -> None:
    """Write a resolved configuration as TOML, with the tables of what was found on the way.

    Args:
        path: The file.
        config: The configuration.
        run: How it came about; the version of the format goes before it.
        tables: What else the file says.
    """
    options = {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in option_values(config).items()
    }
    record = {**tables, "run": {"version": FORMAT, **run}}
    write_text(path, tomli_w.dumps({**options, **record}))


@dataclass(frozen=True)
class RunTable:
    """What ``[run]`` of a ``config.toml`` or ``sweep.toml`` says that is read back."""

    version: Annotated[int, msgspec.Meta(ge=1)] | None = None  # none from before there were any


@dataclass(frozen=True)
class _Tables:
    """What a ``config.toml`` of a run has beside its options."""

    run: RunTable


# Options that a run has decided, and what they are where they are still open.
_UNRESOLVED = {"dataset": "auto", "model": "auto", "device": "auto", "epochs": "", "batch_size": 0}


def check_is(path: Path, what: str) -> None:
    """Raise ``RunError`` unless the folder of a run or a sweep is at ``path``, or can be put back.

    Args:
        path: The folder.
        what: What it is of, ``run`` or ``sweep``.
    """
    sign = SIGNS[what]
    if not (path / sign).is_file():
        settle(path, last=sign)
    if not (path / sign).is_file():
        kind = "a run folder" if what == "run" else "the folder of a sweep"
        raise RunError(f"{path} is not {kind}: it has no {sign}")


def check_files(path: Path) -> None:
    """Raise ``RunError`` if something else lies where a folder's files are, and will be written."""
    for item in sorted(path.iterdir()):
        ours = any(fnmatchcase(item.name, pattern) for pattern in _WRITTEN)
        if ours and not item.is_file():
            raise RunError(f"{item} is not a file: remove it, then resume")


def read_config(
    folder: Path, *, allow_import: bool = False, used: Collection[str] = CODE
) -> TrainConfig:
    """Read the resolved configuration of a run.

    Args:
        folder: A run folder.
        allow_import: Whether code that it names may be imported.
        used: The options of which the code will be. That of the others stays refused.

    Raises:
        ConfigError: it names code, and that is not allowed.
        RunError: ``folder`` is not a run folder, or is of a newer format.
    """
    check_is(folder, "run")
    try:
        options, tables = read_record(folder / CONFIG, allow_import=allow_import)
        from_plain(_Tables, tables, str(folder / CONFIG))
        if (version := recorded_format(tables)) is not None and version < FORMAT:
            raise ConfigError(
                f"{folder} was made by an older funcloss: format {version}, this one reads "
                f"{FORMAT}; train it again with config {folder / CONFIG}"
            )
    except ConfigError as error:
        raise RunError(str(error)) from None
    try:
        config = make_config(options)
    except ConfigError as error:
        raise RunError(f"{folder / CONFIG}: {error}") from None
    if left := [name for name, open in _UNRESOLVED.items() if getattr(config, name) == open]:
        raise RunError(f"{folder / CONFIG} is damaged: it does not say its {left[0]}")
    check_code(config, used)
    return config


def records_of(folder: Path, lost: Lost = lambda text: None) -> Iterator[dict[str, Any]]:
    """Yield the records of ``metrics.jsonl``, without what is damaged.

    Args:
        folder: A run folder.
        lost: Called with a sentence if lines were left out.

    Raises:
        RunError: the file cannot be read.
    """
    return (record for _, record in lines_of(folder / METRICS, metrics_line, lost))


def append_line(path: Path, record: dict[str, Any]) -> None:
    """Add a record to a file of JSON lines.

    Raises:
        RunError: it cannot be written.
    """
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(as_line(record))
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror}") from None


def as_line(record: Mapping[str, Any]) -> str:
    """Return a record as a line of JSON."""
    return json.dumps(jsonable(dict(record)), allow_nan=False) + "\n"


def read_summary(folder: Path) -> dict[str, Any] | None:
    """Return ``summary.json``, None in a run that is not finished.

    Raises:
        RunError: the file cannot be read, or lacks what commands read of it.
    """
    path = folder / SUMMARY
    if not path.exists():
        return None
    summary = read_json(dict[str, Any], path)
    from_plain(Summary, summary, str(path))
    told = summary.get("test", summary.get("out-of-fold", {})).get("rules", {})
    if "argmax" not in told or told.keys() - summary.get("over_folds", told).keys():
        raise RunError(f"{path} is damaged: it has no scores by argmax, on a test set or on folds")
    return summary


def as_name(text: str) -> str:
    """Return a text as the name of a folder.

    Example:
        >>> as_name("my data/mine:net")
        'my-data-mine-net'
    """
    return re.sub(r"[^\w.-]+", "-", text).strip("-.") or "run"


def fresh_name(parent: Path, stem: str) -> Path:
    """Return a path under ``parent`` that is not there yet."""
    path, n = parent / stem, 1
    while path.exists():
        n += 1
        path = parent / f"{stem}-{n}"
    return path


def command_line() -> str:
    """Return the command that made this process, for whoever reads the run later."""
    return printable(shlex.join([os.path.basename(sys.argv[0]), *sys.argv[1:]]))
