"""Held-out loss, with the model and the loss of training, in the figures of `train_tpu`."""

from collections.abc import Callable

import torch

from core.data.sequences import HeldOut
from core.progress import Activity
from core.run.metrics import Score, make_score
from port_torch.training.step import TrainStep


@torch.no_grad()
def score(
    train_step: TrainStep,
    heldout: HeldOut,
    size: int,
    limit: int | None = None,
    interrupted: Callable[[], bool] = lambda: False,
) -> Score | None:
    """The loss on a held-out set, or on about `limit` rows spread over it; None if interrupted on the way.

    size: rows scored at once. Every rank takes its part of them; they are not interrupted, since each would
    have to be at the same place.
    """
    ranks = train_step.ranks
    total = torch.zeros((), dtype=torch.float64, device=ranks.device)
    n_targets = 0
    train_step.decoder.eval()
    with Activity(f"evaluating {heldout.name}", unit="rows") as progress:
        progress.total, parts = heldout.parts(limit, size * ranks.size)
        for part in parts:
            if ranks.size == 1 and interrupted():
                return None
            part = part.part(slice(ranks.rank * size, (ranks.rank + 1) * size))
            with train_step.autocast():
                # z-loss is no part of the figure; `nll` is.
                _, nll = train_step.losses(*next(train_step.place(part).micro_batches()))
            total += nll
            n_targets += part.n_targets
            progress.advance(min(size * ranks.size, progress.total - progress.done))
    sums = ranks.sum(torch.stack([total, torch.full_like(total, n_targets)]))
    return make_score(float(sums[0]), int(sums[1]), heldout.tokens, heldout.n_bytes)
