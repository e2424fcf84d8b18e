"""The CUDA implementations of the ops that return new tensors: they allocate them, and a kernel fills them.

Memory is asked for here and not in the built file: PyTorch's stable ABI passes every error on as a
RuntimeError, and whoever splits a batch when memory runs out must see torch.OutOfMemoryError. For the shapes
see reference.py.
"""

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The norm of x [N, D] in `dtype`, and each row's factor [N]."""
    normed, rstd = x.new_empty(x.shape, dtype=dtype), _float32(x, x.shape[0])
    torch.ops.mtlm.rms_norm_into(_whole_rows(x), weight.contiguous(), eps, normed, rstd)
    return normed, rstd


def add_rms_norm(
    residual: Tensor, branch: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The norm of residual + branch [N, D], that sum, and each row's factor [N]."""
    normed, total = branch.new_empty(branch.shape), residual.new_empty(residual.shape)
    rstd = _float32(residual, residual.shape[0])
    torch.ops.mtlm.add_rms_norm_into(
        _whole_rows(residual), _whole_rows(branch), weight.contiguous(), eps, normed, total, rstd
    )
    return normed, total, rstd


def rms_norm_backward(
    d_normed: Tensor, d_sum: Tensor | None, x: Tensor, rstd: Tensor, weight: Tensor, branch: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x [N, D], of the branch (empty if its type, d_normed's, is that of x), of weight [D]."""
    two = branch and d_normed.dtype != x.dtype
    d_x, d_weight = x.new_empty(x.shape), weight.new_empty(weight.shape)
    d_branch = d_normed.new_empty(x.shape[0] if two else 0, x.shape[-1])
    partials = _float32(x, torch.ops.mtlm.rms_norm_partials(x), x.shape[-1])
    torch.ops.mtlm.rms_norm_backward_into(
        _whole_rows(d_normed),
        None if d_sum is None else _whole_rows(d_sum),
        _whole_rows(x),
        rstd.contiguous(),
        weight.contiguous(),
        d_x,
        d_branch,
        d_weight,
        partials,
    )
    return d_x, d_branch, d_weight


def rotary_pack(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, conjugate: bool) -> Tensor:
    """[B, S, 3, H, K] of q and k [B, S, H, K], turned, and v."""
    b, s, *head = q.shape
    packed = q.new_empty(b, s, 3, *head)
    torch.ops.mtlm.rotary_pack_into(*map(_whole_rows, (q, k, v)), cos, sin, conjugate, packed)
    return packed


IMPLEMENTATIONS = (rms_norm, add_rms_norm, rms_norm_backward, rotary_pack)


def _float32(like: Tensor, *shape: int) -> Tensor:
    return like.new_empty(shape, dtype=torch.float32)


def _whole_rows(t: Tensor) -> Tensor:
    """The tensor itself if the elements of its last dimension are neighbours; else a copy whose are."""
    return t if t.shape[-1] <= 1 or t.stride(-1) == 1 else t.contiguous()
