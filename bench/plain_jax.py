"""The peer of `bench.step`: what one writes in an afternoon of plain JAX, for the same models.

Layers stacked and unrolled, attention by cuDNN where it can be, a cross-entropy over the float32 logits of
the whole batch, optax's AdamW with clipping; no guard, no checkpoints, no metrics.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from bench.updates import LR
from core.config import ModelConfig


def make(config: ModelConfig, attention: str, dtype: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """(init, step): init(key) -> (params, optimizer state); step(params, state, tokens) -> both, loss."""
    c = config
    if c.mlp not in ("swiglu", "gelu"):
        raise ValueError(f"plain JAX has no MLP {c.mlp}")
    n_up = 2 if c.mlp == "swiglu" else 1
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(LR))

    def init(key):
        def normal(n, *shape):
            return 0.02 * jax.random.normal(jax.random.fold_in(key, n), shape)

        n, d = c.n_layers, c.d_model
        layers = {
            "norm1": jnp.ones((n, d)),
            "norm2": jnp.ones((n, d)),
            "qkv": normal(0, n, d, c.q_width + 2 * c.kv_width),
            "o": normal(1, n, c.q_width, d),
            "up": normal(2, n, d, n_up * c.d_mlp),
            "down": normal(3, n, c.d_mlp, d),
        }
        if c.qk_norm:
            layers |= {"q_norm": jnp.ones((n, c.head_size)), "k_norm": jnp.ones((n, c.head_size))}
        if c.biases:
            layers |= {"o_bias": jnp.zeros((n, d)), "up_bias": jnp.zeros((n, n_up * c.d_mlp))}
            layers["down_bias"] = jnp.zeros((n, d))
        if c.biases or c.qkv_biases:
            layers["qkv_bias"] = jnp.zeros((n, c.q_width + 2 * c.kv_width))
        params = {"embed": normal(4, c.vocab_size, d), "layers": layers, "norm": jnp.ones(d)}
        if c.positions == "learned":
            params["positions"] = normal(5, c.context, d)
        if not c.tied:
            params["head"] = normal(6, d, c.vocab_size)
        return params, optimizer.init(params)

    def linear(x, p, name):
        y = x @ p[name].astype(x.dtype)
        return y + p[f"{name}_bias"].astype(x.dtype) if f"{name}_bias" in p else y

    def norm(x, scale):
        y = x.astype(jnp.float32)
        y *= jax.lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + c.norm_eps)
        return (y * scale).astype(x.dtype)

    half = c.head_size // 2
    angle = jnp.arange(c.context)[:, None] * c.rope_theta ** (-jnp.arange(half) / half)
    cos, sin = jnp.cos(angle)[None, :, None], jnp.sin(angle)[None, :, None]

    def rope(x):
        a, b = jnp.split(x, 2, -1)
        return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x.dtype)

    def layer(x, p):
        batch, length, _ = x.shape
        qkv = linear(norm(x, p["norm1"]), p, "qkv")
        parts = jnp.split(qkv, (c.q_width, c.q_width + c.kv_width), -1)
        q, k, v = (t.reshape(batch, length, -1, c.head_size) for t in parts)
        if c.qk_norm:
            q, k = norm(q, p["q_norm"]), norm(k, p["k_norm"])
        if c.positions == "rope":
            q, k = rope(q), rope(k)
        y = jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation=attention)
        x = x + linear(y.reshape(batch, length, -1), p, "o")
        up = linear(norm(x, p["norm2"]), p, "up")
        if c.mlp == "swiglu":
            gate, up = jnp.split(up, 2, -1)
            up = jax.nn.silu(gate) * up
        else:
            up = jax.nn.gelu(up)
        return x + linear(up, p, "down"), None

    def loss(params, tokens):
        x = params["embed"].astype(dtype)[tokens[:, :-1]]
        if c.positions == "learned":
            x += params["positions"].astype(dtype)
        x, _ = jax.lax.scan(layer, x, params["layers"], unroll=c.n_layers)
        head = params["embed"].T if c.tied else params["head"]
        logits = jnp.dot(norm(x, params["norm"]), head.astype(dtype), preferred_element_type=jnp.float32)
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, tokens):
        value, gradients = jax.value_and_grad(loss)(params, tokens)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, value

    return jax.jit(init), step
