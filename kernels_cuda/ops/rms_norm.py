"""RMSNorm, alone or behind a residual addition (csrc/rms_norm.cu).

Shapes: N rows, D d_model. Under autocast the kernels' outputs have autocast's type, as a linear layer behind
them would make of them.
"""

import torch
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


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension of x [..., D], statistics in float32."""
    if not on_kernels(x, weight):
        return rms_norm_plain(x, weight, eps, x.dtype)[0]
    return RMSNorm.apply(x, weight, eps, compute_type(x))


def add_rms_norm(residual: Tensor, branch: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The norm of residual + branch [..., D], in branch's type, and that sum, in residual's."""
    if (
        not on_kernels(residual, branch, weight)
        or torch.promote_types(residual.dtype, branch.dtype) != residual.dtype
    ):
        return _add_rms_norm_plain(residual, branch, weight, eps)[:2]
    return AddRMSNorm.apply(residual, branch, weight, eps)


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


def _rms_norm_fake(x, weight, eps, dtype):
    return x.new_empty(x.shape, dtype=dtype), x.new_empty(x.shape[:-1], dtype=wide_type(x.dtype))


def _rms_norm_cuda(x, weight, eps, dtype):
    normed, rstd = _rms_norm_fake(x, weight, eps, dtype)
    torch.ops.mtlm.rms_norm_into(contiguous_rows(x), weight.contiguous(), eps, normed, rstd)
    return normed, rstd


@declare(
    "rms_norm(Tensor x, Tensor weight, float eps, ScalarType dtype) -> (Tensor, Tensor)",
    fake=_rms_norm_fake,
    cuda=_rms_norm_cuda,
)
def rms_norm_plain(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The norm of x [..., D] in `dtype`, and 1 / sqrt(mean(x^2) + eps) of each row [...]."""
    y = x.to(wide_type(x.dtype))
    rstd = torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + eps)
    y = y * rstd
    return (y * weight).to(dtype), rstd.squeeze(-1)


declare_kernel("rms_norm_into(Tensor x, Tensor weight, float eps, Tensor(a!) normed, Tensor(b!) rstd) -> ()")


def _add_rms_norm_fake(residual, branch, weight, eps):
    rstd = residual.new_empty(residual.shape[:-1], dtype=wide_type(residual.dtype))
    return branch.new_empty(branch.shape), residual.new_empty(residual.shape), rstd


def _add_rms_norm_cuda(residual, branch, weight, eps):
    results = _add_rms_norm_fake(residual, branch, weight, eps)
    torch.ops.mtlm.add_rms_norm_into(
        contiguous_rows(residual), contiguous_rows(branch), weight.contiguous(), eps, *results
    )
    return results


@declare(
    "add_rms_norm(Tensor residual, Tensor branch, Tensor weight, float eps) -> (Tensor, Tensor, Tensor)",
    fake=_add_rms_norm_fake,
    cuda=_add_rms_norm_cuda,
)
def _add_rms_norm_plain(
    residual: Tensor, branch: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The norm of residual + branch [..., D] in branch's type, the sum in residual's, each row's 1 / rms."""
    total = residual + branch
    normed, rstd = rms_norm_plain(total, weight, eps, branch.dtype)
    return normed, total, rstd


declare_kernel(
    "add_rms_norm_into(Tensor residual, Tensor branch, Tensor weight, float eps, Tensor(a!) normed,"
    " Tensor(b!) sum, Tensor(c!) rstd) -> ()"
)


def _backward_fake(d_normed, d_sum, x, rstd, weight, branch):
    two = branch and d_normed.dtype != x.dtype
    d_branch = d_normed.new_empty(x.shape[0] if two else 0, x.shape[1])
    return x.new_empty(x.shape), d_branch, weight.new_empty(weight.shape)


def _backward_cuda(d_normed, d_sum, x, rstd, weight, branch):
    results = _backward_fake(d_normed, d_sum, x, rstd, weight, branch)
    # One row of partial sums of d_weight for each block of the grid: two blocks share a multiprocessor, and
    # each takes at least 8 rows at a time.
    processors = torch.cuda.get_device_properties(x.device).multi_processor_count
    partials = x.new_empty(min(-(-x.shape[0] // 8), 2 * processors), x.shape[1], dtype=torch.float32)
    torch.ops.mtlm.rms_norm_backward_into(
        contiguous_rows(d_normed),
        None if d_sum is None else contiguous_rows(d_sum),
        contiguous_rows(x),
        rstd.contiguous(),
        weight.contiguous(),
        *results,
        partials,
    )
    return results


@declare(
    "rms_norm_backward(Tensor d_normed, Tensor? d_sum, Tensor x, Tensor rstd, Tensor weight, bool branch)"
    " -> (Tensor, Tensor, Tensor)",
    fake=_backward_fake,
    cuda=_backward_cuda,
)
def _backward_plain(
    d_normed: Tensor, d_sum: Tensor | None, x: Tensor, rstd: Tensor, weight: Tensor, branch: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x [N, D], of the branch (empty if its type, d_normed's, is that of x) and of weight."""
    wide = wide_type(x.dtype)
    y, g = x.to(wide), d_normed.to(wide)
    rstd = rstd[:, None]
    d_weight = (g * (y * rstd)).sum(0).to(weight.dtype)
    g = g * weight.to(wide)
    d_x = rstd * (g - y * (g * y).mean(-1, keepdim=True) * rstd**2)
    if d_sum is not None:
        d_x = d_x + d_sum.to(wide)
    two = branch and d_normed.dtype != x.dtype
    d_branch = d_x.to(d_normed.dtype) if two else d_normed.new_empty(0, x.shape[1])
    return d_x.to(x.dtype), d_branch, d_weight


declare_kernel(
    "rms_norm_backward_into(Tensor d_normed, Tensor? d_sum, Tensor x, Tensor rstd, Tensor weight,"
    " Tensor(a!) d_x, Tensor(b!) d_branch, Tensor(c!) d_weight, Tensor(d!) partials) -> ()"
)
