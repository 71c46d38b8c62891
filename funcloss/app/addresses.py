"""What a text names: somebody's own code, ``module:name`` or ``file.py:name``, or a path.

Which of the two it is, its syntax alone says. Code is imported in one place, :func:`imported`,
which is told what must not be.
"""

import difflib
import importlib
import importlib.util
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from funcloss.errors import ConfigError, FunclossError

_STAMP = (
    "_funcloss_stamp"  # in a module that was imported from a file: its path, when it was written
)


def is_address(text: str) -> bool:
    """Return whether a text names code, rather than a file or a folder, whatever is on the disk.

    Example:
        >>> is_address("mine:net"), is_address("a b/mine.py:Net.make"), is_address("digits.npz")
        (True, True, False)
        >>> is_address("./mine.py:net/"), is_address("rows/of:mine")
        (False, False)
    """
    place, _, name = text.rpartition(":")
    return _is_dotted(name) and (place.endswith(".py") or _is_dotted(place))


def _is_dotted(text: str) -> bool:
    return all(part.isidentifier() for part in text.split("."))


def final(text: str) -> str:
    """Return a text that names the same code or path from any folder, and does so in one way.

    A path that would read as code in this form ends in a slash.

    Raises:
        ConfigError: there can be no such path.

    Example:
        >>> final("mine:net"), final("/a/./b/../mine.py:net"), final("//a/rows.csv")
        ('mine:net', '/a/mine.py:net', '/a/rows.csv')
        >>> final(final("/a/mine.py:net/"))
        '/a/mine.py:net/'
    """
    if not is_address(text):
        path = final_path(text)
        return f"{path}/" if is_address(path) else path
    place, colon, name = text.rpartition(":")
    return f"{final_path(place)}{colon}{name}" if place.endswith(".py") else text


def final_path(text: str) -> str:
    """Return the absolute path that a text names, ``~`` and symbolic links resolved.

    Raises:
        ConfigError: there can be no such path.

    Example:
        >>> final_path("/a/../b.npz")
        '/b.npz'
    """
    try:
        # Where two slashes begin a path, Path keeps both: to Linux they are one.
        path = str(Path(text).expanduser().resolve())
        path.encode()
    except UnicodeEncodeError:
        raise ConfigError(
            f"{text!r} cannot be used: its name is not UTF-8, rename the file or folder"
        ) from None
    except (OSError, RuntimeError, ValueError) as error:  # no such user, a loop, a null byte
        raise ConfigError(f"{text!r} cannot be a path: {error}") from None
    return f"/{path.lstrip('/')}" if path.startswith("//") else path


def imported(address: str, *, what: str, refused: Mapping[str, str]) -> Any:
    """Return what ``module:name`` or ``file.py:name`` names; the code of the module runs.

    Args:
        address: Modules are looked for where Python does, then in the current folder.
        what: What is looked for, for the error.
        refused: What must not be imported, each with the file that names it.

    Raises:
        ConfigError: it is refused, cannot be imported, or has nothing of that name.
    """
    if address in refused:
        raise ConfigError(refusal(refused[address], {what: address}))
    if not is_address(address):
        raise ConfigError(f"{what}: a name is module:name or file.py:name; got {address!r}")
    place, _, name = address.rpartition(":")
    found: Any = _module(place)
    for part in name.split("."):
        if not hasattr(found, part):
            near = difflib.get_close_matches(part, dir(found), n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ConfigError(f"{place} has no {name!r}{hint}")
        found = getattr(found, part)
    return found


def refusal(place: str, named: Mapping[str, str]) -> str:
    """Return why code is not imported.

    Args:
        place: The file that names it.
        named: Addresses by option.
    """
    listed = ", ".join(f"{option} {address}" for option, address in named.items())
    return (
        f"{place} names code, which would be imported and run: {listed}; if it is yours, allow "
        "it with --allow-import, in Python allow_import=True"
    )


def _module(place: str) -> ModuleType:
    """Import a module by name, from here too, or a file by path."""
    try:
        if not place.endswith(".py"):
            if place.partition(".")[0] != "funcloss":
                _look_in(Path.cwd())
            return importlib.import_module(place)
        path = Path(final_path(place))
        if not path.is_file():
            raise ConfigError(f"no file {place}")
        _look_in(path.parent)
        name = f"_tried_{path.stem}"  # a file may be called as a module that is in use
        loaded, written = sys.modules.get(name), path.stat().st_mtime_ns
        if loaded is not None and loaded.__dict__.get(_STAMP) == (str(path), written):
            return loaded  # a second copy under one name confuses the compiler
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        module.__dict__[_STAMP] = (str(path), written)
        sys.modules[name] = module
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]  # half of it is there
            raise
        return module
    except FunclossError:
        raise
    except (Exception, SystemExit) as error:
        raise ConfigError(f"cannot import {place}: {type(error).__name__}: {error}") from error


def _look_in(folder: Path) -> None:
    if str(folder) not in sys.path:
        sys.path.append(str(folder))
