"""The figures of a benchmark as a JSON file; here, since the kernels' benchmark imports no other one."""

import json
from pathlib import Path
from typing import Any

from core.errors import UserError
from core.folders import require_place, write_atomically


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


def write_json(path: Path | None, figures: Any) -> None:
    """Writes them, in place of the fewer ones that the file may hold; None: nothing is written."""
    if path is not None:
        write_atomically(path, json.dumps(figures, indent=1) + "\n")
