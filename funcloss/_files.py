"""Files: read with one error for all that can be wrong, and written whole or not at all."""

import contextlib
import csv
import os
import platform
import re
import resource
import shutil
import stat
import sys
import tempfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from funcloss.errors import DataError, FunclossError, RunError

TEXT = 64 * 2**20  # bytes of a configuration, a matrix of costs or a summary, at most
SNIFFED = 65_536  # characters in which the separator of a CSV file is looked for
_FORMULA = ("=", "+", "-", "@", "\t", "\r")  # what a spreadsheet takes a cell for one by
_KINDS = {
    stat.S_ISFIFO: "a named pipe",
    stat.S_ISSOCK: "a socket",
    stat.S_ISCHR: "a device",
    stat.S_ISBLK: "a device",
}


def usable_memory() -> int:
    """Return the bytes of memory of this machine, or what a container or a limit leaves of it."""
    found = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    with contextlib.suppress(OSError, ValueError):  # there is none, or it says max
        found.append(int(Path("/sys/fs/cgroup/memory.max").read_text()))
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    return min(found + [limit] * (limit != resource.RLIM_INFINITY))


@contextlib.contextmanager
def reading(
    path: str | Path,
    error: type[FunclossError] = DataError,
    *,
    kind: str = "",
    broken: tuple[type[Exception], ...] = (),
    most: int | None = None,
) -> Iterator[None]:
    """Turn what can go wrong in reading a file into one error that names it.

    Before that it refuses what is no regular file, which could be read for ever, and one that is
    too large. A folder, and what is not there, are left to whoever opens them.

    Args:
        path: The file.
        error: What is raised.
        kind: What the file should be, ``"TOML"`` say.
        broken: What its parser raises if it is not.
        most: Bytes that it may have; None: as many as this machine has memory.

    Raises:
        error: the file cannot be read, is not text in UTF-8 or not of its kind.
    """
    try:
        _check_regular(path, error, usable_memory() if most is None else most)
        yield
    except UnicodeDecodeError:
        raise error(f"{path} is not text in UTF-8: save it in that encoding") from None
    except RecursionError:
        raise error(f"{path} is not {kind or 'readable'}: it is nested too deeply") from None
    except MemoryError:
        raise error(f"{path} needs more memory than this machine has") from None
    except broken as failure:
        raise error(f"{path} is not {kind}: {_in_one_line(failure)}") from None
    except OSError as failure:
        raise error(f"cannot read {path}: {failure.strerror or _in_one_line(failure)}") from None


def _in_one_line(failure: Exception) -> str:
    """Return what an error says, of whatever lines."""
    return " ".join(str(failure).split())


def _check_regular(path: str | Path, error: type[FunclossError], most: int) -> None:
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return
    except ValueError as failure:  # a null byte
        raise error(f"cannot read {path}: {failure}") from None
    for is_of_kind, kind in _KINDS.items():
        if is_of_kind(found.st_mode):
            raise error(f"cannot read {path}: it is {kind}, not a file")
    if stat.S_ISREG(found.st_mode) and found.st_size > most:
        raise error(
            f"cannot read {path}: it has {found.st_size / 2**20:,.0f} MiB, and at most "
            f"{most / 2**20:,.0f} are read"
        )


@contextlib.contextmanager
def csv_rows(
    path: str | Path, error: type[FunclossError] = DataError, *, most: int | None = None
) -> Iterator[Iterator[list[str]]]:
    """Open a CSV file in UTF-8 and yield its rows, to be read within; empty lines are left out.

    Cells are separated by commas, semicolons or tabs: what its first line has most of.

    Args:
        path: The file.
        error: What is raised.
        most: As for :func:`reading`.

    Raises:
        error: the file cannot be read or is not CSV in UTF-8.
    """
    with (
        reading(path, error, kind="CSV", broken=(csv.Error,), most=most),
        open(path, newline="", encoding="utf-8-sig") as file,
    ):
        separator = separator_of(file.read(SNIFFED))
        file.seek(0)
        yield (row for row in csv.reader(_lines(file), delimiter=separator) if row)


def _lines(file: IO[str]) -> Iterator[str]:
    """Yield the lines of a file, none of which takes all memory."""
    while line := file.readline(TEXT):
        if len(line) == TEXT:
            raise csv.Error(f"a line of it has more than {TEXT:,} characters")
        yield line


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


_HERE = f"{zlib.crc32(platform.node().encode('utf-8', 'surrogateescape')):08x}"  # this machine
# What is half written: its name once it is whole, machine, process; of a folder how far it came.
HALF = re.compile(
    r"\.(?P<stem>.+?)-(?P<machine>[0-9a-f]{8})-(?P<process>\d+)"
    r"(?:\.[^.]+|-\w{8}(?:-old|-full)?)?",
    re.DOTALL,
)


