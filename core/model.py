"""The one decoder. Its config says which parts it is made of; its parameters are a plain pytree.

Modules are Flax NNX, used functionally: `init_params` gives nested dicts of arrays, `forward` takes
them. Every leaf under `layers` has a leading axis [layers]: the layers run as one `lax.scan`, and
growing a model in depth is indexing that axis.

Shapes: B batch, S positions, D d_model, H heads, G heads of keys and values, K head size, F d_mlp,
V vocabulary, L layers.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from flax.traverse_util import unflatten_dict
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, Key

from core.attention import RESIDUALS, Implementation, causal_attention, masked_attention
from core.config import ModelConfig
from core.leaves import model_leaves
from core.ops import (
    IN_PRODUCTS,
    Kernels,
    Rotation,
    add_rms_norm,
    gelu_mlp,
    norms_run_on,
    products_run_on,
    qkv_product,
    qkv_runs_on,
    rms_norm,
    rotate_both,
    split_heads,
    swiglu_mlp,
)
from core.shapes import naming_shapes, require_shapes
from core.sharding import (
    all_gather_weights,
    constrain_activations,
    embedding_lookup,
    gathers_weights,
    keep_all_but_gathered,
    splits_weights,
)

Params = dict[str, Any]
QKV = "qkv"  # the scope of the one product for queries, keys and values


@dataclasses.dataclass(frozen=True)
class Compute:
    """How the model is run; nothing here changes what its parameters are."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of activations and of the weights in products; parameters stay float32."""
    attention: Implementation = "xla"
    unroll: int = 1
    """Layers a scan step holds. The number of layers unrolls the loop: faster, longer to compile."""
    remat: Literal["none", "dots", "full"] = "none"
    """What the backward pass computes again: nothing, all but matrix products and splash attention, or whole
    layers."""
    mesh: Mesh | None = None
    kernels: Kernels | None = None
    """CUDA kernels for norms, rotation, SwiGLU, GELU, loss and AdamW; None: XLA's formulas."""


class KVCache(NamedTuple):
    """Keys and values of the positions seen so far, for every layer."""

    k: Float[Array, "L B S G K"]
    v: Float[Array, "L B S G K"]


@dataclasses.dataclass(frozen=True)
class ForwardContext:
    """What a forward pass hands down to its layers."""

    compute: Compute
    positions: Int[Array, "#B S"]
    rotation: Rotation | None
    """Of `rotary_angles`; None without rotary positions."""
    dropout: float
    dropout_keys: Key[Array, " B"] | None
    """One per sequence; None means no dropout."""
    documents: Int[Array, "B S"] | None = None
    """Numbers that rise along a row, at whose changes attention ends; None: a row is one document."""
    cache: KVCache | None = None
    """A layer's own, [B, S, G, K]; None for whole sequences."""

    def of_layer(self, number: Int[Array, ""], cache: KVCache | None) -> "ForwardContext":
        """With the layer's cache and dropout keys of its own."""
        keys = self.dropout_keys
        if keys is not None:
            keys = jax.vmap(jax.random.fold_in, (0, None))(keys, number + 1)
        return dataclasses.replace(self, dropout_keys=keys, cache=cache)

    def drop(self, branch: Float[Array, "B S D"], site: int) -> Float[Array, "B S D"]:
        """Dropout of what a branch adds to the residual stream; `site` tells those of a layer apart."""
        return drop(branch, self.dropout, self.dropout_keys, site)


def scoped(name: str, part: Callable, *inputs: Any) -> Any:
    """What a part of a module gives, computed under its name: profiles, replays and errors show it."""
    with jax.named_scope(name):
        return naming_shapes(name, part, *inputs)


class Adapter(nnx.Module):
    """What LoRA adds to a linear map of every layer: dropout(x) A B (core/lora.py)."""

    def __init__(
        self,
        a: Float[Array, "L I R"],
        b: Float[Array, "L R O"],
        keys: Key[Array, "L B"] | None = None,
        dropout: float = 0.0,
    ):
        """b: multiplied by alpha / rank already. keys: for dropout; None means no dropout.

        Inside the scan over layers, all of them lack the axis L.
        """
        self.a, self.b = nnx.Param(a), nnx.Param(b)
        self.keys = None if keys is None else nnx.Variable(keys)
        self.dropout = dropout

    def __call__(self, x: Float[Array, "*batch I"]) -> Float[Array, "*batch O"]:
        if self.keys is not None:
            x = drop(x, self.dropout, self.keys[...], site=0)
        return x @ self.a[...].astype(x.dtype) @ self.b[...].astype(x.dtype)


