"""`train_tpu.run` in the folder WORK, on a disk that takes SEAL_SECONDS to commit a checkpoint and shows this
process none of step HIDDEN; with less patience than in earnest."""

import os
import time
from pathlib import Path

import core.checkpoint.checkpointer
import core.checkpoint.steps
from core import processes
from core.errors import run_command
from train_tpu.run import main

processes.FAREWELL, processes.SILENCE = 5, float(os.environ.get("SILENCE", processes.SILENCE))
processes.ARRIVAL = int(os.environ.get("ARRIVAL", processes.ARRIVAL))
seal, list_steps = core.checkpoint.checkpointer.seal, core.checkpoint.steps.list_steps


def slow_seal(*args) -> None:
    """As on a disk that is slow to flush."""
    print("committing", flush=True)
    time.sleep(float(os.environ["SEAL_SECONDS"]))
    seal(*args)


def list_shown(folder: Path) -> list[int]:
    """As on a network disk, which shows a new folder to other machines late."""
    return [step for step in list_steps(folder) if str(step) != os.environ.get("HIDDEN")]


core.checkpoint.checkpointer.seal, core.checkpoint.steps.list_steps = slow_seal, list_shown

if __name__ == "__main__":
    os.chdir(os.environ.get("WORK", "."))
    run_command(main)
