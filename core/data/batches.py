"""Batches of prepared data, read through Grain.

There is one endless sequence of training windows: epoch after epoch, each a shuffle of all records, seeded
by (seed, epoch). A global batch is B neighbours of that sequence, so it depends only on the seed and on the
index of its first window; a host reads its rows of it. The cursor of a run is that index: another batch
size or number of hosts neither repeats nor skips a window, and there is no iterator state to save.
"""

import dataclasses
import hashlib
import sys
from collections.abc import Collection, Iterator, Sequence
from typing import Literal

import numpy as np

from core.data.dataset import TRAIN, Dataset, open_windows
from core.errors import UserError


@dataclasses.dataclass(frozen=True)
class Batch:
    """This process's rows of one global batch."""

    tokens: np.ndarray
    """[rows, context + 1], of the type in which they are stored or that was asked for."""
    first: int
    """Index of the global batch's first window in the endless sequence."""
    records: np.ndarray
    """int64 [rows]: which train record each row is."""
    bad: np.ndarray
    """bool [rows]: the row predicts nothing: its record is to be left out or, with on_bad="skip", cannot be
    used (then the row is zeros)."""


def require_records(dataset: Dataset, records: Collection[int], option: str) -> None:
    """A UserError that names the first of `records`, which a user gave `option`, that train does not have."""
    n = dataset.splits[TRAIN].windows
    for record in records:
        if not 0 <= record < n:
            raise UserError(f"{option} {record}: the training records of {dataset.path} are 0 to {n - 1}")


def train_batches(
    dataset: Dataset,
    *,
    seed: int,
    batch: int,
    start: int = 0,
    rows: slice | Sequence[int] = slice(None),
    vocab_size: int,
    on_bad: Literal["fail", "skip"] = "fail",
    leave_out: Collection[int] = (),
    dtype: np.dtype | None = None,
) -> Iterator[Batch]:
    """Endless batches of `batch` windows, the first one beginning at window `start` of the sequence.

    rows: which rows of every global batch this process reads; default: all.
    vocab_size: of the tokenizer; ids at or above it make a record unusable.
    on_bad: what an unusable record does: `fail` raises a `UserError` naming it, `skip` marks its row. A file
        that the system cannot read is no such record: that raises in both cases.
    leave_out: records that are marked as unusable ones are, whatever they hold.
    dtype: of the tokens, where it is not the one in which they are stored.

    Batches are read ahead in threads; closing the generator ends these.
    """
    import grain

    windows = open_windows(dataset, TRAIN)
    offsets = np.arange(batch)[rows].tolist()

    def read(number: int) -> Batch:
        first = start + number * batch
        records = [record_at(first + offset, len(windows), seed) for offset in offsets]
        if on_bad == "skip":
            tokens, bad = windows.read_or_skip(records, vocab_size)
        else:
            tokens, bad = windows.read(records, vocab_size), np.zeros(len(records), bool)
        bad |= np.isin(records, list(leave_out))
        tokens = tokens if dtype is None else tokens.astype(dtype, copy=False)
        return Batch(tokens, first, np.array(records, np.int64), bad)

    # Four batches of 256 x 1025 tokens are 2 MB.
    read_ahead = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)
    batches = iter(grain.MapDataset.range(sys.maxsize).map(read).to_iter_dataset(read_ahead))
    try:
        yield from batches
    finally:
        batches.close()


def record_at(index: int, n_records: int, seed: int) -> int:
    """The train record that is window `index` of the endless sequence.

    Grain's pseudorandom permutation of one epoch, computed for a single index: nothing is held in memory,
    however long the dataset. Its usual 4 rounds leave neighbours correlated; 16 do not.
    """
    import grain

    epoch, place = divmod(index, n_records)
    digest = hashlib.sha256(f"train order, seed {seed}, epoch {epoch}".encode()).digest()
    epoch_seed = int.from_bytes(digest[:4], "big")
    return grain.experimental.index_shuffle(place, max_index=n_records - 1, seed=epoch_seed, rounds=16)


def heldout_windows(dataset: Dataset, split: str, limit: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """(tokens [n, context + 1], mask bool [n, context]) of a held-out split.

    The mask is False where the last window is filled up. All windows, or `limit` of them spread evenly.
    """
    if split not in dataset.splits:
        raise UserError(f"{dataset.path} has no split {split!r}: it has {', '.join(dataset.splits)}")
    windows = open_windows(dataset, split)
    n = len(windows) if limit is None else min(limit, len(windows))
    records = [i * len(windows) // n for i in range(n)]
    tokens = windows.read(records, dataset.tokenizer_record["vocab_size"])
    predicted = dataset.splits[split].tokens - 1
    index = np.array(records)[:, None] * dataset.context + np.arange(dataset.context)
    return tokens, index < predicted
