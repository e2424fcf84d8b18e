"""The peer of `bench.train`: what one writes in an afternoon of plain PyTorch, for the same two models.

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
        d, f = c.d_model, c.d_mlp
        self.heads, self.gated = c.n_heads, c.mlp == "swiglu"
        self.norm1, self.norm2 = nn.RMSNorm(d, c.norm_eps), nn.RMSNorm(d, c.norm_eps)
        self.qkv = nn.Linear(d, 3 * d, bias=c.biases)
        self.o = nn.Linear(d, d, bias=c.biases)
        self.up = nn.Linear(d, 2 * f if self.gated else f, bias=c.biases)
        self.down = nn.Linear(f, d, bias=c.biases)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor] | None) -> Tensor:
        b, s, d = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, s, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        if rotation is not None:
            q, k = rotate(q, *rotation), rotate(k, *rotation)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(y.transpose(1, 2).reshape(b, s, d))
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
            block.norm1.weight.copy_(layer.attn_norm.weight)
            block.norm2.weight.copy_(layer.mlp_norm.weight)
        self.embed.weight.copy_(mirror.embed.weight)
        if self.positions is not None:
            self.positions.weight.copy_(mirror.positions.weight)
        self.norm.weight.copy_(mirror.norm.weight)
        self.head.weight.copy_(mirror.table)
        return self