LIVE: set[str] = set()  # names of what this process is writing


def half_name(stem: str) -> str:
    """Return the hidden name of what this process is writing, by which a leftover is known."""
    return f".{stem}-{_HERE}-{os.getpid()}"


def is_left_over(path: Path) -> bool:
    """Return whether a process of this machine began to write a file or folder, and is gone."""
    found = HALF.fullmatch(path.name)
    if found is None or found["machine"] != _HERE:
        return False
    if int(found["process"]) == os.getpid():  # in a container, that of another process before
        return re.sub("-(old|full)$", "", path.name) not in LIVE
    try:
        os.kill(int(found["process"]), 0)
    except (ProcessLookupError, OverflowError):
        return True
    except OSError:  # it is another user's
        return False
    return False


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a path beside ``path`` to write to; it takes the place of ``path`` if all went well.

    Of a link the file that it leads to is replaced, and a replaced file's mode is kept. Into what
    is no file, a device or a pipe, all is written at the end.

    Args:
        path: The file to make or replace, in a folder that exists.

    Yields:
        Where to write, with the same suffix.

    Raises:
        RunError: it cannot be written; ``path`` is as it was and nothing is left beside it.
    """
    mode = _mode(path)
    stream = _is_stream(path, mode)
    target = Path(tempfile.gettempdir(), path.name) if stream else Path(os.path.realpath(path))
    beside = target.with_name(half_name(target.stem) + path.suffix)
    LIVE.add(beside.name)
    try:
        yield beside
        if stream:
            _pour(beside, path)
            return
        if mode is not None:
            beside.chmod(stat.S_IMODE(mode))
        with beside.open("rb") as file:
            os.fsync(file.fileno())
        beside.replace(target)
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror or error}") from None
    finally:
        LIVE.discard(beside.name)
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)


def _mode(path: Path) -> int | None:
    """Return the mode of the file that a path leads to, None where nothing is."""
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:  # a null byte
        reason = error.strerror if isinstance(error, OSError) else error
        raise RunError(f"cannot write {path}: {reason}") from None
    if stat.S_ISDIR(mode):
        raise RunError(f"cannot write {path}: it is a folder, name a file in it")
    return mode


_STREAMS = re.compile(r"/dev/(?:fd/(\d+)|(stdin|stdout|stderr))|/proc/(?:self|\d+)/fd/(\d+)")


def _is_stream(path: Path, mode: int | None) -> bool:
    """Return whether a path is no file, or is what this process has open: never to be replaced."""
    if _STREAMS.fullmatch(os.path.abspath(path)):
        return True
    return mode is not None and not stat.S_ISREG(mode)


def _pour(content: Path, path: Path) -> None:
    """Write a file into a device or a pipe; what is open already goes on from where it is."""
    named = _STREAMS.fullmatch(os.path.abspath(path))
    number = named and (named[1] or named[3])
    if named and named[2]:
        number = {"stdin": 0, "stdout": 1, "stderr": 2}[named[2]]
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()
    opened = os.open(path, os.O_WRONLY) if number is None else os.dup(int(number))
    with os.fdopen(opened, "wb") as out, content.open("rb") as file:
        shutil.copyfileobj(file, out)


def write_text(path: Path, text: str) -> None:
    """Write ``text`` to ``path``, whole or not at all."""
    with replacing(path) as beside:
        try:
            beside.write_text(text, encoding="utf-8")
        except UnicodeEncodeError:
            raise RunError(
                f"cannot write {path}: a name that goes into it is not UTF-8, rename that file"
            ) from None


def write_csv(path: Path, rows: Iterable[Iterable[Any]]) -> None:
    """Write a CSV file, whole or not at all.

    Text that a spreadsheet would take for a formula gets a ``'`` before it; numbers do not. What of
    a name is not UTF-8 is written as an escape.

    Raises:
        RunError: the file cannot be written; what was there is as it was.
    """
    with (
        replacing(path) as beside,
        beside.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file,
    ):
        writer = csv.writer(file)
        writer.writerows([_harmless(cell) for cell in row] for row in rows)


def _harmless(cell: Any) -> Any:
    """Return a cell that no spreadsheet runs.

    Example:
        >>> _harmless("=1+1"), _harmless("-0.5"), _harmless(-0.5)
        ("'=1+1", '-0.5', -0.5)
    """
    is_text = isinstance(cell, str) and cell.startswith(_FORMULA) and not is_number(cell)
    return f"'{cell}" if is_text else cell
