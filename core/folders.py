"""Folders and files that appear whole, under their own names, or not at all."""

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from core.checkpoint.manifest import sync_path
from core.errors import UserError


def require_place(out: Path) -> None:
    """Refuses a path at which nothing can be written. To be called before anything slow; it makes nothing.

    Raises:
        UserError: `out`, or the nearest folder above it that there is, is a file or does not take one.
    """
    nearest = next(path for path in (out.absolute(), *out.absolute().parents) if path.exists())
    if not nearest.is_dir():
        where = "is a file" if nearest == out.absolute() else f"lies in {nearest}, which is a file"
        raise UserError(f"{out} {where}: name another folder")
    try:
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        raise UserError(
            f"{out} cannot be written ({nearest}: {error.strerror}): give a place that you may write to"
        ) from None


def require_new(out: Path) -> None:
    """Refuses a path at which something is already, or nothing can be made; otherwise as `require_place`."""
    if out.exists() or out.is_symlink():
        raise UserError(f"{out} exists already: choose another folder, or remove it first")
    require_place(out)


def require_space(place: Path, needed: int, what: str) -> None:
    """A UserError where the disk of a folder has fewer bytes free than are `needed`.

    what: is going to be written, with its verb: "the weights take".
    """
    free = shutil.disk_usage(place).free
    if needed > free:
        raise UserError(
            f"{place} has {free / 1e9:.2f} GB free, and {what} {needed / 1e9:.2f} GB: free some space"
        )


@contextlib.contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """The path of a hidden folder next to `out`, for the caller to make and fill; it becomes `out` when all
    went well, and is removed otherwise.

    Raises:
        UserError: `out` exists, before or after.
    """
    out = out.absolute()
    require_new(out)
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # what a killed process left
    try:
        yield partial
        if out.exists():
            raise UserError(f"{out} was created in the meantime: choose another folder, or remove it first")
        partial.rename(out)
        sync_path(out.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """The path of a hidden file next to `path`, for the caller to write; it becomes `path`, or replaces it,
    when all went well and it is on the disk, and is removed otherwise."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        sync_path(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_picture(figure: Any, path: Path, dpi: int) -> None:
    """Writes a picture, of the format that its suffix names, that is whole whenever it is there.

    figure: matplotlib's.
    """
    with whole_file(path) as partial:
        figure.savefig(partial, dpi=dpi, format=path.suffix.removeprefix("."))


def write_atomically(path: Path, content: str | bytes) -> None:
    """Writes a file that is whole whenever it is there."""
    with whole_file(path) as partial:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)
