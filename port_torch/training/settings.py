"""The settings that both commands share, on the command line and in a run folder's config.json."""

import dataclasses
from typing import ClassVar, Literal

import tyro

from core import checks
from core.checkpoint.manifest import TORCH
from core.run.schedule import OptimizerConfig
from core.run.settings import TrainingSettings

Hidden = tyro.conf.Suppress


@dataclasses.dataclass(frozen=True)
class MirrorOptimizerConfig(OptimizerConfig):
    """The update rule and the learning rate's schedule, without what is growing's."""

    optimizer: Literal["adamw", "muon"] = "adamw"
    """adamw: AdamW for everything. muon: Muon for the layers' weight matrices, AdamW for embeddings, norms,
    biases and the head."""
    rewarm: Hidden[int] = 0
    rewarm_at: Hidden[int] = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.between_zero_and_one(**checks.fields(self, "beta1", "beta2"))


@dataclasses.dataclass(frozen=True)
class TrainerConfig(TrainingSettings):
    """How a run of the mirror is computed, watched and kept."""

    engine = TORCH
    compiled_by_default: ClassVar[bool]
    """Whether a GPU's updates are compiled where --compile is not given."""

    batch: int = 32
    """Global batch size: sequences per optimizer step, summed over GPUs."""
    grad_accum_steps: int = 1
    """Gradient accumulation: micro-batches that a GPU splits its sequences into. Uses less memory; the update
    is the same up to rounding. More are made where the memory does not suffice."""
    optim: MirrorOptimizerConfig = MirrorOptimizerConfig()

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: the GPU if there is one."""
    kernels: Literal["auto", "cuda", "torch"] = "auto"
    """auto: our CUDA kernels where they can run, else plain PyTorch. cuda: only our kernels. torch: plain
    PyTorch."""
    compile: bool | None = None  # each command has its own default and help
