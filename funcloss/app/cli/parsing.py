"""How the commands read what is given as text."""

from funcloss.app.config import Option
from funcloss.errors import ConfigError


def pairs(name: str, texts: list[str], option: Option) -> dict[str, float]:
    """Read ``KEY=NUMBER``, the last = being the one that counts."""
    read: dict[str, float] = {}
    for text in texts:
        key, equals, number = text.rpartition("=")
        if not equals or not key:
            raise ConfigError(
                f"{name} must be {option.metavar}, as in {option.example}; got {text!r}"
            )
        if key in read:
            what = option.metavar.partition("=")[0].lower()
            raise ConfigError(f"{name}: {what} {key!r} is given twice")
        read[key] = as_number(name, number)
    return read


def as_number(name: str, text: str) -> float:
    """Read a number; ``name`` is what it is for."""
    try:
        return float(text)
    except ValueError:
        raise ConfigError(f"{name}: {text!r} is not a number") from None
