"""What of a row is its text: a field, or several fields joined by a template.

A field may lie within others: `meta.title` is the `title` of what is in `meta`. A name that a row has as it
stands goes first.
"""

import string
from typing import Any

from core.errors import UserError

MISSING = object()
"""What `find` gives for a field that a row does not have."""
ESCAPES = {"\\n": "\n", "\\t": "\t"}  # as they are typed on a command line


class RowText:
    """How the text of a row is made of its fields."""

    def __init__(self, field: str = "text", template: str | None = None) -> None:
        """template: text with fields in braces, such as "{title}\\n\\n{text}"; it goes before `field`.

        Raises:
            UserError: the template has no field, or its braces do not fit.
        """
        self._parts = [("", field)] if template is None else _parse(template)
        self.names = list(dict.fromkeys(name for _, name in self._parts if name is not None))
        """Of the fields, each once."""
        self.identity = field if template is None else f"template {template}"
        """The same for the same text of every row."""

    def join(self, values: dict[str, str]) -> str:
        """The text of a row, given the texts of its fields."""
        return "".join(text + ("" if name is None else values[name]) for text, name in self._parts)


def find(row: Any, name: str) -> Any:
    """The value of a field of a row; `MISSING` if it has none, as `a.b` is where `a` is null."""
    if not isinstance(row, dict):
        return MISSING
    if name in row:
        return row[name]
    outer, _, inner = name.partition(".")
    return find(row[outer], inner) if inner and outer in row else MISSING


def _parse(template: str) -> list[tuple[str, str | None]]:
    """(text, the field after it) of a template; None where no field follows."""
    try:
        parsed = list(string.Formatter().parse(template))
    except ValueError as error:
        raise UserError(
            f"--template {template!r}: {error}; write a field as {{name}} and a brace as {{{{ or }}}}"
        ) from None
    names = [name for _, name, _, _ in parsed if name is not None]
    if not names or not all(names) or any(spec or conversion for _, _, spec, conversion in parsed):
        raise UserError(
            f"--template {template!r} needs a name in every pair of braces, and nothing else there: "
            "write '{title}\\n\\n{text}'"
        )
    parts = []
    for text, name, _, _ in parsed:
        for typed, meant in ESCAPES.items():
            text = text.replace(typed, meant)
        parts.append((text, name))
    return parts
