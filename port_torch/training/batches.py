"""What a step is given, whatever it was made of: rows of tokens, their targets and their documents."""

import dataclasses
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from core.data.batches import Batch as Windows
from core.data.batches import Data, Record, heldout_windows, train_batches
from core.data.examples import IGNORE
from core.documents import DocumentMark, number_documents


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

    def on(self, device: torch.device, parts: int = 1, by_lengths: bool = False) -> "Inputs":
        """The rows as int64 on a device, in equal micro-batches; the host waits for no copy.

        by_lengths: with where the documents begin.
        """

        def move(array: np.ndarray) -> Tensor:
            held = torch.from_numpy(array.astype(np.int32))
            held = held.pin_memory() if device.type == "cuda" else held
            return held.to(device, non_blocking=True)

        def cut(array: np.ndarray | None) -> Tensor | None:
            return None if array is None else move(array).long().view(parts, -1, array.shape[1])

        starts = None
        if by_lengths and self.documents is not None:
            starts = move(document_starts(self.documents, parts))
        return Inputs(cut(self.tokens), cut(self.targets), cut(self.documents), starts)


class Inputs(NamedTuple):
    """Rows on a device, cut into N micro-batches."""

    tokens: Tensor
    """[N, R, S], int64, as are targets and documents."""
    targets: Tensor
    documents: Tensor | None
    starts: Tensor | None
    """[N, M + 1], int32: see `document_starts`."""

    def micro_batches(self) -> Iterator["Inputs"]:
        """Tokens, targets, documents and starts of one after the other."""
        for number in range(len(self.tokens)):
            micro = Inputs(*(None if tensor is None else tensor[number] for tensor in self))
            if micro.starts is not None:
                torch._dynamo.maybe_mark_dynamic(micro.starts, 0)  # compiled once for every length
            yield micro


def document_starts(documents: np.ndarray, parts: int = 1) -> np.ndarray:
    """Where the documents of each micro-batch begin, counted through its rows, and where the last one ends.

    [parts, M + 1], int32. M is a power of two, so that there are few shapes to compile; where there are fewer
    documents, empty ones follow.
    """
    begins = np.ones(documents.shape, bool)
    begins[:, 1:] = documents[:, 1:] != documents[:, :-1]
    places = [np.flatnonzero(part) for part in np.split(begins, parts)]
    starts = np.full((parts, (1 << (max(map(len, places)) - 1).bit_length()) + 1), begins.size // parts)
    for number, found in enumerate(places):
        starts[number, : len(found)] = found
    return starts.astype(np.int32)


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
    dataset: Data,
    *,
    seed: int,
    batch: int,
    start: int,
    rows: slice,
    vocab_size: int,
    on_bad: str,
    leave_out: Collection[Record] = (),
    mark: DocumentMark | None = None,
) -> Iterator[Batch]:
    """The batches of `core.data.batches.train_batches`, in its order, as a step here takes them.

    mark: by which the documents of a window are told apart; None: a window is one.
    """
    windows = train_batches(
        dataset,
        seed=seed,
        batch=batch,
        start=start,
        rows=rows,
        vocab_size=vocab_size,
        on_bad=on_bad,
        leave_out=leave_out,
    )
    try:
        for given in windows:
            yield Batch(shifted(given, mark), given.first, given.records, given.bad)
    finally:
        windows.close()


def shifted(windows: Windows, mark: DocumentMark | None) -> Rows:
    """Windows of S + 1 tokens as S tokens and the S that follow them; a bad row predicts nothing."""
    tokens = windows.tokens[:, :-1]
    targets = np.where(windows.bad[:, None], IGNORE, windows.tokens[:, 1:].astype(np.int32))
    return Rows(tokens, targets, number_documents(tokens, mark))


def heldout_sets(dataset: Data, mark: DocumentMark | None = None) -> list[HeldOut]:
    """The held-out splits of prepared data; mark: see `pretraining_batches`."""

    def reader(split: str) -> Callable[[int | None], Rows]:
        def read(limit: int | None) -> Rows:
            tokens, mask = heldout_windows(dataset, split, limit)
            targets = np.where(mask, tokens[:, 1:].astype(np.int32), IGNORE)
            return Rows(tokens[:, :-1], targets, number_documents(tokens[:, :-1], mark))

        return read

    splits = (dataset.splits[name] for name in dataset.heldout)
    return [HeldOut(s.name, s.tokens - 1, s.bytes, reader(s.name)) for s in splits]
