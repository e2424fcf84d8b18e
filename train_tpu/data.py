"""A prepared dataset: opening it, checking it, and batches out of it through Grain.

It is a folder of ArrayRecord files, TFDS's description of them, and dataset.json. That one is written last,
so a folder that has it is complete. It holds the format's version, the tokenizer's record, the context, what
the splits contain, what was dropped, where the text came from, the sha256 of every file, and the
fingerprint that checkpoints and runs refer to.

There is one endless sequence of training windows: epoch after epoch, each a shuffle of all records, seeded
by (seed, epoch). A global batch is B neighbours of that sequence, so it depends only on the seed and on the
index of its first window; a host reads its rows of it. The cursor of a run is that index: another batch
size or number of hosts neither repeats nor skips a window, and there is no iterator state to save.
"""

import bisect
import dataclasses
import hashlib
import itertools
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from google.protobuf.message import DecodeError

from core.errors import UserError
from core.tokenizer import TOKENIZER_FILE
from train_tpu.packing import open_windows

FORMAT = 1
MANIFEST = "dataset.json"
TRAIN = "train"


@dataclasses.dataclass(frozen=True)
class Split:
    """What a split contains."""

    name: str
    documents: int
    bytes: int
    """Bytes of the documents' text in UTF-8: the denominator of bits per byte."""
    tokens: int
    """Length of the stream, with `<s>` and `</s>` around every document."""
    windows: int
    """Number of records. A held-out split's last window is filled up; train's rest is left out."""


@dataclasses.dataclass(frozen=True)
class Dataset:
    """An open prepared dataset."""

    path: Path
    context: int
    tokenizer_record: dict
    fingerprint: str
    """Hash of tokenizer, context and contents: equal fingerprints mean equal batches."""
    splits: dict[str, Split]
    """`train`, and the held-out splits by name."""
    files: dict[str, dict]
    """File name -> {"sha256", "bytes"}."""
    sources: list[str]

    @property
    def heldout(self) -> list[str]:
        """Names of the held-out splits."""
        return [name for name in self.splits if name != TRAIN]

    def verify(self) -> None:
        """Reads every file and compares its sha256; a `UserError` names the first that differs."""
        for name, recorded in self.files.items():
            if file_sha256(self.path / name) != recorded["sha256"]:
                raise UserError(
                    f"{self.path / name} is corrupt: its sha256 is not the one in {MANIFEST}; "
                    "prepare the data again"
                )


