"""How the commands read what is given as text."""

from funcloss.app.config import fields
from funcloss.errors import ConfigError

_OPTIONS = {field.name: field.option for field in fields()}


def pairs(name: str, values: list[str]) -> dict[str, float]:
    """Read ``KEY=NUMBER``, the last = being the one that counts; ``name`` is a field's."""
    metavar, example = _OPTIONS[name].metavar, _OPTIONS[name].example
    read: dict[str, float] = {}
    for text in values:
        key, equals, number = text.rpartition("=")
        if not equals or not key:
            raise ConfigError(f"{name} must be {metavar}, as in {example}; got {text!r}")
        if key in read:
            what = metavar.partition("=")[0].lower()
            raise ConfigError(f"{name}: {what} {key!r} is given twice")
        read[key] = as_number(name, number)
    return read


def as_number(name: str, text: str) -> float:
    """Read a number; ``name`` is what it is for."""
    try:
        return float(text)
    except ValueError:
        raise ConfigError(f"{name}: {text!r} is not a number") from None
