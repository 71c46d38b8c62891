"""How the commands read what is given as text."""

from collections.abc import Callable
from typing import Any

from funcloss._files import is_number
from funcloss.app.config import Option, gives_word
from funcloss.errors import ConfigError


def as_number(name: str, text: str) -> float:
    """Read a number; ``name`` is what it is for."""
    try:
        return float(text)
    except ValueError:
        raise ConfigError(f"{name}: {text!r} is not a number") from None


def number_or_name(name: str, text: str) -> float | str:
    """Read a number where it is one, else take the text for a name."""
    return float(text) if is_number(text) else text


def pairs(
    name: str,
    texts: list[str],
    option: Option,
    read_value: Callable[[str, str], Any] = as_number,
) -> dict[str, Any] | str:
    """Read ``KEY=NUMBER``, the last = being the one that counts, or the word of the option."""
    if words := [text for text in texts if gives_word(option, text)]:
        if len(texts) > 1:
            raise ConfigError(
                f"{name} {words[0]} sets the weight of every class: give nothing else, got "
                f"{', '.join(texts)}"
            )
        return words[0]
    read: dict[str, Any] = {}
    for text in texts:
        key, equals, number = text.rpartition("=")
        if not equals or not key or not number:
            raise ConfigError(
                f"{name} must be {option.metavar}, as in {option.example}; got {text!r}"
            )
        if key in read:
            what = option.metavar.partition("=")[0].lower()
            raise ConfigError(f"{name}: {what} {key!r} is given twice")
        read[key] = read_value(name, number)
    return read
