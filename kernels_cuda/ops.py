"""What a model calls: norms, projection with rotary embedding. CUDA kernels where `library.load` has found
them and the tensors are on a GPU in bfloat16 or float32, as is autocast's type; else the plain formulas of
reference.py, which autograd differentiates.

Shapes: B batch, S positions, D d_model, H heads, K head size. Under autocast the kernels' outputs have
autocast's type, as a linear layer behind them would make of them.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from kernels_cuda import reference
from kernels_cuda.library import kernels_loaded

KERNEL_TYPES = (torch.bfloat16, torch.float32)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension of x [..., D], statistics in float32."""
    if not on_kernels(x, weight):
        return reference.rms_norm(x, weight, eps, x.dtype)[0]
    return RMSNorm.apply(x, weight, eps, compute_type(x))


def add_rms_norm(residual: Tensor, branch: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The norm of residual + branch [..., D], in branch's type, and that sum, in residual's."""
    if (
        not on_kernels(residual, branch, weight)
        or torch.promote_types(residual.dtype, branch.dtype) != residual.dtype
    ):
        return reference.add_rms_norm(residual, branch, weight, eps)[:2]
    return AddRMSNorm.apply(residual, branch, weight, eps)


def rotated_projections(
    x: Tensor,
    weights: tuple[Tensor, Tensor, Tensor],
    biases: tuple[Tensor | None, Tensor | None, Tensor | None],
    cos: Tensor,
    sin: Tensor,
    heads: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values [B, S, H, K] of x [B, S, D], the first two with rotary embedding.

    The kernels want one product for all three: it is rotated where it lies, and the way back puts the three
    gradients together and turns them in one pass.

    Args:
        weights, biases: of q, k and v: [H * K, D], [H * K] or None.
        cos, sin: [1 or B, S, K/2], float32.
    """
    b, s, _ = x.shape
    if not on_kernels(x, *weights):
        q, k, v = (
            F.linear(x, w, bias).view(b, s, heads, -1) for w, bias in zip(weights, biases, strict=True)
        )
        return reference.rotate(q, cos, sin), reference.rotate(k, cos, sin), v
    dtype = compute_type(x)
    weight = torch.cat([w.to(dtype) for w in weights])
    bias = None if biases[0] is None else torch.cat([bias.to(dtype) for bias in biases])
    return RotatedProjections.apply(x.to(dtype), weight, bias, cos, sin, heads)


def on_kernels(*tensors: Tensor) -> bool:
    """Whether the CUDA kernels are there for these tensors and the type that autocast makes of the first."""
    return (
        kernels_loaded()
        and all(t.is_cuda and t.dtype in KERNEL_TYPES for t in tensors)
        and compute_type(tensors[0]) in KERNEL_TYPES
    )


def compute_type(x: Tensor) -> torch.dtype:
    """The type that a matrix product with x would have."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


class RMSNorm(torch.autograd.Function):
    """`rms_norm` on the op, whatever the device; the output's type is given."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        normed, rstd = torch.ops.mtlm.rms_norm(rows, weight, eps, dtype)
        ctx.save_for_backward(rows, rstd, weight)
        return normed.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, d_normed: Tensor):
        rows, rstd, weight = ctx.saved_tensors
        d_rows = d_normed.reshape(rows.shape)
        d_x, _, d_weight = torch.ops.mtlm.rms_norm_backward(d_rows, None, rows, rstd, weight, False)
        return d_x.view(d_normed.shape), d_weight, None, None


class AddRMSNorm(torch.autograd.Function):
    """`add_rms_norm` on the op, whatever the device."""

    @staticmethod
    def forward(ctx: FunctionCtx, residual: Tensor, branch: Tensor, weight: Tensor, eps: float):
        d = residual.shape[-1]
        normed, total, rstd = torch.ops.mtlm.add_rms_norm(
            residual.reshape(-1, d), branch.reshape(-1, d), weight, eps
        )
        ctx.save_for_backward(total, rstd, weight)
        ctx.branch_type = branch.dtype
        ctx.set_materialize_grads(False)  # the last sum of a network is used by nobody: no zeros to read
        return normed.view(residual.shape), total.view(residual.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, d_normed: Tensor | None, d_total: Tensor | None):
        total, rstd, weight = ctx.saved_tensors
        if d_normed is None:  # the sum alone was used
            return d_total, None if d_total is None else d_total.to(ctx.branch_type), None, None
        shape = d_normed.shape
        d_sum = None if d_total is None else d_total.reshape(total.shape)
        d_residual, d_branch, d_weight = torch.ops.mtlm.rms_norm_backward(
            d_normed.reshape(total.shape), d_sum, total, rstd, weight, True
        )
        d_residual = d_residual.view(shape)
        return d_residual, d_branch.view(shape) if d_branch.numel() else d_residual, d_weight, None


class RotatedProjections(torch.autograd.Function):
    """`rotated_projections` on the ops, whatever the device; weight [3 H K, D] and bias [3 H K] of all three.

    The product is inside, so that what is rotated in place is nobody else's.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx, x: Tensor, weight: Tensor, bias: Tensor | None, cos: Tensor, sin: Tensor, heads: int
    ):
        b, s, _ = x.shape
        qkv = F.linear(x, weight, bias).view(b, s, 3, heads, -1)
        q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
        torch.ops.mtlm.rotary_(q, k, cos, sin, False)
        ctx.save_for_backward(x, weight, cos, sin)
        ctx.has_bias = bias is not None
        return q, k, v

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, d_q: Tensor, d_k: Tensor, d_v: Tensor):
        x, weight, cos, sin = ctx.saved_tensors
        d = torch.ops.mtlm.rotary_pack(d_q, d_k, d_v, cos, sin, True).view(-1, weight.shape[0])
        d_x = (d @ weight).view(x.shape)
        d_weight = d.T @ x.reshape(-1, x.shape[-1])
        return d_x, d_weight, d.sum(0) if ctx.has_bias else None, None, None, None
