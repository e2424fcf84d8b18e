"""Cross-entropy of the output head without the logits of a whole batch, as core/loss.py has it for JAX.

The plain formula keeps float32 logits of every token and their gradient: 8 GiB for 32768 tokens and 32,000
ids. Here logits are made in the type of the product (bfloat16 in training), for as many rows as fit in
LOGITS_BYTES, and one pass over them makes the losses and puts the gradient where the logits were; on a Hopper
GPU their product itself makes it, but for a factor of each row (loss_product.py). Two more products turn
that into the gradients of both inputs. All this happens in the forward pass; the backward pass scales what
is there. Where nothing is differentiated, as in an evaluation, no gradient is made. Nothing waits for the
device.

Shapes: N tokens, D d_model, V vocabulary.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.torch_version import TorchVersion

from kernels_cuda.ops.softmax_loss import IGNORE
from kernels_cuda.registry import compute_type, declare, on_kernels, products_run_on, wide_type

# Logits held at once: with the table's float32 gradient less than a gibibyte at 32768 x 768 x 32000, in
# three chunks of 11008 rows. Their product for d_hidden is 258 tiles of 128 x 256, nearly twice the 132
# multiprocessors of an H100; of four chunks of 8192 it would be 192, half of them idle in the second round.
LOGITS_BYTES = 768 * 2**20
FEWEST_ROWS = 8192


class LossSums(NamedTuple):
    """Sums over the targets that are not IGNORE, in nats."""

    total: Tensor
    """What is minimized: cross-entropy + z_loss * lse^2. The gradient is that of this sum alone."""
    nll: Tensor
    """The cross-entropy part, to report."""


def linear_cross_entropy(hidden: Tensor, table: Tensor, targets: Tensor, z_loss: float = 0.0) -> LossSums:
    """Sum of -log softmax(hidden table^T)[target] over all targets but -1 (`IGNORE`).

    On a GPU without the kernels, and on a CPU, the plain formula. With them a target outside of the
    vocabulary makes the sums NaN instead of stopping the process.

    Args:
        hidden: [..., D], the final hidden states. Under autocast the products have its type.
        table: [V, D], the head or the tied embedding; its gradient is added up in float32.
        targets: [...], int64.
        z_loss: weight of the squared log-normalizer (Chowdhery et al. 2022, PaLM, uses 1e-4).
    """
    hidden, targets = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    if not on_kernels(hidden, table):
        return LossSums(*all_logits_at_once(hidden, table, targets, z_loss))
    if torch.compiler.is_compiling():
        introduce_to_inductor()
    hidden = hidden.to(compute_type(hidden))
    # Not left to the function's `needs_input_grad`, which is also true of a parameter under no_grad.
    if torch.is_grad_enabled() and (hidden.requires_grad or table.requires_grad):
        sums = LinearCrossEntropy.apply(hidden, table, targets, z_loss)
    else:
        sums = torch.ops.mtlm.linear_cross_entropy(hidden, table, targets, z_loss, False)[0]
    return LossSums(sums[0], sums[1].detach())


def all_logits_at_once(
    hidden: Tensor, table: Tensor, targets: Tensor, z_loss: float
) -> tuple[Tensor, Tensor]:
    """The plain formula: sums over the targets [N] of total and nll, from hidden [N, D] and head [V, D]."""
    logits = F.linear(hidden, table.to(hidden.dtype))
    logits = logits.to(wide_type(logits.dtype))
    scored = targets != IGNORE
    lse = torch.logsumexp(logits, dim=-1)
    picked = logits.gather(1, torch.where(scored, targets, 0)[:, None])[:, 0]
    nll = torch.where(scored, lse - picked, 0)
    return (nll + torch.where(scored, z_loss * lse**2, 0)).sum(), nll.detach().sum()


def introduce_to_inductor() -> bool:
    """Makes the op known to torch.compile's Inductor as one to be called, while a graph is traced.

    Before PyTorch 2.13 an op that Inductor meets unprepared goes into a log line, shown or not, with all that
    its arguments were computed from, once for every way that leads there. This op stands behind all layers:
    from eight on the line would never end (pytorch/pytorch, pull request 185951).
    """
    if TorchVersion(torch.__version__) < "2.13":
        from torch._inductor.lowering import constrain_to_fx_strides, lowerings, make_fallback

        op = torch.ops.mtlm.linear_cross_entropy.default
        if op not in lowerings:
            make_fallback(op, constrain_to_fx_strides)
    return True


# What torch.compiler.assume_constant_result does, which first imports the compiler: 1.5 s of every command.
introduce_to_inductor._dynamo_marked_constant = True


class LinearCrossEntropy(torch.autograd.Function):
    """Both sums [2] on the op, whatever the device; a gradient comes to `total` alone."""

    @staticmethod
    def forward(ctx: FunctionCtx, hidden: Tensor, table: Tensor, targets: Tensor, z_loss: float) -> Tensor:
        gradients = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        sums, d_hidden, d_table = torch.ops.mtlm.linear_cross_entropy(
            hidden, table, targets, z_loss, gradients
        )
        ctx.save_for_backward(d_hidden, d_table)
        ctx.table_type = table.dtype
        return sums

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, d_sums: Tensor):
        d_hidden, d_table = ctx.saved_tensors
        scale = d_sums[:1]  # of one dimension, so that bfloat16 times float32 is not rounded twice
        return (d_hidden * scale).to(d_hidden.dtype), (d_table * scale).to(ctx.table_type), None, None


def rows_at_once(rows: int, row_bytes: int) -> int:
    """How many rows of logits are made at once: equal chunks, none above the limit unless it is tiny."""
    most = max(FEWEST_ROWS, LOGITS_BYTES // row_bytes)
    chunks = max(1, -(-rows // most))
    return min(most, -(-rows // chunks // 256) * 256) if chunks > 1 else rows


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a b, in total's type: cuBLAS adds bfloat16 products up in float32 where they lie."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif a.is_cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype))


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a b, not rounded from the type in which it is added up."""
    wide = wide_type(a.dtype)
    return torch.mm(a, b, out_dtype=wide) if a.is_cuda and a.dtype != wide else a.to(wide) @ b.to(wide)


