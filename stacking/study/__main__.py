"""`python -m stacking.study STUDY`: a grid of runs, trained on every GPU there is, and what they say.

    python -m stacking.study tuning --dry-run
    python -m stacking.study tuning --minutes 30

A study is a small file, or one of ours by its name (stacking/studies): a grid over settings of
train_tpu.run (tuning), decays that branch off a trunk (saturation), or growth compared with training from
scratch (growth).

Every run is a `train_tpu.run` in a process of its own. What has ended is not trained again, what was
interrupted continues from its checkpoint, and a budget is kept. All results are in one small JSON file, of
which the report is made; weights are removed.
"""

import signal
import sys

from core import cli
from core.console import make_console
from core.errors import EXIT_INTERRUPTED, run_command
from stacking.study.config import StudyConfig


def main() -> int:
    """Runs the command; returns its exit code."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the runs are told, too
    config = cli.parse(StudyConfig, prog="python -m stacking.study", description=__doc__)
    from stacking.study.experiment import run_study  # slow: JAX

    try:
        run_study(config, make_console())
    except KeyboardInterrupt:
        said = "interrupted: what has ended is in the results, and the same command resumes the rest"
        print(said, file=sys.stderr)
        return EXIT_INTERRUPTED
    return 0


if __name__ == "__main__":
    run_command(main)
