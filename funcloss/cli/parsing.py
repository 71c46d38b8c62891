"""How the commands read what is given as text."""

from funcloss.errors import ConfigError


def pairs(name: str, values: list[str]) -> dict[str, float]:
    """Read ``CLASS=WEIGHT``, the last = being the one that counts."""
    read: dict[str, float] = {}
    for text in values:
        key, equals, weight = text.rpartition("=")
        if not equals or not key:
            raise ConfigError(f"{name} must be CLASS=WEIGHT, as in 9=5; got {text!r}")
        if key in read:
            raise ConfigError(f"{name}: class {key!r} is given twice")
        read[key] = as_number(name, weight)
    return read


def as_number(name: str, text: str) -> float:
    """Read a number; ``name`` is what it is for."""
    try:
        return float(text)
    except ValueError:
        raise ConfigError(f"{name}: {text!r} is not a number") from None
