"""JSONL files: a JSON value a line."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from core.errors import UserError


def json_lines(text: str, path: Path) -> Iterator[tuple[str, Any]]:
    """(where it is, value) of every line of the file's text that is not blank.

    Raises:
        UserError: a line is not JSON.
    """
    # Not splitlines: JSON strings may hold U+2028 and its like, which that takes for line ends.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where} is not JSON: {error}") from None
        yield where, value
