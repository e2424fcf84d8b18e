"""The settings of a training run, as they stand on the command line and in a run folder's config.json."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

from core import checks
from core.cli import Maybe
from core.config import PRESETS, ModelConfig, preset
from core.errors import UserError
from core.run.guard import GuardConfig
from core.run.schedule import OptimizerConfig


@dataclasses.dataclass(frozen=True)
class ModelOverrides:
    """Changes to the preset's model; what is not given is the preset's."""

    context: Maybe[int] = None
    """Longest sequence, in tokens; the data is cut into windows of this length."""
    d_model: Maybe[int] = None
    """Width of the residual stream."""
    n_layers: Maybe[int] = None
    """Transformer layers."""
    n_heads: Maybe[int] = None
    """Attention heads."""
    d_mlp: Maybe[int] = None
    """Hidden width of the MLP."""
    positions: Maybe[Literal["rope", "learned"]] = None
    """Rotary position embeddings, or a learned table."""
    mlp: Maybe[Literal["swiglu", "gelu"]] = None
    """SwiGLU (gate, up, down), or GELU in its tanh form (up, down)."""
    biases: Maybe[bool] = None
    """Biases in attention and MLP."""
    tied: Maybe[bool] = None
    """Whether the output head is the embedding table."""
    rope_theta: Maybe[float] = None
    """Base of the rotary frequencies."""
    norm_eps: Maybe[float] = None
    """Epsilon of RMSNorm."""
    dropout: Maybe[float] = None
    """Dropout probability of the embeddings and of each branch's output."""
    init_std: Maybe[float] = None
    """Standard deviation of the initial weights."""
    scaled_residual_init: Maybe[bool] = None
    """Init of the projections into the residual stream divided by sqrt(2 layers)."""

    def __post_init__(self) -> None:
        checks.counts(**checks.fields(self, "context", "d_model", "n_layers", "n_heads", "d_mlp"))
        checks.positive(**checks.fields(self, "rope_theta", "norm_eps", "init_std"))
        checks.below_one(dropout=self.dropout)


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


# What a preset is trained with if nothing else is said; docs/RESULTS.md has the measurements. The rates are
# Muon's. 2e-3 is the best of 1e-3, 2e-3 and 4e-3 on two held-out sets of three; 4e-3 is the highest that was
# trained to the end of the 40M's two epochs; the 200M was measured at 1e-3 alone and keeps it.
_TINY = {"steps": 350, "batch": 16, "tokenizer": "bytes", "lr": 1e-2, "warmup": 50}
_LARGE = {"epochs": 1.0, "batch": 128, "tokenizer": "mistral", "warmup": 100}
TRAINING_DEFAULTS: dict[str, dict[str, Any]] = {
    "mtlm1-tiny": _TINY,
    "mtlm2-tiny": _TINY,
    "mtlm1-88m": _LARGE | {"lr": 2e-3},
    "mtlm1-200m": _LARGE | {"lr": 1e-3},
    "mtlm2-40m": _LARGE | {"epochs": 2.0, "lr": 4e-3},
}


def defaults(name: str) -> RunConfig:
    """The settings of a run of preset `name` where the command line says nothing else."""
    preset(name)  # refuses an unknown name
    given = TRAINING_DEFAULTS[name]
    optim = OptimizerConfig(lr=given["lr"], warmup=given["warmup"])
    return RunConfig(preset=name, batch=given["batch"], optim=optim)


def for_help(config: Any, argv: Sequence[str]) -> Any:
    """`config` as the defaults of a command line: with the preset's own values where --help is asked for.

    Otherwise what is not given stays None, so that a command can tell it from what is.
    """
    if not {"--help", "-h"} & set(argv):
        return config
    model = dataclasses.asdict(model_config(config, preset(config.preset).vocab_size))
    names = [field.name for field in dataclasses.fields(ModelOverrides)]
    shown = dataclasses.replace(config, model=ModelOverrides(**{name: model[name] for name in names}))
    if shown.steps is None and shown.epochs is None:
        given = TRAINING_DEFAULTS[config.preset]
        shown = dataclasses.replace(shown, steps=given.get("steps"), epochs=given.get("epochs"))
    return shown


