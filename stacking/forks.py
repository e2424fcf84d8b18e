"""Forks: runs that continue from a checkpoint of another one under other settings, and how they ended."""

import math
import os
import shutil
from pathlib import Path
from typing import Any

from core.checkpoint.steps import step_path
from core.errors import UserError
from core.folders import new_folder
from core.run.folder import read_config, write_config
from core.run.log import END, HALT, read_log
from core.tokenizer import TOKENIZER_FILE

NEVER = 10**9  # steps between checkpoints of a fork: those that are needed are named one by one


def fork(
    source: Path, step: int, out: Path, changes: dict[str, Any], record: dict[str, Any] | None = None
) -> None:
    """Makes the run folder `out`, which continues from a checkpoint of the run in `source`; nothing is done
    where there is one already.

    It shares the checkpoint's files where the disk allows that: nothing in a checkpoint is ever written
    again.

    Args:
        changes: settings that it has instead of the run's, by name.
        record: what its config.json says but for them. Default: what the run's does.
    """
    if out.exists():
        return
    record = read_config(source) if record is None else record
    if record is None:
        raise UserError(
            f"{source} is gone or holds no run: remove {source.parent} and give the same command again"
        )
    with new_folder(out) as folder:
        checkpoint = step_path(source / "checkpoints", step)
        shutil.copytree(checkpoint, step_path(folder / "checkpoints", step), copy_function=_share)
        if (source / TOKENIZER_FILE).is_file():
            _share(source / TOKENIZER_FILE, folder / TOKENIZER_FILE)
        write_config(folder, record | {"run": record["run"] | changes | {"out": str(out)}})


def _share(source: str | Path, target: str | Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # on another disk, or on one without links
        shutil.copy2(source, target)


def is_finished(folder: Path, steps: int) -> bool:
    """Whether a run has logged its end at `steps`."""
    return any(row["what"] == END and row["step"] == steps for row in read_log(folder, "event"))


def halt_step(folder: Path, end: float = math.inf) -> int | None:
    """The step at which the guard ended a run, before it had made `end` updates; None if it did not, or if
    somebody has started the run again."""
    if not (folder / "metrics.jsonl").is_file():
        return None
    events = read_log(folder, "event")
    if not events or events[-1]["what"] != HALT or events[-1]["step"] > end:
        return None
    return events[-1]["step"]


def in_words(halted: int | None) -> str:
    """How a run ended. halted: its `halt_step`."""
    return "done" if halted is None else f"halted by the guard at step {halted:,}"
