"""The settings of a study, and the run that its arms are measured against."""

import dataclasses
from pathlib import Path

from core import checks
from core.config import ModelConfig
from core.errors import UserError
from stacking.plan import Operator
from train_tpu.config import RunConfig


@dataclasses.dataclass(frozen=True)
class StudyConfig:
    """Compare growing with training from scratch. After -- come the arguments of the target's train_tpu.run,
    among them --steps, the number of updates of the run from scratch."""

    out: Path
    """The study's folder. The same command trains what is missing."""
    ops: tuple[Operator, ...] = ("stack", "interleave", "identity", "random")
    """Ways of growing; random is the control."""
    fractions: tuple[float, ...] = (0.25, 0.5)
    """When to grow: fractions of the target's steps that the base is trained for."""
    factor: float = 2.0
    """Layers of the target / layers of the base."""
    schedule: str = "rewarm:50"
    """As stacking.grow takes it."""
    seeds: tuple[int, ...] = (0, 1)
    """Every arm is trained once per seed."""
    lrs: tuple[float, ...] = ()
    """Peak learning rates to tune every arm over, on the first seed, by its decayed loss at equal tokens.
    Default: the run's own, untuned."""
    early: float = 0.8
    """Length of the shortest decayed run, as a fraction of the steps."""
    heldout: str | None = None
    """The held-out set whose losses are compared. Default: the data's first."""
    jobs: int = 1
    """Arms trained at the same time, on each GPU if there are any."""
    gpus: tuple[int, ...] = ()
    """Numbers of the GPUs to spread the arms over. Default: every arm sees all devices there are."""
    dry_run: bool = False
    """List the arms and what they cost, and train nothing."""
    report: bool = False
    """Train nothing: make the table and plot of the arms trained so far."""

    def __post_init__(self) -> None:
        if not self.seeds or not self.ops or not self.fractions:
            raise UserError("a study needs at least one seed, operator and fraction")
        checks.counts(jobs=self.jobs)
        checks.positive(factor=self.factor)
        checks.between_zero_and_one(early=self.early)
        for fraction in self.fractions:
            checks.between_zero_and_one(fractions=fraction)
        for lr in self.lrs:
            checks.positive(lrs=lr)
        for seed in self.seeds:
            checks.seeds(seeds=seed)
        for gpu in self.gpus:
            checks.counts(0, gpus=gpu)


@dataclasses.dataclass(frozen=True)
class Target:
    """The run that the arms are measured against, and the base below it."""

    arguments: tuple[str, ...]
    run: RunConfig
    steps: int
    model: ModelConfig
    base: ModelConfig

    def decay_start(self, steps: int) -> int:
        """The last step at which a schedule of `steps` has the constant rate."""
        return steps - round(self.run.optim.decay * steps)

    def flops(self, steps: int, grown_at: int) -> int:
        """Training FLOPs of `steps` updates, the first `grown_at` of them with the base."""
        base, whole = (m.flops_per_token() for m in (self.base, self.model))
        tokens = self.run.batch * self.model.context
        return tokens * (min(steps, grown_at) * base + max(0, steps - grown_at) * whole)
