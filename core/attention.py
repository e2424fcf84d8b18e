"""Causal self-attention: one function, a reference in plain XLA and the fast kernel of each accelerator.

The reference runs everywhere and is what the others are tested against. `choose` decides once, at
start-up, and gives the reason, so that nobody wonders which one a run used.
"""

import functools
import importlib.util
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from core.errors import UserError
from core.sharding import BATCH_AXES, is_parallel

Implementation = Literal["xla", "cudnn", "triton", "splash"]

SPLASH_BLOCK = 512  # queries and keys per tile; others report 128 slower than plain XLA, 512 to 1024 faster
SPLASH_LANES = 128  # the smallest tile the kernel takes
TRITON_MODULE = "jax.experimental.pallas.ops.gpu.attention"  # deprecated from 0.11 on
TRITON_BLOCK = 64  # queries and keys per tile of the gradient
TRITON_QUERIES = 128  # of the forward pass
RESIDUALS = "attention"  # the name of splash's output and normaliser, for a rematerialisation that keeps them


class Choice(NamedTuple):
    """An implementation and, in words, why it is used."""

    name: Implementation
    why: str


def choose(
    requested: Literal["auto", "xla", "cudnn", "triton", "splash"],
    *,
    platform: str,
    dtype: str,
    head_dim: int,
    context: int,
    deterministic: bool = False,
) -> Choice:
    """The implementation to use on `platform` ("cpu", "gpu" or "tpu") for these shapes.

    deterministic: only one whose gradients are equal to the bit from run to run.

    Raises:
        UserError: one was requested by name that cannot run here.
    """
    obstacles = {
        "xla": None,
        "cudnn": _cudnn_obstacle(platform, dtype, head_dim, context, deterministic),
        "triton": _triton_obstacle(platform, dtype, head_dim, context),
        "splash": _splash_obstacle(platform, context),
    }
    if requested != "auto":
        if obstacles[requested]:
            raise UserError(f"attention {requested!r} cannot be used: {obstacles[requested]}")
        return Choice(requested, "as requested")
    on_gpu: Implementation = "triton" if deterministic else "cudnn"
    fast: Implementation | None = {"gpu": on_gpu, "tpu": "splash"}.get(platform)
    if fast is None:
        return Choice("xla", f"the reference; there is no faster one for a {platform.upper()}")
    if obstacles[fast]:
        return Choice("xla", f"the reference, since {fast} cannot be used: {obstacles[fast]}")
    of_those = " whose gradients do not vary" if deterministic and platform == "gpu" else ""
    return Choice(fast, f"the fastest on a {platform.upper()}{of_those}")


def _cudnn_obstacle(
    platform: str, dtype: str, head_dim: int, context: int, deterministic: bool
) -> str | None:
    if platform != "gpu":
        return f"it needs an NVIDIA GPU, and this is a {platform.upper()}"
    if dtype != "bfloat16":
        return f"it computes in bfloat16, not in {dtype}"
    if deterministic:
        return "its gradients vary in the last bits from run to run"
    if head_dim % 8 or head_dim > 128:
        return f"it needs a head size that is a multiple of 8 up to 128, not {head_dim}"
    if context % 2:
        return f"it needs an even context, not {context}"
    return None


def _triton_obstacle(platform: str, dtype: str, head_dim: int, context: int) -> str | None:
    if platform != "gpu":
        return f"it needs an NVIDIA GPU, and this is a {platform.upper()}"
    if dtype != "bfloat16":
        return f"it computes in bfloat16, not in {dtype}"
    if not _is_there(TRITON_MODULE):
        return f"this JAX ({jax.__version__}) has no {TRITON_MODULE} any more"
    if not 16 <= head_dim <= 128:
        return f"it needs a head size of 16 to 128, not {head_dim}"
    if context % TRITON_QUERIES:
        return f"it needs a context that is a multiple of {TRITON_QUERIES}, not {context}"
    return None


def _is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # not even the package that it would be in
        return False


def _splash_obstacle(platform: str, context: int) -> str | None:
    if platform != "tpu":
        return f"it needs a TPU, and this is a {platform.upper()}"
    if context % SPLASH_LANES:
        return f"it needs a context that is a multiple of {SPLASH_LANES}, not {context}"
    return None


def causal_attention(
    q: Float[Array, "B S H K"],
    k: Float[Array, "B S G K"],
    v: Float[Array, "B S G K"],
    implementation: Implementation,
    mesh: Mesh | None = None,
    documents: Int[Array, "B S"] | None = None,
) -> Float[Array, "B S H K"]:
    """softmax(q k^T / sqrt(K)) v, each position seeing itself and those before it.

    Args:
        q, k, v: batch, sequence, heads, head size. Each head of keys and values serves H / G of queries, that
            follow each other. The softmax is in float32 whatever their type.
        implementation: see `choose`.
        mesh: if of several devices, each works on its own rows and heads, which need nothing of the others.
            XLA could not split a custom kernel by itself. Keys and values whose heads do not divide by
            `tensor` are whole on every device, which takes those that its queries need.
        documents: numbers that rise along a row; a position sees only those with its own. None: a row is one
            document. Any number of them is exact in every implementation.
    """
    local = functools.partial(_attend, implementation)
    if not is_parallel(mesh):
        return local(q, k, v, documents)
    heads = kv_heads = P(BATCH_AXES, None, "tensor")
    if k.shape[2] % mesh.shape["tensor"]:
        kv_heads = P(BATCH_AXES)
        local = functools.partial(_attend_own_heads, implementation, q.shape[2] // k.shape[2])
    specs = (heads, kv_heads, kv_heads, None if documents is None else P(BATCH_AXES))
    attend = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=heads, check_vma=False)
    return attend(q, k, v, documents)


