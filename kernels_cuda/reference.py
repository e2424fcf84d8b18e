"""Every op in plain PyTorch, of any device and float type: what the kernels are compared with, and what runs
where there are none. Differentiable but for the gradients' own formulas and what is in place.

Shapes: N rows, D d_model, V vocabulary, B batch, S positions, H heads, K head size.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = -1  # a target that does not count, as in core/loss.py


def wide_type(dtype: torch.dtype) -> torch.dtype:
    """The type of statistics and sums: at least float32."""
    return torch.promote_types(dtype, torch.float32)


def rms_norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x / sqrt(mean(x^2) + eps) * weight [..., D] in `dtype`, and the factor [...] of each row."""
    y = x.to(wide_type(x.dtype))
    rstd = torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + eps)
    y = y * rstd
    return (y * weight).to(dtype), rstd.squeeze(-1)


def add_rms_norm(
    residual: Tensor, branch: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The norm of residual + branch [..., D] in branch's type, the sum in residual's, each row's factor."""
    total = residual + branch
    normed, rstd = rms_norm(total, weight, eps, branch.dtype)
    return normed, total, rstd


def rms_norm_backward(
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


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x [B, S, H, K] in the half-split layout: element i turns with element i + K/2.

    Args:
        cos, sin: [1 or B, S, K/2].
    """
    a, b = x.to(wide_type(x.dtype)).chunk(2, dim=-1)
    cos, sin = cos[:, :, None], sin[:, :, None]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


def rotary_(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, conjugate: bool) -> None:
    """`rotate` of q and k [B, S, H, K] in place; `conjugate` turns back."""
    sin = -sin if conjugate else sin
    q.copy_(rotate(q, cos, sin))
    k.copy_(rotate(k, cos, sin))


def rotary_pack(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, conjugate: bool) -> Tensor:
    """[B, S, 3, H, K] of q and k, turned, and v."""
    sin = -sin if conjugate else sin
    return torch.stack([rotate(q, cos, sin), rotate(k, cos, sin), v], dim=2)


def softmax_loss_(
    logits: Tensor, targets: Tensor, total: Tensor, nll: Tensor, z_loss: float, gradients: bool
) -> None:
    """Cross-entropy of each row of logits [N, V] into nll [N], with z_loss * lse^2 into total [N].

    With `gradients` the logits become those of the totals. A target `IGNORE` has loss and gradient 0; another
    one outside of the vocabulary makes its row NaN.
    """
    x = logits.to(wide_type(logits.dtype))
    counted = targets != IGNORE
    valid = (targets >= 0) & (targets < logits.shape[1])
    index = torch.where(valid, targets, 0)[:, None]
    lse = torch.logsumexp(x, dim=-1)
    rows = torch.where(valid, lse - x.gather(1, index)[:, 0], torch.nan)
    nll.copy_(torch.where(counted, rows, 0))
    total.copy_(torch.where(counted, rows + z_loss * lse**2, 0))
    if gradients:
        d = (1 + 2 * z_loss * lse)[:, None] * torch.exp(x - lse[:, None])
        d.scatter_add_(1, index, d.new_full(index.shape, -1))
        d = torch.where(valid[:, None], d, torch.nan)
        logits.copy_(torch.where(counted[:, None], d, 0))


def linear_cross_entropy(
    hidden: Tensor, table: Tensor, targets: Tensor, z_loss: float
) -> tuple[Tensor, Tensor]:
    """Sums over the targets [N] of total and nll, from hidden [N, D] and head [V, D]: all logits at once."""
    logits = F.linear(hidden, table.to(hidden.dtype))
    logits = logits.to(wide_type(logits.dtype))
    counted = targets != IGNORE
    lse = torch.logsumexp(logits, dim=-1)
    picked = logits.gather(1, torch.where(counted, targets, 0)[:, None])[:, 0]
    nll = torch.where(counted, lse - picked, 0)
    return (nll + torch.where(counted, z_loss * lse**2, 0)).sum(), nll.detach().sum()


def adamw_(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    copies: list[Tensor],
    lr: Tensor,
    step: Tensor,
    grad_scale: Tensor,
    skip: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    """One update of AdamW (Loshchilov and Hutter 2019) in place, number `step` counted from 1."""
    # 1 - beta^step in float64: float32's 1 - 0.9999 is off by 1.7e-4 of itself.
    correction1, correction2 = (-torch.expm1(step.double() * math.log(beta)) for beta in (beta1, beta2))
    for i, (p, g, m, v) in enumerate(zip(params, grads, exp_avgs, exp_avg_sqs, strict=True)):
        g = g.to(p.dtype) * grad_scale
        new_m = m + (1 - beta1) * (g - m)
        new_v = beta2 * v + (1 - beta2) * g * g
        new_p = p * (1 - lr * weight_decay) - lr / correction1 * new_m / ((new_v / correction2).sqrt() + eps)
        for old, new in ((p, new_p), (m, new_m), (v, new_v)):
            old.copy_(torch.where(skip, old, new))
        if copies:
            copies[i].copy_(p)
