"""How commands end."""

import subprocess
import sys

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
