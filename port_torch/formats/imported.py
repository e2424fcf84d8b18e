"""What every format gives, and how parameters are put together from single tensors."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from core.checkpoint.checkpointer import flatten
from core.checkpoint.manifest import Manifest
from core.config import ModelConfig
from core.model import Params, abstract_params


class Imported(NamedTuple):
    """A model that came from somewhere."""

    config: ModelConfig
    params: Params
    """Float32, as core.model has them."""
    tokenizer_folder: Path | None = None
    """Where the tokenizer's files lie; None: the format has none."""
    manifest: Manifest | None = None
    """Where the model comes from, if it was ours before."""
    assumed: str | None = None
    """What the tensors do not tell and was taken as the original has it, in words."""


def assemble(config: ModelConfig, read: Callable[[str, int | None], Float[np.ndarray, "..."]]) -> Params:
    """The parameters of a model, read tensor by tensor, so that memory holds one tensor more than them.

    read: gives the values of (leaf path, layer or None) in the orientation of core.model, in any float type
        that float32 holds exactly.
    """
    leaves, treedef = flatten(abstract_params(config))

    def fill(path: str, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        values = np.empty(leaf.shape, leaf.dtype)
        if path.startswith("layers/"):
            for layer in range(config.n_layers):
                _put(values[layer], read(path, layer))
        else:
            _put(values, read(path, None))
        return jnp.asarray(values)

    return treedef.unflatten([fill(path, leaf) for path, leaf in leaves.items()])


def _put(place: np.ndarray, values: np.ndarray) -> None:
    if place.shape != values.shape:  # numpy would broadcast
        raise ValueError(f"values of shape {values.shape} for a place of shape {place.shape}")
    place[...] = values
