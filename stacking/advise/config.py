"""The settings of `stacking.advise`."""

import dataclasses
import re
from pathlib import Path
from typing import Annotated

import tyro

from core import checks
from core.errors import UserError
from stacking.plan import Operator

LATEST = "latest"
LEAST_WINDOWS = 8  # of held-out text: with fewer, a standard error is itself too uncertain


@dataclasses.dataclass(frozen=True)
class AdviseConfig:
    """Is it time to grow? At a checkpoint of a run whose learning rate is still constant, the model is
    trained on, and grown and trained on. Both are decayed at equal FLOPs and compared on held-out text.
    RUN/advice.json and the lineage of what is grown there keep the answer. The same command resumes."""

    run: Annotated[Path, tyro.conf.Positional]
    """The run folder, of JAX or of PyTorch."""
    at: tuple[str, ...] = (LATEST,)
    """Steps of the checkpoints to ask at, or latest."""
    budget: str = "20%"
    """Tokens that the ungrown model is trained on, as a number or as a share of those it has read so far. The
    grown one gets as many FLOPs, and so fewer tokens. The answer is for this horizon."""
    op: Operator = "stack"
    """How to grow, as stacking.grow has it."""
    factor: float | None = None
    """New layers / old layers. Default: 2; 1.5 for overlap and middle."""
    layers: str | None = None
    """A plan of your own instead of --op, as stacking.grow has it."""
    heldout: str | None = None
    """The held-out set whose loss decides. Default: the data's first."""
    windows: int = 1024
    """Windows of it that are scored, spread over it; all, if it has fewer."""
    out: Path | None = None
    """Where both are trained. Default: the run's folder, with -advice appended."""
    dry_run: bool = False
    """Say what would be trained and what it costs, and write nothing."""

    def __post_init__(self) -> None:
        checks.counts(LEAST_WINDOWS, windows=self.windows)
        checks.positive(factor=self.factor)
        if not self.at:
            raise UserError("--at needs at least one step, or latest")
        for step in self.at:
            if step != LATEST and not re.fullmatch(r"\d{1,9}", step):
                raise UserError(f"--at {step} is not a step: give the number of a checkpoint, or {LATEST}")
        _parse_budget(self.budget)

    @property
    def plan_arguments(self) -> tuple[str, ...]:
        """What stacking.grow is given for the plan."""
        layers = ("--op", self.op) if self.layers is None else ("--layers", self.layers)
        return layers if self.factor is None else (*layers, "--factor", repr(self.factor))

    def tokens(self, read: int) -> int:
        """The budget in tokens, for a model that has read so many."""
        number, is_share = _parse_budget(self.budget)
        return round(number / 100 * read) if is_share else round(number)


def _parse_budget(text: str) -> tuple[float, bool]:
    """The number, and whether it is a percentage."""
    match = re.fullmatch(r"(\d{1,15})|(\d{1,4}(?:\.\d+)?)%", text)
    number = float(match[1] or match[2]) if match else 0.0
    if number == 0:
        raise UserError(
            f"--budget {text}: give a number of tokens, as 2000000, or a share of those read so far, as 20%"
        )
    return number, bool(match[2])
