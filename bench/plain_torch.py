"""The peer of `bench.train`: what one writes in an afternoon of plain PyTorch, for the same models.

nn.RMSNorm, one product for q, k and v and one for gate and up, PyTorch's attention, a cross-entropy over the
float32 logits of the whole batch. No kernels of anybody's; `torch.compile` is left to fuse the rest.
Shapes: B batch, S positions, H heads, K head size.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.config import ModelConfig
from kernels_cuda.registry import compute_type
from port_torch.model import Decoder


class Block(nn.Module):
    """x + attention(norm x), then x + mlp(norm x)."""

    def __init__(self, c: ModelConfig):
        super().__init__()
        if c.mlp not in ("swiglu", "gelu"):
            raise ValueError(f"plain PyTorch has no MLP {c.mlp}")
        d, f = c.d_model, c.d_mlp
        self.heads, self.gated = (c.n_heads, c.kv_heads, c.kv_heads), c.mlp == "swiglu"
        self.norm1, self.norm2 = nn.RMSNorm(d, c.norm_eps), nn.RMSNorm(d, c.norm_eps)
        self.qkv = nn.Linear(d, c.q_width + 2 * c.kv_width, bias=c.biases or c.qkv_biases)
        self.q_norm, self.k_norm = (
            nn.RMSNorm(c.head_size, c.norm_eps) if c.qk_norm else nn.Identity() for _ in range(2)
        )
        self.o = nn.Linear(c.q_width, d, bias=c.biases)
        self.up = nn.Linear(d, 2 * f if self.gated else f, bias=c.biases)
        self.down = nn.Linear(f, d, bias=c.biases)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor] | None) -> Tensor:
        b, s, _ = x.shape
        qkv = self.qkv(self.norm1(x)).view(b, s, sum(self.heads), -1).transpose(1, 2)
        q, k, v = qkv.split(self.heads, dim=1)
        q, k = self.q_norm(q), self.k_norm(k)
        if rotation is not None:
            q, k = rotate(q, *rotation), rotate(k, *rotation)
        grouped = self.heads[0] != self.heads[1]
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
        x = x + self.o(y.transpose(1, 2).reshape(b, s, -1))
        up = self.up(self.norm2(x))
        if self.gated:
            gate, up = up.chunk(2, -1)
            return x + self.down(F.silu(gate) * up)
        return x + self.down(F.gelu(up, approximate="tanh"))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x [B, H, S, K] with cos and sin [S, K/2]."""
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)


class GPT(nn.Module):
    """Tokens and targets [B, S] to the mean loss.

    Under autocast the residual stream is float32, as the embedding is and as most leave it; `narrow` casts it
    to autocast's type, as our mirror does.
    """

    def __init__(self, c: ModelConfig, narrow: bool = False):
        super().__init__()
        self.narrow = narrow
        self.embed = nn.Embedding(c.vocab_size, c.d_model)
        self.positions = nn.Embedding(c.context, c.d_model) if c.positions == "learned" else None
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.n_layers))
        self.norm = nn.RMSNorm(c.d_model, c.norm_eps)
        self.head = nn.Linear(c.d_model, c.vocab_size, bias=False)
        if c.tied:
            self.head.weight = self.embed.weight
        half = c.head_size // 2
        angle = torch.arange(c.context)[:, None] * c.rope_theta ** -(torch.arange(half) / half)
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        s = tokens.shape[1]
        x, rotation = self.embed(tokens), None
        if self.positions is None:
            rotation = self.cos[:s], self.sin[:s]
        else:
            x = x + self.positions.weight[:s]
        if self.narrow:
            x = x.to(compute_type(x))
        for block in self.blocks:
            x = block(x, rotation)
        logits = self.head(self.norm(x))
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    @torch.no_grad()
    def take_weights(self, mirror: Decoder) -> "GPT":
        """Becomes the same function as our mirror of the same config."""
        for block, layer in zip(self.blocks, mirror.layers, strict=True):
            attn, mlp = layer.attn, layer.mlp
            for linear, parts in (
                (block.qkv, [attn.q, attn.k, attn.v]),
                (block.o, [attn.o]),
                (block.up, [mlp.up] if mlp.gate is None else [mlp.gate, mlp.up]),
                (block.down, [mlp.down]),
            ):
                linear.weight.copy_(torch.cat([part.weight for part in parts]))
                if linear.bias is not None:
                    linear.bias.copy_(torch.cat([part.bias for part in parts]))
            if attn.q_norm is not None:
                block.q_norm.weight.copy_(attn.q_norm.weight)
                block.k_norm.weight.copy_(attn.k_norm.weight)
            block.norm1.weight.copy_(layer.attn_norm.weight)
            block.norm2.weight.copy_(layer.mlp_norm.weight)
        self.embed.weight.copy_(mirror.embed.weight)
        if self.positions is not None:
            self.positions.weight.copy_(mirror.positions.weight)
        self.norm.weight.copy_(mirror.norm.weight)
        self.head.weight.copy_(mirror.table)
        return self