# Settings that change how a run is watched, kept or carried out, but not its losses; data and tokenizer are
# compared by what they hold and not by their names.
FREE_SETTINGS = frozenset((
    "out", "data", "tokenizer", "eval_every", "eval_windows", "eval_tasks", "eval_data_dir", "eval_questions",
    "sample_every", "prompts", "save_every", "save_minutes", "keep_last", "keep_every", "keep_steps",
    "stop_at", "log_every", "init_from", "allow_change", "fallback", "from_step",
))  # fmt: skip
# Settings that a run folder does not pass on to the next start: they are of one start only.
ONCE = ("allow_change", "fallback", "from_step", "stop_at")


def model_config(config: RunConfig, vocab_size: int) -> ModelConfig:
    """The preset with the overrides and the tokenizer's vocabulary."""
    overrides = {k: v for k, v in dataclasses.asdict(config.model).items() if v is not None}
    return dataclasses.replace(preset(config.preset), vocab_size=vocab_size, **overrides)


def flatten(config: Any) -> dict[str, Any]:
    """Settings by the names they have on the command line, as JSON values."""
    flat: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            flat.update(flatten(value))
        else:
            flat[field.name] = json.loads(json.dumps(value, default=str))
    return flat


def unflatten(flat: dict[str, Any], kind: type = RunConfig) -> Any:
    """The settings that `flatten` made `flat` of; what it lacks, since it is older, has its default."""
    values: dict[str, Any] = {}
    hints = get_type_hints(kind)
    for field in dataclasses.fields(kind):
        if dataclasses.is_dataclass(field.default):
            values[field.name] = unflatten(flat, type(field.default))
        elif field.name in flat:
            value = flat[field.name]
            if Path in (hints[field.name], *get_args(hints[field.name])) and value is not None:
                value = Path(value)
            values[field.name] = tuple(value) if isinstance(value, list) else value
    return kind(**values)


def resolved(run: dict[str, Any]) -> dict[str, Any]:
    """A recorded run's settings as they are compared: the preset's values where the model's are not given."""
    model = PRESETS.get(run.get("preset", ""))
    names = [field.name for field in dataclasses.fields(ModelOverrides)] if model else []
    return run | {name: getattr(model, name) for name in names if run.get(name) is None}


def require_same(
    old: dict[str, Any],
    new: dict[str, Any],
    allowed: tuple[str, ...],
    where: Path,
    defaults: Any,
    mesh: Callable[[str | None], str] = str,
) -> None:
    """Refuses to resume a run under settings that would make it another run.

    Args:
        defaults: those of the command: what `old` lacks, since it is older, had them.
        mesh: what a mesh's description stands for on the devices that there are.

    Raises:
        UserError: a setting differs and is not named in `allowed`; both values are given.
    """
    unknown = sorted(set(allowed) - set(new))
    if unknown:
        raise UserError(f"--allow-change names {unknown[0]!r}, which is not a setting")
    old, new = resolved(flatten(defaults) | old), resolved(new)
    if old.get("dtype") == "auto":  # older records do not say what it stood for
        old["dtype"] = new["dtype"]
    if "mesh" in new:
        old["mesh"], new["mesh"] = mesh(old["mesh"]), mesh(new["mesh"])
    for name in sorted(set(old) | set(new)):
        if name in FREE_SETTINGS or name in allowed or old.get(name) == new.get(name):
            continue
        flag = name.replace("_", "-")
        raise UserError(
            f"the run in {where} was started with --{flag} {old.get(name)}, not {new.get(name)}: give the "
            f"same value, another --out, or --allow-change {name} if the change is meant"
        )
