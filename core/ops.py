"""The operations of a training step that have CUDA kernels: their formulas in XLA, and how kernels stand in.

`Kernels` (kernels_cuda/xla.py) computes on the arrays of one device. What belongs to it is here: its
gradients, how its arrays are split over a mesh (XLA would gather them for a call that it does not know), and
for which shapes it is used. Without kernels the formulas run, and JAX makes their gradients.

Shapes: B batch, S positions, D d_model, H heads of queries, G heads of keys and values, K head size,
N rows, F hidden width of an MLP, V vocabulary.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from core.sharding import BATCH_AXES, constrain_activations, is_parallel, per_device

Rotation = tuple[Array, Array]
"""cos and sin, [1 or B, S, 1, K/2], float32."""
Heads = tuple[int, int, int]
"""H, G and G."""

IN_PRODUCTS = {("swiglu", False): "SwiGLU", ("gelu", True): "GELU"}
"""Activations that kernels compute inside products, by kind of MLP and whether it has biases: their names."""

ROWS = P(BATCH_AXES)


class Kernels(NamedTuple):
    """CUDA kernels, each for the arrays of one device."""

    widths: tuple[int, ...]
    """Of the rows that the norms hold in registers; others they only loop over."""
    rms_norm: Callable[..., tuple[Array, Array]]
    """x [N, D], scale [D], eps -> its norm, 1/rms of each row."""
    add_rms_norm: Callable[..., tuple[Array, Array, Array]]
    """x and branch [N, D], scale, eps -> the norm of their sum, the sum, 1/rms."""
    rms_norm_backward: Callable[..., tuple[Array, Array]]
    """Gradients of norm and sum, the sum, 1/rms, scale -> gradients of each summand and of scale."""
    rotary: Callable[..., tuple[Array, Array]]
    """q, k, cos and sin [1 or B, S, K/2], back: bool -> q and k, rotated or rotated back."""
    rotary_unpack: Callable[..., tuple[Array, Array, Array]]
    """packed [B, S, (H + 2G) K], heads, angles (cos and sin, or nothing) -> q and k, rotated, and v."""
    rotary_pack: Callable[..., Array]
    """Gradients of q, k and v, angles -> that of packed."""
    softmax_loss: Callable[..., tuple[Array, Array, Array]]
    """logits [N, V], targets [N], z_loss -> their gradient, in their memory; total and nll of each row."""
    product_types: tuple[str, ...]
    """Of matrices that they multiply, with something inside; none on a GPU that lacks what they need."""
    product_head_sizes: tuple[int, ...]
    """Of heads that `qkv_product` makes."""
    qkv_product: Callable[..., tuple[Array, Array, Array]]
    """x [B, S, D], weight [D, (H + 2G) K] and bias (float32, or None), heads, angles -> q and k,
    rotated, and v."""
    loss_product: Callable[..., tuple[Array, Array, Array, Array]]
    """x [N, D], head [V, D], targets [N], z_loss -> exps [N, V] and scale [N], whose product is the gradient
    of the logits; total and nll of each row."""
    swiglu_product: Callable[..., tuple[Array, Array]]
    """x [N, D], weight [D, 2F] of gate and up -> their outputs [N, 2F]; silu(gate) * up, [N, F]."""
    swiglu_product_backward: Callable[..., tuple[Array, Array]]
    """Gradient [N, D] of the MLP, down [F, D], outputs of gate and up -> their gradient; silu(gate) * up."""
    gelu_product: Callable[..., tuple[Array, Array]]
    """x [N, D], weight [D, F] and bias [F] of up -> its output [N, F]; its GELU."""
    gelu_product_backward: Callable[..., tuple[Array, Array]]
    """Gradient [N, D] of the MLP, down [F, D], output of up -> its gradient; that of its bias, float32."""
    adamw: Callable[..., tuple[list[Array], list[Array], list[Array]]]
    """params, gradients, first and second moments (lists), lr, step, grad_scale, skip (scalars), betas, eps,
    weight_decay -> params and moments, in their memory."""


def norms_run_on(kernels: Kernels | None, d: int) -> bool:
    """Whether the kernels compute norms of this width."""
    return kernels is not None and d in kernels.widths


def rms_norm(x: Float[Array, "*batch D"], scale: Float[Array, " D"], eps: float) -> Float[Array, "*batch D"]:
    """x / sqrt(mean(x^2) + eps) * scale, in float32 (Zhang and Sennrich 2019)."""
    y = x.astype(jnp.float32)
    y *= jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
    return (y * scale).astype(x.dtype)


def add_rms_norm(
    x: Float[Array, "B S D"],
    branch: Float[Array, "B S D"] | None,
    scale: Float[Array, " D"],
    eps: float,
    kernels: Kernels | None = None,
    mesh: Mesh | None = None,
) -> tuple[Float[Array, "B S D"], Float[Array, "B S D"]]:
    """The norm of x, or of x plus what a branch adds to it; and what was normalised.

    Use that for the residual stream: its gradient and the norm's are then added in one pass.
    """
    if not norms_run_on(kernels, x.shape[-1]):
        total = x if branch is None else constrain_activations(x + branch, mesh)
        return rms_norm(total, scale, eps), total
    return _norm(eps, kernels, mesh, (x,) if branch is None else (x, branch), scale)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _norm(eps: float, kernels: Kernels, mesh: Mesh | None, summands: tuple[Array, ...], scale: Array):
    return _norm_forward(eps, kernels, mesh, summands, scale)[0]


def _norm_forward(eps, kernels, mesh, summands, scale):
    shape = summands[0].shape

    def local(summands, scale):
        rows = [x.reshape(-1, shape[-1]) for x in summands]
        if len(rows) == 1:
            normed, rstd = kernels.rms_norm(*rows, scale, eps)
            total = rows[0]
        else:
            normed, total, rstd = kernels.add_rms_norm(*rows, scale, eps)
        own = summands[0].shape
        return normed.reshape(own), total.reshape(own), rstd.reshape(own[:-1])

    normed, total, rstd = per_device(mesh, local, (ROWS, P()), ROWS)(summands, scale)
    return (normed, total), (total, rstd, scale, ((),) * len(summands))


def _norm_backward(eps, kernels, mesh, residuals, cotangents):
    *saved, summands = residuals

    def local(d_normed, d_total, total, rstd, scale):
        flat = (x.reshape(-1, x.shape[-1]) for x in (d_normed, d_total, total))
        d_x, d_scale = kernels.rms_norm_backward(*flat, rstd.reshape(-1), scale)
        if is_parallel(mesh):
            d_scale = jax.lax.psum(d_scale, BATCH_AXES)
        return d_x.reshape(total.shape), d_scale

    d_x, d_scale = per_device(mesh, local, (ROWS, ROWS, ROWS, ROWS, P()), (ROWS, P()))(*cotangents, *saved)
    return (d_x,) * len(summands), d_scale


_norm.defvjp(_norm_forward, _norm_backward)


def rotate(x: Float[Array, "B S H K"], cos: Array, sin: Array) -> Float[Array, "B S H K"]:
    """Rotary embedding in the half-split layout: element i turns with element i + K/2."""
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def rotate_both(
    q: Float[Array, "B S H K"],
    k: Float[Array, "B S G K"],
    rotation: Rotation,
    kernels: Kernels | None = None,
    mesh: Mesh | None = None,
) -> tuple[Float[Array, "B S H K"], Float[Array, "B S G K"]]:
    """Rotary embedding of queries and keys."""
    if kernels is None:
        return rotate(q, *rotation), rotate(k, *rotation)
    return _rotary(kernels, mesh, q, k, *rotation)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _rotary(kernels: Kernels, mesh: Mesh | None, q: Array, k: Array, cos: Array, sin: Array):
    return _rotated(False, kernels, mesh, q, k, cos, sin)


def _rotated(back, kernels, mesh, q, k, cos, sin):
    def local(q, k, cos, sin):
        return kernels.rotary(q, k, *_angles((cos, sin)), back)

    heads = [
        ROWS if mesh is None or x.shape[2] % mesh.shape["tensor"] else P(BATCH_AXES, None, "tensor")
        for x in (q, k)
    ]
    of_angles = _angle_spec(cos)
    return per_device(mesh, local, (*heads, of_angles, of_angles), tuple(heads))(q, k, cos, sin)


def _rotary_forward(kernels, mesh, q, k, cos, sin):
    return _rotated(False, kernels, mesh, q, k, cos, sin), (cos, sin)


def _rotary_backward(kernels, mesh, rotation, cotangents):
    return *_rotated(True, kernels, mesh, *cotangents, *rotation), None, None


_rotary.defvjp(_rotary_forward, _rotary_backward)


def split_heads(
    packed: Float[Array, "B S P"],
    heads: Heads,
    rotation: Rotation | None,
    kernels: Kernels | None = None,
    mesh: Mesh | None = None,
) -> tuple[Float[Array, "B S H K"], Float[Array, "B S G K"], Float[Array, "B S G K"]]:
    """Queries, keys and values of one product for all three, the first two rotated if angles are given.

    The kernel's gradient is packed again in the pass that rotates it back.
    """
    if kernels is not None:
        return _split(heads, kernels, mesh, packed, rotation)
    b, s, width = packed.shape
    size = width // sum(heads)
    # Split before the heads are told apart: on a TPU an array that ends in [heads, 64] takes up to 2.7 times
    # its size.
    parts = jnp.split(packed, (heads[0] * size, (heads[0] + heads[1]) * size), axis=-1)
    q, k, v = (part.reshape(b, s, -1, size) for part in parts)
    return (q, k, v) if rotation is None else (*rotate_both(q, k, rotation), v)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _split(heads: Heads, kernels: Kernels, mesh: Mesh | None, packed: Array, rotation: Rotation | None):
    return _split_forward(heads, kernels, mesh, packed, rotation)[0]


def _split_forward(heads, kernels, mesh, packed, rotation):
    def local(packed, rotation):
        return kernels.rotary_unpack(packed, heads, _angles(rotation))

    specs = (ROWS, _rotation_spec(rotation))
    return per_device(mesh, local, specs, ROWS)(packed, rotation), rotation


def _split_backward(heads, kernels, mesh, rotation, cotangents):
    def local(cotangents, rotation):
        return kernels.rotary_pack(*cotangents, _angles(rotation))

    specs = (ROWS, _rotation_spec(rotation))
    return per_device(mesh, local, specs, ROWS)(cotangents, rotation), None


_split.defvjp(_split_forward, _split_backward)


def qkv_runs_on(kernels: Kernels | None, x: Array, width: int, head_size: int) -> bool:
    """Whether `qkv_product` takes x [..., D] and the width and head size of q, k and v."""
    return products_run_on(kernels, x, width) and head_size in kernels.product_head_sizes


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def qkv_product(
    heads: Heads,
    kernels: Kernels,
    mesh: Mesh | None,
    x: Float[Array, "B S D"],
    weight: Float[Array, "D P"],
    bias: Float[Array, " P"] | None,
    rotation: Rotation | None,
) -> tuple[Float[Array, "B S H K"], Float[Array, "B S G K"], Float[Array, "B S G K"]]:
    """`split_heads` of x weight + bias in the product itself; every device holds whole weights.

    weight: of the type of x. bias: float32.
    """
    return _qkv_forward(heads, kernels, mesh, x, weight, bias, rotation)[0]


def _qkv_forward(heads, kernels, mesh, x, weight, bias, rotation):
    def local(x, weight, bias, rotation):
        return kernels.qkv_product(x, weight, bias, heads, _angles(rotation))

    specs = (ROWS, P(), None if bias is None else P(), _rotation_spec(rotation))
    return per_device(mesh, local, specs, ROWS)(x, weight, bias, rotation), (x, weight, bias, rotation)


def _qkv_backward(heads, kernels, mesh, residuals, cotangents):
    x, weight, bias, rotation = residuals
    d = _flat(_split_backward(heads, kernels, mesh, rotation, cotangents)[0])
    d_bias = None if bias is None else d.sum(0, dtype=bias.dtype)
    return (d @ weight.T).reshape(x.shape), _flat(x).T @ d, d_bias, None


qkv_product.defvjp(_qkv_forward, _qkv_backward)


def _angles(rotation: Rotation | None) -> tuple[Array, ...]:
    """As the kernels take them: without the axis of heads."""
    return () if rotation is None else tuple(x[:, :, 0] for x in rotation)


def _angle_spec(cos: Array) -> P:
    """Angles of all sequences, or a set for each."""
    return P() if cos.shape[0] == 1 else ROWS


def _rotation_spec(rotation: Rotation | None) -> P | None:
    return None if rotation is None else _angle_spec(rotation[0])


def products_run_on(kernels: Kernels | None, x: Array, width: int) -> bool:
    """Whether the kernels multiply x [..., D] by matrices of D and this width: both in steps of 16 bytes."""
    if kernels is None or str(x.dtype) not in kernels.product_types:
        return False
    return x.shape[-1] % 8 == 0 and width % 8 == 0


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def swiglu_mlp(
    kernels: Kernels,
    mesh: Mesh | None,
    x: Float[Array, "B S D"],
    gate: Float[Array, "D F"],
    up: Float[Array, "D F"],
    down: Float[Array, "F D"],
) -> Float[Array, "B S D"]:
    """(silu(x gate) * (x up)) down, its gradient on the kernels; every device holds whole weights.

    The kernels store what gate and up give for the backward pass, so without gradients the formula runs. h is
    computed again rather than stored.
    """
    gate, up, down = (w.astype(x.dtype) for w in (gate, up, down))
    return (jax.nn.silu(x @ gate) * (x @ up)) @ down


def _swiglu_forward(kernels, mesh, x, gate, up, down):
    def local(x, weight):
        results = kernels.swiglu_product(_flat(x), weight)
        return tuple(y.reshape(*x.shape[:-1], -1) for y in results)

    gate_up, h = per_device(mesh, local, (ROWS, P()), ROWS)(x, _gate_and_up(x, gate, up))
    y = _flat(h) @ down.astype(x.dtype)
    return y.reshape(x.shape), (x, gate, up, down, gate_up)


def _swiglu_backward(kernels, mesh, residuals, d):
    x, gate, up, down, gate_up = residuals

    def local(d, down, gate_up):
        results = kernels.swiglu_product_backward(_flat(d), down, _flat(gate_up))
        return tuple(y.reshape(*d.shape[:-1], -1) for y in results)

    d_gate_up, h = per_device(mesh, local, (ROWS, P(), ROWS), ROWS)(d, down.astype(x.dtype), gate_up)
    d_x = _flat(d_gate_up) @ _gate_and_up(x, gate, up).T
    d_gate, d_up = jnp.split(_flat(x).T @ _flat(d_gate_up), 2, axis=1)
    d_down = _flat(h).T @ _flat(d)
    return d_x.reshape(x.shape), d_gate.astype(gate.dtype), d_up.astype(up.dtype), d_down.astype(down.dtype)


swiglu_mlp.defvjp(_swiglu_forward, _swiglu_backward)


def _gate_and_up(x: Array, gate: Array, up: Array) -> Array:
    return jnp.concatenate([gate, up], axis=1).astype(x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def gelu_mlp(
    kernels: Kernels,
    mesh: Mesh | None,
    x: Float[Array, "B S D"],
    up: Float[Array, "D F"],
    up_bias: Float[Array, " F"],
    down: Float[Array, "F D"],
    down_bias: Float[Array, " D"],
) -> Float[Array, "B S D"]:
    """gelu(x up + up_bias) down + down_bias in GELU's tanh form, its gradient on the kernels.

    Every device holds whole weights. The kernels store what up gives for the backward pass, so without
    gradients the formula runs.
    """
    up, up_bias, down, down_bias = (w.astype(x.dtype) for w in (up, up_bias, down, down_bias))
    return jax.nn.gelu(x @ up + up_bias, approximate=True) @ down + down_bias


def _gelu_forward(kernels, mesh, x, up, up_bias, down, down_bias):
    def local(x, weight, bias):
        results = kernels.gelu_product(_flat(x), weight, bias)
        return tuple(y.reshape(*x.shape[:-1], -1) for y in results)

    weight, bias = up.astype(x.dtype), up_bias.astype(jnp.float32)
    of_up, h = per_device(mesh, local, (ROWS, P(), P()), ROWS)(x, weight, bias)
    y = _flat(h) @ down.astype(x.dtype) + down_bias.astype(x.dtype)
    return y.reshape(x.shape), (x, up, up_bias, down, down_bias, of_up, h)


def _gelu_backward(kernels, mesh, residuals, d):
    x, up, up_bias, down, down_bias, of_up, h = residuals

    def local(d, down, of_up):
        d_up, d_bias = kernels.gelu_product_backward(_flat(d), down, _flat(of_up))
        if is_parallel(mesh):
            d_bias = jax.lax.psum(d_bias, BATCH_AXES)
        return d_up.reshape(of_up.shape), d_bias

    specs = (ROWS, P(), ROWS)
    d_up, d_up_bias = per_device(mesh, local, specs, (ROWS, P()))(d, down.astype(x.dtype), of_up)
    d, d_up = _flat(d), _flat(d_up)
    d_x = d_up @ up.astype(x.dtype).T
    gradients = (_flat(x).T @ d_up, d_up_bias, _flat(h).T @ d, d.sum(0, dtype=jnp.float32))
    weights = (up, up_bias, down, down_bias)
    return d_x.reshape(x.shape), *(g.astype(w.dtype) for g, w in zip(gradients, weights, strict=True))


gelu_mlp.defvjp(_gelu_forward, _gelu_backward)


def _flat(x: Array) -> Array:
    return x.reshape(-1, x.shape[-1])
