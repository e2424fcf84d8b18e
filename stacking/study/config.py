"""The settings of `stacking.study`."""

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro

from core import checks
from core.data.mixture_options import parse_data


@dataclasses.dataclass(frozen=True)
class StudyConfig:
    """Train the runs of a study and report on them. The same command trains what is missing."""

    study: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="STUDY")]
    """A study file (.toml), or one of ours by its name: see stacking/studies."""
    out: Path | None = None
    """Folder of the runs. Default: studies/NAME."""
    results: Path | None = None
    """File of the results; runs that it holds are not trained again. Default: OUT/results.json."""
    data: Annotated[tuple[str, ...] | None, tyro.conf.arg(metavar="SOURCE | NAME=SOURCE...")] = None
    """Text or prepared folder of all runs, or the sources of a mixture, instead of the study's."""
    minutes: float | None = None
    """Time to spend. A run that cannot end in it is not started; what still runs at its end is saved."""
    flops: float | None = None
    """Training FLOPs to spend in this call."""
    jobs: int | None = None
    """Runs trained at the same time, on each GPU if there are any. Default: 2 on each GPU, else 1."""
    gpus: tuple[int, ...] = ()
    """Numbers of the GPUs to use. Default: all."""
    again: tuple[str, ...] = ()
    """Runs that the guard halted, by the names that --dry-run lists, to be trained again. Where it halted the
    trunk of one, the trunk and all that branches off it."""
    keep_weights: bool = False
    """Keep the checkpoints of runs that have ended, too."""
    dry_run: bool = False
    """List the runs and what they cost, and train nothing."""
    report: bool = False
    """Train nothing: make the table and the plot of the results."""

    def __post_init__(self) -> None:
        if self.data is not None:
            parse_data(self.data)
        checks.positive(**checks.fields(self, "minutes", "flops"))
        checks.counts(jobs=self.jobs)
        for gpu in self.gpus:
            checks.counts(0, gpus=gpu)
