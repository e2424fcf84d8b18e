"""The names of exported tensors: one table, read in one direction by the export and in the other by imports.

They are those of `transformers`' Llama, so that an exported MTLM1 is one; MTLM2 adds its table of positions.
"""

from typing import NamedTuple

from core.checkpoint.checkpointer import flatten
from core.config import ModelConfig
from core.model import abstract_params

MODULES = {
    "embed": "model.embed_tokens",
    "positions": "model.embed_positions",
    "norm": "model.norm",
    "head": "lm_head",
}
LAYER_MODULES = {
    "attn_norm": "input_layernorm",
    "attn/q": "self_attn.q_proj",
    "attn/k": "self_attn.k_proj",
    "attn/v": "self_attn.v_proj",
    "attn/o": "self_attn.o_proj",
    "mlp_norm": "post_attention_layernorm",
    "mlp/gate": "mlp.gate_proj",
    "mlp/up": "mlp.up_proj",
    "mlp/down": "mlp.down_proj",
}


class Leaf(NamedTuple):
    """Where an exported tensor lies in the parameters of core.model."""

    path: str
    """Of the leaf: "layers/attn/q/kernel"."""
    layer: int | None
    """Index on the leaf's first axis; None for a leaf outside the layers."""
    transposed: bool
    """PyTorch's linear maps are (out, in), ours (in, out)."""
    shape: tuple[int, ...]
    """Of the exported tensor."""


def exported_tensors(config: ModelConfig) -> dict[str, Leaf]:
    """Exported name -> where it lies, for every tensor of a model; a tied head has none."""
    leaves, _ = flatten(abstract_params(config))
    tensors: dict[str, Leaf] = {}
    for path, leaf in leaves.items():
        module, _, kind = path.rpartition("/")
        transposed = kind == "kernel"
        suffix = "bias" if kind == "bias" else "weight"
        in_layers = module.removeprefix("layers/")
        layers = range(config.n_layers) if in_layers != module else [None]
        for i in layers:
            name = MODULES[module] if i is None else f"model.layers.{i}.{LAYER_MODULES[in_layers]}"
            shape = leaf.shape if i is None else leaf.shape[1:]
            tensors[f"{name}.{suffix}"] = Leaf(path, i, transposed, shape[::-1] if transposed else shape)
    return tensors
