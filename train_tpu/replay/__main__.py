"""`python -m train_tpu.replay RUN --step N`: make an update of a run again and look into it."""

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro

from core import checks, cli
from core.errors import run_command
from train_tpu.replay.recorded import open_data, open_recorded, open_tokenizer


@dataclasses.dataclass(frozen=True)
class ReplayConfig:
    """Make exactly one update of a run again, from the nearest checkpoint before it, and look into it: which
    layer, which operation, which record went wrong. Nothing of the run is changed."""

    run: Annotated[Path, tyro.conf.Positional]
    """The run folder."""
    step: int
    """The update to make again, as the log and the guard name it (0-based); refused updates, too."""
    data: str | None = None
    """Where the run's data is now, if it was moved. Default: where it was."""

    def __post_init__(self) -> None:
        checks.counts(0, step=self.step)


def main() -> int:
    """The command; 0 when the update was made again."""
    config = cli.parse(ReplayConfig, prog="python -m train_tpu.replay")
    recorded = open_recorded(config.run, config.step)
    print(f"update {config.step} of {config.run}, {recorded.cost(config.step)}", flush=True)
    tokenizer = open_tokenizer(recorded)
    dataset = open_data(recorded, tokenizer, config.data)
    from train_tpu.replay.report import replay  # slow: JAX

    return replay(recorded, dataset, tokenizer)


if __name__ == "__main__":
    run_command(main)
