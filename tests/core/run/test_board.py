"""TensorBoard's events: what is written reads back, and what can go wrong is one sentence of ours."""

import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from tensorboardX.proto.event_pb2 import Event

from core.run.board import Board
from tests.several_devices import ROOT


def read_events(folder: Path) -> list[Event]:
    """The records of the event files: length, its checksum, the message, its checksum (TFRecord)."""
    events = []
    for path in sorted(folder.iterdir()):
        content, at = path.read_bytes(), 0
        while at < len(content):
            (length,) = struct.unpack_from("<Q", content, at)
            events.append(Event.FromString(content[at + 12 : at + 12 + length]))
            at += 12 + length + 4
    return events


def test_scalars_and_texts_read_back(tmp_path: Path):
    board = Board(tmp_path, resume_step=7)
    board.scalars(8, {"train/loss": 2.5, "train/lr": 1e-3})
    board.scalars(9, {})
    board.text(9, "samples", "once upon")
    board.close()
    version, start, scalars, text = read_events(tmp_path)
    assert version.file_version == "brain.Event:2"
    assert (start.step, start.session_log.status) == (7, start.session_log.START)
    assert [(v.tag, v.simple_value) for v in scalars.summary.value] == [
        ("train/loss", 2.5),
        ("train/lr", struct.unpack("f", struct.pack("f", 1e-3))[0]),
    ]
    assert (scalars.step, text.step) == (8, 9)
    assert text.summary.value[0].tensor.string_val == [b"once upon"]


LOGGING = """
import resource, sys
from pathlib import Path
from core.errors import run_command
from core.run.log import RunLog

def main():
    log = RunLog(Path(sys.argv[1]), 0)
    try:
        for step in range(2000):
            log.write(step, "train", tokens=step, loss=1.0, nll=1.0)
            if step == 10:  # from here on the disk takes no more: a write fails as on a full one
                resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
    finally:
        log.close()

run_command(main)
"""


def logging_process(folder: Path, *path: Path) -> subprocess.CompletedProcess[str]:
    environ = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (*path, ROOT)))}
    command = [sys.executable, "-c", LOGGING, str(folder)]
    return subprocess.run(command, env=environ, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("torch", ["whole", "broken"])
def test_a_full_disk_is_one_sentence_and_pytorch_is_left_alone(tmp_path: Path, torch: str):
    """Whichever of the files fails, and whether PyTorch could be imported or not."""
    (tmp_path / "run").mkdir()
    if torch == "broken":
        (tmp_path / "torch").mkdir()
        (tmp_path / "torch/__init__.py").write_text("raise OSError('libtorch.so: cannot open shared object')")
    done = logging_process(tmp_path / "run", tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: the disk is full") and done.stderr.count("\n") == 1, done.stderr
