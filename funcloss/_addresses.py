"""What ``module:name`` and ``file.py:name`` stand for: somebody's own code, imported."""

import difflib
import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from funcloss.errors import ConfigError, FunclossError

_STAMP = (
    "_funcloss_stamp"  # in a module that was imported from a file: its path, when it was written
)


def is_address(text: str) -> bool:
    """Return whether a text names code, rather than a file or a folder.

    Example:
        >>> is_address("mine:net"), is_address("mine.py:net"), is_address("digits.npz")
        (True, True, False)
    """
    return ":" in text and not Path(text).exists()


def absolute(address: str) -> str:
    """Return an address of code that means the same from any folder."""
    place, colon, name = address.rpartition(":")
    if not place.endswith(".py"):
        return address
    return f"{Path(place).expanduser().absolute()}{colon}{name}"


def imported(address: str, *, what: str) -> Any:
    """Return what ``module:name`` or ``file.py:name`` names; the code of the module runs.

    Args:
        address: Modules are looked for where Python does, then in the current folder.
        what: What is looked for, for the error.

    Raises:
        ConfigError: it cannot be imported, or has nothing of that name.
    """
    place, _, name = address.rpartition(":")
    if not place or not name:
        raise ConfigError(f"{what}: a name is module:name or file.py:name; got {address!r}")
    found: Any = _module(place)
    for part in name.split("."):
        if not hasattr(found, part):
            near = difflib.get_close_matches(part, dir(found), n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ConfigError(f"{place} has no {name!r}{hint}")
        found = getattr(found, part)
    return found


def _module(place: str) -> ModuleType:
    """Import a module by name, from here too, or a file by path."""
    try:
        if not place.endswith(".py"):
            _look_in(Path.cwd())
            return importlib.import_module(place)
        path = Path(place).expanduser().resolve()
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
