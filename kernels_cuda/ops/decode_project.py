"""The matrix products of a decoding step, each with what surrounds it (csrc/decode_project.cu).

One new token per row. Every op writes into what it is given, so that a CUDA graph can capture a step. Nothing
is differentiated.

Shapes: B batch, D d_model, F d_mlp, H heads, G heads of keys and values, K head size, S positions of the
cache, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels_cuda.ops.rms_norm import rms_norm_plain
from kernels_cuda.ops.rotary import rotate
from kernels_cuda.registry import declare


def _normed(x: Tensor, norm: Tensor, eps: float) -> Tensor:
    return rms_norm_plain(x, norm, eps, x.dtype)[0]


@declare(
    "decode_qkv_(Tensor x, Tensor norm, float eps, Tensor weight, Tensor? bias, Tensor? cos, Tensor? sin,"
    " Tensor position, Tensor(a!) q, Tensor(b!) k_cache, Tensor(c!) v_cache) -> ()"
)
def _qkv(
    x: Tensor,
    norm: Tensor,
    eps: float,
    weight: Tensor,
    bias: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    position: Tensor,
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
) -> None:
    """Queries q [B, H K] of the normed x [B, D]; keys and values go to `position` [B] of caches [B, S, G, K].

    Args:
        weight, bias: of q, k and v concatenated: [(H + 2 G) K, D], [(H + 2 G) K] or None.
        cos, sin: [S or more, K/2], or None where nothing is rotated here.
    """
    batch, _, kv_heads, size = k_cache.shape
    packed = F.linear(_normed(x, norm, eps), weight, bias).view(batch, 1, -1, size)
    queries, keys, values = packed.split((packed.shape[2] - 2 * kv_heads, kv_heads, kv_heads), dim=2)
    if cos is not None:
        angles = cos[position][:, None], sin[position][:, None]
        queries, keys = rotate(queries, *angles), rotate(keys, *angles)
    rows = torch.arange(batch, device=x.device)
    q.copy_(queries.reshape(q.shape))
    k_cache[rows, position] = keys[:, 0]
    v_cache[rows, position] = values[:, 0]


@declare("decode_add_projection_(Tensor a, Tensor weight, Tensor? bias, Tensor(a!) x) -> ()")
def _add_projection(a: Tensor, weight: Tensor, bias: Tensor | None, x: Tensor) -> None:
    """x [B, D] += weight a + bias, of a [B, F or H K]."""
    x.add_(F.linear(a, weight, bias))


@declare(
    "decode_mlp_(Tensor x, Tensor norm, float eps, Tensor weight, Tensor? bias, bool gated,"
    " Tensor(a!) hidden) -> ()"
)
def _mlp(
    x: Tensor, norm: Tensor, eps: float, weight: Tensor, bias: Tensor | None, gated: bool, hidden: Tensor
) -> None:
    """The MLP's inside, hidden [B, F], of the normed x [B, D].

    Args:
        weight, bias: gate and up concatenated, [2 F, D], if `gated` (SwiGLU); else [F, D] (GELU).
    """
    y = F.linear(_normed(x, norm, eps), weight, bias)
    if gated:
        gate, up = y.chunk(2, dim=-1)
        hidden.copy_(F.silu(gate) * up)
    else:
        hidden.copy_(F.gelu(y, approximate="tanh"))


@declare("decode_logits_(Tensor x, Tensor norm, float eps, Tensor table, Tensor(a!) logits) -> ()")
def _logits(x: Tensor, norm: Tensor, eps: float, table: Tensor, logits: Tensor) -> None:
    """Scores [B, V], float32 or wider, of the normed x [B, D] against table [V, D]."""
    logits.copy_(F.linear(_normed(x, norm, eps), table))
