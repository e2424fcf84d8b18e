"""An MLP with GELU (Hendrycks and Gimpel 2016) in its tanh form, inside the products (csrc/gelu.cu).

Shapes: N rows, D d_model, F hidden width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from kernels_cuda.registry import compute_type, declare, declare_kernel, products_run_on, wide_type


def gelu_mlp(x: Tensor, up: Tensor, up_bias: Tensor, down: Tensor, down_bias: Tensor) -> Tensor:
    """gelu(x up^T + up_bias) down^T + down_bias of x [..., D]; up [F, D], down [D, F].

    The kernels store what up gives for the backward pass, so without gradients the plain formula runs.
    """
    parameters = (up, up_bias, down, down_bias)
    if not (torch.is_grad_enabled() and products_run_on(x, *parameters, widths=up.shape)):
        return F.linear(F.gelu(F.linear(x, up, up_bias), approximate="tanh"), down, down_bias)
    dtype = compute_type(x)
    weights = (up.to(dtype), up_bias.to(wide_type(dtype)), down.to(dtype), down_bias.to(dtype))
    return GELU.apply(x.reshape(-1, x.shape[-1]).to(dtype), *weights).view(x.shape)


class GELU(torch.autograd.Function):
    """`gelu_mlp` on the ops, whatever the device; x [N, D]; up_bias in at least float32."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, x: Tensor, weight: Tensor, up_bias: Tensor, down: Tensor, down_bias: Tensor
    ) -> Tensor:
        up, h = torch.ops.mtlm.gelu_product(x.contiguous(), weight, up_bias)
        ctx.save_for_backward(x, weight, down, up, h)
        return F.linear(h, down, down_bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, d: Tensor):
        x, weight, down, up, h = ctx.saved_tensors
        d_up, d_bias = torch.ops.mtlm.gelu_product_backward(d.contiguous(), down, up)
        return d_up @ weight, d_up.T @ x, d_bias, d.T @ h, d.sum(0)


def _product_fake(x, weight, bias):
    up = x.new_empty(x.shape[0], weight.shape[0])
    return up, torch.empty_like(up)


def _product_cuda(x, weight, bias):
    up, h = _product_fake(x, weight, bias)
    torch.ops.mtlm.gelu_product_into(x, weight, bias, False, up, h)
    return up, h


@declare(
    "gelu_product(Tensor x, Tensor weight, Tensor bias) -> (Tensor up, Tensor h)",
    fake=_product_fake,
    cuda=_product_cuda,
)
def _product_plain(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """up = x weight^T + bias, bias of at least float32, and h = gelu(up)."""
    up = (x @ weight.T + bias).to(x.dtype)
    return up, F.gelu(up.to(wide_type(x.dtype)), approximate="tanh").to(x.dtype)


def _backward_fake(d, down, up):
    return torch.empty_like(up), up.new_empty(up.shape[1], dtype=wide_type(up.dtype))


def _backward_cuda(d, down, up):
    d_up, d_bias = _backward_fake(d, down, up)
    # Sums over the rows of each of the eight warps that have tiles of 256 rows.
    partials = d_bias.new_empty(8 * -(-up.shape[0] // 256), up.shape[1])
    torch.ops.mtlm.gelu_product_backward_into(d, down, False, up, d_up, d_bias, partials)
    return d_up, d_bias


@declare(
    "gelu_product_backward(Tensor d, Tensor down, Tensor up) -> (Tensor d_up, Tensor d_bias)",
    fake=_backward_fake,
    cuda=_backward_cuda,
)
def _backward_plain(d: Tensor, down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of up from that of h down^T, and its column sums, in at least float32."""
    wide = wide_type(up.dtype)
    d_up = torch.ops.aten.gelu_backward((d @ down).to(wide), up.to(wide), approximate="tanh")
    return d_up.to(up.dtype), d_up.sum(0)


declare_kernel(
    "gelu_product_into(Tensor x, Tensor weight, Tensor bias, bool inputs_first, Tensor(a!) up, Tensor(b!) h)"
    " -> ()"
)
declare_kernel(
    "gelu_product_backward_into(Tensor d, Tensor down, bool inputs_first, Tensor up, Tensor(a!) d_up,"
    " Tensor(b!) d_bias, Tensor(c!) partials) -> ()"
)
