"""A stretch of a run trained again with something changed, as a run of its own, and compared."""

import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from core.checkpoint.manifest import MANIFEST, load_manifest
from core.console import make_console
from core.data.batches import Data, data_record
from core.folders import new_folder, write_atomically
from core.run.curve import plot_branch
from core.run.folder import run_record, write_config
from core.run.interrupt import EXIT_FINISHED
from core.run.log import METRICS, read_log
from core.run.steering_queue import write_record
from core.tokenizer import Tokenizer
from train_tpu.replay.branch import MARK, Branch
from train_tpu.replay.compiled import open_setup
from train_tpu.setup import Setup
from train_tpu.trainer import run

ROWS = 10  # of the table
RECENT = 8  # updates at the end of the stretch whose losses are averaged


def run_branch(branch: Branch, dataset: Data, tokenizer: Tokenizer) -> int:
    """Trains the branch, draws both curves and prints the table; the exit code."""
    console = make_console()

    def say(text: str) -> None:
        console.print(text, highlight=False, soft_wrap=True)

    recorded = dataclasses.replace(branch.recorded, config=branch.config)
    setup = open_setup(recorded, dataset, tokenizer, console)
    config = dataclasses.replace(setup.config, out=branch.out)
    model, steps = setup.step.model, setup.steps
    record = run_record(config, model, steps, dataset.tokenizer_record, data_record(dataset))
    setup = dataclasses.replace(setup, config=config, out=branch.out, record=record)
    if not branch.begun:
        make_folder(branch, setup)
    of = f"a branch of {branch.recorded.folder} from update {recorded.first} on"
    say(f"{branch.out}: {of}, {branch.describe()}")
    code = run(setup, report=False)
    if code != EXIT_FINISHED:
        say(f"the branch ended early (exit code {code}): what it logged is compared")
    for line in table(branch):
        say(line)
    say(f"both curves: {plot_branch(branch.recorded.folder, branch.out, recorded.first)}")
    return code


def make_folder(branch: Branch, setup: Setup) -> None:
    """The run folder of the branch, ready to be resumed: the checkpoint that it starts from, the log up to
    there, and its settings."""
    recorded = branch.recorded
    with new_folder(branch.out) as folder:
        folder.mkdir(parents=True)
        if recorded.start:
            step_dir = folder / "checkpoints" / recorded.start.name
            shutil.copytree(recorded.start, step_dir)
            manifest = load_manifest(step_dir)
            entry = {
                "operation": "branch", "path": str(recorded.start), "step": manifest.step,
                "tokens": manifest.tokens, "changes": branch.changes,
            }  # fmt: skip
            marked = dataclasses.replace(manifest, lineage=[*manifest.lineage, entry])
            write_atomically(step_dir / MANIFEST, marked.to_json())
        if (recorded.folder / METRICS).is_file():  # resuming drops lines that come again
            shutil.copyfile(recorded.folder / METRICS, folder / METRICS)
        write_record(folder, branch.steering)
        write_config(folder, setup.record)
        write_atomically(folder / MARK, branch.mark)


def table(branch: Branch) -> Iterator[str]:
    """Losses of the run and of the branch, a line for some of the updates."""
    first = branch.recorded.first
    before, after = (losses(folder, first) for folder in (branch.recorded.folder, branch.out))
    both = sorted(before.keys() & after.keys())
    if not both:
        yield "the logs of the run and of the branch have no update in common"
        return
    shown = sorted(
        {both[round(i)] for i in np.linspace(0, len(both) - 1, ROWS)} | {branch.recorded.step} & set(both)
    )
    yield f"{'update':>8} {'run':>10} {'branch':>10} {'difference':>11}   (nats per token)"
    for step in shown:
        yield _row(f"{step}", before[step], after[step])
    last = both[-RECENT:]
    means = [float(np.mean([values[step] for step in last])) for values in (before, after)]
    yield _row(f"mean {len(last)}", *means)
    skipped = (
        sum(first <= row["step"] <= both[-1] for row in read_log(folder, "skip"))
        for folder in (branch.recorded.folder, branch.out)
    )
    yield "updates refused by the guard: {} in the run, {} in the branch".format(*skipped)
    if all(before[step] == after[step] for step in both):
        compared = "" if both[-1] == branch.until else f" up to update {both[-1]}, the last that it has made"
        yield f"the branch is equal to the run to the bit{compared}"


def _row(name: str, before: float, after: float) -> str:
    return f"{name:>8} {before:>10.4f} {after:>10.4f} {after - before:>+11.4f}"


def losses(folder: Path, first: int) -> dict[int, float]:
    """Training loss (nats per token) of every update from `first` on that a run logged."""
    return {row["step"]: float(row["nll"]) for row in read_log(folder, "train") if row["step"] >= first}
