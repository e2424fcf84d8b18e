"""What a model is made of, and the presets. A config says nothing of where or how fast it runs."""

import dataclasses
import difflib
from typing import Any, Literal

from core import checks
from core.errors import UserError
from core.leaves import model_leaves
from core.rope import Scaling, parse_scaling

Mlp = Literal["swiglu", "gelu", "relu2"]
MAX_VOCAB = 262_144  # the largest that is tested; the field's largest is about as large
TRAINING_FIELDS = frozenset({"dropout", "init_std", "scaled_residual_init"})  # they change no trained model


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """One decoder; the fields choose its parts. Every size is that of one layer or one token."""

    vocab_size: int
    """Number of token ids; the tokenizer sets it."""
    context: int
    """Longest sequence, in tokens."""
    d_model: int
    """Width of the residual stream."""
    n_layers: int
    n_heads: int
    d_mlp: int
    """Hidden width of the MLP."""
    n_kv_heads: int | None = None
    """Heads of keys and values, each shared by as many heads of queries (Ainslie et al. 2023, GQA). None:
    n_heads."""
    head_dim: int | None = None
    """Size of a head. None: d_model / n_heads. `head_size` and `kv_heads` are what holds."""
    positions: Literal["rope", "learned"] = "rope"
    """Rotary (half-split) or a learned table added to the embeddings."""
    mlp: Mlp = "swiglu"
    """SwiGLU (gate, up, down), or GELU in its tanh form or squared ReLU (up, down)."""
    biases: bool = False
    """Biases in attention and MLP; norms and the head never have one."""
    qkv_biases: bool = False
    """Biases of queries, keys and values alone (Qwen2)."""
    qk_norm: bool = False
    """RMSNorm of every query and key over its head, before rotation (Henry et al. 2020; Qwen3)."""
    tied: bool = True
    """Whether the output head is the embedding table."""
    rope_theta: float = 10_000.0
    rope_scaling: str | None = None
    """Scaled rotary frequencies, as `core.rope.Scaling` is written."""
    norm_eps: float = 1e-6
    dropout: float = 0.0
    """Probability that an element of the embeddings or of a branch's output is dropped, in training."""
    init_std: float = 0.02
    scaled_residual_init: bool = False
    """Divides the init of the projections into the residual stream (o, down) by sqrt(2 n_layers)."""

    def __post_init__(self) -> None:
        sizes = ("vocab_size", "context", "d_model", "n_layers", "n_heads", "d_mlp")
        checks.counts(**checks.fields(self, *sizes, prefix="model."))
        if self.vocab_size > MAX_VOCAB:
            raise UserError(
                f"model.vocab_size is {self.vocab_size}: choose a tokenizer of at most {MAX_VOCAB} ids"
            )
        self._check_attention()
        self._normalize()
        checks.positive(**checks.fields(self, "rope_theta", "norm_eps", "init_std", prefix="model."))
        checks.below_one(**checks.fields(self, "dropout", prefix="model."))

    def _check_attention(self) -> None:
        checks.counts(**checks.fields(self, "n_kv_heads", "head_dim", prefix="model."))
        if self.head_dim is None and self.d_model % self.n_heads:
            raise UserError(f"model.d_model {self.d_model} is not divisible by model.n_heads {self.n_heads}")
        if self.n_heads % self.kv_heads:
            raise UserError(
                f"model.n_heads {self.n_heads} is not a multiple of model.n_kv_heads {self.kv_heads}: "
                f"{', '.join(str(n) for n in range(1, self.n_heads + 1) if self.n_heads % n == 0)} divide it"
            )
        if self.biases and self.qkv_biases:
            raise UserError("model.biases already includes model.qkv_biases: give only one of them")
        if self.positions == "rope" and self.head_size % 2:
            raise UserError(f"rotary positions need an even head size, not {self.head_size}")
        if self.rope is not None and self.positions != "rope":
            raise UserError("model.rope_scaling scales rotary positions, and the model's are learned")
        if self.rope is not None and self.rope_theta <= 1:
            raise UserError(f"model.rope_scaling needs a rope_theta above 1, not {self.rope_theta:g}")

    def _normalize(self) -> None:
        """Configs are compared, so what says the same becomes the same: None where a value is the default."""
        same = {
            "n_kv_heads": None if self.kv_heads == self.n_heads else self.n_kv_heads,
            "head_dim": None if self.head_size * self.n_heads == self.d_model else self.head_dim,
            "rope_scaling": None if self.rope is None else str(self.rope),
        }
        for name, value in same.items():
            object.__setattr__(self, name, value)

    @property
    def head_size(self) -> int:
        """Elements of a query, key or value."""
        return self.d_model // self.n_heads if self.head_dim is None else self.head_dim

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values."""
        return self.n_heads if self.n_kv_heads is None else self.n_kv_heads

    @property
    def q_width(self) -> int:
        """Of the queries of all heads together, and of their outputs."""
        return self.n_heads * self.head_size

    @property
    def kv_width(self) -> int:
        """Of the keys of all heads together; of the values, too."""
        return self.kv_heads * self.head_size

    @property
    def rope(self) -> Scaling | None:
        """How rotary frequencies are scaled."""
        return None if self.rope_scaling in (None, "none") else parse_scaling(self.rope_scaling)

    @property
    def summary(self) -> str:
        """Sizes and parts in one line, for people."""
        heads = f"{self.n_heads} heads"
        if self.q_width != self.d_model:
            heads += f" of {self.head_size}"
        if self.kv_heads != self.n_heads:
            heads += f" on {self.kv_heads} of keys and values"
        parts = [self.positions, self.mlp, "tied head" if self.tied else "untied head"]
        parts += ["queries and keys normed"] if self.qk_norm else []
        parts += [f"positions scaled by {self.rope_scaling}"] if self.rope else []
        sizes = [f"{self.n_layers} layers", f"width {self.d_model}", heads, f"MLP {self.d_mlp}"]
        return f"{', '.join(sizes)}, context {self.context}; {', '.join(parts)}"

    def function(self) -> dict[str, Any]:
        """The fields that say what the model computes, and not how it was or will be trained.

        Some of them, like n_heads and rope_theta, show in no parameter's shape.
        """
        return {k: v for k, v in dataclasses.asdict(self).items() if k not in TRAINING_FIELDS}

    @property
    def n_params(self) -> int:
        """Number of parameters, embeddings included."""
        return sum(leaf.size(self) for leaf in model_leaves(self))

    @property
    def n_embedding_params(self) -> int:
        """Parameters of the embedding table, the position table and an untied head."""
        return sum(leaf.size(self) for leaf in model_leaves(self) if leaf.is_embedding)

    def flops_per_token(self) -> int:
        """Model FLOPs to train on one token: forward and backward, causal attention, no recomputation.

        6 for every weight of a matrix product (the head counted, the embedding look-up not), and
        attention's two products over the half of the scores that the causal mask leaves.
        """
        layers = sum(leaf.size(self) for leaf in model_leaves(self) if leaf.is_layer_kernel)
        matrices = layers + self.vocab_size * self.d_model
        return 6 * matrices + 6 * self.n_layers * self.q_width * self.context


MISTRAL_VOCAB = 32_000

_MTLM1 = ModelConfig(
    vocab_size=MISTRAL_VOCAB, context=1024, d_model=768, n_layers=12, n_heads=12, d_mlp=2176,
)  # fmt: skip
_MTLM2 = ModelConfig(
    vocab_size=MISTRAL_VOCAB, context=1024, d_model=384, n_layers=11, n_heads=6, d_mlp=1024,
    positions="learned", mlp="gelu", biases=True, tied=False,
)  # fmt: skip
_SMOLLM2 = ModelConfig(
    vocab_size=49_152, context=2048, d_model=576, n_layers=30, n_heads=9, n_kv_heads=3, d_mlp=1536,
    rope_theta=1e5, norm_eps=1e-5,
)  # fmt: skip
_replace = dataclasses.replace

PRESETS: dict[str, ModelConfig] = {
    "mtlm1-88m": _MTLM1,
    "mtlm1-200m": _replace(_MTLM1, n_layers=24),
    "mtlm2-40m": _MTLM2,
    # The shapes of others, as they are published; each has a tokenizer of its own.
    "smollm2-135m": _SMOLLM2,
    "smollm2-360m": _replace(_SMOLLM2, d_model=960, n_layers=32, n_heads=15, n_kv_heads=5, d_mlp=2560),
    "qwen3-0.6b": ModelConfig(
        vocab_size=151_936,
        context=4096,
        d_model=1024,
        n_layers=28,
        n_heads=16,
        n_kv_heads=8,
        head_dim=128,
        d_mlp=3072,
        rope_theta=1e6,
        qk_norm=True,
    ),
    # Ours in the small: minutes on a CPU. The byte tokenizer makes them smaller still.
    "mtlm1-tiny": _replace(_MTLM1, context=256, d_model=128, n_layers=6, n_heads=2, d_mlp=384),
    "mtlm2-tiny": _replace(_MTLM2, context=256, d_model=128, n_layers=6, n_heads=2, d_mlp=384),
}


def training_flags(model: ModelConfig, n_ids: int) -> str:
    """`--preset NAME` and the overrides that make a training command's model compute what `model` does.

    n_ids: of its tokenizer, which the command takes for the vocabulary.
    """
    nearest = nearest_preset(model)
    fields = _differing(model, PRESETS[nearest]) + (["vocab_size"] if model.vocab_size != n_ids else [])
    overrides = (f"--{name.replace('_', '-')} {typed_value(model, name)}" for name in fields)
    return " ".join([f"--preset {nearest}", *overrides])


def nearest_preset(model: ModelConfig) -> str:
    """The preset that needs the fewest overrides to compute what `model` does."""
    return min(PRESETS, key=lambda name: len(_differing(model, PRESETS[name])))


def _differing(model: ModelConfig, given: ModelConfig) -> list[str]:
    wanted = model.function()
    return [k for k, v in given.function().items() if k != "vocab_size" and wanted[k] != v]


def typed_value(model: ModelConfig, name: str) -> Any:
    """The value of a model's field as an option gives it: None, which stands for a default, as that default,
    since a preset may have another value."""
    default = {"n_kv_heads": model.kv_heads, "head_dim": model.head_size, "rope_scaling": "none"}
    value = getattr(model, name)
    return default[name] if value is None else value


def preset(name: str) -> ModelConfig:
    """The preset of that name; a `UserError` lists them otherwise, with the one that was probably meant."""
    if name in PRESETS:
        return PRESETS[name]
    near = difflib.get_close_matches(name, PRESETS, n=1)
    guess = f"; did you mean {near[0]!r}?" if near else "."
    raise UserError(f"unknown preset {name!r}{guess} Presets: {', '.join(PRESETS)}")


def compute_dtype(requested: str, platform: str) -> str:
    """The type of activations: what is asked for, or for "auto" bfloat16 where the hardware multiplies it."""
    if requested != "auto":
        return requested
    return "float32" if platform == "cpu" else "bfloat16"