class Linear(nnx.Module):
    """x W + b, the weights cast to the type of x."""

    def __init__(self, n_in: int, n_out: int, *, bias: bool, std: float, rngs: nnx.Rngs):
        self.kernel = nnx.Param(std * jax.random.normal(rngs.params(), (n_in, n_out)))
        self.bias = nnx.Param(jnp.zeros(n_out)) if bias else None
        self.adapter: Adapter | None = nnx.data(None)

    def __call__(self, x: Float[Array, "*batch I"]) -> Float[Array, "*batch O"]:
        return fused_linear(x, self)


def fused_linear(x: Float[Array, "*batch I"], *linears: Linear) -> Float[Array, "*batch O"]:
    """Several linear maps of the same input as one product; the outputs lie side by side."""
    kernel = _kernel_of_all(linears, x.dtype)
    # As a product of two matrices: on a CPU its gradient is twice as fast as with two batch axes.
    y = (x.reshape(-1, x.shape[-1]) @ kernel).reshape(*x.shape[:-1], -1)
    if (bias := _bias_of_all(linears)) is not None:
        y += bias.astype(x.dtype)
    if any(m.adapter is not None for m in linears):
        y += jnp.concatenate([_adapted(x, m) for m in linears], axis=-1)
    return y


def _kernel_of_all(linears: Sequence[Linear], dtype: jnp.dtype) -> Float[Array, "I O"]:
    return jnp.concatenate([m.kernel[...] for m in linears], axis=1).astype(dtype)


def _bias_of_all(linears: Sequence[Linear]) -> Float[Array, " O"] | None:
    return None if linears[0].bias is None else jnp.concatenate([m.bias[...] for m in linears])


def _adapted(x: Float[Array, "*batch I"], linear: Linear) -> Float[Array, "*batch O"]:
    """What a map's adapter adds; zeros without one."""
    if linear.adapter is None:
        return jnp.zeros((*x.shape[:-1], linear.kernel.shape[-1]), x.dtype)
    return linear.adapter(x)


class RMSNorm(nnx.Module):
    """x / sqrt(mean(x^2) + eps) * scale, in float32 (Zhang and Sennrich 2019)."""

    def __init__(self, d: int, eps: float):
        self.scale = nnx.Param(jnp.ones(d))
        self.eps = eps

    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        return rms_norm(x, self.scale[...], self.eps)

    def add(
        self, x: Float[Array, "B S D"], branch: Float[Array, "B S D"] | None, compute: Compute
    ) -> tuple[Float[Array, "B S D"], Float[Array, "B S D"]]:
        """The norm of the residual stream x, after what a branch adds to it; and the stream."""
        return add_rms_norm(x, branch, self.scale[...], self.eps, compute.kernels, compute.mesh)


