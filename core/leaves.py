"""What every parameter of a model is, said once: its shape, how it is sharded, trained and grown, its names.

Parameter counts, sharding, weight decay, Muon, growth, the names in PyTorch and in exports, and LoRA's
targets are read from `LEAVES`. A new weight is a line there, besides the module that computes with it in
core/model.py and its mirrors; the tests compare the two.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from core.config import ModelConfig

Axis = Literal["layers", "width", "heads", "kv_heads", "head", "mlp", "vocab", "context"]
# What of ModelConfig is an axis's size; "heads" are all together, "head" is one.
SIZES: dict[Axis, str] = {
    "layers": "n_layers",
    "width": "d_model",
    "heads": "q_width",
    "kv_heads": "kv_width",
    "head": "head_size",
    "mlp": "d_mlp",
    "vocab": "vocab_size",
    "context": "context",
}
# `hidden_act` of transformers for every kind of MLP. GELU is the tanh form.
HIDDEN_ACT = {"swiglu": "silu", "gelu": "gelu_pytorch_tanh", "relu2": "relu2"}
if len(set(HIDDEN_ACT.values())) != len(HIDDEN_ACT):
    raise ValueError("two kinds of MLP have the same hidden_act: a folder would be read as the wrong one")


def _always(config: "ModelConfig") -> bool:
    return True


def _biased(config: "ModelConfig") -> bool:
    return config.biases


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One parameter of the decoder; a parameter of the layers is one array for all of them."""

    module: str
    """Of core/model.py: "layers/attn/q"."""
    kind: Literal["kernel", "bias", "scale", "table"]
    """A linear map's weight or bias, a norm's scale, rows to look up."""
    axes: tuple[Axis, ...]
    """What each dimension is; a kernel is [in, out]."""
    exported: str
    """The module's name in `transformers`, "{}" where the layer's number goes. MTLM1's are those of Llama."""
    used: Callable[["ModelConfig"], bool] = _always
    """Whether a model has it."""
    writes_residual: bool = False
    """Whether its module's output is added to the residual stream: an identity block has zeros there."""

    @property
    def path(self) -> str:
        """In the tree of parameters: "layers/attn/q/kernel"."""
        return f"{self.module}/{self.kind}"

    @property
    def in_layers(self) -> bool:
        """Whether every layer has it; its first axis is then that of the layers."""
        return self.axes[0] == "layers"

    @property
    def is_matrix(self) -> bool:
        """A kernel or a table: decays and is split over devices. Scales and biases are neither."""
        return self.kind in ("kernel", "table")

    @property
    def is_layer_kernel(self) -> bool:
        """A matrix of the layers that activations are multiplied by: Muon takes it, and LoRA adapts it."""
        return self.in_layers and self.kind == "kernel"

    @property
    def is_embedding(self) -> bool:
        """Tables and an untied head, which "without embeddings" leaves out."""
        return "vocab" in self.axes or "context" in self.axes

    @property
    def transposed(self) -> bool:
        """Whether PyTorch has it the other way round: its linear maps are [out, in]."""
        return self.kind == "kernel"

    @property
    def torch_suffix(self) -> str:
        """What PyTorch calls it within its module."""
        return "bias" if self.kind == "bias" else "weight"

    def shape(self, config: "ModelConfig") -> tuple[int, ...]:
        """Of the whole leaf."""
        return tuple(getattr(config, SIZES[axis]) for axis in self.axes)

    def size(self, config: "ModelConfig") -> int:
        """Number of elements."""
        return math.prod(self.shape(config))

    def torch_name(self, layer: int | None = None) -> str:
        """Of its parameter in port_torch/model.py, or of that of one layer: "layers.0.attn.q.weight"."""
        modules = self.module.split("/")
        numbered = modules if layer is None else [modules[0], str(layer), *modules[1:]]
        return ".".join([*numbered, self.torch_suffix])

    def exported_name(self, layer: int | None = None) -> str:
        """Of its tensor in an export, or of that of one layer."""
        return f"{self.exported.format(layer)}.{self.torch_suffix}"


