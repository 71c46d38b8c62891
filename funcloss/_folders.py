"""Folders: made and replaced as a whole, held by one process, and whole again after a kill."""

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from funcloss._files import HALF, LIVE, half_name, is_left_over
from funcloss.errors import RunError

_OPEN: set[int] = set()  # descriptors of held folders


def _let_go() -> None:
    """Close, in a process that was forked to read data, what its parent alone holds."""
    for number in _OPEN:
        os.close(number)
    _OPEN.clear()


os.register_at_fork(after_in_child=_let_go)


@dataclass(frozen=True)
class Hold:
    """A folder that no other process may write to."""

    path: Path
    opened: int  # its descriptor

    def check(self) -> None:
        """Raise ``RunError`` if the folder is no longer at its path."""
        try:
            there = os.path.samestat(os.stat(self.path), os.fstat(self.opened))
        except OSError:
            there = False
        if not there:
            raise RunError(
                f"{self.path} was moved or removed while this process wrote to it: what came after "
                "the last checkpoint is lost; resume it from where it is now"
            )


@contextlib.contextmanager
def holding(path: Path) -> Iterator[Hold]:
    """Keep a folder from every other process, until this is left or the process ends in any way.

    Raises:
        RunError: another process holds it, or it cannot be opened.
    """
    try:
        opened = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise RunError(f"cannot use {path}: {error.strerror}") from None
    _OPEN.add(opened)
    try:
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunError(
                f"{path} is in use by another process: wait until it ends, or stop it"
            ) from None
        except OSError:  # a file system without locks
            pass
        yield Hold(path, opened)
    finally:
        if opened in _OPEN:
            _OPEN.remove(opened)
            os.close(opened)


@contextlib.contextmanager
def folder_replacing(path: Path, *, last: str) -> Iterator[Path]:
    """Give a folder beside ``path`` to fill; it becomes ``path`` if all went well.

    After a kill at any moment :func:`settle` finds the folder that was there or the new one whole.

    Args:
        path: The folder to make or replace; a replaced one is removed last. An empty one stays
            (it may be where a disk is mounted) and is filled.
        last: The file without which the folder counts for nothing; it arrives last.

    Yields:
        The folder to fill.

    Raises:
        RunError: it cannot be made, or another process holds what is there; what was at ``path`` is
            as it was.
    """
    path = Path(os.path.realpath(path))
    beside, name, old_one = None, "", contextlib.ExitStack()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            old_one.enter_context(holding(path))  # nobody writes to what is replaced
        settle(path, last=last)
        empty = path.is_dir() and not any(path.iterdir())
        place = path if empty else path.parent
        beside = Path(tempfile.mkdtemp(prefix=f"{half_name(path.name)}-", dir=place))
        LIVE.add(name := beside.name)
        beside.chmod(0o755)
        yield beside
        if empty:
            # Complete from the moment that it is called so: then what is still to move is moved,
            # now or by settle(), the sign of the folder last.
            full = beside.with_name(f"{beside.name}-full")
            os.rename(beside, full)
            beside = full
            _move_up(full, last)
        elif not path.exists():
            os.rename(beside, path)
        else:
            # Between the two renames nothing is at ``path``: settle() puts the old one back. After
            # them the new one is there, and settle() removes the old one.
            old = beside.with_name(f"{beside.name}-old")
            os.rename(path, old)
            try:
                os.rename(beside, path)
            except BaseException:
                os.rename(old, path)
                raise
            shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise RunError(f"cannot make {path}: {error.strerror or error}") from None
    finally:
        old_one.close()
        LIVE.discard(name)
        if beside is not None and not beside.name.endswith("-full"):
            shutil.rmtree(beside, ignore_errors=True)


def _move_up(full: Path, last: str) -> None:
    """Move all that a folder holds into the one that it is in; a file named ``last`` last."""
    for item in sorted(full.iterdir(), key=lambda item: (item.name == last, item.name)):
        os.rename(item, full.parent / item.name)
    full.rmdir()


def settle(path: Path, *, last: str) -> None:
    """Make a folder whole that a process was making or replacing when it was killed.

    Args:
        path: The folder, there or not. What cannot be changed is left as it is.
        last: As for :func:`folder_replacing`.
    """
    path = Path(os.path.realpath(path))
    with contextlib.suppress(OSError):
        beside = [item for item in path.parent.iterdir() if is_left_over(item)]
        own = [item for item in beside if HALF.fullmatch(item.name)["stem"] == path.name]  # pyright: ignore[reportOptionalSubscript]
        for item in sorted(own, key=lambda item: not item.name.endswith("-old")):
            if item.name.endswith("-old") and not path.exists():
                os.rename(item, path)
            else:
                _remove(item)
    with contextlib.suppress(OSError):
        for item in [item for item in path.iterdir() if is_left_over(item)]:
            if item.name.endswith("-full"):
                _move_up(item, last)
            else:
                _remove(item)


def _remove(item: Path) -> None:
    if item.is_dir() and not item.is_symlink():
        shutil.rmtree(item, ignore_errors=True)
    else:
        item.unlink(missing_ok=True)