def _linear_cross_entropy_fake(hidden, table, targets, z_loss, gradients):
    wide = wide_type(hidden.dtype)
    d_hidden = hidden.new_empty(hidden.shape[0] if gradients else 0, hidden.shape[1])
    d_table = hidden.new_empty(table.shape if gradients else (0, hidden.shape[1]), dtype=wide)
    return hidden.new_empty(2, dtype=wide), d_hidden, d_table


@declare(
    "linear_cross_entropy(Tensor hidden, Tensor table, Tensor targets, float z_loss, bool gradients)"
    " -> (Tensor, Tensor, Tensor)",
    fake=_linear_cross_entropy_fake,
)
def _linear_cross_entropy(
    hidden: Tensor, table: Tensor, targets: Tensor, z_loss: float, gradients: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Sums [2] of total and nll; gradients of `total` by hidden, in its type, and by table, in float32."""
    n, d = hidden.shape
    wide = wide_type(hidden.dtype)
    losses, scales = hidden.new_empty(2, n, dtype=wide), hidden.new_empty(n, dtype=wide)
    d_hidden = hidden.new_empty(n if gradients else 0, d)
    d_table = hidden.new_zeros(table.shape if gradients else (0, d), dtype=wide)
    rows = rows_at_once(n, table.shape[0] * hidden.element_size())
    hidden, targets = hidden.contiguous(), targets.contiguous()
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        weights = table.to(hidden.dtype).contiguous()
        in_product = gradients and products_run_on(hidden, weights, widths=weights.shape)
        buffer = hidden.new_empty(rows, table.shape[0])
        for begin in range(0, n, max(rows, 1)):
            part = slice(begin, begin + rows)
            h, logits = hidden[part], buffer[: min(rows, n - begin)]
            if in_product:
                torch.ops.mtlm.loss_product_(
                    h, weights, targets[part], logits, losses[0, part], losses[1, part], scales[part], z_loss
                )
                scale = scales[part, None]
                torch.mul(_product(logits, weights), scale, out=d_hidden[part])
                _add_product(d_table, logits.T, torch.mul(h, scale, out=torch.empty_like(h)))
                continue
            torch.mm(h, weights.T, out=logits)
            torch.ops.mtlm.softmax_loss_(
                logits, targets[part], losses[0, part], losses[1, part], z_loss, gradients
            )
            if gradients:
                torch.mm(logits, weights, out=d_hidden[part])
                _add_product(d_table, logits.T, h)
    return losses.sum(1), d_hidden, d_table
