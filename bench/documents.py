"""`python -m bench.documents DATA RUN...`: held-out losses of runs by the length of documents.

For the ablation of --document-mask: the loss where a model sees the documents before, as windows have them,
and where it sees a document alone, as evaluation and generation have it. Lengths are those of documents that
lie wholly in a window; what a window cuts is counted apart.
"""

import dataclasses
import functools
import statistics
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jaxtyping import Array, Bool, Float, Int

from core import checks, cli
from core.attention import choose
from core.checkpoint.checkpointer import restore_params
from core.checkpoint.manifest import Manifest, load_manifest
from core.checkpoint.steps import find_step
from core.config import ModelConfig, compute_dtype
from core.console import Table
from core.data.batches import full_batches, heldout_windows
from core.data.dataset import Dataset, open_dataset
from core.documents import document_mark, number_documents
from core.errors import UserError, run_command
from core.figures import require_json, write_json
from core.loss import IGNORE, cross_entropy
from core.model import Compute, Params, abstract_params, forward, head_table
from core.run.log import read_log
from core.tokenizer import load_tokenizer_of, require_same

UP_TO = (128, 512)  # tokens of a document: bounds of the groups, the last of which is without
GROUPS = (*(f"up to {most}" for most in UP_TO), f"over {UP_TO[-1]}", "cut by a window", "all")
AFTER_OTHERS, ALONE = "after others", "alone"  # how a document is scored
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
    json: Path | None = None
    """Write all figures into this file, after every run."""

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


def read_windows(
    dataset: Dataset, split: str, limit: int | None
) -> tuple[Int[np.ndarray, "N S1"], Int[np.ndarray, "N S"], Bool[np.ndarray, "N G S"]]:
    """Windows of the held-out set, at most `limit`; the documents of their places; each group's places."""
    windows, mask = heldout_windows(dataset, split, limit)
    tokenizer = load_tokenizer_of(dataset.tokenizer_record, [dataset.path], f"the data {dataset.path}")
    documents = number_documents(windows[:, :-1], document_mark(tokenizer))
    groups = group_of_places(documents)
    scored = np.stack([*((groups == g) & mask for g in range(len(GROUPS) - 1)), mask], axis=1)
    return windows, documents, scored


def open_run(run: Path, dataset: Dataset) -> tuple[Path, Manifest]:
    """The newest checkpoint of a run that has the tokenizer of the data."""
    step_dir = find_step(run)
    manifest = load_manifest(step_dir)
    require_same(manifest.tokenizer, dataset.tokenizer_record, str(run), f"the data {dataset.path}")
    return step_dir, manifest


def score(
    step_dir: Path,
    manifest: Manifest,
    windows: Int[np.ndarray, "N S1"],
    documents: Int[np.ndarray, "N S"],
    scored: Bool[np.ndarray, "N G S"],
    rows: int,
) -> dict[str, list[float | None]]:
    """Nats per token of each group, where a document comes after others and where it is alone.

    rows: windows that are scored at once. None where a group has no tokens.
    """
    model = ModelConfig(**manifest.config["model"])
    params = restore_params(step_dir, abstract_params(model))
    platform = jax.default_backend()
    dtype = compute_dtype("auto", platform)
    attention = choose(
        "auto", platform=platform, dtype=dtype, head_dim=model.head_size, context=model.context
    )
    compute = Compute(dtype, attention.name)
    counts = scored.sum(axis=(0, 2))
    losses = {}
    for how in (AFTER_OTHERS, ALONE):
        sums = np.zeros(len(GROUPS))
        for _, (tokens, numbers, places) in full_batches(rows, windows, documents, scored):
            given = jnp.asarray(numbers) if how == ALONE else None
            sums += group_sums(model, compute, params, jnp.asarray(tokens, jnp.int32), places, given)
        losses[how] = [float(total / n) if n else None for total, n in zip(sums, counts, strict=True)]
    return losses


def print_table(report: dict[str, Any]) -> None:
    """Two lines per run, and how many tokens each group has."""
    table = Table(
        ("run", "masked", "documents"),
        ("tokens/s", *GROUPS),
        title=f"{report['split']}, nats per token by the tokens of a document",
    )
    for row in report["rows"]:
        rate = row["tokens_per_second"]
        losses = ("-" if loss is None else f"{loss:.4f}" for loss in row["nll"].values())
        masked = "yes" if row["masked"] else "no"
        table.add_row(row["run"], masked, row["documents"], "" if rate is None else f"{rate:,.0f}", *losses)
    table.add_row("tokens", "", "", "", *(f"{n:,}" for n in report["tokens"].values()))
    table.print()


def main() -> int:
    """Scores the runs one after the other and prints one table of all."""
    config = cli.parse(DocumentsConfig, prog="python -m bench.documents")
    require_json(config.json)
    dataset = open_dataset(config.data)
    split = config.split or next(iter(dataset.heldout), None)
    if split is None:
        raise UserError(f"{config.data} has no held-out set: prepare it with one")
    opened = [open_run(run, dataset) for run in config.runs]
    windows, documents, scored = read_windows(dataset, split, config.windows)
    tokens = scored.sum(axis=(0, 2)).tolist()
    report: dict[str, Any] = {
        "data": str(dataset.path),
        "fingerprint": dataset.fingerprint,
        "split": split,
        "windows": len(windows),
        "tokens": dict(zip(GROUPS, tokens, strict=True)),
        "rows": [],
    }
    for number, (run, (step_dir, manifest)) in enumerate(zip(config.runs, opened, strict=True), 1):
        print(f"[{number}/{len(opened)}] {run} ...", flush=True)
        rates = [row["tokens_per_second"] for row in read_log(run, "train")][WARM_UP:]
        facts = {
            "run": str(run),
            "step": manifest.step,
            "masked": manifest.config.get("run", {}).get("document_mask", False),
            "tokens_per_second": statistics.median(rates) if rates else None,
        }
        for how, losses in score(step_dir, manifest, windows, documents, scored, config.rows).items():
            nll = dict(zip(GROUPS, losses, strict=True))
            report["rows"].append({**facts, "documents": how, "nll": nll})
        write_json(config.json, report)
    print_table(report)
    return 0


if __name__ == "__main__":
    run_command(main)
