"""An MLP with SwiGLU (Shazeer 2020), its formula and gradient inside the products (csrc/swiglu.cu).

Shapes: N rows, D d_model, F hidden width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from kernels_cuda.registry import compute_type, declare, declare_kernel, products_run_on, wide_type


def swiglu_mlp(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """(silu(x gate^T) * (x up^T)) down^T of x [..., D]; gate and up [F, D], down [D, F].

    The kernels want one product for gate and up. They store gate and up for the backward pass, so without
    gradients the plain formula runs.
    """
    if not (torch.is_grad_enabled() and products_run_on(x, gate, up, down, widths=gate.shape)):
        return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)
    dtype = compute_type(x)
    weights = (w.to(dtype) for w in (gate, up, down))
    return SwiGLU.apply(x.reshape(-1, x.shape[-1]).to(dtype), *weights).view(x.shape)


class SwiGLU(torch.autograd.Function):
    """`swiglu_mlp` on the ops, whatever the device; x [N, D].

    The gradients of gate and up come side by side, and cuBLAS reads each half in its place: those of their
    weights are two products, which take less time than one (docs/LOG.md).
    """

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        weight = torch.cat([gate, up])
        gate_up, h = torch.ops.mtlm.swiglu_product(x.contiguous(), weight)
        ctx.save_for_backward(x, weight, down, gate_up)
        return h @ down.T

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, d: Tensor):
        x, weight, down, gate_up = ctx.saved_tensors
        d_gate_up, h = torch.ops.mtlm.swiglu_product_backward(d.contiguous(), down, gate_up)
        d_gate, d_up = d_gate_up.chunk(2, dim=1)
        return d_gate_up @ weight, d_gate.T @ x, d_up.T @ x, d.T @ h


def _product_fake(x, weight):
    rows, width = x.shape[0], weight.shape[0]
    return x.new_empty(rows, width), x.new_empty(rows, width // 2)


def _product_cuda(x, weight):
    gate_up, h = _product_fake(x, weight)
    torch.ops.mtlm.swiglu_product_into(x, weight, False, gate_up, h)
    return gate_up, h


@declare(
    "swiglu_product(Tensor x, Tensor weight) -> (Tensor gate_up, Tensor h)",
    fake=_product_fake,
    cuda=_product_cuda,
)
def _product_plain(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """[gate, up] = x weight^T and h = silu(gate) * up."""
    gate_up = x @ weight.T
    return gate_up, _formula(gate_up)


def _formula(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.to(wide_type(gate_up.dtype)).chunk(2, dim=1)
    return (F.silu(gate) * up).to(gate_up.dtype)


def _backward_fake(d, down, gate_up):
    return torch.empty_like(gate_up), d.new_empty(d.shape[0], down.shape[1])


def _backward_cuda(d, down, gate_up):
    d_gate_up, h = _backward_fake(d, down, gate_up)
    torch.ops.mtlm.swiglu_product_backward_into(d, down, False, gate_up, d_gate_up, h)
    return d_gate_up, h


@declare(
    "swiglu_product_backward(Tensor d, Tensor down, Tensor gate_up) -> (Tensor d_gate_up, Tensor h)",
    fake=_backward_fake,
    cuda=_backward_cuda,
)
def _backward_plain(d: Tensor, down: Tensor, gate_up: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of [gate, up] from that of h down^T, and h, which is not stored in between."""
    wide = wide_type(gate_up.dtype)
    gate, up = gate_up.to(wide).chunk(2, dim=1)
    d_h, s = (d @ down).to(wide), torch.sigmoid(gate)
    d_gate_up = torch.cat([d_h * up * s * (1 + gate * (1 - s)), d_h * gate * s], dim=1)
    return d_gate_up.to(gate_up.dtype), _formula(gate_up)


declare_kernel(
    "swiglu_product_into(Tensor x, Tensor weight, bool inputs_first, Tensor(a!) gate_up, Tensor(b!) h) -> ()"
)
declare_kernel(
    "swiglu_product_backward_into(Tensor d, Tensor down, bool inputs_first, Tensor gate_up,"
    " Tensor(a!) d_gate_up, Tensor(b!) h) -> ()"
)
