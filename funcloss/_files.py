"""Files that are whole or not there: written beside their place, then renamed into it."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from funcloss.errors import RunError


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
