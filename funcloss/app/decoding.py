"""The one way in for what a file holds: a record of a declared type, or one line that says why not.

What a command keeps is declared where it belongs, as a frozen dataclass or, for JSON that is
passed on as it is, a ``TypedDict``. Nothing else of a file is trusted: wrong types, missing fields,
numbers out of range or of thousands of digits, lists nested without end are all refused alike.
"""

import functools
import re
import tomllib
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec

from funcloss._files import TEXT, reading
from funcloss.errors import FunclossError, RunError

T = TypeVar("T")
Count = Annotated[int, msgspec.Meta(ge=0, le=10**15)]  # steps, examples, numbers of anything
Number = float | None  # as JSON has it: none where it is not finite or not defined
_WORDS = {"`": "", "Object": "table", "object": "table", "array": "list", "null": "nothing"}
_BROKEN = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)


def from_plain(kind: type[T], value: Any, where: str, error: type[FunclossError] = RunError) -> T:
    """Return the record that plain values make: tables of TOML, JSON that is decoded already.

    Args:
        kind: The type of the record.
        value: Dicts, lists, texts, numbers.
        where: The file, and what of it, for the error.
        error: What is raised.

    Raises:
        error: a field is missing, of another type or out of range; the line names it.

    Example:
        >>> from_plain(tuple[Count, ...], [1, 2], "a.toml: steps")
        (1, 2)
        >>> from_plain(tuple[Count, ...], [1, -2], "a.toml: steps")
        Traceback (most recent call last):
        funcloss.errors.RunError: a.toml: steps: [1] is damaged: expected int >= 0
    """
    try:
        return msgspec.convert(value, kind)
    except (msgspec.ValidationError, RecursionError) as failure:
        raise error(_said(where, failure)) from None


def from_json(
    kind: type[T], text: str | bytes, where: str, error: type[FunclossError] = RunError
) -> T:
    """Return the record that a text in JSON makes, see :func:`from_plain`."""
    try:
        return _decoder(kind).decode(text)
    except _BROKEN as failure:
        raise error(_said(where, failure)) from None


_decoder = functools.cache(msgspec.json.Decoder)  # a log has millions of lines


def read_json(kind: type[T], path: Path) -> T:
    """Return the record that a file in JSON makes.

    Raises:
        RunError: it cannot be read, or is no such record.
    """
    with reading(path, RunError, most=TEXT):
        content = path.read_bytes()
    return from_json(kind, content, str(path))


def read_toml_table(path: Path, error: type[FunclossError]) -> dict[str, Any]:
    """Return what a file in TOML holds, its values not yet checked.

    Raises:
        error: it cannot be read, or is not TOML.
    """
    with reading(path, error, kind="TOML", broken=(ValueError,), most=TEXT):
        return tomllib.loads(path.read_text(encoding="utf-8"))


def _said(where: str, failure: Exception) -> str:
    """Return what is wrong in one line that names the field: ``x.json: step is damaged: ...``."""
    if isinstance(failure, RecursionError):
        return f"{where} is damaged: it is nested too deeply"
    text = str(failure)
    for theirs, ours in _WORDS.items():
        text = text.replace(theirs, ours)
    said, _, place = text.partition(" - at ")
    field = re.sub(r"^(key in )?\$\.?", "", place)
    if missing := re.fullmatch("table missing required field (.+)", said, re.IGNORECASE):
        return f"{where} is damaged: it has no {f'{field}.' if field else ''}{missing[1]}"
    return f"{where}{f': {field}' if field else ''} is damaged: {said[:1].lower()}{said[1:]}"
