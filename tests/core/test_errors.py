"""How commands end."""

import subprocess
import sys

import pytest

LOST_CTRL_C = """
import os, signal, time
from core.errors import run_command

signal.signal(signal.SIGINT, signal.default_int_handler)

class Dying:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)
        for _ in range(1000):
            pass

def main():
    dying = Dying()
    del dying
    time.sleep(20)

run_command(main)
"""


def test_ctrl_c_within_a_destructor_is_not_lost():
    """Python prints it and goes on; the command ends all the same."""
    done = subprocess.run([sys.executable, "-c", LOST_CTRL_C], capture_output=True, text=True, timeout=60)
    assert done.returncode == 130 and done.stderr == "interrupted\n", done.stderr


ONE_OF_SEVERAL = """
import sys, threading, time
from core import processes
from core.errors import run_command

processes._joined = True
threading.Thread(target=time.sleep, args=(100,)).start()  # for others, who wait for this one

def main():
    with processes.leaving_at_once():
        print("said")
        raise eval(sys.argv[1])

run_command(main)
"""


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        ("processes.UserError('no')", 2, "error: no\n"),
        ("OSError(28, 'No space left', 'f')", 2,
         "error: the disk is full writing f: free some space and run the command again\n"),
        ("KeyboardInterrupt()", 130, "interrupted\n"),
        ("BrokenPipeError()", 1, ""),
    ],
)  # fmt: skip
def test_one_process_of_several_ends_as_one_alone_but_at_once(error: str, code: int, said: str):
    command = [sys.executable, "-c", ONE_OF_SEVERAL, error]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (code, "said\n", said)


def test_ours_keep_their_traceback():
    command = [sys.executable, "-c", ONE_OF_SEVERAL, "AssertionError('ours')"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "Traceback" in done.stderr and "AssertionError: ours" in done.stderr
