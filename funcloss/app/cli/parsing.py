"""How the commands read what is given as text."""

from funcloss.app.config import Option, gives_word
from funcloss.errors import ConfigError


def pairs(name: str, texts: list[str], option: Option) -> dict[str, float] | str:
    """Read ``KEY=NUMBER``, the last = being the one that counts, or the word of the option."""
    if words := [text for text in texts if gives_word(option, text)]:
        if len(texts) > 1:
            raise ConfigError(
                f"{name} {words[0]} sets the weight of every class: give nothing else, got "
                f"{', '.join(texts)}"
            )
        return words[0]
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