def _scale(
    module: str,
    exported: str,
    axis: Axis = "width",
    used: Callable[["ModelConfig"], bool] = _always,
) -> Leaf:
    in_layers: tuple[Axis, ...] = ("layers",) if module.startswith("layers/") else ()
    return Leaf(module, "scale", (*in_layers, axis), exported, used)


def _linear(
    module: str,
    exported: str,
    n_in: Axis,
    n_out: Axis,
    used: Callable[["ModelConfig"], bool] = _always,
    writes_residual: bool = False,
    biased: Callable[["ModelConfig"], bool] = _biased,
) -> tuple[Leaf, Leaf]:
    """The kernel of a linear map of the layers, and its bias, which some models have."""
    kernel = Leaf(module, "kernel", ("layers", n_in, n_out), exported, used, writes_residual)
    bias = dataclasses.replace(
        kernel, kind="bias", axes=("layers", n_out), used=lambda c: used(c) and biased(c)
    )
    return kernel, bias


def _biased_qkv(config: "ModelConfig") -> bool:
    return config.biases or config.qkv_biases


_LAYER = "model.layers.{}."
LEAVES: tuple[Leaf, ...] = (
    Leaf("embed", "table", ("vocab", "width"), "model.embed_tokens"),
    Leaf("positions", "table", ("context", "width"), "model.embed_positions",
         lambda c: c.positions == "learned"),
    _scale("layers/attn_norm", _LAYER + "input_layernorm"),
    *_linear("layers/attn/q", _LAYER + "self_attn.q_proj", "width", "heads", biased=_biased_qkv),
    *_linear("layers/attn/k", _LAYER + "self_attn.k_proj", "width", "kv_heads", biased=_biased_qkv),
    *_linear("layers/attn/v", _LAYER + "self_attn.v_proj", "width", "kv_heads", biased=_biased_qkv),
    _scale("layers/attn/q_norm", _LAYER + "self_attn.q_norm", "head", lambda c: c.qk_norm),
    _scale("layers/attn/k_norm", _LAYER + "self_attn.k_norm", "head", lambda c: c.qk_norm),
    *_linear("layers/attn/o", _LAYER + "self_attn.o_proj", "heads", "width", writes_residual=True),
    _scale("layers/mlp_norm", _LAYER + "post_attention_layernorm"),
    *_linear("layers/mlp/gate", _LAYER + "mlp.gate_proj", "width", "mlp", lambda c: c.mlp == "swiglu"),
    *_linear("layers/mlp/up", _LAYER + "mlp.up_proj", "width", "mlp"),
    *_linear("layers/mlp/down", _LAYER + "mlp.down_proj", "mlp", "width", writes_residual=True),
    _scale("norm", "model.norm"),
    Leaf("head", "kernel", ("width", "vocab"), "lm_head", lambda c: not c.tied),
)  # fmt: skip
_BY_NAME = {tuple(leaf.path.split("/")[-2:]): leaf for leaf in LEAVES}
if len(_BY_NAME) != len(LEAVES):
    raise ValueError("two modules have the same last name: `find_leaf` could not tell their leaves apart")


def model_leaves(config: "ModelConfig") -> list[Leaf]:
    """The leaves of a model, in the order of its tree (jax's: sorted by name, level by level)."""
    return sorted((leaf for leaf in LEAVES if leaf.used(config)), key=lambda leaf: leaf.path.split("/"))


def find_leaf(names: Sequence[str]) -> Leaf | None:
    """The leaf that a path ends in: of a parameter, of its gradient or moments, or within a block.

    None for what belongs to no parameter, such as counters.
    """
    return _BY_NAME.get(tuple(names[-2:]))


def get_leaf(names: Sequence[str]) -> Leaf:
    """`find_leaf` for what must belong to a parameter; a ValueError if it does not."""
    leaf = find_leaf(names)
    if leaf is None:
        raise ValueError(f"core/leaves.py has no line for {'/'.join(names)}")
    return leaf


def path_names(path: Iterable) -> tuple[str, ...]:
    """A path of `jax.tree_util`, in dicts, tuples or Flax modules, as ("layers", "attn", "q", "kernel")."""
    names = [str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path]
    return tuple(names[:-1] if names[-1:] == ["value"] else names)
