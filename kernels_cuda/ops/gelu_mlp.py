"""An MLP with GELU (tanh form) and biases; GELU costs no pass of its own over memory (csrc/products.cu).

cuBLASLt applies GELU where it finishes the first product, and its gradient with the first bias's where it
finishes the backward product of the second map. What is kept for the backward pass is GELU's input alone, as
torch.compile does without kernels: its output, as large again, is made once more there.

Shapes: N rows, D d_model, F d_mlp.
"""

import ctypes
import os
import statistics
from collections.abc import Callable, Hashable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from kernels_cuda.registry import compute_type, declare, declare_kernel, on_kernels

WORKSPACE_BYTES = 32 * 2**20
"""What cuBLAS recommends for Hopper."""
CHOICES = 8
"""How many of cuBLASLt's proposals are timed."""

_fastest: dict[Hashable, int] = {}  # by op, device and shapes


def gelu_mlp(x: Tensor, up_weight: Tensor, up_bias: Tensor, down_weight: Tensor, down_bias: Tensor) -> Tensor:
    """down(gelu(up x)) of x [..., D].

    The plain formula unless all of this holds: the kernels are loaded, products are bfloat16, the widths
    are multiples of 8, weights are being trained, and cuBLASLt fuses (`fuses_gelu`).

    Args:
        up_weight, up_bias: [F, D], [F].
        down_weight, down_bias: [D, F], [D].
    """
    parameters = (up_weight, up_bias, down_weight, down_bias)
    dtype = compute_type(x)
    if not (
        torch.is_grad_enabled()
        and all(p.requires_grad for p in parameters)
        and on_kernels(x, *parameters)
        and dtype == torch.bfloat16
        and all(width % 8 == 0 for width in up_weight.shape)
        and fuses_gelu()
    ):
        return F.linear(gelu(F.linear(x, up_weight, up_bias)), down_weight, down_bias)
    return GeluMLP.apply(x.to(dtype), *(p.to(dtype) for p in parameters))


@torch.compiler.assume_constant_result
def fuses_gelu() -> bool:
    """Whether PyTorch's cuBLASLt is there by name and the GPU one for which it fuses GELU in bfloat16: Hopper
    or newer. On older ones GELU is a second kernel behind the product, slower than Inductor's."""
    return torch.cuda.get_device_capability() >= (9, 0) and cublaslt() is not None


def cublaslt() -> str | None:
    """The name of the cuBLASLt that is loaded in this process, as csrc/products.cu looks for it."""
    for name in ("libcublasLt.so.13", "libcublasLt.so.12"):
        try:
            ctypes.CDLL(name, mode=os.RTLD_LAZY | os.RTLD_NOLOAD)
        except OSError:
            continue
        return name
    return None


def gelu(x: Tensor) -> Tensor:
    """GELU in the tanh form (Hendrycks and Gimpel 2016)."""
    return F.gelu(x, approximate="tanh")


