"""The decoder's formulas in float64, one layer after the other: what every implementation must compute."""

import numpy as np
import torch

from core.config import ModelConfig

Leaves = dict[str, torch.Tensor]


def logits64(config: ModelConfig, p: Leaves, tokens: np.ndarray, last: int | None = None) -> torch.Tensor:
    """Logits [N, S, V] of tokens [N, S], or those of the last places, by the formulas of both papers.

    p: the parameters by their path (tests.models.flat), in float64.
    """
    c = config
    n, s = tokens.shape

    def norm(x, scale):
        return x / torch.sqrt((x**2).mean(-1, keepdim=True) + c.norm_eps) * scale

    def linear(x, name, layer):
        y = x @ p[f"layers/{name}/kernel"][layer]
        biased = c.biases or (c.qkv_biases and name in ("attn/q", "attn/k", "attn/v"))
        return y + p[f"layers/{name}/bias"][layer] if biased else y

    def turned(x):  # the pair (x_i, x_{i + K/2}) is a complex number, turned by position * theta^(-2i/K)
        half = c.head_size // 2
        angle = torch.arange(s)[:, None] * c.rope_theta ** (-2 * torch.arange(half).double() / c.head_size)
        z = torch.complex(x[..., :half], x[..., half:]) * torch.exp(1j * angle)[None, :, None]
        return torch.cat([z.real, z.imag], -1)

    x = p["embed/table"][torch.tensor(tokens, dtype=torch.long)]
    if c.positions == "learned":
        x = x + p["positions/table"][:s]
    for layer in range(c.n_layers):
        y = norm(x, p["layers/attn_norm/scale"][layer])
        q, k, v = (linear(y, f"attn/{m}", layer).reshape(n, s, -1, c.head_size) for m in "qkv")
        if c.qk_norm:
            q, k = (norm(t, p[f"layers/attn/{m}_norm/scale"][layer]) for t, m in ((q, "q"), (k, "k")))
        if c.positions == "rope":
            q, k = turned(q), turned(k)
        k, v = (t.repeat_interleave(c.n_heads // t.shape[2], dim=2) for t in (k, v))
        scores = torch.einsum("bihd,bjhd->bhij", q, k) / c.head_size**0.5
        scores = scores.masked_fill(torch.ones(s, s).triu(1).bool(), float("-inf"))
        y = torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v).reshape(n, s, -1)
        x = x + linear(y, "attn/o", layer)
        y = norm(x, p["layers/mlp_norm/scale"][layer])
        up = linear(y, "mlp/up", layer)
        if c.mlp == "swiglu":
            gate = linear(y, "mlp/gate", layer)
            inner = gate / (1 + torch.exp(-gate)) * up
        elif c.mlp == "relu2":
            inner = up**2 * (up > 0)
        else:
            inner = 0.5 * up * (1 + torch.tanh((2 / np.pi) ** 0.5 * (up + 0.044715 * up**3)))
        x = x + linear(inner, "mlp/down", layer)
    x = norm(x, p["norm/scale"])
    if last is not None:
        x = x[:, s - last :]
    return x @ (p["embed/table"].T if c.tied else p["head/kernel"])
