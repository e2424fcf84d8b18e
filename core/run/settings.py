"""The settings of a training run, as they stand on the command line and in a run folder's config.json."""

import dataclasses
import itertools
import json
import re
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args, get_type_hints

from core import checks
from core.checkpoint.steps import Keep
from core.config import PRESETS, Mlp, ModelConfig, preset
from core.data.mixture_options import NAME, parse_mixture
from core.errors import UserError
from core.run.guard import GuardConfig
from core.run.profiling import parse_updates
from core.run.schedule import OptimizerConfig

_COUNTS = ("vocab_size", "context", "d_model", "n_layers", "n_heads", "n_kv_heads", "head_dim", "d_mlp")


@dataclasses.dataclass(frozen=True)
class ModelOverrides:
    """Changes to the preset's model; what is not given is the preset's."""

    vocab_size: int | None = None
    """Rows of the embedding, where they are more than the tokenizer has ids."""
    context: int | None = None
    """Longest sequence, in tokens; the data is cut into windows of this length."""
    d_model: int | None = None
    """Width of the residual stream."""
    n_layers: int | None = None
    """Transformer layers."""
    n_heads: int | None = None
    """Attention heads."""
    n_kv_heads: int | None = None
    """Heads of keys and values (grouped-query attention); n_heads is a multiple of it."""
    head_dim: int | None = None
    """Size of a head, where it is not d_model / n_heads."""
    d_mlp: int | None = None
    """Hidden width of the MLP."""
    positions: Literal["rope", "learned"] | None = None
    """Rotary position embeddings, or a learned table."""
    mlp: Mlp | None = None
    """The MLP: gated (SwiGLU), or two layers with another activation."""
    biases: bool | None = None
    """Biases in attention and MLP."""
    qkv_biases: bool | None = None
    """Biases of queries, keys and values alone."""
    qk_norm: bool | None = None
    """RMSNorm of queries and keys."""
    tied: bool | None = None
    """Whether the output head is the embedding table."""
    rope_theta: float | None = None
    """Base of the rotary frequencies."""
    rope_scaling: str | None = None
    """Scaled rotary frequencies: linear,factor=2 or llama3,factor=... or yarn,factor=... or none."""
    norm_eps: float | None = None
    """Epsilon of RMSNorm."""
    dropout: float | None = None
    """Dropout probability of the embeddings and of each branch's output."""
    init_std: float | None = None
    """Standard deviation of the initial weights."""
    scaled_residual_init: bool | None = None
    """Init of the projections into the residual stream divided by sqrt(2 layers)."""

    def __post_init__(self) -> None:
        checks.counts(**checks.fields(self, *_COUNTS))
        checks.positive(**checks.fields(self, "rope_theta", "norm_eps", "init_std"))
        checks.below_one(dropout=self.dropout)


