"""What stops a run so that its state is saved."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from core.run.interrupt import EXIT_KEPT, Interrupt
from tests.several_devices import ROOT

# Sends itself signals, by name, while a run would train, and says into a file what has become of them.
TRAINING = """
import os, signal, sys
from pathlib import Path
from rich.console import Console
from core.errors import run_command
from core.run.interrupt import EXIT_SAVED, Interrupt

def main():
    with Interrupt() as interrupt:
        for name in sys.argv[2:]:
            os.kill(os.getpid(), getattr(signal, name))
        for number in range(3):
            Console(soft_wrap=True).print("line", number)
            Console(stderr=True).print("error", number)
        Path(sys.argv[1]).write_text(str(interrupt.requested))
    print("the end")
    return EXIT_SAVED

run_command(main)
"""


def train(told: Path, *signals: str, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", TRAINING, str(told), *signals]
    environ = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"} | {"PYTHONPATH": str(ROOT)}
    environ |= options.pop("env", {})
    return subprocess.run(command, env=environ, text=True, timeout=60, **options)


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_output_that_nobody_reads_stops_the_run_so_that_it_saves(tmp_path: Path, unbuffered: str):
    reads, writes = os.pipe()
    os.close(reads)
    env = {"PYTHONUNBUFFERED": unbuffered}
    try:
        both = train(tmp_path / "both", stdout=writes, stderr=writes, env=env)
        out = train(tmp_path / "out", stdout=writes, stderr=subprocess.PIPE, env=env)
        err = train(tmp_path / "err", stdout=subprocess.PIPE, stderr=writes, env=env)
    finally:
        os.close(writes)
    assert (both.returncode, out.returncode, err.returncode) == (3, 3, 3)
    assert (tmp_path / "both").read_text() == "the end of what read its stdout"
    assert out.stderr == (
        "\nnobody reads stdout any more: saving a checkpoint, then stopping\nerror 0\nerror 1\nerror 2\n"
    )
    assert (tmp_path / "err").read_text() == "the end of what read its stderr"
    assert err.stdout == "line 0\nline 1\nline 2\nthe end\n"


def test_the_signals_of_a_closed_terminal_are_one(tmp_path: Path):
    """The kernel and the shell each send one, and a service manager one beside its SIGTERM. A terminal that
    is gone refuses what is written to it."""
    master, terminal = os.openpty()
    os.close(master)
    done = train(tmp_path / "gone", "SIGHUP", "SIGHUP", "SIGTERM", stdout=terminal, stderr=terminal)
    os.close(terminal)
    assert done.returncode == 3 and (tmp_path / "gone").read_text() == "SIGTERM"
    done = train(tmp_path / "beside", "SIGTERM", "SIGHUP", capture_output=True)
    assert done.returncode == 3 and (tmp_path / "beside").read_text() == "SIGTERM"
    done = train(tmp_path / "twice", "SIGHUP", "SIGTERM", "SIGINT", capture_output=True)
    assert done.returncode == EXIT_KEPT and not (tmp_path / "twice").exists()


def test_sighup_stays_ignored_under_nohup():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Interrupt() as interrupt:
            os.kill(os.getpid(), signal.SIGHUP)
            assert interrupt.requested is None
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        with Interrupt() as interrupt:
            assert signal.getsignal(signal.SIGHUP) != signal.SIG_DFL  # which would end pytest
            os.kill(os.getpid(), signal.SIGHUP)
            assert interrupt.requested == "SIGHUP"
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before)
