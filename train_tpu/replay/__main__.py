"""`python -m train_tpu.replay RUN --step N`: make an update of a run again and look into it."""

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro

from core import checks, cli
from core.errors import UserError, run_command
from core.run.settings import check_records
from train_tpu.replay.branch import plan_branch
from train_tpu.replay.recorded import open_data, open_recorded, open_tokenizer


@dataclasses.dataclass(frozen=True)
class ReplayConfig:
    """Make exactly one update of a run again, from the nearest checkpoint before it, and look into it: which
    layer, which operation, which record went wrong. Or, with --until, train a stretch again with something
    changed. Nothing of the run itself is changed."""

    run: Annotated[Path, tyro.conf.Positional]
    """The run folder."""
    step: int
    """The update to make again, as the log and the guard name it (0-based); refused updates, too."""
    until: int | None = None
    """What if: train on as a branch of its own, from that checkpoint up to this update, with the changes
    below, and compare."""
    without: tuple[int | str, ...] = ()
    """Records that the branch leaves out, as the guard and the log name them: they predict nothing."""
    lr: str | None = None
    """Peak learning rate of the branch: 3e-4, or 0.5x for half of the run's."""
    out: Path | None = None
    """Run folder of the branch. Default: RUN-branch-N, next to the run."""
    data: tuple[str, ...] = ()
    """Where the run's data is now, if it was moved: DIR, or wiki=DIR books=DIR. Default: where it was."""

    def __post_init__(self) -> None:
        checks.counts(0, **checks.fields(self, "step", "until"))
        check_records(without=self.without)
        for name in ("without", "lr", "out"):
            if self.until is None and getattr(self, name):
                raise UserError(f"--{name} is for a branch: give --until M, its last update")


def main() -> int:
    """The command; 0 when the update was made again."""
    config = cli.parse(ReplayConfig, prog="python -m train_tpu.replay")
    recorded = open_recorded(config.run, config.step)
    branch = None
    if config.until is not None:
        out = config.out or config.run.with_name(f"{config.run.name}-branch-{config.step}")
        branch = plan_branch(recorded, config.until, config.lr, config.without, out)
    until = config.step if config.until is None else config.until
    what = f"update {until}" if until == config.step else f"updates {config.step} to {until}"
    print(f"{what} of {config.run}, {recorded.cost(until)}", flush=True)
    for note in recorded.notes(until):
        print(note, flush=True)
    tokenizer = open_tokenizer(recorded)
    dataset = open_data(recorded, tokenizer, config.data)
    if branch:
        branch.require_read(dataset)
        from train_tpu.replay.what_if import run_branch  # slow: JAX

        return run_branch(branch, dataset, tokenizer)
    from train_tpu.replay.report import replay  # slow: JAX

    return replay(recorded, dataset, tokenizer)


if __name__ == "__main__":
    run_command(main)
