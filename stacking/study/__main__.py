"""`python -m stacking.study`: does growing pay? Growth against training from scratch, fairly.

    python -m stacking.study --out studies/a -- --preset mtlm1-88m --steps 2000

The arguments after the second -- are the target model's training run, as `train_tpu.run` takes it. The arms:

    scratch      the target, from its first step
    OP at f      a base with fewer layers, grown by OP after a fraction f of
                 the steps

Fair means: all arms of a seed see the same sequences in the same order. Every arm is a trunk at a constant
learning rate, and what is compared are decays forked off it, since an undecayed loss says little about the
decayed one. All arms are tuned over the same learning rates. The base's FLOPs count. Every arm is decayed at
three lengths: at equal tokens, at equal FLOPs, and earlier, so that the FLOPs to reach scratch's loss can be
read off without extrapolating. Seeds are paired, and every number has their spread.

Each arm is a `train_tpu.run` in a process of its own; whatever is there already is not done again.
"""

import signal
import sys

from core import cli
from core.errors import run_command
from core.progress import make_console
from stacking.study.config import StudyConfig


def main() -> int:
    """Runs the command; returns its exit code."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the arms are told, too
    argv = sys.argv[1:]
    at = argv.index("--") if "--" in argv else len(argv)
    config = cli.parse(StudyConfig, argv[:at], prog="python -m stacking.study", description=__doc__)
    from stacking.study.experiment import run_study  # slow: JAX

    run_study(config, tuple(argv[at + 1 :]), make_console())
    return 0


if __name__ == "__main__":
    run_command(main)
