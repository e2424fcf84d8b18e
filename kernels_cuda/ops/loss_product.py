"""The output head's product with the softmax of the loss inside (csrc/loss_product.cu).

linear_cross_entropy.py is what a model calls. Shapes: N tokens, D d_model, V vocabulary.
"""

import torch
from torch import Tensor

from kernels_cuda.ops.softmax_loss import IGNORE
from kernels_cuda.registry import declare, declare_kernel, wide_type

MOST = 2.0**100  # of a row's sum relative to its target; beyond, to what keeps exp from overflowing


def _loss_product_cuda(hidden, table, targets, exps, total, nll, scale, z_loss):
    shift = torch.empty_like(scale)
    partials = shift.new_empty(-(-table.shape[0] // 128), hidden.shape[0])
    torch.ops.mtlm.loss_product_into(hidden, table, targets, z_loss, exps, total, nll, scale, shift, partials)


@declare(
    "loss_product_(Tensor hidden, Tensor table, Tensor targets, Tensor(a!) exps, Tensor(b!) total,"
    " Tensor(c!) nll, Tensor(d!) scale, float z_loss) -> ()",
    cuda=_loss_product_cuda,
)
def _loss_product_plain(
    hidden: Tensor,
    table: Tensor,
    targets: Tensor,
    exps: Tensor,
    total: Tensor,
    nll: Tensor,
    scale: Tensor,
    z_loss: float,
) -> None:
    """Cross-entropy of hidden [N, D] and table [V, D], and of it the gradient of the logits.

    nll and total [N] are as `softmax_loss_` has them, and scale [N] times the rows of exps [N, V] is the
    gradient of total by the logits, which are never stored. On the kernels all must be contiguous, and rows
    steps of 16 bytes.
    """
    x = hidden.to(wide_type(hidden.dtype)) @ table.to(wide_type(table.dtype)).T
    valid = (targets >= 0) & (targets < table.shape[0])
    index = torch.where(valid, targets, 0)[:, None]
    lse, own = torch.logsumexp(x, dim=-1), x.gather(1, index)[:, 0]
    near = lse - own <= torch.tensor(MOST, dtype=torch.float64).log().item()
    shift = torch.where(near, own, x.amax(-1))
    e, weight = torch.exp(x - shift[:, None]), 1 + 2 * z_loss * lse
    n = e.sum(-1)
    e.scatter_add_(1, index, -(n / weight)[:, None])
    exps.copy_(torch.where(valid[:, None], e, 0))
    of_none = torch.where(targets == IGNORE, 0.0, torch.nan)
    nll.copy_(torch.where(valid, lse - own, of_none))
    total.copy_(torch.where(valid, lse - own + z_loss * lse**2, of_none))
    scale.copy_(torch.where(valid, weight / n, of_none))


declare_kernel(
    "loss_product_into(Tensor hidden, Tensor table, Tensor targets, float z_loss, Tensor(a!) exps,"
    " Tensor(b!) total, Tensor(c!) nll, Tensor(d!) scale, Tensor(e!) shift, Tensor(f!) partials) -> ()"
)
