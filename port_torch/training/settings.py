"""The settings that both commands share, on the command line and in a run folder's config.json."""

import dataclasses
from typing import Literal

import tyro

from core import checks
from core.cli import Maybe
from core.errors import UserError
from core.run.guard import GuardConfig
from core.run.schedule import OptimizerConfig
from train_tpu.config import RunConfig

Hidden = tyro.conf.Suppress
_THEIRS = RunConfig()


@dataclasses.dataclass(frozen=True)
class AdamWConfig(OptimizerConfig):
    """AdamW and the learning rate's schedule, without what is Muon's or growing's."""

    optimizer: Hidden[Literal["adamw"]] = "adamw"
    lr: float = 1e-3
    """Peak learning rate of AdamW."""
    momentum: Hidden[float] = 0.95
    rewarm: Hidden[int] = 0
    rewarm_at: Hidden[int] = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.between_zero_and_one(**checks.fields(self, "beta1", "beta2"))


@dataclasses.dataclass(frozen=True)
class TrainerConfig:
    """How a run is computed, watched and kept."""

    seed: int = 0
    steps: Maybe[int] = None
    """Optimizer steps of the whole run, instead of --epochs."""
    epochs: Maybe[float] = None
    """Passes over the training data."""
    batch: int = 32
    """Global batch size: sequences per optimizer step, summed over GPUs."""
    accumulate: int = 1
    """Gradient accumulation: micro-batches that a GPU splits its sequences into. Uses less memory; the update
    is the same up to rounding. More are made where the memory does not suffice."""
    optim: AdamWConfig = AdamWConfig()
    guard: GuardConfig = GuardConfig()
    z_loss: float = 0.0
    """Weight of the squared log-normaliser in the loss; 1e-4 keeps logits from drifting."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto is the GPU where there is one."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Activation dtype. auto: bfloat16 on a GPU, float32 on a CPU. Parameters stay float32."""
    kernels: Literal["auto", "cuda", "torch"] = "auto"
    """Our CUDA kernels where they are, nothing but them, or plain PyTorch."""
    compile: Maybe[bool] = None
    """torch.compile: a minute at the start for faster steps. Default: on a GPU."""
    deterministic: bool = False
    """On a GPU: only operations whose result never varies, so that a resumed run is equal to the bit."""

    eval_every: Maybe[int] = None
    """Updates between evaluations, besides those before the first update and after the last; 0: only the
    last. Default: a tenth of the run."""
    eval_windows: int = 512
    """Windows of each held-out set that evaluations read; the last reads all."""
    sample_every: Maybe[int] = None
    """Updates between samples; 0: none. Default: as --eval-every."""
    prompts: tuple[str, ...] = _THEIRS.prompts
    """Prompts to sample from during training. Pass --prompts with no value to turn samples off."""
    save_every: Maybe[int] = None
    """Updates between checkpoints. Default: a tenth of the run."""
    save_minutes: float = 10.0
    """Also save when this much time has passed since the last checkpoint."""
    keep_last: int = 2
    """Checkpoints to keep."""
    stop_at: Maybe[int] = None
    """Stop when this step is reached, saved; the schedule stays that of all steps."""
    log_every: int = 10
    """Updates between lines where the output is not a terminal; metrics.jsonl has every update."""

    allow_change: tuple[str, ...] = ()
    """Settings that may differ from the run that is resumed, by name: --allow-change lr batch."""
    fallback: bool = False
    """If the newest checkpoint is damaged, resume from the newest intact one."""
    from_step: Maybe[int] = None
    """Resume from this older checkpoint; newer ones are renamed to left-STEP."""

    def __post_init__(self) -> None:
        if self.steps is not None and self.epochs is not None:
            raise UserError("give --steps or --epochs, not both")
        names = ("steps", "batch", "accumulate", "eval_windows", "save_every", "keep_last", "stop_at",
                 "log_every")  # fmt: skip
        checks.counts(**checks.fields(self, *names))
        checks.counts(0, **checks.fields(self, "eval_every", "sample_every", "from_step"))
        if self.from_step is not None and self.fallback:
            raise UserError("give --from-step or --fallback, not both")
        checks.positive(**checks.fields(self, "epochs", "save_minutes"))
        checks.not_negative(z_loss=self.z_loss)
        checks.seeds(seed=self.seed)
