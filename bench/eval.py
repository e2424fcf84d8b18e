"""`python -m bench.eval FOLDER --run RUN`: evaluation compared with lm-eval's own `hf` model, in one run.

Every row is a process of its own, from its imports to its last task, on the same files. Besides the seconds
it says how far the rows agree: the largest difference of a summed log-probability, and the questions on which
another choice is the likeliest, with the two choices' distance (a tie inside the first is one).
"""

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from bench.row_process import compiled_anew
from core import checks, cli
from core.console import Table
from core.errors import UserError, run_command
from core.figures import require_json, write_json
from eval.run import DEFAULT_TASKS
from eval.settings import is_checkpoint, require_model, task_names
from eval.tasks import open_tasks

ROWS = ("hf", "torch", "jax")
DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class EvalBenchConfig:
    """Time evaluation with our PyTorch mirror, with Flax and with lm-eval's `hf` model."""

    folder: Annotated[Path, tyro.conf.Positional]
    """An exported folder."""
    data_dir: Path
    """Where the tasks' data lies (see eval.run)."""
    run: Path | None = None
    """The run that it was exported from, for the row of Flax."""
    tasks: str = DEFAULT_TASKS
    batch: int = 64
    """Of the `hf` model: requests at once."""
    dtypes: tuple[str, ...] = DTYPES
    limit: int | None = None
    """Only the first questions of each task."""
    out: Path | None = None
    """Also write the table as JSON."""

    def __post_init__(self) -> None:
        checks.lists(**checks.fields(self, "dtypes"))
        checks.counts(**checks.fields(self, "batch", "limit"))


def measure(config: EvalBenchConfig, row: str, dtype: str) -> dict[str, Any]:
    """Seconds per task and every question's log-probabilities, of one row."""
    from eval.evaluate import evaluate_task
    from eval.harness import HarnessModel
    from eval.models import open_model

    names = task_names(config.tasks)
    with open_tasks(names, config.data_dir) as tasks:
        started = time.monotonic()
        if row == "hf":
            import torch
            from lm_eval.models.huggingface import HFLM

            model = HFLM(
                pretrained=str(config.folder), dtype=dtype, batch_size=config.batch, trust_remote_code=True,
                device="cuda" if torch.cuda.is_available() else "cpu",
            )  # fmt: skip
        else:
            opened = open_model(config.run if row == "jax" else config.folder, dtype)
            model = HarnessModel(opened.backend, opened.tokenizer)
        loading = time.monotonic() - started
        seconds, metrics, scores = {}, {}, {}
        for name in names:
            record, questions = evaluate_task(model, tasks, name, limit=config.limit)
            seconds[name] = record["seconds"]
            metrics |= {task: entry["metrics"] for task, entry in record["tasks"].items()}
            scores |= {
                task: [row.get("logprobs", [row.get("logprob")]) for row in rows]
                for task, rows in questions.items()
            }
    return {"load": round(loading, 1), "seconds": seconds, "metrics": metrics, "scores": scores}


def in_process(argv: list[str], row: str, dtype: str) -> dict[str, Any]:
    """A row in a process of its own that finds nothing compiled, with its seconds from start to end. One that
    fails has said why: this one ends with its exit code."""
    with tempfile.TemporaryDirectory() as folder:
        dump = Path(folder) / "row.json"
        started = time.monotonic()
        command = [sys.executable, "-m", "bench.eval", "--row", row, dtype, str(dump), *argv]
        done = subprocess.run(command, env=os.environ | compiled_anew(folder), check=False)
        if done.returncode:
            sys.exit(done.returncode)
        wall = time.monotonic() - started
        return json.loads(dump.read_text(encoding="utf-8")) | {"wall": wall}


def agreement(ours: dict[str, list], theirs: dict[str, list]) -> str:
    """How far two rows' log-probabilities agree, in words."""
    largest, differing, numbers = 0.0, [], True
    for task, questions in ours.items():
        for number, (a, b) in enumerate(zip(questions, theirs[task], strict=True)):
            distance = np.abs(np.subtract(a, b)).max()
            numbers &= bool(np.isfinite(distance))
            if len(a) == 1:  # a page: relative to its length
                distance = distance / abs(b[0])
            largest = max(largest, distance)
            if np.argmax(a) != np.argmax(b):
                differing.append(f"{task} {number} ({abs(b[np.argmax(a)] - b[np.argmax(b)]):.1e})")
    if not numbers:
        return "a log-probability that is no finite number: nothing is compared"
    others = f"; another choice on {len(differing)}: {', '.join(differing[:6])}" if differing else ""
    return f"largest difference {largest:.1e}{others or '; the same choice on every question'}"


def check(config: EvalBenchConfig) -> None:
    """Refuses what cannot be measured before a row is."""
    if unknown := set(config.dtypes) - set(DTYPES):
        raise UserError(f"--dtypes names {unknown.pop()!r}: give float32, bfloat16 or both")
    require_json(config.out)
    for model in filter(None, (config.folder, config.run)):
        require_model(model)
    if is_checkpoint(config.folder):
        raise UserError(f"{config.folder} is a checkpoint: give an exported folder, and its run with --run")
    if config.run and not is_checkpoint(config.run):
        raise UserError(f"--run {config.run} has no checkpoint: give the run of {config.folder}")
    with open_tasks(task_names(config.tasks), config.data_dir):
        pass


def main() -> int:
    """The command."""
    argv, child = sys.argv[1:], []
    if argv[:1] == ["--row"]:  # this is a row's process
        child, argv = argv[1:4], argv[4:]
    config = cli.parse(EvalBenchConfig, argv, prog="python -m bench.eval")
    if child:
        row, dtype, dump = child
        Path(dump).write_text(json.dumps(measure(config, row, dtype)), encoding="utf-8")
        return 0
    check(config)
    found = {
        (row, dtype): in_process(argv, row, dtype)
        for dtype in config.dtypes
        for row in ROWS
        if row != "jax" or config.run
    }
    names = task_names(config.tasks)
    table = Table(("",), (*names, "load", "whole process, s", "x hf"))
    for (row, dtype), result in found.items():
        speed = found["hf", dtype]["wall"] / result["wall"]
        cells = [f"{result['seconds'][name]:.1f}" for name in names]
        label = {"hf": "lm-eval hf", "torch": "ours, PyTorch", "jax": "ours, Flax"}[row]
        table.add_row(
            f"{label}, {dtype}", *cells, f"{result['load']:.1f}", f"{result['wall']:.1f}", f"{speed:.2f}"
        )
    table.print()
    for (row, dtype), result in found.items():
        if row != "hf":
            against = agreement(result["scores"], found["hf", dtype]["scores"])
            print(f"{row} {dtype} against hf {dtype}: {against}")
    for (row, dtype), result in found.items():
        print(row, dtype, json.dumps(result["metrics"]))
    kept = {f"{row} {dtype}": {k: v for k, v in result.items() if k != "scores"}
            for (row, dtype), result in found.items()}  # fmt: skip
    write_json(config.out, kept)
    return 0


if __name__ == "__main__":
    run_command(main)
