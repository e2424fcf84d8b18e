"""`python -m train_tpu.run`: train a model from scratch, or resume a run (setup.py, trainer.py)."""

import sys
from pathlib import Path

from core import cli
from core.errors import run_command
from core.run.folder import settings_of_run
from core.run.help import TRAINING_OPTIONS, for_help
from core.run.settings import given_value
from train_tpu.config import RunConfig, defaults


def main() -> int:
    """Runs the command; returns its exit code (core.run.interrupt says what each means)."""
    config = parse(sys.argv[1:])
    from core.processes import leaving_at_once  # slow: JAX
    from train_tpu.setup import prepare_run
    from train_tpu.trainer import run

    with leaving_at_once():
        return run(prepare_run(config))


def parse(argv: list[str]) -> RunConfig:
    """The command line over the settings of the run in its --out, else over its preset's defaults."""
    preset, out = given_value(argv, "--preset") or RunConfig.preset, given_value(argv, "--out")
    folder = Path(out) if out else Path("runs") / preset
    default = for_help(settings_of_run(folder, defaults(preset), argv), argv)
    return cli.parse(
        RunConfig, argv, prog="python -m train_tpu.run", default=default, groups=TRAINING_OPTIONS
    )


if __name__ == "__main__":
    run_command(main)
