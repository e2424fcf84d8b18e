"""Counts documents that are exact copies of others, in bounded memory.

A document is known by 64 bits of its hash. Up to `limit` different ones are held, 8 bytes each, and the count
is exact (but for one chance in 2^64 / n that a document is taken for a copy of one of n others). Where there
are more, only documents whose hash falls into a part of all hashes are looked at, half of them first, then a
quarter, and each copy found counts for 2, then 4: copies of a document have one hash, so they are looked at
together or not at all, and the count is an unbiased estimate.
"""

import numpy as np
from jaxtyping import Bool, UInt64

LIMIT = 1 << 24
"""Hashes that are held: 128 MiB, and as much again while new ones are added."""


class Copies:
    """Counts how many of the documents that are added were there before."""

    def __init__(self, limit: int = LIMIT) -> None:
        self.limit = limit
        self._seen = np.empty(0, np.uint64)  # sorted, different
        self._pending: list[UInt64[np.ndarray, " n"]] = []
        self._n_pending = 0
        self._count = 0
        self._halvings = 0

    def add(self, hashes: UInt64[np.ndarray, " n"]) -> None:
        """Adds documents by their hashes, in order."""
        # In groups whose ends do not depend on how the hashes come, so that an estimate does not, either.
        size = max(self.limit // 4, 1)
        while len(hashes):
            part, hashes = np.split(hashes, [size - self._n_pending])
            self._pending.append(part)
            self._n_pending += len(part)
            if self._n_pending == size:
                self._merge()

    def count(self) -> int:
        """How many documents were there before; an estimate if not `is_exact`."""
        self._merge()
        return self._count

    @property
    def is_exact(self) -> bool:
        """Whether all documents were looked at."""
        return self._halvings == 0

    def among(self, hashes: UInt64[np.ndarray, " n"]) -> int:
        """How many of the documents are copies of one that was added."""
        self._merge()
        looked_at = self._looked_at(hashes)
        found = np.searchsorted(self._seen, looked_at, "right") > np.searchsorted(
            self._seen, looked_at, "left"
        )
        return int(found.sum()) << self._halvings

    def _looked_at(self, hashes: UInt64[np.ndarray, " n"]) -> UInt64[np.ndarray, " m"]:
        return hashes[hashes & np.uint64((1 << self._halvings) - 1) == 0]

    def _merge(self) -> None:
        if not self._pending:
            return
        new = self._looked_at(np.concatenate(self._pending))
        self._pending, self._n_pending = [], 0
        n = len(self._seen) + len(new)
        self._seen = np.unique(np.concatenate([self._seen, new]))
        self._count += (n - len(self._seen)) << self._halvings
        while len(self._seen) > self.limit:
            self._halvings += 1
            self._seen = self._looked_at(self._seen)


class Seen:
    """Which documents were there before, exactly: 8 bytes for every different one, and as much again for a
    moment now and then. A hash of 64 bits is taken for its document."""

    def __init__(self) -> None:
        # Different hashes, each array at most half the last.
        self._sorted: list[UInt64[np.ndarray, " n"]] = []

    def add(self, hashes: UInt64[np.ndarray, " n"]) -> Bool[np.ndarray, " n"]:
        """Adds documents by their hashes, in order; which of them are new."""
        _, firsts = np.unique(hashes, return_index=True)
        new = np.zeros(len(hashes), bool)
        new[firsts] = True
        for seen in self._sorted:
            places = np.searchsorted(seen, hashes)
            new &= seen[np.minimum(places, len(seen) - 1)] != hashes
        if new.any():
            self._sorted.append(np.sort(hashes[new]))
        while len(self._sorted) > 1 and 2 * len(self._sorted[-1]) > len(self._sorted[-2]):
            self._sorted[-2:] = [np.sort(np.concatenate(self._sorted[-2:]))]
        return new
