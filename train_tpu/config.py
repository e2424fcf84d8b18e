"""The settings of `train_tpu.run` and `train_tpu.finetune`."""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import tyro

from core import checks
from core.checkpoint.manifest import JAX
from core.config import preset
from core.run.presets import TRAINING_DEFAULTS
from core.run.schedule import OptimizerConfig
from core.run.settings import PretrainingSource, TrainingSettings
from core.run.tuning import OPTIMIZER, TuningSource

KernelsOption = Literal["auto", "cuda", "xla"]


@dataclasses.dataclass(frozen=True)
class JaxSettings(TrainingSettings):
    """How a run of JAX is computed, watched and kept."""

    engine = JAX

    grad_accum_steps: int | None = None
    """Gradient accumulation: split each batch into this many micro-batches. Uses less memory; the update is
    the same up to rounding. Default: 1; on a TPU, enough for 8,192 tokens per chip."""

    mesh: str | None = None
    """Device mesh, e.g. data=8, fsdp=8 or fsdp=4,tensor=2. data: replicate the model; fsdp: shard parameters
    and optimizer state, all-gather on use; tensor: split heads, MLP and vocabulary. The result is the same up
    to rounding. Default: all devices on data."""
    show_sharding: bool = False
    """Print how every parameter is sharded over the devices, and stop before training."""
    attention: Literal["auto", "xla", "cudnn", "triton", "splash"] = "auto"
    """Attention implementation. auto: cudnn on a GPU (with --deterministic triton) and splash on a TPU where
    they can be used, else xla."""
    kernels: KernelsOption = "auto"
    """auto: our CUDA kernels for norms, rotation, SwiGLU, GELU, loss and AdamW on a GPU that they can run on,
    else XLA's operations. cuda: only our kernels. xla: only XLA's operations."""
    unroll: int | None = None
    """Unroll factor of the scan over layers. Default: all layers on CPU and GPU, 1 on TPU (it compiles
    faster)."""
    recompile: bool = True
    """Compile again what changed shape, type or sharding while the run is on, and say what it was;
    --no-recompile ends the run instead."""
    remat: Literal["none", "dots", "full"] | None = None
    """Activation rematerialization. none: keep everything; dots: keep matmul outputs (and TPU attention),
    recompute the rest; full: recompute each layer. Default: none on CPU and GPU, dots on TPU."""
    loss_chunk: int | None = None
    """Chunk size of the cross-entropy, in tokens per device; logits are never materialized for more than
    this. Default: 8192 (with our kernels 16384; TPU: 256 if the output head fits in VMEM)."""

    coordinator: str | None = None
    """To train with several processes: HOST:PORT of the first, the same in all of them; or auto, for what a
    TPU pod, Slurm or MPI says. All must see the disk that --out is on. Default: this process alone."""
    num_processes: int | None = None
    """Total number of processes (with --coordinator HOST:PORT)."""
    process_id: int | None = None
    """Index of this process, 0 to num_processes - 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.counts(**checks.fields(self, "unroll", "loss_chunk", "num_processes"))
        checks.counts(0, process_id=self.process_id)


@dataclasses.dataclass(frozen=True)
class RunConfig(JaxSettings, PretrainingSource):
    """Train a language model, or resume a run. `--out DIR` alone resumes DIR with its saved settings."""

    tokenizer: str | None = None
    """mistral, bytes or a path to a tokenizer.json. Default: the prepared data's; else bytes for the
    tiny presets and mistral for the others."""
    init_from: Path | None = None
    """Start from the parameters of this run or checkpoint instead of random ones."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_source()


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinetuneConfig(TuningSource, JaxSettings):
    """Fine-tune a model on rows of text, of prompts and responses, or of conversations; the same command
    resumes."""

    init_from: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="CHECKPOINT")]
    """The run or checkpoint to start from; of a run, its newest checkpoint."""
    out: Path
    """The run folder. Its checkpoints hold the whole tuned model, with LoRA the adapters merged into it."""
    optim: OptimizerConfig = OptimizerConfig(**OPTIMIZER)

    # What runs on rows have not.
    preset = None
    document_mask = False
    watch_every = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_tuning()


def defaults(name: str) -> RunConfig:
    """The settings of a run of preset `name` where the command line says nothing else."""
    preset(name)  # refuses an unknown name
    given = TRAINING_DEFAULTS[name]
    optim = OptimizerConfig(lr=None, warmup=given["warmup"], decay=given["decay"])
    return RunConfig(preset=name, batch=given["batch"], optim=optim)
