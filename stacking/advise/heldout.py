"""The loss of every held-out window, so that two models can be compared window by window."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from core.checkpoint.checkpointer import restore_params
from core.config import ModelConfig
from core.data.batches import Data, full_batches, heldout_windows
from core.documents import number_documents, recorded_mark
from core.loss import IGNORE, cross_entropy
from core.model import Compute, Params, abstract_params, forward, head_table
from core.progress import Activity
from stacking.advise.verdict import WindowLosses

TOKENS = 8192  # that go through the model at once


def score_windows(step_dir: Path, model: ModelConfig, dataset: Data, split: str, limit: int) -> WindowLosses:
    """Scores the parameters of a checkpoint of either engine, in float32 on one device; with the document
    mask of its run.

    limit: windows at most, spread over the set.
    """
    params = restore_params(step_dir, abstract_params(model))
    tokens, mask = heldout_windows(dataset, split, limit)
    mark = recorded_mark(step_dir)
    rows = max(1, TOKENS // model.context)
    nats = []
    with (
        Activity(f"evaluating {split}", len(tokens), "windows") as progress,
        jax.default_matmul_precision("highest"),
    ):
        for n, (part, scored) in full_batches(rows, tokens.astype(np.int32), mask):
            targets = np.where(scored, part[:, 1:], IGNORE)
            documents = number_documents(part[:, :-1], mark)
            nats.append(np.asarray(_row_nats(model, params, part[:, :-1], targets, documents))[:n])
            progress.advance(n)
    return WindowLosses(np.concatenate(nats).astype(np.float64), mask.sum(1))


@functools.partial(jax.jit, static_argnums=0)
def _row_nats(
    model: ModelConfig,
    params: Params,
    inputs: Int[Array, "B S"],
    targets: Int[Array, "B S"],
    documents: Int[Array, "B S"] | None,
) -> Float[Array, " B"]:
    hidden = forward(model, params, inputs, Compute(), documents=documents)
    table = head_table(model, params)
    row = lambda one: cross_entropy(one[0][None], table, one[1][None]).nll  # noqa: E731
    return jax.lax.map(row, (hidden, jnp.asarray(targets)))
