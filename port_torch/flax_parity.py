"""What Flax computes from the parameters of a checkpoint: what an export of it has to compute (parity.py)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from core.checkpoint.checkpointer import flatten
from core.config import ModelConfig
from core.errors import UserError
from core.model import Params, forward, logits
from core.progress import Activity


def flax_logits(model: ModelConfig, params: Params, tokens: np.ndarray) -> np.ndarray:
    """Logits of core.model in float32, [B, S, V]."""

    with Activity("computing the logits"):
        return np.asarray(_whole_logits(model, params, jnp.asarray(tokens, jnp.int32)))


@functools.partial(jax.jit, static_argnums=0)
def _whole_logits(model: ModelConfig, params: Params, tokens: jax.Array) -> jax.Array:
    return logits(model, params, forward(model, params, tokens))


def require_finite(params: Params, what: str) -> None:
    """A UserError naming the first leaf of `what` that holds NaN or infinity."""
    for path, leaf in flatten(params)[0].items():
        bad = leaf.size - np.count_nonzero(np.isfinite(leaf))
        if bad:
            raise UserError(
                f"{what}: {path} holds {bad} values that are NaN or infinite, so it is not exported; "
                "take another checkpoint, or another --dtype if that one is too narrow"
            )


def rounded(params: Params, dtype: str) -> Params:
    """The parameters as float32 again after rounding to `dtype`; those given are used up."""

    def leaf(array: jax.Array) -> jax.Array:
        with np.errstate(over="ignore"):  # what is too large for it becomes infinite, which is refused
            narrow = np.asarray(array).astype(jnp.dtype(dtype))
        array.delete()
        return jnp.asarray(narrow.astype(np.float32))

    return jax.tree.map(leaf, params)
