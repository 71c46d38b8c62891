"""Files: read with one error for all that can be wrong, and written whole or not at all."""

import contextlib
import csv
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from funcloss.errors import DataError, FunclossError, RunError

_SNIFFED = 65_536  # characters in which the separator of a CSV file is looked for


@contextlib.contextmanager
def reading(
    path: str | Path,
    error: type[FunclossError] = DataError,
    *,
    kind: str = "",
    broken: tuple[type[Exception], ...] = (),
) -> Iterator[None]:
    """Turn what can go wrong in reading a file into one error that names it.

    Args:
        path: The file.
        error: What is raised.
        kind: What the file should be, ``"TOML"`` say.
        broken: What its parser raises if it is not.

    Raises:
        error: the file cannot be read, is not text in UTF-8 or not of its kind.
    """
    try:
        yield
    except broken as failure:
        raise error(f"{path} is not {kind}: {failure}") from None
    except UnicodeDecodeError:
        raise error(f"{path} is not text in UTF-8: save it in that encoding") from None
    except OSError as failure:
        raise error(f"cannot read {path}: {failure.strerror or failure}") from None


@contextlib.contextmanager
def csv_rows(
    path: str | Path, error: type[FunclossError] = DataError
) -> Iterator[Iterator[list[str]]]:
    """Open a CSV file in UTF-8 and yield its rows, to be read within; empty lines are left out.

    Cells are separated by commas, semicolons or tabs: what its first line has most of.

    Raises:
        error: the file cannot be read or is not CSV in UTF-8.
    """
    with (
        reading(path, error, kind="CSV", broken=(csv.Error,)),
        open(path, newline="", encoding="utf-8-sig") as file,
    ):
        separator = separator_of(file.read(_SNIFFED))
        file.seek(0)
        yield (row for row in csv.reader(file, delimiter=separator) if row)


def separator_of(text: str, also: str = "") -> str:
    """Return what separates the cells of a table: what its first line has most of.

    Args:
        text: The beginning of the file.
        also: What separates if there are neither commas, semicolons, tabs nor bars.

    Example:
        >>> separator_of("a;b,c;d"), separator_of("A11 6 A34", " ")
        (';', ' ')
    """
    text = re.sub('"[^"]*"', "", text)  # what is quoted separates nothing
    first = re.search(r"[^\r\n]+", text)
    line = first[0] if first else ""
    most = max(",;\t|", key=line.count)
    return also if also and most not in line and also in line.strip() else most


def is_number(text: str) -> bool:
    """Return whether the text of a cell is a number."""
    try:
        float(text)
    except ValueError:
        return False
    return True


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a path beside ``path`` to write to; it takes the place of ``path`` if all went well.

    Args:
        path: The file to make or replace, in a folder that exists.

    Yields:
        Where to write, with the same suffix.

    Raises:
        RunError: it cannot be written; ``path`` is as it was and nothing is left beside it.
    """
    beside = path.with_name(f".{path.stem}-{os.getpid()}{path.suffix}")
    try:
        yield beside
        with beside.open("rb") as file:
            os.fsync(file.fileno())
        beside.replace(path)
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror or error}") from None
    finally:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write ``text`` to ``path``, whole or not at all."""
    with replacing(path) as beside:
        beside.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def folder_replacing(path: Path, *, last: str) -> Iterator[Path]:
    """Give a folder beside ``path`` to fill; it becomes ``path`` if all went well.

    Args:
        path: The folder to make or replace; a replaced one is removed last. An empty one stays
            (it may be where a disk is mounted) and is filled.
        last: The file without which the folder counts for nothing; it arrives last.

    Yields:
        The folder to fill.

    Raises:
        RunError: it cannot be made; what was at ``path`` is as it was.
    """
    path = path.resolve()
    beside = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
        beside.chmod(0o755)
        yield beside
        if not path.exists():
            beside.rename(path)
        elif not any(path.iterdir()):
            for file in sorted(beside.iterdir(), key=lambda file: file.name == last):
                shutil.move(file, path / file.name)
        else:
            old = beside.with_name(beside.name + "-old")
            path.rename(old)
            beside.rename(path)
            shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise RunError(f"cannot make {path}: {error.strerror or error}") from None
    finally:
        if beside is not None:
            shutil.rmtree(beside, ignore_errors=True)
