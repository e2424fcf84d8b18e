"""The settings of a training run, as they stand on the command line and in a run folder's config.json."""

import dataclasses
import json
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

from core import checks
from core.config import ModelConfig, preset
from core.errors import UserError
from train_tpu.optimizer import OptimizerConfig
from train_tpu.step import GuardConfig


@dataclasses.dataclass(frozen=True)
class ModelOverrides:
    """Departures from the preset; what is not given is the preset's."""

    context: int | None = None
    d_model: int | None = None
    n_layers: int | None = None
    n_heads: int | None = None
    d_mlp: int | None = None
    positions: Literal["rope", "learned"] | None = None
    mlp: Literal["swiglu", "gelu"] | None = None
    biases: bool | None = None
    tied: bool | None = None
    rope_theta: float | None = None
    norm_eps: float | None = None
    dropout: float | None = None
    init_std: float | None = None
    scaled_residual_init: bool | None = None
    """Init of the projections into the residual stream divided by sqrt(2 layers)."""

    def __post_init__(self) -> None:
        checks.counts(**checks.fields(self, "context", "d_model", "n_layers", "n_heads", "d_mlp"))
        checks.positive(**checks.fields(self, "rope_theta", "norm_eps", "init_std"))
        checks.below_one(dropout=self.dropout)


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """Train a model from scratch, or go on with a run: --out DIR alone resumes the run in DIR as it is."""

    preset: str = "mtlm1-tiny"
    """mtlm1-88m, mtlm1-200m, mtlm2-40m, mtlm1-tiny or mtlm2-tiny."""
    data: str = "builtin"
    """A prepared folder, text files (.txt, .jsonl, .parquet, also .gz .xz .zst; a folder or a glob),
    tfds:NAME, hf:DATASET, or the built-in corpus of English documentation."""
    tokenizer: str | None = None
    """mistral, bytes or a path to a tokenizer.json. Default: the prepared data's; else bytes for the
    tiny presets and mistral for the others."""
    out: Path | None = None
    """The run folder. Default: runs/PRESET."""
    seed: int = 0

    steps: int | None = None
    """Updates in all. Default: as many as --epochs asks for, else the preset's."""
    epochs: float | None = None
    """Passes over the training data, instead of --steps."""
    batch: int = 32
    """Sequences an update, over all devices."""
    accumulate: int | None = None
    """Parts that a batch is computed in, one after the other: less memory, the same result. Default: 1; on a
    TPU as many as leave a chip 8,192 tokens at a time."""
    model: ModelOverrides = ModelOverrides()
    optim: OptimizerConfig = OptimizerConfig()
    guard: GuardConfig = GuardConfig()
    z_loss: float = 0.0
    """Weight of the squared log-normaliser in the loss; 1e-4 keeps logits from drifting."""
    on_bad_record: Literal["fail", "skip"] = "fail"
    """A damaged training record ends the run, or its sequence is left out of the loss."""
    init_from: Path | None = None
    """Start from the parameters of this run or checkpoint instead of random ones."""

    mesh: str | None = None
    """How the devices are arranged: data=8, fsdp=8, or fsdp=4,tensor=2. Along `data` each holds the whole
    model, along `fsdp` a part of it that is gathered when it is used, along `tensor` some heads, MLP width
    and vocabulary to compute with. The same result up to rounding. Default: all devices along `data`."""
    show_sharding: bool = False
    """Print how every parameter lies on the devices, and stop before training."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of activations; auto is bfloat16 on GPU and TPU, float32 on a CPU."""
    attention: Literal["auto", "xla", "cudnn", "splash"] = "auto"
    unroll: int | None = None
    """Layers a step of the layer loop holds. Default: all on a CPU or GPU, 1 on a TPU."""
    remat: Literal["none", "dots", "full"] | None = None
    """What the backward pass computes again to save memory: nothing, all but matrix products and a TPU's
    attention, or whole layers. Default: none on a CPU or GPU, dots on a TPU."""
    loss_chunk: int | None = None
    """Tokens whose logits are held at once on a device. Default: 8192; on a TPU 256 where the head is small
    enough to stay on the chip with them."""
    deterministic: bool = False
    """On a GPU: only operations whose result never varies, so that a resumed run is equal to the bit."""

    eval_every: int | None = None
    """Updates between evaluations, besides those before the first update and after the last.
    Default: a tenth of the run."""
    eval_windows: int = 512
    """Windows of each held-out set that evaluations during the run read; the first and last read all."""
    eval_tasks: str = ""
    """Tasks of lm-evaluation-harness to evaluate along with the held-out sets: arc_easy,piqa."""
    eval_data_dir: Path | None = None
    """Where the tasks' data lies (see eval.run). Default: fetched from the Hugging Face hub."""
    eval_questions: int = 200
    """Questions of each task that evaluations during the run ask; the last asks all."""
    sample_every: int | None = None
    """Updates between samples. Default: as --eval-every."""
    prompts: tuple[str, ...] = ("This function returns", "The", "In the early years of")
    """What the samples go on from."""
    save_every: int | None = None
    """Updates between checkpoints. Default: a tenth of the run."""
    save_minutes: float = 10.0
    """Also save when this much time has passed since the last checkpoint."""
    keep_last: int = 2
    """Checkpoints to keep."""
    keep_every: int | None = None
    """Also keep every checkpoint whose step is a multiple of this."""
    keep_steps: tuple[int, ...] = ()
    """Also save and keep the checkpoints of these steps."""
    stop_at: int | None = None
    """Stop when this step is reached, saved; the schedule stays that of all --steps. What is there then
    has not been decayed: a trunk, to grow or to go on with."""
    log_every: int = 10
    """Updates between lines where the output is not a terminal; metrics.jsonl has every update."""

    coordinator: str | None = None
    """To train with several processes: HOST:PORT of the first, the same in all of them; or auto, for what a
    TPU pod, Slurm or MPI says. All must see the disk that --out is on. Default: this process alone."""
    num_processes: int | None = None
    """How many they are."""
    process_id: int | None = None
    """Which of them this one is, from 0."""

    allow_change: tuple[str, ...] = ()
    """Settings that may differ from the run that is resumed, by name: --allow-change steps lr."""
    fallback: bool = False
    """If the newest checkpoint is damaged, resume from the newest intact one."""

    def __post_init__(self) -> None:
        if self.steps is not None and self.epochs is not None:
            raise UserError("give --steps or --epochs, not both")
        names = ("steps", "batch", "accumulate", "unroll", "loss_chunk", "eval_windows", "eval_every",
                 "eval_questions", "sample_every", "save_every", "keep_last", "keep_every", "log_every",
                 "stop_at", "num_processes")  # fmt: skip
        checks.counts(**checks.fields(self, *names))
        checks.counts(0, process_id=self.process_id)
        for step in self.keep_steps:
            checks.counts(keep_steps=step)
        checks.positive(**checks.fields(self, "epochs", "save_minutes"))
        checks.not_negative(z_loss=self.z_loss)
        checks.seeds(seed=self.seed)


