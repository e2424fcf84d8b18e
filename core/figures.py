"""The figures of a benchmark as a JSON file, and where its picture may lie; here, since the kernels'
benchmark imports no other one."""

import json
from pathlib import Path
from typing import Any

from core.errors import UserError
from core.folders import require_place, write_atomically

PICTURES = (".png", ".svg", ".pdf")
"""With which the name of a picture may end: matplotlib writes these wherever it is installed."""


def require_json(path: Path | None) -> None:
    """Refuses a file that cannot be written. To be called before anything is measured; None passes.

    Raises:
        UserError: `path` is a folder, or its folder cannot be made or written to.
    """
    if path is None:
        return
    if path.is_dir():
        raise UserError(f"{path} is a folder: name a file")
    require_place(path.absolute().parent)


def require_picture(path: Path | None) -> None:
    """Refuses a picture that cannot be written, as `require_json` does a file.

    Raises:
        UserError: as there, or its name ends with none of `PICTURES`.
    """
    if path is not None and path.suffix not in PICTURES:
        raise UserError(
            f"--plot {path} names no kind of picture: end it with {', '.join(PICTURES[:-1])} or "
            f"{PICTURES[-1]}"
        )
    require_json(path)


def write_json(path: Path | None, figures: Any) -> None:
    """Writes them, in place of the fewer ones that the file may hold; None: nothing is written."""
    if path is not None:
        write_atomically(path, json.dumps(figures, indent=1) + "\n")
