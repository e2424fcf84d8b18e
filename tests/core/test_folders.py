"""Where something can be written, found out before anything slow."""

import errno
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from core.errors import UserError
from core.folders import require_new, require_place, write_picture


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Path]:
    """A read-only file system: root may write where permissions forbid it."""
    command = ["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(tmp_path)]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("needs the right to mount a file system")
    yield tmp_path
    subprocess.run(["umount", str(tmp_path)], check=True)


def test_a_read_only_place_is_refused_by_name(read_only: Path):
    for out in (read_only, read_only / "new", read_only / "deeper/new"):
        with pytest.raises(UserError, match=f"{out} cannot be written .{read_only}: Read-only file system"):
            require_place(out)


def test_a_place_within_a_file(tmp_path: Path):
    file = tmp_path / "file"
    file.write_text("x")
    with pytest.raises(UserError, match=f"{file} is a file: name another"):
        require_place(file)
    with pytest.raises(UserError, match=f"lies in {file}, which is a file"):
        require_place(file / "deeper/new")


def test_a_new_place_is_not_made(tmp_path: Path):
    require_new(tmp_path / "deeper/new")
    require_place(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_dangling_link_is_there(tmp_path: Path):
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(UserError, match="exists already"):
        require_new(tmp_path / "link")


def test_a_picture_is_whole_or_the_old_one(tmp_path: Path):
    """The disk may be full halfway."""

    class Half:
        def savefig(self, path: Path, **_) -> None:
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")

    picture = tmp_path / "a.png"
    picture.write_bytes(b"old")
    with pytest.raises(OSError, match="No space"):
        write_picture(Half(), picture, dpi=9)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"a.png": b"old"}
    write_picture(Figure(figsize=(1, 1)), picture, dpi=9)
    assert picture.read_bytes().startswith(b"\x89PNG") and list(tmp_path.iterdir()) == [picture]
