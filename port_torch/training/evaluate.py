"""Held-out loss, with the model and the loss of training, in the figures of `train_tpu`."""

from collections.abc import Callable

import numpy as np
import torch

from core.data.examples import IGNORE
from core.progress import Activity
from core.run.metrics import Score, make_score
from port_torch.training.batches import HeldOut, Rows
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
        rows = heldout.read(limit)
        progress.total = len(rows.tokens)
        for start in range(0, len(rows.tokens), size * ranks.size):
            if ranks.size == 1 and interrupted():
                return None
            first = start + ranks.rank * size
            part = filled(rows.part(slice(first, first + size)), size)
            with train_step.autocast():
                # z-loss is no part of the figure; `nll` is.
                _, nll = train_step.losses(*next(train_step.place(part).micro_batches()))
            total += nll
            n_targets += int((part.targets != IGNORE).sum())
            progress.advance(min(size * ranks.size, len(rows.tokens) - start))
    sums = ranks.sum(torch.stack([total, torch.full_like(total, n_targets)]))
    return make_score(float(sums[0]), int(sums[1]), heldout.tokens, heldout.n_bytes)


def filled(rows: Rows, size: int) -> Rows:
    """The rows and as many that predict nothing as make `size`: the compiled loss knows one shape."""
    missing = ((0, size - len(rows.tokens)), (0, 0))
    documents = None if rows.documents is None else np.pad(rows.documents, missing)
    return Rows(
        np.pad(rows.tokens, missing), np.pad(rows.targets, missing, constant_values=IGNORE), documents
    )
