"""Cross-entropy of rows of logits with its gradient in their place (csrc/softmax_loss.cu).

linear_cross_entropy.py is what a model calls; it has the autograd of both.
"""

import torch
from torch import Tensor

from kernels_cuda.registry import declare, wide_type

IGNORE = -1  # a target that does not count, as in core/loss.py


@declare(
    "softmax_loss_(Tensor(a!) logits, Tensor targets, Tensor(b!) total, Tensor(c!) nll, float z_loss,"
    " bool gradients) -> ()"
)
def _softmax_loss_plain(
    logits: Tensor, targets: Tensor, total: Tensor, nll: Tensor, z_loss: float, gradients: bool
) -> None:
    """Cross-entropy of each row of logits [N, V] into nll [N], with z_loss * lse^2 into total [N].

    With `gradients` the logits become those of the totals. A target `IGNORE` has loss and gradient 0; another
    one outside of the vocabulary makes its row NaN.
    """
    x = logits.to(wide_type(logits.dtype))
    scored = targets != IGNORE
    valid = (targets >= 0) & (targets < logits.shape[1])
    index = torch.where(valid, targets, 0)[:, None]
    lse = torch.logsumexp(x, dim=-1)
    rows = torch.where(valid, lse - x.gather(1, index)[:, 0], torch.nan)
    nll.copy_(torch.where(scored, rows, 0))
    total.copy_(torch.where(scored, rows + z_loss * lse**2, 0))
    if gradients:
        d = (1 + 2 * z_loss * lse)[:, None] * torch.exp(x - lse[:, None])
        d.scatter_add_(1, index, d.new_full(index.shape, -1))
        d = torch.where(valid[:, None], d, torch.nan)
        logits.copy_(torch.where(scored[:, None], d, 0))