@dataclasses.dataclass(frozen=True)
class TrainingSettings:
    """How any run is trained, watched and kept; each command adds its own."""

    engine: ClassVar[str]
    """Which one trains: JAX or TORCH of core.checkpoint.manifest."""

    seed: int = 0
    """Of the initial weights, the order of the data, dropout and samples."""
    steps: int | None = None
    """Optimizer steps of the whole run. Default: as many as --epochs asks for."""
    epochs: float | None = None
    """Passes over the training data, instead of --steps."""
    batch: int = 32
    """Global batch size: sequences per optimizer step, summed over devices."""
    grad_accum_steps: int | None = None  # each engine has its own default and help
    optim: OptimizerConfig = OptimizerConfig()
    guard: GuardConfig = GuardConfig()
    z_loss: float = 0.0
    """Weight of the squared log-normaliser in the loss; 1e-4 keeps logits from drifting."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Activation dtype. auto: bfloat16 on GPU and TPU, float32 on CPU; a run keeps the one it was started
    with. Parameters and optimizer state are always float32."""
    deterministic: bool = False
    """On a GPU: use deterministic operations only, so that a resumed run is equal to the bit."""

    eval_every: int | None = None
    """Steps between evaluations, besides those before the first step and after the last; 0: only the last.
    Default: a tenth of the run."""
    eval_windows: int = 512
    """Windows per held-out set in evaluations during the run; the last one, and one where a model grew, use
    all."""
    eval_tasks: str = ""
    """Tasks of lm-evaluation-harness to run at each evaluation, for example arc_easy,piqa."""
    eval_data_dir: Path | None = None
    """Folder with the tasks' data (see eval.run). Default: downloaded from the Hugging Face Hub."""
    eval_questions: int = 200
    """Questions per task in evaluations during the run; the last one asks all."""
    sample_every: int | None = None
    """Steps between samples; 0: none. Default: as --eval-every."""
    prompts: tuple[str, ...] = ("This function returns", "The", "In the early years of")
    """Prompts to sample from during training. Pass --prompts with no value to turn samples off."""
    save_every: int | None = None
    """Steps between checkpoints. Default: a tenth of the run."""
    save_minutes: float = 10.0
    """Also save when this much time has passed since the last checkpoint."""
    keep_last: int = 2
    """Number of newest checkpoints to keep."""
    keep_every: int | None = None
    """Also keep every checkpoint whose step is a multiple of this."""
    keep_steps: tuple[int, ...] = ()
    """Also save and keep the checkpoints of these steps."""
    stop_at: int | None = None
    """Save and stop at this step. The schedule stays that of all --steps, so the model has not been decayed
    yet: a trunk, to grow or to resume."""
    profile: str | None = None
    """Trace these updates, 100:105 for 100 to 104, for Perfetto (JAX: or XProf), into the run folder's
    profile/, and print the ten costliest operations."""
    log_every: int = 10
    """Steps between lines of output where it is not a terminal; metrics.jsonl has every step."""

    allow_change: tuple[str, ...] = ()
    """Settings that may differ from the run that is resumed, by name: --allow-change lr batch."""
    fallback: bool = False
    """If the newest checkpoint is damaged, resume from the newest intact one."""
    from_step: int | None = None
    """Resume from this older checkpoint; newer ones are renamed to left-STEP."""

    def __post_init__(self) -> None:
        if self.steps is not None and self.epochs is not None:
            raise UserError("give --steps or --epochs, not both")
        if self.from_step is not None and self.fallback:
            raise UserError("give --from-step or --fallback, not both")
        names = ("steps", "batch", "grad_accum_steps", "eval_windows", "eval_questions", "save_every",
                 "keep_last", "keep_every", "log_every", "stop_at")  # fmt: skip
        checks.counts(**checks.fields(self, *names))
        checks.counts(0, **checks.fields(self, "eval_every", "sample_every", "from_step"))
        for step in self.keep_steps:
            checks.counts(keep_steps=step)
        checks.positive(**checks.fields(self, "epochs", "save_minutes"))
        if self.profile is not None:
            parse_updates(self.profile)
        checks.not_negative(z_loss=self.z_loss)
        checks.seeds(seed=self.seed)

    @property
    def keep(self) -> Keep:
        """Which checkpoints are kept."""
        return Keep(self.keep_last, self.keep_every, self.keep_steps)


@dataclasses.dataclass(frozen=True)
class PretrainingSource:
    """The model and the text of a run that pretrains."""

    preset: str = "mtlm1-tiny"
    """mtlm1-88m, mtlm1-200m, mtlm2-40m, mtlm1-tiny, mtlm2-tiny, or the shape of smollm2-135m, smollm2-360m or
    qwen3-0.6b."""
    data: str | tuple[str, ...] = "builtin"
    """A prepared folder, text files (.txt, .jsonl, .json, .parquet, also .gz, .bz2, .xz, .zst), a folder,
    a glob, tfds:NAME, hf:DATASET, or the built-in corpus of English documentation. Several are mixed, each
    with a name: wiki=DIR books=DIR."""
    weights: tuple[str, ...] = ()
    """Shares of the windows that a mixture takes from each source: wiki=0.7 books=0.3."""
    phases: tuple[str, ...] = ()
    """Other shares later in the run: 0.8 wiki=0.3 books=0.7 from four fifths of it on, 0.9 books=1 ... Once
    the run has begun, they stay where they are, whatever --steps says."""
    tokenizer: str | None = None  # each engine has its own help
    out: Path | None = None
    """The run folder. Default: runs/PRESET."""
    model: ModelOverrides = ModelOverrides()
    on_bad_record: Literal["fail", "skip"] = "fail"
    """fail: a damaged training record ends the run. skip: its sequence is left out of the loss."""
    leave_out: tuple[int | str, ...] = ()
    """Training records to leave out of the loss, as the guard and train_tpu.replay name them."""
    document_mask: bool = False
    """End attention and positions at the documents of a window: no document sees another. Held-out losses of
    the run are then computed so, too."""
    watch_every: int = 0
    """Measure every layer at each update whose number is a multiple of this (norms, activations, attention),
    for train_tpu.inspect; 0: never."""

    def check_source(self) -> None:
        """Raises a UserError for what is out of range. Each command's settings call it once made."""
        check_records(leave_out=self.leave_out)
        parse_mixture(self.data, self.weights, self.phases)
        checks.counts(0, watch_every=self.watch_every)