def open_dataset(path: Path | str) -> Dataset:
    """The prepared dataset in the folder `path`; a `UserError` says what is missing or does not fit."""
    path = Path(path)
    manifest = path / MANIFEST
    if not manifest.is_file():
        raise UserError(
            f"{path} is not a prepared dataset (it has no {MANIFEST}): make one with "
            f"`python -m train_tpu.prepare TEXT --out {path}`"
        )
    try:
        content = json.loads(manifest.read_bytes())
        version = content["format"]
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{manifest} is damaged ({error!r}): prepare the data again") from error
    if version != FORMAT:
        raise UserError(
            f"{manifest} has format {version}, this version reads {FORMAT}: prepare the data again"
        )
    try:
        dataset = Dataset(
            path=path,
            context=content["context"],
            tokenizer_record=content["tokenizer"],
            fingerprint=content["fingerprint"],
            splits={name: Split(name=name, **split) for name, split in content["splits"].items()},
            files=content["files"],
            sources=content["sources"],
        )
    except (TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{manifest} is damaged ({error!r}): prepare the data again") from error
    for name, recorded in dataset.files.items():
        size = (path / name).stat().st_size if (path / name).is_file() else None
        if size != recorded["bytes"]:
            raise UserError(
                f"{path / name} is {'missing' if size is None else 'truncated'} "
                f"({recorded['bytes']} bytes expected, {size or 0} found): prepare the data again"
            )
    return dataset


def write_manifest(
    path: Path,
    context: int,
    tokenizer: dict,
    splits: Iterable[Split],
    dropped: dict,
    sources: list[str],
    train_tokens: int | None = None,
) -> Dataset:
    """Hashes the files in the folder `path` and writes its dataset.json, which completes it.

    train_tokens: with which the reading of the sources was to end, if it was.
    """
    files = {
        file.name: {"sha256": file_sha256(file), "bytes": file.stat().st_size}
        for file in sorted(path.iterdir())
    }
    # The tokenizer is in it by its hash alone, whether its file is carried or not.
    hashes = {name: file["sha256"] for name, file in files.items() if name != TOKENIZER_FILE}
    contents = [tokenizer["sha256"], context, hashes]
    manifest = {
        "format": FORMAT,
        "tokenizer": tokenizer,
        "context": context,
        "splits": {
            split.name: {k: v for k, v in dataclasses.asdict(split).items() if k != "name"}
            for split in splits
        },
        "dropped": dropped,
        "sources": sources,
        "train_tokens": train_tokens,
        "files": files,
        "fingerprint": hashlib.sha256(json.dumps(contents).encode()).hexdigest(),
    }
    (path / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
    return open_dataset(path)


def file_sha256(path: Path) -> str:
    """Hex digest of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclasses.dataclass(frozen=True)
class Batch:
    """This process's rows of one global batch."""

    tokens: np.ndarray
    """uint16 [rows, context + 1]."""
    first: int
    """Index of the global batch's first window in the endless sequence."""
    records: np.ndarray
    """int64 [rows]: which train record each row is."""
    bad: np.ndarray
    """bool [rows]: the record cannot be used; the row is zeros. Only with on_bad="skip"."""


# What ArrayRecord, protobuf and TFDS raise at a record that is damaged or of another shape.
UNREADABLE = (RuntimeError, ValueError, KeyError, DecodeError)


class Windows:
    """The records of one split by number, read through TFDS and checked."""

    def __init__(self, dataset: Dataset, split: str) -> None:
        self.split, self.context = split, dataset.context
        self._source, files = open_windows(dataset.path, split)
        self._files = [dataset.path / name for name, _ in files]
        self._ends = list(itertools.accumulate(n for _, n in files))
        if len(self._source) != dataset.splits[split].windows:
            raise UserError(
                f"{dataset.path} is damaged: its split {split} has {len(self._source)} records instead of "
                f"{dataset.splits[split].windows}; prepare the data again"
            )

    def __len__(self) -> int:
        return len(self._source)

    def read(self, records: list[int], vocab_size: int) -> np.ndarray:
        """The windows, uint16 [n, context + 1]; a `UserError` names the first record that is unusable."""
        try:
            rows = [item["tokens"] for item in self._source.__getitems__(records)]
        except UNREADABLE:
            return np.stack([self._read_one(record, vocab_size) for record in records])
        for record, row in zip(records, rows, strict=True):
            self._check(record, row, vocab_size)
        return np.stack(rows)

    def read_or_skip(self, records: list[int], vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
        """(windows, bad [n]): as `read`, but an unusable record gives a row of zeros, marked bad."""
        try:
            return self.read(records, vocab_size), np.zeros(len(records), bool)
        except UserError:
            pass
        tokens = np.zeros((len(records), self.context + 1), np.uint16)
        bad = np.zeros(len(records), bool)
        for i, record in enumerate(records):
            try:
                tokens[i] = self._read_one(record, vocab_size)
            except UserError:
                bad[i] = True
        return tokens, bad

    def _read_one(self, record: int, vocab_size: int) -> np.ndarray:
        try:
            row = self._source[record]["tokens"]
        except UNREADABLE as error:
            raise UserError(
                f"{self._place(record)} cannot be read ({error}): prepare the data again, "
                "or skip such records with on_bad=skip"
            ) from error
        self._check(record, row, vocab_size)
        return row

    def _check(self, record: int, row: np.ndarray | None, vocab_size: int) -> None:
        if row is None:  # what TFDS makes of the empty record that a truncated file can give
            raise UserError(f"{self._place(record)} cannot be read (it is empty): prepare the data again")
        assert row.shape == (self.context + 1,), row.shape
        if (top := int(row.max())) >= vocab_size:
            raise UserError(
                f"{self._place(record)} holds the token id {top}, but the model's vocabulary has "
                f"{vocab_size} ids: prepare the data again with the model's tokenizer"
            )

    def _place(self, record: int) -> str:
        return f"{self.split} record {record} in {self._files[bisect.bisect(self._ends, record)]}"


def train_batches(
    dataset: Dataset,
    *,
    seed: int,
    batch: int,
    start: int = 0,
    rows: slice | Sequence[int] = slice(None),
    vocab_size: int,
    on_bad: Literal["fail", "skip"] = "fail",
) -> Iterator[Batch]:
    """Endless batches of `batch` windows, the first one beginning at window `start` of the sequence.

    rows: which rows of every global batch this process reads; default: all.
    vocab_size: ids at or above it make a record unusable.
    on_bad: what an unusable record does: `fail` raises a `UserError` naming it, `skip` marks its row.

    Batches are read ahead in threads; closing the generator ends these.
    """
    import grain

    windows = Windows(dataset, TRAIN)
    offsets = np.arange(batch)[rows].tolist()

    def read(number: int) -> Batch:
        first = start + number * batch
        records = [record_at(first + offset, len(windows), seed) for offset in offsets]
        if on_bad == "skip":
            tokens, bad = windows.read_or_skip(records, vocab_size)
        else:
            tokens, bad = windows.read(records, vocab_size), np.zeros(len(records), bool)
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
    """(tokens uint16 [n, context + 1], mask bool [n, context]) of a held-out split.

    The mask is False where the last window is filled up. All windows, or `limit` of them spread evenly.
    """
    if split not in dataset.splits:
        raise UserError(f"{dataset.path} has no split {split!r}: it has {', '.join(dataset.splits)}")
    windows = Windows(dataset, split)
    n = min(len(windows), limit or len(windows))
    records = [i * len(windows) // n for i in range(n)]
    tokens = windows.read(records, dataset.tokenizer_record["vocab_size"])
    predicted = dataset.splits[split].tokens - 1
    index = np.array(records)[:, None] * dataset.context + np.arange(dataset.context)
    return tokens, index < predicted
