"""The tensors of an export: read in one direction when it is written, in the other when it is opened.

They have the names of `transformers`' Llama (core/leaves.py), so that an exported MTLM1 is one; MTLM2 adds
its table of positions.
"""

from typing import NamedTuple

from core.config import ModelConfig
from core.leaves import model_leaves


class Place(NamedTuple):
    """Where an exported tensor lies in the parameters of core.model."""

    path: str
    """Of the leaf: "layers/attn/q/kernel"."""
    layer: int | None
    """Index on the leaf's first axis; None for a leaf outside the layers."""
    transposed: bool
    """PyTorch's linear maps are (out, in), ours (in, out)."""
    shape: tuple[int, ...]
    """Of the exported tensor."""


def exported_tensors(config: ModelConfig) -> dict[str, Place]:
    """Exported name -> where it lies, for every tensor of a model; a tied head has none."""
    tensors: dict[str, Place] = {}
    for leaf in model_leaves(config):
        shape = leaf.shape(config)[1 if leaf.in_layers else 0 :]
        shape = shape[::-1] if leaf.transposed else shape
        for layer in range(config.n_layers) if leaf.in_layers else [None]:
            tensors[leaf.exported_name(layer)] = Place(leaf.path, layer, leaf.transposed, shape)
    return tensors
