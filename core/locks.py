"""Files that one process at a time may write. The operating system keeps the locks, and lets them go however
their holder ends."""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from core.errors import UserError


def take_lock(path: Path, taken: str) -> TextIO:
    """Locks a file, which is made with its folder, for this process until what is returned is closed.

    Who holds it may remove it; the next one makes it anew.

    Raises:
        UserError: another process holds it. It says `taken`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = path.open("a")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        lock.close()
        raise UserError(taken) from None
    if not (path.exists() and os.path.samestat(os.fstat(lock.fileno()), path.stat())):
        lock.close()
        return take_lock(path, taken)  # in this moment another process has removed the file
    return lock


@contextlib.contextmanager
def hold_file(path: Path, taken: str) -> Iterator[None]:
    """Keeps other processes from holding a file, for as long as this one reads, changes and replaces it.

    What is locked is a hidden file next to it, since the file itself is replaced. Neither that nor a folder
    made for it stays where nothing else was written.

    Raises:
        UserError: another process holds it. It says `taken`.
    """
    made = [folder for folder in path.absolute().parents if not folder.exists()]
    hidden = path.with_name(f".{path.name}.lock")
    with take_lock(hidden, taken):
        try:
            yield
        finally:
            hidden.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # the first that is not empty
                for folder in made:
                    folder.rmdir()
