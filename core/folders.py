"""Folders and files that appear whole, under their own names, or not at all."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from core.errors import UserError
from core.manifest import sync_path

CACHE = Path(os.environ.get("MTLM_CACHE", Path.home() / ".cache" / "mtlm"))
"""Where is kept what can be made again: prepared text, compiled programs, kernels."""


@contextlib.contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """The path of a hidden folder beside `out`, for the caller to make and fill; it becomes `out` when all
    went well, and is removed otherwise.

    Raises:
        UserError: `out` exists, before or after.
    """
    out = out.absolute()
    if out.exists() or out.is_symlink():
        raise UserError(f"{out} exists already: choose another folder, or remove it first")
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # what a killed process left
    try:
        yield partial
        if out.exists():
            raise UserError(f"{out} has appeared meanwhile: choose another folder, or remove it first")
        partial.rename(out)
        sync_path(out.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Writes a file that is whole whenever it is there."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(content.encode() if isinstance(content, str) else content)
        sync_path(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
