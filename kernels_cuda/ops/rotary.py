"""Rotary embedding in the half-split layout (csrc/rotary.cu), and the projection to q, k and v around it: on
Hopper the product rotates its results (csrc/qkv_product.cu).

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
    products_run_on,
    wide_type,
)

HEAD_SIZES = (64, 128)  # of heads that a tile of the product holds whole


def rotated_projections(
    x: Tensor,
    weights: tuple[Tensor, Tensor, Tensor],
    biases: tuple[Tensor | None, Tensor | None, Tensor | None],
    cos: Tensor,
    sin: Tensor,
    heads: tuple[int, int, int],
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries [B, S, H, K], keys and values [B, S, G, K] of x [B, S, D], the first two with rotary embedding.

    The kernels want one product for all three. It rotates q and k itself, or they are rotated in place; the
    backward pass concatenates the three gradients and rotates them back in one pass.

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
    parameters = (*weights, *(bias for bias in biases if bias is not None))
    in_product = weight.shape[0] // sum(heads) in HEAD_SIZES
    in_product = in_product and products_run_on(x, *parameters, widths=weight.shape)
    bias = None
    if biases[0] is not None:
        bias = torch.cat([bias.to(wide_type(dtype) if in_product else dtype) for bias in biases])
    return RotatedProjections.apply(x.to(dtype), weight, bias, cos, sin, heads, in_product)


class RotatedProjections(torch.autograd.Function):
    """`rotated_projections` on the ops, whatever the device; weight [(H + 2 G) K, D] and bias of all three.

    in_product: whether `qkv_product` rotates, with a bias in at least float32. Otherwise what is rotated in
    place is the result of a product in here, and so nobody else's.
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
        in_product: bool,
    ):
        if in_product:
            qkv = torch.ops.mtlm.qkv_product(x.contiguous(), weight, bias, cos, sin, heads)
        else:
            qkv = F.linear(x, weight, bias).view(*x.shape[:2], sum(heads), -1)
            of_q, of_k, _ = heads
            torch.ops.mtlm.rotary_(qkv[:, :, :of_q], qkv[:, :, of_q : of_q + of_k], cos, sin, False)
        ctx.save_for_backward(x, weight, cos, sin)
        ctx.bias_type = None if bias is None else bias.dtype
        return qkv.split(heads, dim=2)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, d_q: Tensor, d_k: Tensor, d_v: Tensor):
        x, weight, cos, sin = ctx.saved_tensors
        d = torch.ops.mtlm.rotary_pack(d_q, d_k, d_v, cos, sin, True)
        d = d.view(-1, weight.shape[0])
        d_x = (d @ weight).view(x.shape)
        d_weight = d.T @ x.reshape(-1, x.shape[-1])
        d_bias = None if ctx.bias_type is None else d.sum(0, dtype=ctx.bias_type)
        return d_x, d_weight, d_bias, None, None, None, None


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


def _product_fake(x, weight, bias, cos, sin, heads):
    return x.new_empty(*x.shape[:2], sum(heads), weight.shape[0] // sum(heads))


def _product_cuda(x, weight, bias, cos, sin, heads):
    qkv = _product_fake(x, weight, bias, cos, sin, heads)
    parts = qkv.split(heads, dim=2)
    torch.ops.mtlm.qkv_product_into(x.flatten(0, 1), weight, bias, cos, sin, False, *parts)
    return qkv


@declare(
    "qkv_product(Tensor x, Tensor weight, Tensor? bias, Tensor cos, Tensor sin, int[] heads) -> Tensor",
    fake=_product_fake,
    cuda=_product_cuda,
)
def _product_plain(
    x: Tensor, weight: Tensor, bias: Tensor | None, cos: Tensor, sin: Tensor, heads: list[int]
) -> Tensor:
    """[B, S, H + 2 G, K]: x weight^T + bias, q and k rotated; x [B, S, D], bias of at least float32."""
    y = x @ weight.T
    y = y if bias is None else y + bias
    q, k, v = y.unflatten(2, (sum(heads), weight.shape[0] // sum(heads))).split(heads, dim=2)
    return torch.cat([rotate(q, cos, sin), rotate(k, cos, sin), v], dim=2).to(x.dtype)


declare_kernel(
    "qkv_product_into(Tensor x, Tensor weight, Tensor? bias, Tensor? cos, Tensor? sin, bool inputs_first,"
    " Tensor(a!) q, Tensor(b!) k, Tensor(c!) v) -> ()"
)
