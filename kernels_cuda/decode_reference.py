"""The ops of one decoding step in plain PyTorch, of any device and float type; see reference.py.

One new token a row. Shapes: B batch, D d_model, F d_mlp, H heads, K head size, S positions of the cache, V
vocabulary. All write into what they are given, so that a step can be captured.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels_cuda.reference import rms_norm, rotate, wide_type


def decode_embed_(token: Tensor, position: Tensor, table: Tensor, learned: Tensor | None, x: Tensor) -> None:
    """x [B, D]: the rows of table [V, D] and, where positions are learned, of `learned` [S, D]."""
    rows = table[token]
    x.copy_(rows if learned is None else rows + learned[position])


def _normed(x: Tensor, norm: Tensor, eps: float) -> Tensor:
    return rms_norm(x, norm, eps, x.dtype)[0]


def decode_qkv_(
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
    """Queries q [B, D] of the normed x [B, D]; keys and values go to `position` [B] of caches [B, S, H, K].

    Args:
        weight, bias: of q, k and v one after the other: [3 D, D], [3 D] or None.
        cos, sin: [S or more, K/2], or None where nothing is turned.
    """
    batch, _, heads, size = k_cache.shape
    parts = F.linear(_normed(x, norm, eps), weight, bias).view(batch, 3, 1, heads, size).unbind(1)
    if cos is not None:
        angles = cos[position][:, None], sin[position][:, None]
        parts = rotate(parts[0], *angles), rotate(parts[1], *angles), parts[2]
    rows = torch.arange(batch, device=x.device)
    q.copy_(parts[0].reshape(q.shape))
    k_cache[rows, position] = parts[1][:, 0]
    v_cache[rows, position] = parts[2][:, 0]


def decode_attention_(q: Tensor, k_cache: Tensor, v_cache: Tensor, position: Tensor, out: Tensor) -> None:
    """Attention of q [B, D] over the caches [B, S, H, K] up to and with `position` [B], into out [B, D]."""
    batch, positions, heads, size = k_cache.shape
    visible = torch.arange(positions, device=q.device) <= position[:, None]
    # What is behind the position may be anything, NaN too.
    k, v = (torch.where(visible[:, :, None, None], t, 0).transpose(1, 2) for t in (k_cache, v_cache))
    mask = visible[:, None, None]
    y = F.scaled_dot_product_attention(q.view(batch, heads, 1, size), k, v, attn_mask=mask)
    out.copy_(y.reshape(out.shape))


def decode_add_projection_(a: Tensor, weight: Tensor, bias: Tensor | None, x: Tensor) -> None:
    """x [B, D] += weight a + bias, of a [B, F or D]."""
    x.add_(F.linear(a, weight, bias))


def decode_mlp_(
    x: Tensor, norm: Tensor, eps: float, weight: Tensor, bias: Tensor | None, gated: bool, hidden: Tensor
) -> None:
    """The MLP's inside, hidden [B, F], of the normed x [B, D].

    Args:
        weight, bias: gate and up one after the other, [2 F, D], if `gated` (SwiGLU); else [F, D] (GELU).
    """
    y = F.linear(_normed(x, norm, eps), weight, bias)
    if gated:
        gate, up = y.chunk(2, dim=-1)
        hidden.copy_(F.silu(gate) * up)
    else:
        hidden.copy_(F.gelu(y, approximate="tanh"))


def decode_logits_(x: Tensor, norm: Tensor, eps: float, table: Tensor, logits: Tensor) -> None:
    """Scores [B, V], float32 or wider, of the normed x [B, D] against table [V, D]."""
    logits.copy_(F.linear(_normed(x, norm, eps), table))


def decode_sample_(
    logits: Tensor, real: Tensor, whole: Tensor, last: int, position: Tensor, token: Tensor
) -> None:
    """Chooses a token [B] a row from softmax(logits / temperature), cut to the top k and the top p.

    The draw is an exponential race, argmax p / -log(1 - u), with u of Philox: a function of the seed, the
    row's number, the position of the new token and the token alone. Tokens of equal p are kept all or none.

    Args:
        real: temperature (0: the likeliest token), top_p.
        whole: top_k (0: all), seed, number of the first row.
        last: highest position there is.
        position: [B] of the newest token, moved on to that of the chosen one.
    """
    temperature, top_p = real.unbind()
    top_k, seed, first_row = whole.unbind()
    vocab = logits.shape[1]
    position.copy_((position + 1).clamp(max=last))
    x = logits.to(wide_type(logits.dtype))
    p = ((x - x.amax(-1, keepdim=True)) / torch.where(temperature > 0, temperature.clamp(min=1e-6), 1)).exp()
    ranked = p.sort(dim=-1, descending=True).values
    k = torch.where(top_k > 0, top_k.clamp(max=vocab), vocab)
    least = ranked.gather(1, (k - 1).expand(len(p), 1))
    mass = torch.where(ranked >= least, ranked, 0).cumsum(-1)
    # A token stays while those before it have not reached top_p: the likeliest always does.
    n_kept = ((mass - ranked < top_p * mass[:, -1:]) & (ranked >= least)).sum(-1, keepdim=True)
    cut = ranked.gather(1, n_kept - 1)
    kept = (p >= torch.where(top_p < 1, torch.maximum(least, cut), least)) & (p > 0)
    row = first_row + torch.arange(len(p), device=p.device)
    times = -torch.log1p(-uniform(seed, row, position, vocab).to(p.dtype))
    drawn = torch.where(kept, p / times, -1).argmax(-1)
    token.copy_(torch.where(temperature > 0, drawn, logits.argmax(-1)))


def uniform(seed: Tensor, row: Tensor, position: Tensor, vocab: int) -> Tensor:
    """Random numbers in (0, 1), float64 [B, V]: word i % 4 of Philox-4x32-10 (Salmon et al. 2011) of counter
    (i / 4, position, 0, 0) and key (seed, row)."""
    low = 0xFFFFFFFF
    block = torch.arange((vocab + 3) // 4, device=row.device)
    zero = torch.zeros_like(row[:, None] + block)
    x, y, z, w = zero + block, zero + position[:, None], zero, zero
    key, other = zero + (seed & low), zero + (row[:, None] & low)
    for _ in range(10):
        a, b = 0xD2511F53 * x, 0xCD9E8D57 * z  # 64 bits; the sign is one of them
        x, y, z, w = (b >> 32 & low) ^ y ^ key, b & low, (a >> 32 & low) ^ w ^ other, a & low
        key, other = key + 0x9E3779B9 & low, other + 0xBB67AE85 & low
    words = torch.stack([x, y, z, w], dim=-1).flatten(1)[:, :vocab]
    return words.double() * 2**-32 + 2**-33
