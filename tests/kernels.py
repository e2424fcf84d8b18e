"""What the CUDA kernels of core/ops.py compute, by the formulas in the headers of kernels_cuda/csrc, on any
device: so that the gradients and shardings around them are tested without a GPU."""

import jax.numpy as jnp
from jax import lax
from jax.nn import logsumexp

from core.ops import Kernels


def rms_norm(x, scale, eps):
    y = x.astype(jnp.float32)
    rstd = lax.rsqrt((y**2).mean(-1) + eps)
    return (y * rstd[:, None] * scale).astype(x.dtype), rstd


def add_rms_norm(x, branch, scale, eps):
    total = x + branch
    normed, rstd = rms_norm(total, scale, eps)
    return normed, total, rstd


def rms_norm_backward(d_normed, d_sum, x, rstd, scale):
    g, y, rstd = d_normed.astype(jnp.float32), x.astype(jnp.float32), rstd[:, None]
    d_scale = (g * y * rstd).sum(0)
    g = g * scale
    d_x = rstd * g - y * rstd**3 * (g * y).mean(-1, keepdims=True) + d_sum
    return d_x.astype(x.dtype), d_scale


def turn(x, cos, sin, back):
    half = x.shape[-1] // 2
    a, b = x[..., :half].astype(jnp.float32), x[..., half:].astype(jnp.float32)
    c, s = cos[:, :, None], (-sin if back else sin)[:, :, None]
    return jnp.concatenate([a * c - b * s, b * c + a * s], -1).astype(x.dtype)


def rotary(q, k, cos, sin, back):
    return turn(q, cos, sin, back), turn(k, cos, sin, back)


def rotary_unpack(packed, heads, angles):
    b, s, _ = packed.shape
    h, g, _ = heads
    parts = packed.reshape(b, s, sum(heads), -1)
    q, k, v = parts[:, :, :h], parts[:, :, h : h + g], parts[:, :, h + g :]
    return (*rotary(q, k, *angles, False), v) if angles else (q, k, v)


def qkv_product(x, weight, bias, heads, angles):
    y = x @ weight
    return rotary_unpack(y if bias is None else (y + bias).astype(x.dtype), heads, angles)


def rotary_pack(q, k, v, angles):
    if angles:
        q, k = rotary(q, k, *angles, True)
    packed = jnp.concatenate([q, k, v], axis=2)
    return packed.reshape(*packed.shape[:2], -1)


def softmax_loss(logits, targets, z_loss):
    x, counts = logits.astype(jnp.float32), targets != -1
    lse = logsumexp(x, -1)
    nll = jnp.where(counts, lse - x[jnp.arange(len(x)), targets], 0)
    total = jnp.where(counts, nll + z_loss * lse**2, 0)
    gradient = (1 + 2 * z_loss * lse)[:, None] * jnp.exp(x - lse[:, None])
    gradient -= jnp.arange(x.shape[1]) == targets[:, None]
    return jnp.where(counts[:, None], gradient, 0).astype(logits.dtype), total, nll


def loss_product(hidden, table, targets, z_loss):
    """Relative to the largest logit, as no kernel has it: what is multiplied comes to the same."""
    x, counts = (hidden @ table.T).astype(jnp.float32), targets != -1
    top = x.max(-1, keepdims=True)
    exps = jnp.exp(x - top)
    lse = logsumexp(x, -1)
    weight, sums = 1 + 2 * z_loss * lse, exps.sum(-1)
    exps -= (jnp.arange(x.shape[1]) == targets[:, None]) * (sums / weight)[:, None]
    nll = jnp.where(counts, lse - x[jnp.arange(len(x)), targets], 0)
    total = jnp.where(counts, nll + z_loss * lse**2, 0)
    return exps.astype(hidden.dtype), jnp.where(counts, weight / sums, 0), total, nll


def swiglu_product(x, weight):
    gate_up = x @ weight
    return gate_up, swiglu(gate_up)


def swiglu(gate_up):
    gate, up = jnp.split(gate_up.astype(jnp.float32), 2, axis=1)
    return (gate / (1 + jnp.exp(-gate)) * up).astype(gate_up.dtype)


def swiglu_product_backward(d, down, gate_up):
    gate, up = jnp.split(gate_up.astype(jnp.float32), 2, axis=1)
    d_h, s = (d @ down.T).astype(jnp.float32), 1 / (1 + jnp.exp(-gate))
    d_gate_up = jnp.concatenate([d_h * up * s * (1 + gate * (1 - s)), d_h * gate * s], axis=1)
    return d_gate_up.astype(gate_up.dtype), swiglu(gate_up)


def gelu_product(x, weight, bias):
    up = (x @ weight + bias).astype(x.dtype)
    y = up.astype(jnp.float32)
    return up, (y * sigmoid(y)).astype(x.dtype)


def sigmoid(y):
    """(1 + tanh u) / 2 of GELU's tanh form."""
    return 1 / (1 + jnp.exp(-2 * jnp.sqrt(2 / jnp.pi) * (y + 0.044715 * y**3)))


def gelu_product_backward(d, down, up):
    y, d_h = up.astype(jnp.float32), (d @ down.T).astype(jnp.float32)
    s, slope = sigmoid(y), 2 * jnp.sqrt(2 / jnp.pi) * (1 + 3 * 0.044715 * y**2)
    d_up = d_h * (s + y * s * (1 - s) * slope)
    return d_up.astype(up.dtype), d_up.sum(0)


def adamw(params, gradients, first, second, lr, step, grad_scale, skip, beta1, beta2, eps, weight_decay):
    updated = []
    for p, g, m, v in zip(params, gradients, first, second, strict=True):
        g = g * grad_scale
        new_m = m + (1 - beta1) * (g - m)
        new_v = beta2 * v + (1 - beta2) * g**2
        m_hat, v_hat = new_m / (1 - beta1**step), new_v / (1 - beta2**step)
        new_p = p * (1 - lr * weight_decay) - lr * m_hat / (jnp.sqrt(v_hat) + eps)
        pairs = ((new_p, p), (new_m, m), (new_v, v))
        updated.append([jnp.where(skip, old, new) for new, old in pairs])
    return tuple(map(list, zip(*updated, strict=True)))


REFERENCE = Kernels(
    (32, 48),
    rms_norm,
    add_rms_norm,
    rms_norm_backward,
    rotary,
    rotary_unpack,
    rotary_pack,
    softmax_loss,
    ("float32", "bfloat16"),
    (8, 12),
    qkv_product,
    loss_product,
    swiglu_product,
    swiglu_product_backward,
    gelu_product,
    gelu_product_backward,
    adamw,
)
