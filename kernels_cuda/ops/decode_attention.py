"""Attention of one new token over the cache (csrc/decode_attention.cu).

One new token per row. Every op writes into what it is given, so that a CUDA graph can capture a step. Nothing
is differentiated.

Shapes: B batch, H heads, G heads of keys and values, K head size, S positions of the cache.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels_cuda.registry import declare


@declare("decode_attention_(Tensor q, Tensor k_cache, Tensor v_cache, Tensor position, Tensor(a!) out) -> ()")
def _attention(q: Tensor, k_cache: Tensor, v_cache: Tensor, position: Tensor, out: Tensor) -> None:
    """Attention of q [B, H K] over the caches [B, S, G, K] up to and with `position` [B], into out [B, H K].

    H/G neighbouring heads of queries share one of keys and values.
    """
    batch, positions, kv_heads, size = k_cache.shape
    visible = torch.arange(positions, device=q.device) <= position[:, None]
    # What is behind the position may be anything, NaN too.
    k, v = (torch.where(visible[:, :, None, None], t, 0).transpose(1, 2) for t in (k_cache, v_cache))
    grouped = q.view(batch, kv_heads, -1, size)  # a head's queries as if they were of several tokens
    y = F.scaled_dot_product_attention(grouped, k, v, attn_mask=visible[:, None, None])
    out.copy_(y.reshape(out.shape))
