"""The folder of a run that several processes share."""

import secrets
import time
from collections.abc import Callable
from pathlib import Path

from core.errors import UserError

NOTICING = 10.0  # seconds within which a new file is seen by all on a disk that they share


def require_shared(
    folder: Path, first: bool, share: Callable[[str], str], any_of: Callable[[bool], bool]
) -> None:
    """Refuses a folder that is not the same one for every process; the first has made it.

    Args:
        first: whether this process is the first.
        share: gives every process what the first gave it.
        any_of: whether a flag is set in any process.

    Raises:
        UserError: in every process.
    """
    folder = folder.absolute()
    name = f".shared-{secrets.token_hex(8)}"
    if first:
        (folder / name).touch()
    where = share(str(folder / name))
    mark = folder / Path(where).name
    deadline = time.monotonic() + NOTICING
    while not (seen := mark.exists()) and time.monotonic() < deadline:
        time.sleep(0.1)
    blind = any_of(not seen)
    if first:
        mark.unlink()
    if blind:
        raise UserError(
            f"not every process sees the folder {Path(where).parent} of the first: give all of them as --out "
            "one absolute path on a disk that they share"
        )
