"""Examples packed into rows of the context's length, and batches of them.

An example is put where it fits best, the longest first, so that little is padding. Within a row each has a
number: attention stays inside of it and positions begin anew, so that an example's loss does not depend on
its neighbours. The order of the rows is a function of (seed, index), as in pretraining.
"""

import bisect
from collections.abc import Iterator, Sequence

import numpy as np

from core.data.batches import record_at
from core.data.examples import IGNORE, Example
from core.data.sequences import Batch, Rows

PADDING = 2**31 - 1  # the number of what fills a row up: behind every document's


def pack(examples: list[Example], length: int) -> Rows:
    """The examples in as few rows of `length` as best-fit-decreasing needs; padding predicts nothing."""
    order = sorted(range(len(examples)), key=lambda i: -len(examples[i].tokens))
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (free places, number of the row), in order
    for i in order:
        n = len(examples[i].tokens)
        place = bisect.bisect_left(room, (n, -1))
        free, row = room.pop(place) if place < len(room) else (length, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(i)
        bisect.insort(room, (free - n, row))
    tokens = np.zeros((len(rows), length), np.int32)
    targets = np.full((len(rows), length), IGNORE, np.int32)
    documents = np.full((len(rows), length), PADDING, np.int32)
    for number, row in enumerate(rows):
        start = 0
        for count, i in enumerate(row, 1):
            end = start + len(examples[i].tokens)
            tokens[number, start:end], targets[number, start:end] = examples[i].tokens, examples[i].targets
            documents[number, start:end] = count
            start = end
    return Rows(tokens, targets, documents)


def packed_batches(
    packed: Rows, *, seed: int, batch: int, start: int, rows: slice | Sequence[int]
) -> Iterator[Batch]:
    """Endless batches of packed rows, epoch after epoch, each a shuffle.

    rows: which rows of every global batch this process reads.
    """
    n, offsets = len(packed.tokens), np.arange(batch)[rows].tolist()
    while True:
        numbers = np.array([record_at(start + i, n, seed) for i in offsets], np.int64)
        yield Batch(packed.part(numbers), start, numbers, np.zeros(len(numbers), bool))
        start += batch
