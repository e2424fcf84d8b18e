"""Sequences as a step of the mirror takes them, on its device in micro-batches; and those of pretraining."""

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from core.data.batches import Batch as Windows
from core.data.examples import IGNORE
from core.data.sequences import Batch, Rows
from core.documents import DocumentMark, number_documents


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
            yield Inputs(*(None if tensor is None else tensor[number] for tensor in self))


def place(rows: Rows, device: torch.device, parts: int = 1, by_lengths: bool = False) -> Inputs:
    """Rows as int64 on a device, in equal micro-batches; the host waits for no copy.

    by_lengths: with where the documents begin.
    """

    def move(array: np.ndarray) -> Tensor:
        held = torch.from_numpy(array.astype(np.int32))
        held = held.pin_memory() if device.type == "cuda" else held
        return held.to(device, non_blocking=True)

    def cut(array: np.ndarray | None) -> Tensor | None:
        return None if array is None else move(array).long().view(parts, -1, array.shape[1])

    starts = None
    if by_lengths and rows.documents is not None:
        starts = move(document_starts(rows.documents, parts))
    return Inputs(cut(rows.tokens), cut(rows.targets), cut(rows.documents), starts)


def document_starts(documents: np.ndarray, parts: int = 1) -> np.ndarray:
    """Where the documents of each micro-batch begin, counted through its rows, and where the last one ends.

    [parts, M + 1], int32. M is a power of two, so that there are few shapes to record; where there are fewer
    documents, empty ones follow.
    """
    begins = np.ones(documents.shape, bool)
    begins[:, 1:] = documents[:, 1:] != documents[:, :-1]
    places = [np.flatnonzero(part) for part in np.split(begins, parts)]
    starts = np.full((parts, (1 << (max(map(len, places)) - 1).bit_length()) + 1), begins.size // parts)
    for number, found in enumerate(places):
        starts[number, : len(found)] = found
    return starts.astype(np.int32)


def empty_rows(n: int, length: int, packed: bool) -> Rows:
    """Rows of nothing that a step computes like any others, to try its memory with."""
    zeros = np.zeros((n, length), np.int32)
    return Rows(zeros, zeros, zeros if packed else None)


def pretraining_batches(windows: Iterator[Windows], mark: DocumentMark | None = None) -> Iterator[Batch]:
    """Batches of windows, which `core.data.batches.train_batches` reads, as a step here takes them.

    mark: by which the documents of a window are told apart; None: a window is one.
    """
    with contextlib.closing(windows):
        for given in windows:
            yield Batch(shifted(given, mark), given.first, given.records, given.bad)


def shifted(windows: Windows, mark: DocumentMark | None) -> Rows:
    """Windows of S + 1 tokens as S tokens and the S that follow them; a bad row predicts nothing."""
    tokens = windows.tokens[:, :-1]
    targets = np.where(windows.bad[:, None], IGNORE, windows.tokens[:, 1:].astype(np.int32))
    return Rows(tokens, targets, number_documents(tokens, mark))
