"""`python -m train_tpu.steer RUN COMMAND ...`: change a run while it trains, in JAX or in PyTorch."""

import dataclasses
import sys
from pathlib import Path
from typing import Annotated

import tyro

from core import checks, cli
from core.errors import UserError, run_command
from core.run.steering_queue import STEERED, answers, holder, send

PROG = "python -m train_tpu.steer"


@dataclasses.dataclass(frozen=True)
class SteerConfig:
    """Change a run while it trains, in JAX or in PyTorch, without stopping or recompiling it.

    lr=0.5x multiplies the learning rate, now and for the rest of the schedule; lr=3e-4 is another peak.

    guard.sigma=5, guard.halt_after=20: the guard's limits, as --sigma and --halt-after.

    skip=1200:1260 leaves out updates 1200 to 1259: their batches are read past.

    steps=+2000 or steps=12000: another length of the run, if its learning rate has not begun to decay.

    save, evaluate, sample "PROMPT": now, besides what the schedule has.

    pause waits after a step, with the state saved; continue trains on; stop saves and ends, as Ctrl-C does.
    """

    run: Annotated[Path, tyro.conf.Positional]
    """The run folder."""
    commands: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="COMMAND...")]
    """One or several of those above."""
    wait: float = 60.0
    """Seconds to wait for the run to come to a step boundary; then the commands stay queued."""

    def __post_init__(self) -> None:
        checks.not_negative(wait=self.wait)


def main() -> int:
    """Runs the command; returns its exit code."""
    config = cli.parse(SteerConfig, prog=PROG)
    sent = send(config.run, config.commands)
    found = answers(config.run, sent, config.wait)
    for row in found:
        if row["what"] == STEERED:
            print(f"step {row['step']}: {row['command']}")
        else:
            print(f"error: step {row['step']}: {row['why']}", file=sys.stderr)
    if any(row["what"] != STEERED for row in found):
        return 2
    if len(found) < sent.n_commands:
        if holder(config.run) is None:
            raise UserError(f"the run in {config.run} ended before it came to a step boundary")
        print("queued: the run takes it before its next update")
    return 0


if __name__ == "__main__":
    run_command(main)
