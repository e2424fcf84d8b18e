"""Rotary embedding in the half-split layout (csrc/rotary.cu), and the projection to q, k and v around it.

Shapes: B batch, S positions, D d_model, H heads of queries, G heads of keys and values, K head size.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from kernels_cuda.registry import (
    compute_type,
    contiguous_rows,
    declare,
    declare_kernel,
    on_kernels,
    wide_type,
)


def rotated_projections(
    x: Tensor,
    weights: tuple[Tensor, Tensor, Tensor],
    biases: tuple[Tensor | None, Tensor | None, Tensor | None],
    cos: Tensor,
    sin: Tensor,
    heads: tuple[int, int, int],
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries [B, S, H, K], keys and values [B, S, G, K] of x [B, S, D], the first two with rotary embedding.

    The kernels want one product for all three: it is rotated in place, and the backward pass concatenates the
    three gradients and rotates them back in one pass.

    Args:
        weights, biases: of q, k and v: [H * K, D] or [G * K, D], [H * K] or [G * K] or None.
        cos, sin: [1 or B, S, K/2], float32.
        heads: H, G and G.
    """
    b, s, _ = x.shape
    if not on_kernels(x, *weights):
        q, k, v = (
            F.linear(x, w, bias).view(b, s, n, -1) for w, bias, n in zip(weights, biases, heads, strict=True)
        )
        return rotate(q, cos, sin), rotate(k, cos, sin), v
    dtype = compute_type(x)
    weight = torch.cat([w.to(dtype) for w in weights])
    bias = None if biases[0] is None else torch.cat([bias.to(dtype) for bias in biases])
    return RotatedProjections.apply(x.to(dtype), weight, bias, cos, sin, heads)


class RotatedProjections(torch.autograd.Function):
    """`rotated_projections` on the ops, whatever the device; weight [(H + 2 G) K, D] and bias of all three.

    The product is inside, so that what is rotated in place is nobody else's.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        cos: Tensor,
        sin: Tensor,
        heads: tuple[int, int, int],
    ):
        b, s, _ = x.shape
        qkv = F.linear(x, weight, bias).view(b, s, sum(heads), -1)
        of_q, of_k, _ = heads
        torch.ops.mtlm.rotary_(qkv[:, :, :of_q], qkv[:, :, of_q : of_q + of_k], cos, sin, False)
        ctx.save_for_backward(x, weight, cos, sin)
        ctx.has_bias = bias is not None
        return qkv.split(heads, dim=2)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, d_q: Tensor, d_k: Tensor, d_v: Tensor):
        x, weight, cos, sin = ctx.saved_tensors
        d = torch.ops.mtlm.rotary_pack(d_q, d_k, d_v, cos, sin, True)
        d = d.view(-1, weight.shape[0])
        d_x = (d @ weight).view(x.shape)
        d_weight = d.T @ x.reshape(-1, x.shape[-1])
        return d_x, d_weight, d.sum(0) if ctx.has_bias else None, None, None, None


def rotated_heads(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`rotate` of q [B, S, H, K] and k [B, S, G, K]; and v [B, S, G, K], which goes through the same pass.

    For queries and keys that are no plain product: normed ones, or those of a LoRA adapter. Written out,
    `torch.compile` computes the angles again for every element of every layer, 19 of 107 ms of an update of
    Qwen3-0.6B (docs/LOG.md).

    Args:
        cos, sin: [1 or B, S, K/2], float32.
    """
    if not on_kernels(q, k, v):
        return rotate(q, cos, sin), rotate(k, cos, sin), v
    return RotatedHeads.apply(*(t.to(compute_type(t)) for t in (q, k, v)), cos, sin)


class RotatedHeads(torch.autograd.Function):
    """`rotated_heads` on the op, whatever the device."""

    @staticmethod
    def forward(ctx: FunctionCtx, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor):
        ctx.save_for_backward(cos, sin)
        ctx.heads = [t.shape[2] for t in (q, k, v)]
        return torch.ops.mtlm.rotary_pack(q, k, v, cos, sin, False).split(ctx.heads, dim=2)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, *gradients: Tensor):
        packed = torch.ops.mtlm.rotary_pack(*gradients, *ctx.saved_tensors, True)
        return *packed.split(ctx.heads, dim=2), None, None


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x [B, S, H, K]: element i rotates with element i + K/2. Plain PyTorch.

    Args:
        cos, sin: [1 or B, S, K/2].
    """
    a, b = x.to(wide_type(x.dtype)).chunk(2, dim=-1)
    cos, sin = cos[:, :, None], sin[:, :, None]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


@declare("rotary_(Tensor(a!) q, Tensor(b!) k, Tensor cos, Tensor sin, bool conjugate) -> ()")
def _rotary_plain(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, conjugate: bool) -> None:
    """`rotate` of q [B, S, H, K] and k [B, S, G, K] in place; `conjugate` rotates back."""
    sin = -sin if conjugate else sin
    q.copy_(rotate(q, cos, sin))
    k.copy_(rotate(k, cos, sin))


def _pack_fake(q, k, v, cos, sin, conjugate):
    b, s, _, size = q.shape
    return q.new_empty(b, s, q.shape[2] + k.shape[2] + v.shape[2], size)


def _pack_cuda(q, k, v, cos, sin, conjugate):
    packed = _pack_fake(q, k, v, cos, sin, conjugate)
    torch.ops.mtlm.rotary_pack_into(*map(contiguous_rows, (q, k, v)), cos, sin, conjugate, packed)
    return packed


@declare(
    "rotary_pack(Tensor q, Tensor k, Tensor v, Tensor cos, Tensor sin, bool conjugate) -> Tensor",
    fake=_pack_fake,
    cuda=_pack_cuda,
)
def _pack_plain(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, conjugate: bool) -> Tensor:
    """[B, S, H + 2 G, K] of q and k, rotated, and v."""
    sin = -sin if conjugate else sin
    return torch.cat([rotate(q, cos, sin), rotate(k, cos, sin), v], dim=2)


declare_kernel(
    "rotary_pack_into(Tensor q, Tensor k, Tensor v, Tensor? cos, Tensor? sin, bool conjugate,"
    " Tensor(a!) packed) -> ()"
)
