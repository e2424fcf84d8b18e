"""`python -m stacking.grow RUN_OR_STEP`: a deeper model out of a trained one, ready to train.

The whole training state grows: parameters, optimizer moments, counters, and the position in the data.
`python -m train_tpu.run --out DIR` resumes the new run folder and needs nothing else. stacking/growth.py
decides what will be done, stacking/rewrite.py does it.
"""

import dataclasses
import functools
import time
from pathlib import Path
from typing import Annotated, Literal

import tyro

from core import checks, cli
from core.config import training_flags
from core.console import make_console
from core.errors import noted, run_command
from core.folders import require_new
from core.memory import peak_memory
from core.progress import Activity
from core.tokenizer import TOKENIZER_FILE
from stacking.growth import Growth, decide
from stacking.plan import Operator


@dataclasses.dataclass(frozen=True)
class GrowConfig:
    """Make a trained model deeper by copying layers, together with their optimizer state; the schedule
    continues."""

    source: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN_OR_STEP")]
    """A run folder (its newest checkpoint), one step of it, or imported parameters."""
    out: Path | None = None
    """The new run folder; it must not exist. Default: the run's, with -grown appended."""
    op: Operator = "stack"
    """stack: copies on top of each other. interleave: every layer next to its copy. overlap: two copies
    without the layers at the seam. middle: the middle block twice. identity: added layers do nothing at
    first, so the loss stays what it is. random: added layers are newly drawn (a control)."""
    factor: float | None = None
    """New layers / old layers. Default: 2; 1.5 for overlap and middle."""
    layers: str | None = None
    """A plan of your own instead of --op: old layers in their new order, both ends of a range included, as in
    0-11,4-11 or 0-11,0-11:identity or 0-11,0-11:fresh."""
    optimizer: Literal["copy", "reset"] = "copy"
    """Moments and counters: grown with the parameters, or as at the start of training."""
    schedule: str = "rewarm"
    """rewarm:N: the schedule continues, re-warmed over N steps (rewarm: 200, or a quarter of the steps left
    if that is less). keep: it continues unchanged. restart: it begins again, with its own warmup."""
    steps: int | None = None
    """Total number of updates, those made so far included. Default: the run's."""
    tokenizer: str | None = None
    """The run's tokenizer.json, where neither the run nor its old path has it."""
    dry_run: bool = False
    """Say what would be done, and write nothing."""
    force: bool = False
    """Accept --optimizer reset under a learning rate that does not start low."""

    def __post_init__(self) -> None:
        checks.counts(steps=self.steps)
        checks.positive(factor=self.factor)


def main() -> int:
    """Runs the command; returns its exit code."""
    started = time.monotonic()
    console = make_console()
    say = functools.partial(console.print, highlight=False, soft_wrap=True)
    config = cli.parse(GrowConfig, prog="python -m stacking.grow")
    growth = decide(config)
    say(growth.plan.picture())
    growth.describe().print(console)
    if config.dry_run:
        say(f"dry run: {growth.out} was not written")
        with noted(say):
            require_new(growth.out)
        return 0
    from stacking.rewrite import rewrite  # slow: JAX

    with Activity(f"making {growth.out}", console=console):
        n_leaves, (before, after) = rewrite(growth, say)
    change = "equal to the bit, as required" if growth.plan.preserves else f"{after - before:+.4f}"
    say(
        f"verified: {n_leaves} leaves read back, equal to the bit\n"
        f"loss on the probe batch: {before:.4f} before, {after:.4f} after ({change})\n"
        f"took {time.monotonic() - started:.1f} s and at most {peak_memory() / 2**30:.2f} GiB of memory\n"
        f"next: {next_command(growth)}"
    )
    return 0


def next_command(growth: Growth) -> str:
    """The command that trains what was grown."""
    if growth.runs:
        return cli.command("train_tpu.run", "--out", growth.out)
    if growth.manifest.kind == "train":
        return cli.command("train_tpu.finetune", growth.out, "--data", "ROWS.jsonl", "--out", "DIR")
    tokenizer = growth.tokenizer.named_for(growth.out / TOKENIZER_FILE)
    model_flags = training_flags(growth.models[1], growth.tokenizer.vocab_size).split()
    flags = (*model_flags, "--tokenizer", tokenizer, "--data", "DATA")
    return cli.command("train_tpu.run", "--init-from", growth.out, *flags)


if __name__ == "__main__":
    run_command(main)
