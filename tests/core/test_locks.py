"""Files that one process at a time changes."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from core.errors import UserError
from core.locks import hold_file

HOLD = """
import sys, time
from pathlib import Path
from core.locks import hold_file
with hold_file(Path(sys.argv[1]), "taken"):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_file_is_held_until_its_holder_ends_however_it_does(tmp_path: Path):
    """A killed one leaves the hidden file, which holds nothing."""
    path = tmp_path / "new/results.json"
    with subprocess.Popen([sys.executable, "-c", HOLD, path], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=r"^taken by another$"), hold_file(path, "taken by another"):
            pytest.fail("both hold it")
        os.kill(holder.pid, signal.SIGKILL)
    assert [entry.name for entry in path.parent.iterdir()] == [".results.json.lock"]
    with hold_file(path, "taken"):
        path.write_text("{}")
    assert [entry.name for entry in path.parent.iterdir()] == ["results.json"]


def test_nothing_stays_of_a_file_that_was_not_written(tmp_path: Path):
    with hold_file(tmp_path / "a/b/results.json", "taken"), hold_file(tmp_path / "a/other.json", "taken"):
        pass
    assert not list(tmp_path.iterdir())
