"""Batches of prepared data, read through Grain.

There is one endless sequence of training windows: epoch after epoch, each a shuffle of all records, seeded
by (seed, epoch); or a mixture of several such (core/data/mixture.py). A global batch is B neighbours of that
sequence, so it depends only on the seed and on the index of its first window; a host reads its rows of it.
The cursor of a run is that index: another batch size or number of hosts neither repeats nor skips a window,
and there is no iterator state to save.
"""

import dataclasses
import functools
import hashlib
import logging
import sys
from collections.abc import Collection, Iterator, Sequence
from typing import Any, Literal

import numpy as np

from core.data.dataset import TRAIN, Dataset, open_windows
from core.data.mixture import Mixture, alone
from core.data.windows import Windows
from core.errors import UserError

Data = Dataset | Mixture
Record = int | str
"""A train record as users name it: its number, and in a mixture SOURCE:NUMBER."""


@dataclasses.dataclass(frozen=True)
class Batch:
    """This process's rows of one global batch."""

    tokens: np.ndarray
    """[rows, context + 1], of the type in which they are stored or that was asked for."""
    first: int
    """Index of the global batch's first window in the endless sequence."""
    records: np.ndarray
    """[rows]: which train record each row is: its number, and in a mixture SOURCE:NUMBER."""
    bad: np.ndarray
    """bool [rows]: the row predicts nothing: its record is to be left out or, with on_bad="skip", cannot be
    used (then the row is zeros)."""


def data_record(data: Data) -> dict[str, Any]:
    """What config.json and manifests say of the data: `fingerprint`, and `mixture` where it is one."""
    mixture = {"mixture": data.record()} if isinstance(data, Mixture) else {}
    return {"fingerprint": data.fingerprint, **mixture}


def require_records(data: Data, records: Collection[Record], option: str) -> None:
    """A UserError that names the first of `records`, which a user gave `option`, that train does not have."""
    sources = _as_mixture(data).sources
    for record in records:
        name, _, number = str(record).rpartition(":")
        if name not in sources:
            example = _label(next(iter(sources)), 0)
            raise UserError(f"{option} {record}: the data has no such record; the first one is {example}")
        n = sources[name].splits[TRAIN].windows
        if not 0 <= int(number) < n:
            raise UserError(
                f"{option} {record}: the training records of {sources[name].path} are 0 to {n - 1}"
            )


def record_of(data: Data, index: int, seed: int) -> Record:
    """The train record that is window `index` of the endless sequence."""
    return _label(*_locate(_as_mixture(data), index, seed))


def train_batches(
    data: Data,
    *,
    seed: int,
    batch: int,
    start: int = 0,
    rows: slice | Sequence[int] = slice(None),
    vocab_size: int,
    on_bad: Literal["fail", "skip"] = "fail",
    leave_out: Collection[Record] = (),
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
    grain = _import_grain()
    mixture, left_out = _as_mixture(data), set(leave_out)
    windows = {name: open_windows(source, TRAIN) for name, source in mixture.sources.items()}
    offsets = np.arange(batch)[rows].tolist()

    def read(number: int) -> Batch:
        first = start + number * batch
        found = [_locate(mixture, first + offset, seed) for offset in offsets]
        tokens, bad = _read(windows, found, vocab_size, on_bad)
        records = [_label(*one) for one in found]
        if left_out:
            bad |= np.array([record in left_out for record in records])
        tokens = tokens if dtype is None else tokens.astype(dtype, copy=False)
        return Batch(tokens, first, np.array(records), bad)

    # Four batches of 256 x 1025 tokens are 2 MB.
    read_ahead = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)
    batches = iter(grain.MapDataset.range(sys.maxsize).map(read).to_iter_dataset(read_ahead))
    try:
        yield from batches
    finally:
        batches.close()


def _as_mixture(data: Data) -> Mixture:
    return data if isinstance(data, Mixture) else alone(data)


def _locate(mixture: Mixture, index: int, seed: int) -> tuple[str, int]:
    """Source and record that are window `index` of the endless sequence."""
    name, place = mixture.place(index, seed)
    if name not in mixture.sources:
        raise UserError(f"sequence {index} is of the source {name}, which --data does not name any more")
    return name, record_at(place, mixture.sources[name].splits[TRAIN].windows, seed)


