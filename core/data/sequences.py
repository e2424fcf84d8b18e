"""What a step is given, whatever it was made of: sequences of tokens, their targets and their documents."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from core.data.batches import Data, heldout_windows
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

    def filled(self, size: int) -> "Rows":
        """The rows and as many that predict nothing as make `size`: what is compiled knows one shape."""
        missing = ((0, size - len(self.tokens)), (0, 0))
        documents = None if self.documents is None else np.pad(self.documents, missing)
        targets = np.pad(self.targets, missing, constant_values=IGNORE)
        return Rows(np.pad(self.tokens, missing), targets, documents)

    @property
    def n_targets(self) -> int:
        """How many places predict something."""
        return int((self.targets != IGNORE).sum())


class Batch(NamedTuple):
    """One process's rows of a global batch."""

    rows: Rows
    first: int
    """Index of the global batch's first sequence in the endless order."""
    records: np.ndarray
    """Which record each row is."""
    bad: np.ndarray
    """Whether the record was unusable; such a row predicts nothing."""


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

    def parts(self, limit: int | None, size: int) -> tuple[int, Iterator[Rows]]:
        """How many rows there are (see `read`), and `size` of them at a time, the last ones filled up."""
        rows = self.read(limit)
        starts = range(0, len(rows.tokens), size)
        return len(rows.tokens), (rows.part(slice(start, start + size)).filled(size) for start in starts)


def heldout_sets(dataset: Data, mark: DocumentMark | None = None) -> list[HeldOut]:
    """The held-out splits of prepared data.

    mark: by which the documents of a window are told apart; None: a window is one.
    """

    def reader(split: str) -> Callable[[int | None], Rows]:
        def read(limit: int | None) -> Rows:
            tokens, mask = heldout_windows(dataset, split, limit)
            targets = np.where(mask, tokens[:, 1:].astype(np.int32), IGNORE)
            return Rows(tokens[:, :-1], targets, number_documents(tokens[:, :-1], mark))

        return read

    splits = (dataset.splits[name] for name in dataset.heldout)
    return [HeldOut(s.name, s.tokens - 1, s.bytes, reader(s.name)) for s in splits]
