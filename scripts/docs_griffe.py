"""Docstrings as the site needs them: their roles, their examples, the comments of their fields.

griffe, which reads the sources for the reference, loads this class; ``mkdocs.yml`` names this file.
"""

import ast
import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:func|meth|class|mod|attr):`~?([\w.]+)`")
MATH = re.compile(r":math:`([^`]+)`")
MATH_LINE = re.compile(r"^\.\. math:: (.+)$", re.M)
TEX = {
    r"\varepsilon": "ε",
    r"\partial ": "∂",
    r"\sum ": "Σ ",
    r"\log": "log",
    r"\hat p": "p̂",
    r"\bar x": "x̄",
    r"\tfrac12": "½",
    r"\cdot": "·",
    r"\,": " ",
}
FOR_TOOLS = ("noqa", "type:", "pyright:")


class AsThePagesNeed(griffe.Extension):
    """Turn Sphinx's roles into code, ``Example:`` into a section, comments into words."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Rewrite the docstring of a module, class, function or attribute."""
        if obj.docstring is not None:
            obj.docstring.value = rewritten(obj.docstring.value)

    def on_attribute_instance(
        self, *, node: ast.AST | griffe.ObjectNode, attr: griffe.Attribute, **kwargs: Any
    ) -> None:
        """Let the comment beside a name, or the one above it, stand for its docstring."""
        if attr.docstring is None and attr.lineno is not None and attr.endlineno is not None:
            lines = attr.lines_collection[attr.filepath]
            comment = comment_of(lines, attr.lineno, attr.endlineno)
            if comment:
                attr.docstring = griffe.Docstring(comment, parent=attr)

    def on_class(self, *, cls: griffe.Class, **kwargs: Any) -> None:
        """List the fields of a NamedTuple in its docstring, in place of a heading each."""
        if not any(str(base) == "NamedTuple" for base in cls.bases) or cls.docstring is None:
            return
        fields = [f for f in cls.members.values() if f.is_attribute and not f.name.startswith("_")]
        cls.docstring.value += "\n\n" + "\n".join(map(field_line, fields))
        for field in fields:
            cls.del_member(field.name)


def rewritten(text: str) -> str:
    r"""Return a docstring in the form that griffe and Markdown know, its formulas as text.

    Example:
        >>> rewritten(r"As :func:`mean`, of :math:`\partial g`.")
        'As `mean`, of `∂g`.'
    """
    text = MATH.sub(lambda found: f"`{as_text(found[1])}`", ROLE.sub(r"`\1`", text))
    text = MATH_LINE.sub(lambda found: f"    {as_text(found[1])}", text)
    return re.sub(r"^Example:$", "Examples:", text, flags=re.M)


def as_text(formula: str) -> str:
    """Return a formula of TeX's as plain characters."""
    for command, characters in TEX.items():
        formula = formula.replace(command, characters)
    return formula


def comment_of(lines: list[str], first: int, last: int) -> str:
    """Return what the comment at the end of some lines says, or else the one right above them.

    Example:
        >>> comment_of(["share: Tensor  # of each class"], 1, 1)
        'of each class'
    """
    _, _, beside = lines[last - 1].partition("  # ")
    if beside and not beside.startswith(FOR_TOOLS):
        return beside.strip()
    above: list[str] = []
    while first > 1 + len(above) and lines[first - 2 - len(above)].startswith("# "):
        above.insert(0, lines[first - 2 - len(above)].removeprefix("# "))
    return " ".join(above)


def field_line(field: griffe.Object | griffe.Alias) -> str:
    """Return the item of a list that says what a field holds."""
    comment = f": {field.docstring.value}" if field.docstring else ""
    return f"- `{field.name}` (`{field.annotation}`){comment}"
