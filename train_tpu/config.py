"""The settings of `train_tpu.run`."""

import dataclasses
from pathlib import Path
from typing import Literal

from core import checks
from core.cli import Maybe
from core.config import preset
from core.errors import UserError
from core.run.guard import GuardConfig
from core.run.presets import TRAINING_DEFAULTS
from core.run.schedule import OptimizerConfig
from core.run.settings import ModelOverrides


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """Train a language model, or resume a run. `--out DIR` alone resumes DIR with its saved settings."""

    preset: str = "mtlm1-tiny"
    """mtlm1-88m, mtlm1-200m, mtlm2-40m, mtlm1-tiny or mtlm2-tiny."""
    data: str = "builtin"
    """A prepared folder, text files (.txt, .jsonl, .json, .parquet, also .gz, .bz2, .xz, .zst), a folder,
    a glob, tfds:NAME, hf:DATASET, or the built-in corpus of English documentation."""
    tokenizer: Maybe[str] = None
    """mistral, bytes or a path to a tokenizer.json. Default: the prepared data's; else bytes for the
    tiny presets and mistral for the others."""
    out: Maybe[Path] = None
    """The run folder. Default: runs/PRESET."""
    seed: int = 0

    steps: Maybe[int] = None
    """Optimizer steps of the whole run. Default: as many as --epochs asks for."""
    epochs: Maybe[float] = None
    """Passes over the training data, instead of --steps."""
    batch: int = 32
    """Global batch size: sequences per optimizer step, summed over devices."""
    accumulate: Maybe[int] = None
    """Gradient accumulation: split each batch into this many micro-batches. Uses less memory; the update is
    the same up to rounding. Default: 1; on a TPU, enough for 8,192 tokens per chip."""
    model: ModelOverrides = ModelOverrides()
    optim: OptimizerConfig = OptimizerConfig()
    guard: GuardConfig = GuardConfig()
    z_loss: float = 0.0
    """Weight of the squared log-normaliser in the loss; 1e-4 keeps logits from drifting."""
    on_bad_record: Literal["fail", "skip"] = "fail"
    """A damaged training record ends the run, or its sequence is left out of the loss."""
    init_from: Maybe[Path] = None
    """Start from the parameters of this run or checkpoint instead of random ones."""

    mesh: Maybe[str] = None
    """Device mesh, e.g. data=8, fsdp=8 or fsdp=4,tensor=2. data: replicate the model; fsdp: shard parameters
    and optimizer state, all-gather on use; tensor: split heads, MLP and vocabulary. The result is the same up
    to rounding. Default: all devices on data."""
    show_sharding: bool = False
    """Print how every parameter lies on the devices, and stop before training."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Activation dtype. auto: bfloat16 on GPU and TPU, float32 on CPU; a run keeps the one it was started
    with. Parameters and optimizer state are always float32."""
    attention: Literal["auto", "xla", "cudnn", "splash"] = "auto"
    unroll: Maybe[int] = None
    """Unroll factor of the scan over layers. Default: all layers on CPU and GPU, 1 on TPU (it compiles
    faster)."""
    remat: Maybe[Literal["none", "dots", "full"]] = None
    """Activation rematerialization. none: keep everything; dots: keep matmul outputs (and TPU attention),
    recompute the rest; full: recompute each layer. Default: none on CPU and GPU, dots on TPU."""
    loss_chunk: Maybe[int] = None
    """Chunk size of the cross-entropy, in tokens per device; logits are never materialized for more than
    this. Default: 8192 (TPU: 256 if the output head fits in VMEM)."""
    deterministic: bool = False
    """On a GPU: only operations whose result never varies, so that a resumed run is equal to the bit."""

    eval_every: Maybe[int] = None
    """Updates between evaluations, besides those before the first update and after the last; 0: only the
    last. Default: a tenth of the run."""
    eval_windows: int = 512
    """Windows of each held-out set that evaluations read; the last, and one where a model grew, read all."""
    eval_tasks: str = ""
    """Tasks of lm-evaluation-harness to evaluate along with the held-out sets: arc_easy,piqa."""
    eval_data_dir: Maybe[Path] = None
    """Where the tasks' data lies (see eval.run). Default: fetched from the Hugging Face hub."""
    eval_questions: int = 200
    """Questions of each task that evaluations during the run ask; the last asks all."""
    sample_every: Maybe[int] = None
    """Updates between samples; 0: none. Default: as --eval-every."""
    prompts: tuple[str, ...] = ("This function returns", "The", "In the early years of")
    """Prompts to sample from during training. Pass --prompts with no value to turn samples off."""
    save_every: Maybe[int] = None
    """Updates between checkpoints. Default: a tenth of the run."""
    save_minutes: float = 10.0
    """Also save when this much time has passed since the last checkpoint."""
    keep_last: int = 2
    """Checkpoints to keep."""
    keep_every: Maybe[int] = None
    """Also keep every checkpoint whose step is a multiple of this."""
    keep_steps: tuple[int, ...] = ()
    """Also save and keep the checkpoints of these steps."""
    stop_at: Maybe[int] = None
    """Stop when this step is reached, saved; the schedule stays that of all --steps. What is there then
    has not been decayed: a trunk, to grow or to resume."""
    log_every: int = 10
    """Updates between lines where the output is not a terminal; metrics.jsonl has every update."""

    coordinator: Maybe[str] = None
    """To train with several processes: HOST:PORT of the first, the same in all of them; or auto, for what a
    TPU pod, Slurm or MPI says. All must see the disk that --out is on. Default: this process alone."""
    num_processes: Maybe[int] = None
    """Total number of processes (with --coordinator HOST:PORT)."""
    process_id: Maybe[int] = None
    """Index of this process, 0 to num_processes - 1."""

    allow_change: tuple[str, ...] = ()
    """Settings that may differ from the run that is resumed, by name: --allow-change lr batch."""
    fallback: bool = False
    """If the newest checkpoint is damaged, resume from the newest intact one."""
    from_step: Maybe[int] = None
    """Resume from this older checkpoint; newer ones are renamed to left-STEP."""

    def __post_init__(self) -> None:
        if self.steps is not None and self.epochs is not None:
            raise UserError("give --steps or --epochs, not both")
        names = ("steps", "batch", "accumulate", "unroll", "loss_chunk", "eval_windows", "eval_questions",
                 "save_every", "keep_last", "keep_every", "log_every", "stop_at",
                 "num_processes")  # fmt: skip
        checks.counts(**checks.fields(self, *names))
        checks.counts(0, **checks.fields(self, "eval_every", "sample_every", "process_id", "from_step"))
        if self.from_step is not None and self.fallback:
            raise UserError("give --from-step or --fallback, not both")
        for step in self.keep_steps:
            checks.counts(keep_steps=step)
        checks.positive(**checks.fields(self, "epochs", "save_minutes"))
        checks.not_negative(z_loss=self.z_loss)
        checks.seeds(seed=self.seed)


def defaults(name: str) -> RunConfig:
    """The settings of a run of preset `name` where the command line says nothing else."""
    preset(name)  # refuses an unknown name
    given = TRAINING_DEFAULTS[name]
    optim = OptimizerConfig(lr=given["lr"], warmup=given["warmup"])
    return RunConfig(preset=name, batch=given["batch"], optim=optim)