# Overrides that a preset has the values of; the vocabulary is the tokenizer's.
FROM_PRESET = tuple(f.name for f in dataclasses.fields(ModelOverrides) if f.name != "vocab_size")
# Settings that change how a run is watched, kept or carried out, but not its losses; data, its mixture and
# tokenizer are compared by what they hold and not by their names.
FREE_SETTINGS = frozenset((
    "out", "data", "weights", "phases", "tokenizer", "eval_every", "eval_windows", "eval_tasks",
    "eval_data_dir", "eval_questions", "sample_every", "prompts", "save_every", "save_minutes", "keep_last",
    "keep_every", "keep_steps",
    "stop_at", "log_every", "init_from", "allow_change", "fallback", "from_step", "kernels",
    "recompile", "profile", "watch_every",
))  # fmt: skip
MIXTURE = "mixture"  # what --allow-change calls the sources, --weights and --phases
# What older and grown records say where they do not say what it stood for.
AUTOMATIC = {"dtype": "auto", "grad_accum_steps": None}
# Settings that a run folder does not pass on to the next start: they are of one start only.
ONCE = ("allow_change", "fallback", "from_step", "stop_at", "profile")


def check_records(**options: Collection[int | str]) -> None:
    """A UserError for what is no training record: a number or, of a mixture, SOURCE:NUMBER."""
    for name, records in options.items():
        for record in records:
            if isinstance(record, int):
                checks.counts(0, **{name: record})
            elif not re.fullmatch(rf"{NAME}:\d+", record):
                raise UserError(f"{checks.option(name)} {record}: give a record's number, or SOURCE:NUMBER")


def model_config(config: Any, vocab_size: int) -> ModelConfig:
    """The preset with the overrides, and as many rows in its embedding as the tokenizer has ids or more.

    Raises:
        UserError: there can be no such model, or --vocab-size is below `vocab_size`.
    """
    overrides = {k: v for k, v in dataclasses.asdict(config.model).items() if v is not None}
    rows = overrides.setdefault("vocab_size", vocab_size)
    if rows < vocab_size:
        raise UserError(f"--vocab-size {rows} is below the {vocab_size} ids of the tokenizer")
    return dataclasses.replace(preset(config.preset), **overrides)


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


RENAMED = {"accumulate": "grad_accum_steps"}  # settings as older records name them


def current_names(record: dict[str, Any]) -> dict[str, Any]:
    """A recorded run's settings under the names that they have now."""
    return {RENAMED.get(name, name): value for name, value in record.items()}


def unflatten(flat: dict[str, Any], kind: type) -> Any:
    """The settings that `flatten` made `flat` of; what it lacks, since it is older, has its default."""
    flat = current_names(flat)
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
    names = FROM_PRESET if model else ()
    return run | {name: getattr(model, name) for name in names if run.get(name) is None}


def require_same(
    old: dict[str, Any],
    new: dict[str, Any],
    allowed: tuple[str, ...],
    where: Path,
    defaults: Any,
    mesh: Callable[[str | None], str] = str,
    free: Collection[str] = FREE_SETTINGS,
) -> None:
    """Refuses to resume a run under settings that would make it another run.

    Args:
        defaults: those of the command: what `old` lacks, since it is older, had them.
        mesh: what a mesh's description stands for on the devices that there are.
        free: settings that are not compared.

    Raises:
        UserError: a setting differs and is not named in `allowed`, or is the optimizer; both values are
            given.
    """
    unknown = sorted(set(allowed) - set(new) - {MIXTURE})
    if unknown:
        raise UserError(f"--allow-change names {unknown[0]!r}, which is not a setting")
    old, new = resolved(flatten(defaults) | current_names(old)), resolved(new)
    for name, automatic in AUTOMATIC.items():
        if old.get(name) == automatic:
            old[name] = new.get(name)
    if "mesh" in new:
        old["mesh"], new["mesh"] = mesh(old["mesh"]), mesh(new["mesh"])
    for name in sorted(set(old) | set(new)):
        if name in free or old.get(name) == new.get(name):
            continue
        if name == "optimizer":
            raise UserError(
                f"the run in {where} has --optimizer {old.get(name)}, not {new.get(name)}, and its "
                "checkpoints hold the state of that alone: give the same value, or another --out"
            )
        if name in allowed:
            continue
        flag = name.replace("_", "-")
        raise UserError(
            f"the run in {where} has --{flag} {old.get(name)}, not {new.get(name)}: give the same value, "
            f"another --out, or --allow-change {name} if the change is meant"
        )


def given_value(argv: list[str], flag: str) -> str | None:
    """The value that the command line gives a flag, before it is parsed."""
    values = [value for name, value in itertools.pairwise(argv) if name == flag]
    values += [text.partition("=")[2] for text in argv if text.startswith(f"{flag}=")]
    return values[-1] if values else None