def _label(name: str, record: int) -> Record:
    return f"{name}:{record}" if name else record


def _read(
    windows: dict[str, Windows], found: Sequence[tuple[str, int]], vocab_size: int, on_bad: str
) -> tuple[np.ndarray, np.ndarray]:
    """(tokens [n, context + 1], bad [n]) of the records `found`, source by source."""
    of_source: dict[str, list[int]] = {}
    for row, (name, _) in enumerate(found):
        of_source.setdefault(name, []).append(row)
    parts = []
    for name, rows in of_source.items():
        records = [found[row][1] for row in rows]
        if on_bad == "skip":
            parts.append(windows[name].read_or_skip(records, vocab_size))
        else:
            parts.append((windows[name].read(records, vocab_size), np.zeros(len(records), bool)))
    if len(parts) == 1:
        return parts[0]
    tokens, bad = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    back = np.argsort(np.concatenate(list(of_source.values())))
    return tokens[back], bad[back]


def record_at(index: int, n_records: int, seed: int) -> int:
    """The train record that is window `index` of the endless sequence of one source.

    Grain's pseudorandom permutation of one epoch, computed for a single index: nothing is held in memory,
    however long the dataset. Its usual 4 rounds leave neighbours correlated; 16 do not.
    """
    epoch, place = divmod(index, n_records)
    shuffle = _import_grain().experimental.index_shuffle
    return shuffle(place, max_index=n_records - 1, seed=_epoch_seed(seed, epoch), rounds=16)


@functools.cache
def _import_grain() -> Any:
    """Grain without what it imports only because it is installed, and which takes longer than Grain: Orbax,
    and JAX where a run has not imported it."""
    absent = [name for name in ("jax", "orbax.checkpoint") if name not in sys.modules]
    log = logging.getLogger("absl")
    level = log.level
    log.setLevel(logging.ERROR)  # it warns that JAX's profiler is not there
    sys.modules.update(dict.fromkeys(absent))  # importing them is an ImportError, for which Grain is prepared
    try:
        import grain
    finally:
        for name in absent:
            del sys.modules[name]
        log.setLevel(level)
    return grain


@functools.lru_cache(maxsize=64)  # of a few sources, whose epochs end at different times
def _epoch_seed(seed: int, epoch: int) -> int:
    """32 bits for the shuffle of one epoch."""
    digest = hashlib.sha256(f"train order, seed {seed}, epoch {epoch}".encode()).digest()
    return int.from_bytes(digest[:4], "big")


def full_batches(size: int, *arrays: np.ndarray) -> Iterator[tuple[int, tuple[np.ndarray, ...]]]:
    """(n, `size` rows of each array), in turn. Of the last ones only `n` are theirs: they are filled up with
    zeros, so that whatever computes with them is compiled for one shape."""
    for start in range(0, len(arrays[0]), size):
        parts = [array[start : start + size] for array in arrays]
        n = len(parts[0])
        yield n, tuple(np.pad(part, [(0, size - n)] + [(0, 0)] * (part.ndim - 1)) for part in parts)


def heldout_windows(data: Data, split: str, limit: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """(tokens [n, context + 1], mask bool [n, context]) of a held-out split.

    The mask is False where the last window is filled up. All windows, or `limit` of them spread evenly.
    """
    if split not in data.splits:
        raise UserError(f"the data has no split {split!r}: it has {', '.join(data.splits)}")
    dataset = data
    if isinstance(data, Mixture):
        source, _, split = split.partition("/")
        dataset = data.sources[source]
    windows = open_windows(dataset, split)
    n = len(windows) if limit is None else min(limit, len(windows))
    records = [i * len(windows) // n for i in range(n)]
    tokens = windows.read(records, dataset.tokenizer_record["vocab_size"])
    predicted = dataset.splits[split].tokens - 1
    index = np.array(records)[:, None] * dataset.context + np.arange(dataset.context)
    return tokens, index < predicted
