"""The two ends of a decoding step: embedding and choice of a token (csrc/decode_sample.cu).

One new token per row. Every op writes into what it is given, so that a CUDA graph can capture a step. Nothing
is differentiated.

Shapes: B batch, D d_model, S positions, V vocabulary.
"""

import torch
from torch import Tensor

from kernels_cuda.registry import declare, wide_type


@declare("decode_embed_(Tensor token, Tensor position, Tensor table, Tensor? learned, Tensor(a!) x) -> ()")
def _embed(token: Tensor, position: Tensor, table: Tensor, learned: Tensor | None, x: Tensor) -> None:
    """x [B, D]: the rows of table [V, D] and, where positions are learned, of `learned` [S, D]."""
    rows = table[token]
    x.copy_(rows if learned is None else rows + learned[position])


@declare(
    "decode_sample_(Tensor logits, Tensor real, Tensor whole, int last, Tensor(a!) position,"
    " Tensor(b!) token) -> ()"
)
def _sample(logits: Tensor, real: Tensor, whole: Tensor, last: int, position: Tensor, token: Tensor) -> None:
    """Chooses one token [B] per row from softmax(logits / temperature), cut to the top k and the top p.

    The draw is an exponential race, argmax p / -log(1 - u), with u of Philox: a function of the seed, the
    row's number, the position of the new token and the token alone. Tokens of equal p are kept all or none.

    Args:
        real: temperature (0: the likeliest token), top_p.
        whole: top_k (0: all), seed, number of the first row.
        last: highest position there is.
        position: [B] of the newest token, advanced to that of the chosen one.
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
