"""What a step is given, whatever it was made of: rows of tokens, their targets and their documents."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from core.data.dataset import Batch as Windows
from core.data.dataset import Dataset, heldout_windows, train_batches
from core.loss import IGNORE


class Rows(NamedTuple):
    """Sequences, on the host."""

    tokens: np.ndarray
    """[R, S] integers."""
    targets: np.ndarray
    """[R, S]: the id to predict at each place, -1 where nothing is."""
    documents: np.ndarray | None
    """[R, S]: numbers that rise along a row, one for each document packed into it; None: a row is one."""

    def part(self, rows: slice | Sequence[int] | np.ndarray) -> "Rows":
        """Some of the rows, in the order given."""
        return Rows(*(None if array is None else array[rows] for array in self))

    def on(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor | None]:
        """The three as int64 on a device; the host waits for no copy."""

        def move(array: np.ndarray | None) -> Tensor | None:
            if array is None:
                return None
            held = torch.from_numpy(array.astype(np.int32))
            held = held.pin_memory() if device.type == "cuda" else held
            return held.to(device, non_blocking=True).long()

        return move(self.tokens), move(self.targets), move(self.documents)


class Batch(NamedTuple):
    """One rank's rows of a global batch."""

    rows: Rows
    first: int
    """Index of the global batch's first sequence in the endless order."""
    records: np.ndarray
    """Which record each row is."""
    bad: np.ndarray
    """Whether the record was unusable; such a row predicts nothing."""


def empty_rows(n: int, length: int, packed: bool) -> Rows:
    """Rows of nothing that a step computes like any others, to try its memory with."""
    zeros = np.zeros((n, length), np.int32)
    return Rows(zeros, zeros, zeros if packed else None)


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """A set that is scored and never trained on."""

    name: str
    tokens: int
    """Predictions in all of it."""
    n_bytes: int
    """Length of what they predict, in UTF-8."""
    read: Callable[[int | None], Rows]
    """All rows, or about that many spread evenly."""


def pretraining_batches(
    dataset: Dataset, *, seed: int, batch: int, start: int, rows: slice, vocab_size: int, on_bad: str
) -> Iterator[Batch]:
    """The batches of `core.data.dataset.train_batches`, in its order, as a step here takes them."""
    windows = train_batches(
        dataset, seed=seed, batch=batch, start=start, rows=rows, vocab_size=vocab_size, on_bad=on_bad
    )
    try:
        for given in windows:
            yield Batch(shifted(given), given.first, given.records, given.bad)
    finally:
        windows.close()


def shifted(windows: Windows) -> Rows:
    """Windows of S + 1 tokens as S tokens and the S that follow them; a bad row predicts nothing."""
    targets = np.where(windows.bad[:, None], IGNORE, windows.tokens[:, 1:].astype(np.int32))
    return Rows(windows.tokens[:, :-1], targets, None)


def heldout_sets(dataset: Dataset) -> list[HeldOut]:
    """The held-out splits of prepared data."""

    def reader(split: str) -> Callable[[int | None], Rows]:
        def read(limit: int | None) -> Rows:
            tokens, mask = heldout_windows(dataset, split, limit)
            targets = np.where(mask, tokens[:, 1:].astype(np.int32), IGNORE)
            return Rows(tokens[:, :-1], targets, None)

        return read

    splits = (dataset.splits[name] for name in dataset.heldout)
    return [HeldOut(s.name, s.tokens - 1, s.bytes, reader(s.name)) for s in splits]
