"""`python -m bench.documents DATA RUN...`: held-out losses of runs by the length of documents.

For the ablation of --document-mask: the loss where a model sees the documents before, as windows have them,
and where it sees a document alone, as evaluation and generation have it. Lengths are those of documents that
lie wholly in a window; what a window cuts is counted apart.
"""

import dataclasses
import functools
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jaxtyping import Array, Bool, Float, Int

from core import checks, cli
from core.attention import choose
from core.checkpoint.checkpointer import restore_params
from core.checkpoint.manifest import load_manifest
from core.checkpoint.steps import find_step
from core.config import ModelConfig, compute_dtype
from core.console import Table
from core.data.batches import full_batches, heldout_windows
from core.data.dataset import Dataset, open_dataset
from core.documents import document_mark, number_documents
from core.errors import UserError, run_command
from core.loss import IGNORE, cross_entropy
from core.model import Compute, Params, abstract_params, forward, head_table
from core.run.log import read_log
from core.tokenizer import load_tokenizer_of, require_same

UP_TO = (128, 512)  # tokens of a document: bounds of the groups, the last of which is without
GROUPS = (*(f"up to {most}" for most in UP_TO), f"over {UP_TO[-1]}", "cut by a window", "all")
WARM_UP = 20  # updates whose rates do not count


@dataclasses.dataclass(frozen=True)
class DocumentsConfig:
    """Held-out losses of runs by the length of documents: through the documents of a window, and alone."""

    data: Annotated[Path, tyro.conf.Positional]
    """The prepared data of the runs."""
    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Run folders."""
    split: str | None = None
    """The held-out set. Default: the data's first."""
    windows: int | None = None
    """Windows to score, spread over the set. Default: all."""
    rows: int = 16
    """Windows scored at once."""

    def __post_init__(self) -> None:
        if not self.runs:
            raise UserError("give the folders of one run or more")
        checks.counts(**checks.fields(self, "windows", "rows"))


def group_of_places(documents: Int[np.ndarray, "N S"]) -> Int[np.ndarray, "N S"]:
    """For each place the number in `GROUPS` of what its document is."""
    groups = np.empty_like(documents)
    for row, numbers in enumerate(documents):
        _, which, lengths = np.unique(numbers, return_inverse=True, return_counts=True)
        groups[row] = np.searchsorted(UP_TO, lengths)[which]
        groups[row, (which == 0) | (which == len(lengths) - 1)] = len(UP_TO) + 1
    return groups


@functools.partial(jax.jit, static_argnums=(0, 1))
def group_sums(
    config: ModelConfig,
    compute: Compute,
    params: Params,
    tokens: Int[Array, "B S1"],
    scored: Bool[Array, "B G S"],
    documents: Int[Array, "B S"] | None,
) -> Float[Array, " G"]:
    """The cross-entropy summed over the places of every group."""
    hidden = forward(config, params, tokens[:, :-1], compute, documents=documents)
    table = head_table(config, params)
    targets = (jnp.where(places, tokens[:, 1:], IGNORE) for places in scored.swapaxes(0, 1))
    return jnp.stack([cross_entropy(hidden, table, t).nll for t in targets])


def score(config: DocumentsConfig, dataset: Dataset, split: str, run: Path) -> Iterator[Sequence[str]]:
    """The rows of the table for a run."""
    step_dir = find_step(run)
    manifest = load_manifest(step_dir)
    record = dataset.tokenizer_record
    require_same(manifest.tokenizer, record, str(run), f"the data {dataset.path}")
    mark = document_mark(load_tokenizer_of(record, [dataset.path], f"the data {dataset.path}"))
    model = ModelConfig(**manifest.config["model"])
    params = restore_params(step_dir, abstract_params(model))
    platform = jax.default_backend()
    dtype = compute_dtype("auto", platform)
    attention = choose(
        "auto", platform=platform, dtype=dtype, head_dim=model.head_size, context=model.context
    )
    compute = Compute(dtype, attention.name)

    windows, mask = heldout_windows(dataset, split, config.windows)
    documents = number_documents(windows[:, :-1], mark)
    groups = group_of_places(documents)
    scored = np.stack([*((groups == g) & mask for g in range(len(GROUPS) - 1)), mask], axis=1)
    counts = scored.sum(axis=(0, 2))
    rates = [row["tokens_per_second"] for row in read_log(run, "train")][WARM_UP:]
    rate = f"{statistics.median(rates):,.0f}" if rates else ""
    masked = manifest.config["run"].get("document_mask", False)
    for alone in (False, True):
        sums = np.zeros(len(GROUPS))
        for _, (tokens, numbers, places) in full_batches(config.rows, windows, documents, scored):
            given = jnp.asarray(numbers) if alone else None
            sums += group_sums(model, compute, params, jnp.asarray(tokens, jnp.int32), places, given)
        losses = (f"{total / n:.4f}" if n else "-" for total, n in zip(sums, counts, strict=True))
        yield str(run), "yes" if masked else "no", "alone" if alone else "after others", rate, *losses
    yield "", "", "tokens", "", *(f"{n:,}" for n in counts)


def main() -> int:
    """Runs the command: one table of all runs."""
    config = cli.parse(DocumentsConfig, prog="python -m bench.documents")
    dataset = open_dataset(config.data)
    split = config.split or next(iter(dataset.heldout), None)
    if split is None:
        raise UserError(f"{config.data} has no held-out set: prepare it with one")
    table = Table(
        ("run", "masked", "documents"),
        ("tokens/s", *GROUPS),
        title=f"{split}, nats per token by the tokens of a document",
    )
    for run in config.runs:
        for row in score(config, dataset, split, run):
            table.add_row(*row)
    table.print()
    return 0


if __name__ == "__main__":
    run_command(main)
