"""Names that users gave, as text that a page, a figure or a terminal can hold."""

from collections.abc import Sequence


def clean(name: str) -> str:
    """Return a name without what no page can hold: control characters and halves of characters.

    Example:
        >>> clean("nine" + chr(10)) == "nine" + chr(0xFFFD)
        True
    """
    whole = name.encode("utf-8", "replace").decode("utf-8")
    return "".join(c if c.isprintable() or c == " " else "\ufffd" for c in whole)


def printable(text: str) -> str:
    """Return text that a terminal takes for text: control characters become escapes, but for lines.

    Example:
        >>> print(printable("nine" + chr(7)) == "nine" + chr(92) + "x07")
        True
    """
    return "".join(
        c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode("ascii")
        for c in text
    )


def listed(names: Sequence[str], most: int) -> str:
    """Return names one after another, of many the first ``most``.

    Example:
        >>> listed(["a", "b"], 8), listed(["a", "b", "c"], 1)
        ('a, b', 'a and 2 more')
    """
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def short(name: str, most: int = 18) -> str:
    """Return a name that is clean and has at most ``most`` characters, cut with an ellipsis.

    Example:
        >>> short("a name that is too long", 12)
        'a name that…'
    """
    name = clean(name)
    return name if len(name) <= most else f"{name[: most - 1].rstrip()}…"