def _attend_own_heads(
    implementation: Implementation, shared: int, q: Array, k: Array, v: Array, documents: Array | None
) -> Array:
    """One device's heads of queries, and all of keys and values, each serving `shared` heads of queries."""
    first = jax.lax.axis_index("tensor") * q.shape[2]
    needed = (first + jnp.arange(q.shape[2])) // shared
    return _attend(implementation, q, k[:, :, needed], v[:, :, needed], documents)


def _attend(implementation: Implementation, q: Array, k: Array, v: Array, documents: Array | None) -> Array:
    """One device's rows and heads."""
    if implementation == "splash":
        return _splash(q, k, v, documents)
    if implementation == "triton":
        return _triton(q, k, v, documents)
    same = None if documents is None else documents[:, :, None] == documents[:, None, :]
    if implementation == "cudnn":
        # Not its packed layout: that is compiled for the most documents that a row can hold, one for every
        # three tokens, and keeps a normaliser of a row's length, and starts a row's blocks, for each of them.
        mask = None if same is None else same[:, None]
        return jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=True, implementation="cudnn")
    length = q.shape[1]
    visible = jnp.tril(jnp.ones((1, length, length), bool))
    return masked_attention(q, k, v, visible if same is None else visible & same)


def masked_attention(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B S G K"],
    v: Float[Array, "B S G K"],
    visible: Bool[Array, "#B T S"],
) -> Float[Array, "B T H K"]:
    """The reference: attention of T positions over S; `visible` says which of these each may see.

    Fewer heads of keys and values are repeated, one for each head of queries.

    On a CPU its gradient takes half the time of `jax.nn.dot_product_attention`'s.
    """
    k, v = _for_all_heads(q, k, v)
    return jnp.einsum("bhts,bshk->bthk", _weights(q, k, visible).astype(v.dtype), v)


def _weights(q: Array, k: Array, visible: Array) -> Float[Array, "B H T S"]:
    scores = jnp.einsum("bthk,bshk->bhts", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    return jax.nn.softmax(jnp.where(visible[:, None], scores, -jnp.inf), axis=-1)


def attention_entropy(
    q: Float[Array, "B T H K"], k: Float[Array, "B S G K"], visible: Bool[Array, "#B T S"]
) -> Float[Array, " H"]:
    """The entropy of each head's attention in nats, the mean over the T positions; as `masked_attention`."""
    weights = _weights(q, _for_all_heads(q, k, k)[0], visible)
    return jax.scipy.special.entr(weights).sum(-1).mean((0, 2))


def _for_all_heads(q: Array, k: Array, v: Array) -> tuple[Array, Array]:
    """Keys and values repeated, one head for each head of queries."""
    shared = q.shape[2] // k.shape[2]
    return (k, v) if shared == 1 else (jnp.repeat(k, shared, axis=2), jnp.repeat(v, shared, axis=2))


def _triton(q, k, v, documents):
    # JAX's own kernel (Dao et al. 2022). A block adds up its gradients alone: there are no atomic additions.
    from jax.experimental.pallas.ops.gpu import attention as kernel

    block = TRITON_BLOCK
    sizes = kernel.BlockSizes(
        block_q=TRITON_QUERIES, block_k=block,
        block_q_dkv=block, block_kv_dkv=block, block_q_dq=block, block_kv_dq=block,
    )  # fmt: skip
    k, v = _for_all_heads(q, k, v)
    return kernel.mha(q, k, v, documents, q.shape[-1] ** -0.5, True, sizes)


def _splash(q, k, v, documents):
    # The kernel takes one sequence as [heads, sequence, head size], scaled by us.
    kernel = _splash_kernel(q.shape[2], q.shape[1])
    q, k, v = (x.swapaxes(1, 2) for x in (q * q.shape[-1] ** -0.5, k, v))
    return jax.vmap(functools.partial(_splash_row, kernel))(q, k, v, documents).swapaxes(1, 2)


def _splash_row(kernel, q, k, v, documents):
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel

    segments = None if documents is None else splash_attention_kernel.SegmentIds(documents, documents)
    return kernel(q, k, v, segments)


@functools.lru_cache(maxsize=4)
def _splash_kernel(n_heads: int, length: int):
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    block = next(b for b in (SPLASH_BLOCK, SPLASH_BLOCK // 2, SPLASH_LANES) if length % b == 0)
    sizes = kernel.BlockSizes(
        block_q=block, block_kv=block, block_kv_compute=block,
        block_q_dkv=block, block_kv_dkv=block, block_kv_dkv_compute=block,
        block_q_dq=block, block_kv_dq=block,
    )  # fmt: skip
    mask = masks.MultiHeadMask([masks.CausalMask((length, length))] * n_heads)
    with jax.ensure_compile_time_eval():  # the mask's tables are constants, also when built inside a trace
        return kernel.make_splash_mha(
            mask, head_shards=1, q_seq_shards=1, block_sizes=sizes, residual_checkpoint_name=RESIDUALS
        )