# What a preset is trained with if nothing else is said; those of 40M and more are those of docs/RESULTS.md.
_TINY = {"steps": 350, "batch": 16, "tokenizer": "bytes", "lr": 1e-2, "warmup": 50}
_MTLM1 = {"epochs": 1.0, "batch": 128, "tokenizer": "mistral", "lr": 1e-3, "warmup": 100}
TRAINING_DEFAULTS: dict[str, dict[str, Any]] = {
    "mtlm1-tiny": _TINY,
    "mtlm2-tiny": _TINY,
    "mtlm1-88m": _MTLM1,
    "mtlm1-200m": _MTLM1,
    "mtlm2-40m": _MTLM1 | {"epochs": 2.0, "lr": 1.5e-3},
}


def defaults(name: str) -> RunConfig:
    """The settings of a run of preset `name` where the command line says nothing else."""
    preset(name)  # refuses an unknown name
    given = TRAINING_DEFAULTS[name]
    optim = OptimizerConfig(lr=given["lr"], warmup=given["warmup"])
    return RunConfig(preset=name, batch=given["batch"], optim=optim)


# Settings that change how a run is watched, kept or carried out, but not its losses; data and tokenizer are
# compared by what they hold and not by their names.
FREE_SETTINGS = frozenset((
    "out", "data", "tokenizer", "eval_every", "eval_windows", "eval_tasks", "eval_data_dir", "eval_questions",
    "sample_every", "prompts", "save_every", "save_minutes", "keep_last", "keep_every", "keep_steps",
    "stop_at", "log_every", "init_from", "allow_change", "fallback",
))  # fmt: skip
# Settings that a run folder does not pass on to the next start: they are of one start only.
ONCE = ("allow_change", "fallback", "stop_at")


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


def require_same(
    old: dict[str, Any],
    new: dict[str, Any],
    allowed: tuple[str, ...],
    where: Path,
    defaults: Any,
) -> None:
    """Refuses to resume a run under settings that would make it another run.

    `defaults` are those of the command: what `old` lacks, since it is older, had them.

    Raises:
        UserError: a setting differs and is not named in `allowed`; both values are given.
    """
    unknown = sorted(set(allowed) - set(new))
    if unknown:
        raise UserError(f"--allow-change names {unknown[0]!r}, which is not a setting")
    old = flatten(defaults) | old
    for name in sorted(set(old) | set(new)):
        if name in FREE_SETTINGS or name in allowed or old.get(name) == new.get(name):
            continue
        flag = name.replace("_", "-")
        raise UserError(
            f"the run in {where} was started with --{flag} {old.get(name)}, not {new.get(name)}: give the "
            f"same value, another --out, or --allow-change {name} if the change is meant"
        )
