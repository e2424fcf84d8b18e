"""`train_tpu.run` in the folder WORK, on a disk that takes SEAL_SECONDS to commit a checkpoint, and with
less patience than in earnest."""

import os
import time

import core.checkpoint.checkpointer
from core import processes
from core.errors import run_command
from train_tpu.run import main

processes.FAREWELL, processes.SILENCE = 5, float(os.environ.get("SILENCE", processes.SILENCE))
processes.ARRIVAL = int(os.environ.get("ARRIVAL", processes.ARRIVAL))
seal = core.checkpoint.checkpointer.seal


def slow_seal(*args) -> None:
    """As on a disk that is slow to flush."""
    print("committing", flush=True)
    time.sleep(float(os.environ["SEAL_SECONDS"]))
    seal(*args)


core.checkpoint.checkpointer.seal = slow_seal

if __name__ == "__main__":
    os.chdir(os.environ.get("WORK", "."))
    run_command(main)