class Attention(nnx.Module):
    """Causal self-attention of several heads; rotary positions, norms of queries and keys and fewer heads of
    keys and values where the config says so."""

    def __init__(self, config: ModelConfig, residual_std: float, rngs: nnx.Rngs):
        c = config
        linear = functools.partial(Linear, c.d_model, std=c.init_std, rngs=rngs)
        biased = c.biases or c.qkv_biases
        self.q = linear(c.q_width, bias=biased)
        self.k = linear(c.kv_width, bias=biased)
        self.v = linear(c.kv_width, bias=biased)
        self.o = Linear(c.q_width, c.d_model, bias=c.biases, std=residual_std, rngs=rngs)
        self.q_norm = RMSNorm(c.head_size, c.norm_eps) if c.qk_norm else None
        self.k_norm = RMSNorm(c.head_size, c.norm_eps) if c.qk_norm else None
        self.head_size = c.head_size

    def __call__(
        self, x: Float[Array, "B S D"], ctx: ForwardContext
    ) -> tuple[Float[Array, "B S D"], KVCache | None]:
        b, s, _ = x.shape
        compute, cache = ctx.compute, ctx.cache
        q, k, v = self.projections(x, ctx.rotation, compute)
        if cache is None:
            y = causal_attention(q, k, v, compute.attention, compute.mesh, ctx.documents)
        else:
            rows = jnp.arange(b)[:, None]
            cache = KVCache(cache.k.at[rows, ctx.positions].set(k), cache.v.at[rows, ctx.positions].set(v))
            visible = jnp.arange(cache.k.shape[1]) <= ctx.positions[:, :, None]
            y = masked_attention(q, cache.k, cache.v, visible)
        return scoped("o", self.o, y.reshape(b, s, -1)), cache

    def projections(
        self, x: Float[Array, "B S D"], rotation: Rotation | None, compute: Compute
    ) -> tuple[Float[Array, "B S H K"], Float[Array, "B S G K"], Float[Array, "B S G K"]]:
        """Queries, keys and values, the first two normalised and rotated where the config says so."""
        kernels, mesh = compute.kernels, compute.mesh
        linears = (self.q, self.k, self.v)
        if splits_weights(mesh):  # side by side the parts would have to be exchanged first
            q, k, v = (scoped(name, m, x) for name, m in zip("qkv", linears, strict=True))
            q, k, v = (y.reshape(*x.shape[:2], -1, self.head_size) for y in (q, k, v))
        else:
            heads = tuple(m.kernel.shape[-1] // self.head_size for m in linears)
            if self.runs_on_kernels(x, compute):
                product = functools.partial(qkv_product, heads, kernels, mesh)
                weights = _kernel_of_all(linears, x.dtype), _bias_of_all(linears)
                return scoped(QKV, product, x, *weights, rotation)
            packed = scoped(QKV, fused_linear, x, *linears)
            if self.q_norm is None:
                return split_heads(packed, heads, rotation, kernels, mesh)
            q, k, v = split_heads(packed, heads, None)
        if self.q_norm is not None:
            q, k = scoped("q_norm", self.q_norm, q), scoped("k_norm", self.k_norm, k)
        return (q, k, v) if rotation is None else (*rotate_both(q, k, rotation, kernels, mesh), v)

    def runs_on_kernels(self, x: Float[Array, "B S D"], compute: Compute) -> bool:
        """Whether queries and keys are rotated inside the product, and set apart."""
        linears = (self.q, self.k, self.v)
        fits = self.q_norm is None and all(m.adapter is None for m in linears)
        fits &= compute.remat != "dots"  # which keeps XLA's products, not those of a kernel
        width = sum(m.kernel.shape[-1] for m in linears)
        return fits and qkv_runs_on(compute.kernels, x, width, self.head_size)


def relu2(x: Float[Array, "*batch F"]) -> Float[Array, "*batch F"]:
    """Squared ReLU (So et al. 2021, Primer)."""
    return jnp.square(jax.nn.relu(x))


ACTIVATIONS = {
    "swiglu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=True),
    "relu2": relu2,
}


class MLP(nnx.Module):
    """down(activation(up x)); SwiGLU (Shazeer 2020) has a gate, too: down(silu(gate x) * up x)."""

    def __init__(self, config: ModelConfig, residual_std: float, rngs: nnx.Rngs):
        d, f = config.d_model, config.d_mlp
        linear = functools.partial(Linear, bias=config.biases, rngs=rngs)
        self.gate = linear(d, f, std=config.init_std) if config.mlp == "swiglu" else None
        self.up = linear(d, f, std=config.init_std)
        self.down = linear(f, d, std=residual_std)
        self.kind = config.mlp

    def __call__(self, x: Float[Array, "B S D"], compute: Compute) -> Float[Array, "B S D"]:
        if self.runs_on_kernels(x, compute):
            mlp = gelu_mlp if self.gate is None else swiglu_mlp
            parts = (m for m in (self.gate, self.up, self.down) if m is not None)
            weights = (w[...] for m in parts for w in (m.kernel, m.bias) if w is not None)
            return scoped(self.kind, functools.partial(mlp, compute.kernels, compute.mesh), x, *weights)
        activation = ACTIVATIONS[self.kind]
        if self.gate is None:
            return scoped("down", self.down, activation(scoped("up", self.up, x)))
        # Two products: as one, its gradient is concatenated first, 6% of a 200M step on an H200.
        gate = activation(scoped("gate", self.gate, x))
        return scoped("down", self.down, gate * scoped("up", self.up, x))

    def runs_on_kernels(self, x: Float[Array, "B S D"], compute: Compute) -> bool:
        """Whether the activation is computed inside the products."""
        fits = (self.kind, self.up.bias is not None) in IN_PRODUCTS and not splits_weights(compute.mesh)
        fits &= all(m is None or m.adapter is None for m in (self.gate, self.up, self.down))
        fits &= compute.remat != "dots"  # which keeps XLA's products, not those of a kernel
        return fits and products_run_on(compute.kernels, x, self.up.kernel.shape[-1])


class Block(nnx.Module):
    """One layer: x + attention(norm x), then x + mlp(norm x). The last addition is left to the caller."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        residual_std = config.init_std
        if config.scaled_residual_init:
            residual_std /= (2 * config.n_layers) ** 0.5
        self.attn_norm = RMSNorm(config.d_model, config.norm_eps)
        self.attn = Attention(config, residual_std, rngs)
        self.mlp_norm = RMSNorm(config.d_model, config.norm_eps)
        self.mlp = MLP(config, residual_std, rngs)

    def __call__(
        self, x: Float[Array, "B S D"], branch: Float[Array, "B S D"] | None, ctx: ForwardContext
    ) -> tuple[Float[Array, "B S D"], Float[Array, "B S D"], KVCache | None]:
        """branch: what the layer before adds to x; None if it is in x already.

        Returns x with that, what this layer adds to it, and the layer's cache with the new positions.
        """
        normed, x = scoped("attn_norm", self.attn_norm.add, x, branch, ctx.compute)
        y, cache = scoped("attn", self.attn, normed, ctx)
        normed, x = scoped("mlp_norm", self.mlp_norm.add, x, ctx.drop(y, site=0), ctx.compute)
        return x, ctx.drop(scoped("mlp", self.mlp, normed, ctx.compute), site=1), cache


class Embedding(nnx.Module):
    """Rows to look up: token embeddings or learned positions."""

    def __init__(self, n: int, d: int, std: float, rngs: nnx.Rngs):
        self.table = nnx.Param(std * jax.random.normal(rngs.params(), (n, d)))

    def __call__(self, index: Int[Array, "*batch"]) -> Float[Array, "*batch D"]:
        return self.table[...][index]


LayerHook = Callable[[Block, Array, Array, ForwardContext], Any]
"""Takes a layer, the residual stream [B, S, D] before and after it, and what the layer was handed down."""


class Decoder(nnx.Module):
    """Embedding, `n_layers` blocks, final norm; the head is `head_table`, applied by the loss."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        c = self.config = config
        self.embed = Embedding(c.vocab_size, c.d_model, c.init_std, rngs)
        learned = c.positions == "learned"
        self.positions = Embedding(c.context, c.d_model, c.init_std, rngs) if learned else None
        keys = jax.random.split(rngs.params(), c.n_layers)
        self.layers = nnx.vmap(lambda key: Block(c, nnx.Rngs(params=key)))(keys)
        self.norm = RMSNorm(c.d_model, c.norm_eps)
        self.head = None if c.tied else Linear(c.d_model, c.vocab_size, bias=False, std=c.init_std, rngs=rngs)

    def __call__(
        self,
        tokens: Int[Array, "B S"],
        compute: Compute,
        dropout_keys: Key[Array, " B"] | None,
        cache: KVCache | None,
        positions: Int[Array, "B S"] | None,
        documents: Int[Array, "B S"] | None = None,
        hook: LayerHook | None = None,
    ) -> tuple[Float[Array, "B S D"], KVCache | None, Any]:
        """Hidden states after the final norm, the cache with the new positions, and what `hook` gave."""
        c = self.config
        index = jnp.arange(tokens.shape[1])[None] if positions is None else positions
        ctx = forward_context(c, compute, index, dropout_keys, documents)
        x = scoped("embed", self.embed_tokens, tokens, ctx)
        # A kernel adds what a layer leaves in the pass of the next one's norm. Not where layers are
        # recomputed: both would have to be kept for each.
        adds_late = norms_run_on(compute.kernels, c.d_model) and compute.remat == "none" and not hook

        def layer(stream, inputs):
            block, number, cache = inputs
            block = all_gather_weights(block, compute.dtype, compute.mesh)
            ctx_of_layer = ctx.of_layer(number, cache)
            x, branch, cache = block(*stream, ctx_of_layer)
            if not adds_late:
                x, branch = constrain_activations(x + branch, compute.mesh), None
            seen = hook(block, stream[0], x, ctx_of_layer) if hook else None
            return (x, branch), (cache, seen)

        inputs = (self.layers, jnp.arange(c.n_layers), cache)
        layer = rematerialized(layer, compute)
        stream = (x, jnp.zeros_like(x) if adds_late else None)
        scanned = jax.lax.scan(layer, stream, inputs, unroll=min(compute.unroll, c.n_layers))
        stream, (cache, seen) = scanned
        return scoped("norm", self.norm.add, *stream, compute)[0], cache, seen

    def embed_tokens(self, tokens: Int[Array, "B S"], ctx: ForwardContext) -> Float[Array, "B S D"]:
        """What goes into the first layer."""
        mesh = ctx.compute.mesh
        # Rows are cast after the look-up, so that their gradients are summed in float32.
        x = embedding_lookup(self.embed.table[...], tokens, mesh)
        if self.positions is not None and ctx.documents is None:
            x += self.positions(ctx.positions)
        elif self.positions is not None:
            x += embedding_lookup(self.positions.table[...], ctx.positions, mesh, "positions")
        x = constrain_activations(x, mesh)
        return ctx.drop(x.astype(ctx.compute.dtype), site=0)


def forward_context(
    config: ModelConfig,
    compute: Compute,
    positions: Int[Array, "#B S"],
    dropout_keys: Key[Array, " B"] | None,
    documents: Int[Array, "B S"] | None = None,
) -> ForwardContext:
    """What a forward pass of tokens at these positions hands down to its layers; every document of a row
    begins at position 0."""
    if documents is not None:
        begins = jnp.pad(documents[:, 1:] != documents[:, :-1], ((0, 0), (1, 0)))
        positions -= jax.lax.cummax(jnp.where(begins, positions, 0), axis=1)
    rotation = rotary_angles(positions, config) if config.positions == "rope" else None
    return ForwardContext(compute, positions, rotation, config.dropout, dropout_keys, documents)


def rematerialized(layer: Callable, compute: Compute) -> Callable:
    """A layer whose backward pass recomputes what `compute.remat` says, and all-gathers weights again."""
    if compute.remat == "none" and not gathers_weights(compute.mesh):
        return layer
    policy = {
        "none": keep_all_but_gathered,
        # A custom kernel is no matrix product to JAX: what it leaves is kept by its name.
        "dots": jax.checkpoint_policies.save_from_both_policies(
            jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
            jax.checkpoint_policies.save_only_these_names(RESIDUALS),
        ),
        "full": None,
    }[compute.remat]
    # Inside an unrolled loop common-subexpression elimination would undo the rematerialisation.
    return jax.checkpoint(layer, prevent_cse=compute.unroll > 1, policy=policy)


def rotary_angles(positions: Int[Array, "B S"], config: ModelConfig) -> Rotation:
    """cos and sin [B, S, 1, K/2] of position * theta^(-2i/K) (Su et al. 2021), scaled or not; float32."""
    half = config.head_size // 2
    frequency = config.rope_theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    scaling = config.rope
    if scaling is not None:
        frequency *= scaling.multipliers(config.head_size, config.rope_theta)
    angle = (positions.astype(jnp.float32)[..., None] * frequency)[:, :, None]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    return (cos, sin) if scaling is None else (cos * scaling.amplitude, sin * scaling.amplitude)


def drop(
    x: Float[Array, "B S D"], rate: float, keys: Key[Array, " B"] | None, site: int
) -> Float[Array, "B S D"]:
    """Dropout with one key per sequence: the mask does not depend on how sequences are batched."""
    if keys is None or rate == 0:
        return x

    def keep(key: Key[Array, ""]) -> Bool[Array, "S D"]:
        return jax.random.bernoulli(jax.random.fold_in(key, site), 1 - rate, x.shape[1:])

    return jnp.where(jax.vmap(keep)(keys), x / (1 - rate), 0).astype(x.dtype)


def init_params(config: ModelConfig, key: Key[Array, ""]) -> Params:
    """Fresh float32 parameters: normal(0, init_std) for matrices and tables, ones for norms, zero biases."""
    return nnx.to_pure_dict(nnx.state(Decoder(config, nnx.Rngs(params=key))))


def abstract_params(config: ModelConfig) -> Params:
    """The tree of `init_params` as shapes and types, by the table of leaves: nothing is traced."""
    leaves = model_leaves(config)
    flat = {leaf.path: jax.ShapeDtypeStruct(leaf.shape(config), jnp.float32) for leaf in leaves}
    return unflatten_dict(flat, sep="/")


def definition(config: ModelConfig) -> nnx.GraphDef:
    """What the modules are apart from their parameters."""
    return _modules(config)[0]


@functools.cache
def _modules(config: ModelConfig) -> tuple[nnx.GraphDef, Any]:
    """`definition`, and the parameters as shapes; building the modules allocates nothing."""
    return nnx.split(nnx.eval_shape(lambda: Decoder(config, nnx.Rngs(params=jax.random.key(0)))))


def _run(
    config, params, tokens, compute, dropout_keys=None, cache=None, positions=None, documents=None, hook=None,
    adapters=None,
):  # fmt: skip
    require_shapes(config, params)
    model = nnx.merge(definition(config), params)
    for path, adapter in (adapters or {}).items():
        functools.reduce(getattr, path.split("/"), model).adapter = adapter
    return naming_shapes("", model, tokens, compute, dropout_keys, cache, positions, documents, hook)


def forward(
    config: ModelConfig,
    params: Params,
    tokens: Int[Array, "B S"],
    compute: Compute = Compute(),
    dropout_keys: Key[Array, " B"] | None = None,
    documents: Int[Array, "B S"] | None = None,
    adapters: Mapping[str, Adapter] | None = None,
) -> Float[Array, "B S D"]:
    """Hidden states after the final norm, of whole sequences.

    Args:
        tokens: ids below the vocabulary (larger ones would be clamped silently: check them before).
        dropout_keys: one key per sequence; None means no dropout.
        documents: numbers that rise along a row (core/documents.py). Each stretch of one number is a sequence
            of its own: it sees nothing of the others, and its positions begin at 0. None: a row is one.
        adapters: of linear maps, by the paths of these ("layers/attn/q").
    """
    return _run(config, params, tokens, compute, dropout_keys, documents=documents, adapters=adapters)[0]


def forward_with_hook(
    config: ModelConfig,
    params: Params,
    tokens: Int[Array, "B S"],
    compute: Compute,
    hook: LayerHook,
    documents: Int[Array, "B S"] | None = None,
) -> tuple[Float[Array, "B S D"], Any]:
    """As `forward`, without dropout; and what `hook` gives of every layer, stacked on a first axis [L]."""
    hidden, _, seen = _run(config, params, tokens, compute, documents=documents, hook=hook)
    return hidden, seen


def require_fit(config: ModelConfig) -> None:
    """Traces the model once, without computing anything: for whoever edits this file.

    Raises:
        UserError: shapes do not fit; it names the module and its axes.
    """
    params = nnx.to_pure_dict(_modules(config)[1])
    require_shapes(config, params)
    tokens = jax.ShapeDtypeStruct((1, config.context), jnp.int32)
    jax.eval_shape(functools.partial(forward, config), params, tokens)


def empty_cache(config: ModelConfig, batch: int, length: int, dtype: str) -> KVCache:
    """A cache for `batch` sequences of up to `length` tokens."""
    shape = (config.n_layers, batch, length, config.kv_heads, config.head_size)
    return KVCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))


def forward_cached(
    config: ModelConfig,
    params: Params,
    tokens: Int[Array, "B S"],
    positions: Int[Array, "B S"],
    cache: KVCache,
    compute: Compute = Compute(),
) -> tuple[Float[Array, "B S D"], KVCache]:
    """Hidden states of new tokens at the given positions, which see the cache and are added to it.

    Entries of the cache beyond a row's position are invisible to it, so prompts of several lengths
    can be padded on the right and decoded on from their own ends.
    """
    return _run(config, params, tokens, compute, cache=cache, positions=positions)[:2]


def head_table(config: ModelConfig, params: Params) -> Float[Array, "V D"]:
    """The output head as rows of the vocabulary."""
    return params["embed"]["table"] if config.tied else params["head"]["kernel"].T


def logits(config: ModelConfig, params: Params, hidden: Float[Array, "*batch D"]) -> Float[Array, "*batch V"]:
    """Float32 scores of every token; the weights are cast to the type of `hidden`."""
    table = head_table(config, params).astype(hidden.dtype)
    return jnp.einsum("...d,vd->...v", hidden, table, preferred_element_type=jnp.float32)
