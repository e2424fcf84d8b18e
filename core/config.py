"""What a model is made of, and the presets. A config says nothing of where or how fast it runs."""

import dataclasses
import difflib
from typing import Any, Literal

from core import checks
from core.errors import UserError
from core.leaves import model_leaves

Mlp = Literal["swiglu", "gelu", "relu2"]
MAX_VOCAB = 65_536  # token ids are stored as uint16
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
    positions: Literal["rope", "learned"] = "rope"
    """Rotary (half-split) or a learned table added to the embeddings."""
    mlp: Mlp = "swiglu"
    """SwiGLU (gate, up, down), or GELU in its tanh form or squared ReLU (up, down)."""
    biases: bool = False
    """Biases in attention and MLP; norms and the head never have one."""
    tied: bool = True
    """Whether the output head is the embedding table."""
    rope_theta: float = 10_000.0
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
                f"model.vocab_size is {self.vocab_size}, but token ids are stored in 16 bits: "
                f"choose a tokenizer of at most {MAX_VOCAB} ids"
            )
        if self.d_model % self.n_heads:
            raise UserError(f"model.d_model {self.d_model} is not divisible by model.n_heads {self.n_heads}")
        if self.positions == "rope" and self.head_dim % 2:
            raise UserError(f"rotary positions need an even head size, not {self.head_dim}")
        checks.positive(**checks.fields(self, "rope_theta", "norm_eps", "init_std", prefix="model."))
        checks.below_one(**checks.fields(self, "dropout", prefix="model."))

    @property
    def head_dim(self) -> int:
        return self.d_model // self.n_heads

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

    def flops_per_token(self, sequence: int | None = None) -> int:
        """Model FLOPs to train on one token: forward and backward, causal attention, no recomputation.

        6 for every weight of a matrix product (the head counted, the embedding look-up not), and
        attention's two products over the half of the scores that the causal mask leaves.
        """
        s = self.context if sequence is None else sequence
        layers = sum(leaf.size(self) for leaf in model_leaves(self) if leaf.is_layer_kernel)
        matrices = layers + self.vocab_size * self.d_model
        return 6 * matrices + 6 * self.n_layers * self.d_model * s


MISTRAL_VOCAB = 32_000

_MTLM1 = ModelConfig(
    vocab_size=MISTRAL_VOCAB, context=1024, d_model=768, n_layers=12, n_heads=12, d_mlp=2176,
)  # fmt: skip
_MTLM2 = ModelConfig(
    vocab_size=MISTRAL_VOCAB, context=1024, d_model=384, n_layers=11, n_heads=6, d_mlp=1024,
    positions="learned", mlp="gelu", biases=True, tied=False,
)  # fmt: skip
_replace = dataclasses.replace

PRESETS: dict[str, ModelConfig] = {
    "mtlm1-88m": _MTLM1,
    "mtlm1-200m": _replace(_MTLM1, n_layers=24),
    "mtlm2-40m": _MTLM2,
    # The same shapes in the small: minutes on a CPU. The byte tokenizer makes them smaller still.
    "mtlm1-tiny": _replace(_MTLM1, context=256, d_model=128, n_layers=6, n_heads=2, d_mlp=384),
    "mtlm2-tiny": _replace(_MTLM2, context=256, d_model=128, n_layers=6, n_heads=2, d_mlp=384),
}


def training_flags(model: ModelConfig) -> str:
    """`--preset NAME` and the overrides that make a training command's model compute what `model` does.

    The vocabulary is the tokenizer's affair.
    """
    wanted = model.function()
    differing = {
        name: [k for k, v in given.function().items() if k != "vocab_size" and wanted[k] != v]
        for name, given in PRESETS.items()
    }
    nearest = min(differing, key=lambda name: len(differing[name]))
    overrides = (f"--{field.replace('_', '-')} {wanted[field]}" for field in differing[nearest])
    return " ".join([f"--preset {nearest}", *overrides])


def preset(name: str) -> ModelConfig:
    """The preset of that name; a `UserError` lists them otherwise, with the one that was probably meant."""
    if name in PRESETS:
        return PRESETS[name]
    near = difflib.get_close_matches(name, PRESETS, n=1)
    guess = f"; did you mean {near[0]!r}?" if near else "."
    raise UserError(f"unknown preset {name!r}{guess} Presets: {', '.join(PRESETS)}")
