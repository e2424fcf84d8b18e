"""Held-out loss: nats per token, perplexity and bits per byte, by the code that training's loss uses."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Integer

from core.config import ModelConfig
from core.data.batches import Data, full_batches, heldout_windows
from core.documents import DocumentMark, number_documents
from core.loss import IGNORE, cross_entropy
from core.model import Compute, Params, forward, head_table
from core.progress import Activity
from core.run.metrics import Score, make_score
from core.sharding import batch_sharding, place


class Evaluator:
    """Scores the held-out splits of a dataset. Reads parameters and nothing else of a run."""

    def __init__(
        self,
        config: ModelConfig,
        compute: Compute,
        dataset: Data,
        rows: int,
        chunk: int,
        mesh: Mesh,
        documents: DocumentMark | None = None,
    ):
        """rows: windows scored at once, over all devices; chunk: see `core.loss`; documents: see
        `StepConfig`."""
        self.dataset = dataset
        self.rows = rows
        self._sharding = batch_sharding(mesh)
        self._sums = functools.partial(_sums, config, compute, chunk, documents)

    def score(
        self,
        params: Params,
        split: str,
        limit: int | None = None,
        interrupted: Callable[[], bool] = lambda: False,
    ) -> Score | None:
        """The loss on `split`, or on `limit` windows spread over it; None if interrupted on the way."""
        total, count = 0.0, 0
        with Activity(f"evaluating {split}", unit="windows") as progress:
            tokens, mask = heldout_windows(self.dataset, split, limit)
            progress.total = len(tokens)
            for n, (part, scored) in full_batches(self.rows, tokens, mask):
                if interrupted():
                    return None
                nll = self._sums(params, *(place(x[None], self._sharding) for x in (part, scored)))
                total, count = total + float(nll), count + int(scored.sum())
                progress.advance(n)
        info = self.dataset.splits[split]
        return make_score(total, count, info.tokens - 1, info.bytes)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _sums(
    config: ModelConfig,
    compute: Compute,
    chunk: int,
    mark: DocumentMark | None,
    params: Params,
    tokens: Integer[Array, "1 B S1"],
    mask: Bool[Array, "1 B S"],
) -> Float[Array, ""]:
    inputs, targets = tokens[0, :, :-1].astype(jnp.int32), tokens[0, :, 1:].astype(jnp.int32)
    hidden = forward(config, params, inputs, compute, documents=number_documents(inputs, mark))
    targets = jnp.where(mask[0], targets, IGNORE)
    table = head_table(config, params)
    return cross_entropy(hidden, table, targets, chunk=chunk, mesh=compute.mesh).nll
