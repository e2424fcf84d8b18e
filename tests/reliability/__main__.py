"""`python -m tests.reliability FOLDER [EXPERIMENT ...]`: what docs/RELIABILITY.md reports, tried again.

Writes into FOLDER, which must not exist, and prints a table. As root on Linux; an hour on 2 cores for all.
"""

import argparse
import shutil
from collections import Counter
from pathlib import Path

from core.errors import UserError, run_command
from kernels_cuda.compiler import TORCH
from tests.reliability import flips, runs
from tests.train_tpu.processes import TINY, make_text, run

FLIPS = {
    "checkpoint": flips.open_checkpoint,
    "data": flips.open_data,
    "export": flips.open_export,
    "run": flips.open_run,
    "kernels": flips.open_kernels,
}
EXPERIMENTS = (*(f"flips-{name}" for name in FLIPS), "kills", "signals", "full-disk", "read-only")


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m tests.reliability", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("experiments", nargs="*", choices=EXPERIMENTS, default=EXPERIMENTS)
    parser.add_argument("--flips", type=int, default=1000, help="of each kind of folder (%(default)s)")
    parser.add_argument("--kills", type=int, default=100, help="(%(default)s)")
    parser.add_argument("--signals", type=int, default=10, help="of each kind, once and twice (%(default)s)")
    arguments = parser.parse_args()
    folder = arguments.folder.absolute()
    if folder.exists():
        raise UserError(f"{folder} exists already: name a new folder")
    folder.mkdir(parents=True)
    text = make_text(folder)
    make_victims(folder, text, set(arguments.experiments))
    print("| experiment | outcome | times |\n|---|---|---|")
    for name in arguments.experiments:
        if name.startswith("flips-"):
            kind = name.removeprefix("flips-")
            met = flips.flip(folder / "victims" / kind, FLIPS[kind], arguments.flips)
        elif name == "kills":
            met = runs.kill(folder / name, text, arguments.kills)
        elif name == "signals":
            met = runs.interrupt(folder / name, text, arguments.signals)
        elif name == "full-disk":
            met = runs.fill(folder / name, text, [40, 150, 400, 700, 1000, 1400])
        else:
            met = runs.read_only(folder / name, text)
        show(name, met)
    return 0


def make_victims(folder: Path, text: Path, experiments: set[str]) -> None:
    """A prepared dataset, a run on it, its newest checkpoint, its export, and the built kernels."""
    wanted = {name.removeprefix("flips-") for name in experiments if name.startswith("flips-")}
    cache, victims = folder / "cache", folder / "victims"
    if wanted & {"checkpoint", "data", "export", "run"}:
        prepare = ("--tokenizer", "bytes", "--context", "32")
        run(cache, text, "--out", victims / "data", *prepare, module="train_tpu.prepare")
        run(cache, *TINY, "--data", victims / "data", "--out", victims / "run", "--keep-last", "1")
        shutil.copytree(victims / "run/checkpoints", victims / "checkpoint")
        run(cache, victims / "run", victims / "export", module="port_torch.convert")
    if "kernels" in wanted:
        if not TORCH.built.exists():
            raise UserError("the kernels are not built: run python -m kernels_cuda.build, or leave them out")
        (victims / "kernels").mkdir(parents=True)
        for file in (TORCH.built, TORCH.built.with_suffix(".json")):
            shutil.copy(file, victims / "kernels")


def show(name: str, met: Counter[str]) -> None:
    """The rows of one experiment."""
    for outcome, times in sorted(met.items()):
        print(f"| {name} | {outcome} | {times} |", flush=True)


if __name__ == "__main__":
    run_command(main)
