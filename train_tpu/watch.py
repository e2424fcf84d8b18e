"""What the step reports of every layer at a watched update (core/run/watching.py says what that is).

It is a branch of the compiled step, taken where a flag of its controls is set: a forward pass of the first
micro-batch, and the optimizer's update computed once more. Nothing of the update itself is made from it.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from core.attention import attention_entropy
from core.config import ModelConfig
from core.leaves import path_names
from core.model import Block, Compute, ForwardContext, Params, forward_with_hook
from core.run.watching import Sizes, make_record, query_positions


class Seen(NamedTuple):
    """What is measured of a watched update; zeros at others."""

    weights: dict[str, Float[Array, "..."]]
    """The norm of every leaf, of every layer where it has layers."""
    updates: dict[str, Float[Array, "..."]]
    """The same of what is added to them."""
    before: Float[Array, "L 3"]
    """`measure` of the residual stream before every layer."""
    after: Float[Array, "L 3"]
    added: Float[Array, "L 3"]
    """Of what every layer adds to it."""
    entropies: Float[Array, "L 2"]
    """Of the attention: the mean over the heads, and the lowest head's."""
    uniform: Float[Array, ""]
    """What these would be if every query attended evenly to all it sees."""
    hidden: Float[Array, " 3"]
    """`measure` of the output of the final norm."""


def measure(x: Array) -> Float[Array, " 3"]:
    """Largest value, mean of the squares relative to it, and how many are not finite: for `Sizes.add`."""
    finite = jnp.isfinite(x)
    size = jnp.abs(jnp.where(finite, x, 0).astype(jnp.float32))
    largest = size.max()
    relative = size / jnp.where(largest > 0, largest, 1)
    mean = jnp.square(relative).sum() / jnp.maximum(1, finite.sum())
    return jnp.stack([largest, mean, (~finite).sum().astype(jnp.float32)])


def leaf_squares(tree: Params) -> dict[str, Array]:
    """The sum of the squares of every leaf, of every layer of it where it has layers."""
    squares = {}
    for path, x in jax.tree_util.tree_leaves_with_path(tree):
        names = path_names(path)
        axes = tuple(range(1, x.ndim)) if names[0] == "layers" else None
        squares["/".join(names)] = jnp.sum(jnp.square(x), axis=axes)
    return squares


def _norms(tree: Params) -> dict[str, Array]:
    return {name: jnp.sqrt(squares) for name, squares in leaf_squares(tree).items()}


def look(
    config: ModelConfig,
    compute: Compute,
    params: Params,
    new_params: Params,
    tokens: Int[Array, "B S"],
    documents: Int[Array, "B S"] | None = None,
) -> Seen:
    """What is seen of an update from `params` to `new_params`, and of a forward pass before it."""

    def of_layer(block: Block, before: Array, after: Array, ctx: ForwardContext) -> tuple[Array, ...]:
        entropies = _entropies(block, before, ctx)
        return measure(before), measure(after), measure(after - before), entropies

    once = dataclasses.replace(compute, unroll=1, remat="none")  # quick to compile; nothing goes back
    hidden, of_layers = forward_with_hook(config, params, tokens, once, of_layer, documents)
    updates = jax.tree.map(jnp.subtract, new_params, params)
    uniform = jnp.log(_visible(tokens.shape[1], documents).sum(-1)).mean()
    return Seen(_norms(params), _norms(updates), *of_layers, uniform=uniform, hidden=measure(hidden))


def _visible(length: int, documents: Int[Array, "B S"] | None) -> Bool[Array, "#B T S"]:
    """Which positions the measured queries see."""
    index = query_positions(length)
    visible = jnp.asarray(np.arange(length) <= index[:, None])[None]
    return visible if documents is None else visible & (documents[:, index, None] == documents[:, None])


def _entropies(block: Block, x: Array, ctx: ForwardContext) -> Float[Array, " 2"]:
    """Mean over the heads, and the lowest; of some queries, whatever kernel computes the attention itself."""
    normed, _ = block.attn_norm.add(x, None, ctx.compute)
    q, k, _ = block.attn.projections(normed, ctx.rotation, ctx.compute)
    visible = _visible(x.shape[1], ctx.documents)
    of_heads = attention_entropy(q[:, query_positions(x.shape[1])], k, visible)
    return jnp.stack([of_heads.mean(), of_heads.min()])


def record_of(seen: Seen, gradients: Mapping[str, Any], rows: int, length: int, width: int) -> dict[str, Any]:
    """A line of watch.jsonl from what was seen, on the host, of `rows` sequences of a model of that width.

    gradients: norms of the leaves.
    """
    n = rows * length * width
    stream = [seen.before[0], *seen.after, seen.hidden]
    sizes = [Sizes.of(found, n) for found in stream]
    return make_record(
        len(seen.after), weights=seen.weights, gradients=gradients, updates=seen.updates,
        stream=sizes, added=[Sizes.of(found, n) for found in seen.added], entropies=seen.entropies,
        uniform=float(seen.uniform),
    )  # fmt: skip
