"""The settings of a training run, as they stand on the command line and in a run folder's config.json."""

import dataclasses
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

from core import checks
from core.cli import Maybe
from core.config import PRESETS, Mlp, ModelConfig, preset
from core.errors import UserError


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
    mlp: Maybe[Mlp] = None
    """The MLP: gated (SwiGLU), or two layers with another activation."""
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


# Settings that change how a run is watched, kept or carried out, but not its losses; data and tokenizer are
# compared by what they hold and not by their names.
FREE_SETTINGS = frozenset((
    "out", "data", "tokenizer", "eval_every", "eval_windows", "eval_tasks", "eval_data_dir", "eval_questions",
    "sample_every", "prompts", "save_every", "save_minutes", "keep_last", "keep_every", "keep_steps",
    "stop_at", "log_every", "init_from", "allow_change", "fallback", "from_step",
))  # fmt: skip
# Settings that a run folder does not pass on to the next start: they are of one start only.
ONCE = ("allow_change", "fallback", "from_step", "stop_at")


def model_config(config: Any, vocab_size: int) -> ModelConfig:
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


def unflatten(flat: dict[str, Any], kind: type) -> Any:
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


def given_value(argv: list[str], flag: str) -> str | None:
    """The value that the command line gives a flag, before it is parsed."""
    values = [value for name, value in itertools.pairwise(argv) if name == flag]
    values += [text.partition("=")[2] for text in argv if text.startswith(f"{flag}=")]
    return values[-1] if values else None