class GeluMLP(torch.autograd.Function):
    """`gelu_mlp` on the ops, whatever the device; all arguments of one type."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        x: Tensor,
        up_weight: Tensor,
        up_bias: Tensor,
        down_weight: Tensor,
        down_bias: Tensor,
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        activated, pre = torch.ops.mtlm.gelu_product(rows, up_weight, up_bias)
        ctx.save_for_backward(rows, pre, up_weight, down_weight)
        return F.linear(activated, down_weight, down_bias).view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, d_out: Tensor):
        rows, pre, up_weight, down_weight = ctx.saved_tensors
        d = d_out.reshape(rows.shape)
        d_pre, d_up_bias = torch.ops.mtlm.gelu_product_backward(d, down_weight, pre)
        d_x = (d_pre @ up_weight).view(d_out.shape)
        return d_x, d_pre.T @ rows, d_up_bias, d.T @ gelu(pre), d.sum(0)


def multiply(op: Callable[..., None], tensors: tuple[Tensor | None, ...], choice: int | None = None) -> None:
    """Calls an op of csrc/products.cu with a workspace.

    Of cuBLASLt's proposals it takes the one that is fastest in the first call with such shapes, or the first
    proposal where that call is being recorded or PyTorch shall be deterministic: timings differ from run to
    run, and so do the orders of sums of the proposals. Each of them gives equal bits in every call.

    Args:
        choice: the number of a proposal instead.
    """
    first = tensors[0]
    workspace = first.new_empty(WORKSPACE_BYTES // 4, dtype=torch.float32)

    def run(number: int) -> None:
        op(*tensors, workspace, number)

    if choice is None:
        shapes = tuple(None if t is None else (t.shape, t.stride()) for t in tensors)
        key = (str(op), first.device, shapes)
        if torch.are_deterministic_algorithms_enabled() or (
            key not in _fastest and torch.cuda.is_current_stream_capturing()
        ):
            choice = 0
        elif key in _fastest:
            choice = _fastest[key]
        else:
            choice = _fastest[key] = _time(run)
    run(choice)


def _time(run: Callable[[int], None]) -> int:
    """Which of the proposals is fastest; the first, unless another is so by more than the noise.

    The products of a training step are larger than the second-level cache, so each call finds it cold.
    """
    times: list[list[float]] = [[] for _ in range(CHOICES)]
    for turn in range(4):
        for choice, seen in enumerate(times):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            for _ in range(4):
                run(choice)
            end.record()
            end.synchronize()
            if turn:  # the first loads the code
                seen.append(begin.elapsed_time(end))
    medians = [statistics.median(seen) for seen in times]
    fastest = min(range(CHOICES), key=medians.__getitem__)
    return fastest if medians[fastest] < 0.98 * medians[0] else 0


def _aligned(t: Tensor) -> Tensor:
    """The tensor itself if it is contiguous and begins at a multiple of 16 bytes, else a copy."""
    t = t.contiguous()
    return t if t.data_ptr() % 16 == 0 else t.clone()


def _gelu_product_fake(x, weight, bias):
    out = x.new_empty(x.shape[0], weight.shape[0])
    return out, torch.empty_like(out)


def _gelu_product_cuda(x, weight, bias):
    results = _gelu_product_fake(x, weight, bias)
    multiply(torch.ops.mtlm.gelu_product_into, (*map(_aligned, (x, weight, bias)), *results))
    return results


@declare(
    "gelu_product(Tensor x, Tensor weight, Tensor bias) -> (Tensor, Tensor)",
    fake=_gelu_product_fake,
    cuda=_gelu_product_cuda,
)
def _gelu_product(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """GELU of x weight^T + bias [N, F], and its input; x [N, D], weight [F, D]."""
    pre = F.linear(x, weight, bias)
    return gelu(pre), pre


declare_kernel(
    "gelu_product_into(Tensor x, Tensor weight, Tensor bias, Tensor(a!) out, Tensor(b!) pre,"
    " Tensor(c!) workspace, int choice) -> ()"
)


def _gelu_product_backward_fake(d, weight, pre):
    return torch.empty_like(pre), pre.new_empty(pre.shape[1])


def _gelu_product_backward_cuda(d, weight, pre):
    inputs = tuple(map(_aligned, (d, weight, pre)))
    results = _gelu_product_backward_fake(*inputs)
    multiply(torch.ops.mtlm.gelu_product_backward_into, inputs + results)
    return results


@declare(
    "gelu_product_backward(Tensor d, Tensor weight, Tensor pre) -> (Tensor, Tensor)",
    fake=_gelu_product_backward_fake,
    cuda=_gelu_product_backward_cuda,
)
def _gelu_product_backward(d: Tensor, weight: Tensor, pre: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of pre [N, F] and of the bias that was added in it, from d [N, D] behind weight [D, F]."""
    d_pre = torch.ops.aten.gelu_backward(d @ weight, pre, approximate="tanh")
    return d_pre, d_pre.sum(0)


declare_kernel(
    "gelu_product_backward_into(Tensor d, Tensor weight, Tensor pre, Tensor(a!) d_pre, Tensor(b!) d_bias,"
    " Tensor(c!) workspace, int choice) -> ()"
)

declare_kernel(
    "product_into(Tensor a, Tensor b, Tensor? c, Tensor(a!) out, Tensor(b!)? row_sums, Tensor(c!) workspace,"
    " int choice) -> ()"
)
