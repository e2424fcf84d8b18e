"""Held-out loss: nats per token, perplexity and bits per byte, by the code that training's loss uses."""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, Integer

from core.config import ModelConfig
from core.data.sequences import HeldOut
from core.loss import cross_entropy
from core.model import Compute, Params, forward, head_table
from core.progress import Activity
from core.run.metrics import Score, make_score
from core.sharding import batch_sharding, place


class Evaluator:
    """Scores held-out sets. Reads parameters and nothing else of a run."""

    def __init__(
        self,
        config: ModelConfig,
        compute: Compute,
        heldout: Sequence[HeldOut],
        rows: int,
        chunk: int,
        mesh: Mesh,
    ):
        """rows: sequences scored at once, over all devices; chunk: see `core.loss`."""
        self.heldout = {one.name: one for one in heldout}
        self.rows = rows
        self._sharding = batch_sharding(mesh)
        self._sums = functools.partial(_sums, config, compute, chunk)

    def score(
        self,
        params: Params,
        split: str,
        limit: int | None = None,
        interrupted: Callable[[], bool] = lambda: False,
    ) -> Score | None:
        """The loss on the set `split`, or on `limit` rows spread over it; None if interrupted on the way."""
        total, count, heldout = 0.0, 0, self.heldout[split]
        with Activity(f"evaluating {split}", unit="windows") as progress:
            progress.total, parts = heldout.parts(limit, self.rows)
            for part in parts:
                if interrupted():
                    return None
                placed = (None if x is None else place(x[None], self._sharding) for x in part)
                total, count = total + float(self._sums(params, *placed)), count + part.n_targets
                progress.advance(min(self.rows, progress.total - progress.done))
        return make_score(total, count, heldout.tokens, heldout.n_bytes)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _sums(
    config: ModelConfig,
    compute: Compute,
    chunk: int,
    params: Params,
    tokens: Integer[Array, "1 B S"],
    targets: Integer[Array, "1 B S"],
    documents: Integer[Array, "1 B S"] | None,
) -> Float[Array, ""]:
    numbers = None if documents is None else documents[0]
    hidden = forward(config, params, tokens[0].astype(jnp.int32), compute, documents=numbers)
    table = head_table(config, params)
    return cross_entropy(hidden, table, targets[0], chunk=chunk, mesh=compute.mesh).nll
