"""Small models for tests: both kinds of decoder, with parameters that are nowhere trivially 0 or 1."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from core.config import ModelConfig
from core.leaves import path_names
from core.model import Params, abstract_params, forward, logits

LLAMA = ModelConfig(vocab_size=97, context=96, d_model=48, n_layers=3, n_heads=4, d_mlp=80)
"""In the manner of mtlm1: rotary positions, SwiGLU, tied embeddings, no biases."""
GPT = ModelConfig(
    vocab_size=97, context=96, d_model=48, n_layers=3, n_heads=4, d_mlp=80,
    positions="learned", mlp="gelu", biases=True, tied=False,
)  # fmt: skip
"""In the manner of mtlm2: learned positions, GELU, biases, an untied head."""
BOTH = {"llama": LLAMA, "gpt": GPT}
GROUPED = ModelConfig(
    vocab_size=97, context=96, d_model=48, n_layers=3, n_heads=6, n_kv_heads=2, head_dim=16, d_mlp=80,
    qkv_biases=True, qk_norm=True,
)  # fmt: skip
"""Grouped heads wider than the model, normed queries and keys, biases of queries, keys and values alone."""


def random_params(config: ModelConfig, seed: int = 0, std: float = 0.2) -> Params:
    """Float32 parameters in which every leaf matters: norms are not all 1, nor biases 0."""
    rng = np.random.default_rng(seed)

    def leaf(path: tuple, shape: jax.ShapeDtypeStruct) -> jax.Array:
        noise = rng.standard_normal(shape.shape)
        return jnp.asarray(1 + 0.3 * noise if path_names(path)[-1] == "scale" else std * noise, jnp.float32)

    return jax.tree.map_with_path(leaf, abstract_params(config))


def random_tokens(config: ModelConfig, *shape: int, seed: int = 0) -> jax.Array:
    """Token ids, int32, evenly from the whole vocabulary."""
    return jnp.asarray(np.random.default_rng(seed).integers(0, config.vocab_size, shape), jnp.int32)


@functools.partial(jax.jit, static_argnums=0)
def whole_logits(config: ModelConfig, params: Params, tokens: jax.Array) -> jax.Array:
    """Logits [B, S, V] of whole sequences, in float32; compiled once for all tests of this process."""
    return logits(config, params, forward(config, params, tokens))


def flat(tree: Params) -> dict[str, np.ndarray]:
    """The leaves by their path: "layers/attn/q/kernel"."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {"/".join(path_names(path)): np.asarray(leaf) for path, leaf in leaves}
