"""Norm and rotation of the newest queries and keys, for models that norm them (csrc/decode_qk_norm.cu).

One new token per row. Every op writes into what it is given, so that a CUDA graph can capture a step. Nothing
is differentiated.

Shapes: B batch, H heads, G heads of keys and values, K head size, S positions of the cache.
"""

import torch
from torch import Tensor

from kernels_cuda.ops.rms_norm import rms_norm_plain
from kernels_cuda.ops.rotary import rotate
from kernels_cuda.registry import declare


@declare(
    "decode_qk_norm_(Tensor q_norm, Tensor k_norm, float eps, Tensor? cos, Tensor? sin, Tensor position,"
    " Tensor(a!) q, Tensor(b!) k_cache) -> ()"
)
def _qk_norm(
    q_norm: Tensor,
    k_norm: Tensor,
    eps: float,
    cos: Tensor | None,
    sin: Tensor | None,
    position: Tensor,
    q: Tensor,
    k_cache: Tensor,
) -> None:
    """RMSNorm over the head, then rotation, of q [B, H K] and of the keys at `position` [B] of k_cache
    [B, S, G, K], in place.

    Args:
        q_norm, k_norm: weights [K].
        cos, sin: [S or more, K/2], or None where nothing is rotated.
    """
    batch, size = len(q), k_cache.shape[-1]
    rows = torch.arange(batch, device=q.device)

    def normed(x: Tensor, norm: Tensor) -> Tensor:
        x = rms_norm_plain(x.view(batch, 1, -1, size), norm, eps, x.dtype)[0]
        return x if cos is None else rotate(x, cos[position][:, None], sin[position][:, None])

    q.copy_(normed(q, q_norm).view(q.shape))
    k_cache[rows, position] = normed(k_cache[rows, position], k_norm)[:, 0]
