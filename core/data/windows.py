"""Reading the records of a prepared split by number, few files open at a time.

A record is called damaged only where its file is: where the file's sha256 differs from the one recorded. What
the operating system refuses (a file that is gone, too many open files, a disk that fails) is an error of its
own, and never a reason to leave a record out.
"""

import bisect
import itertools
import resource
import threading
import weakref
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from google.protobuf.message import DecodeError

from core.checkpoint.manifest import hash_files
from core.data.packing import NOT_DESCRIBED, parse, read_description, shard_name
from core.errors import UserError, os_error

UNREADABLE = (RuntimeError, ValueError, DecodeError)
"""What ArrayRecord and protobuf raise at a record that is damaged or of another shape."""


class BadRecord(UserError):
    """A record that cannot be used, as its message says; training may continue without it."""


def most_open() -> int:
    """How many shards a process holds open, whatever it reads: half of what it may open, and at most 512.

    A reader takes a descriptor and about 0.3 MB. Opening one takes about a millisecond.
    """
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 512 if soft == resource.RLIM_INFINITY else max(1, min(512, soft // 2))


class _OpenReaders:
    """The readers of all splits and data sets of this process; the one used longest ago is closed first.

    A reader that is dropped closes its file when the last thread that reads from it is done.
    """

    def __init__(self) -> None:
        self._readers: OrderedDict[tuple[int, int], Any] = OrderedDict()
        self._lock = threading.RLock()  # collecting garbage within `get` may call `drop`

    def get(self, key: tuple[int, int], file: Path) -> Any:
        from array_record.python.array_record_module import ArrayRecordReader

        with self._lock:
            reader = self._readers.pop(key, None)
            if reader is None:
                options = "readahead_buffer_size:0"  # records are read in random order
                reader = ArrayRecordReader(str(file), options=options, file_reader_buffer_size=2**15)
            self._readers[key] = reader
            while len(self._readers) > most_open():
                self._readers.popitem(last=False)
        return reader

    def drop(self, owner: int, only: int | None = None) -> None:
        """Forgets an owner's reader of the shard `only`, or all of its readers."""
        with self._lock:
            for key in tuple(self._readers):
                if key[0] == owner and only in (None, key[1]):
                    self._readers.pop(key, None)


_OPEN = _OpenReaders()
_OWNERS = itertools.count()


class Shards:
    """ArrayRecord files as one sequence of records. Several threads may read."""

    def __init__(self, files: Sequence[tuple[Path, int]]) -> None:
        """files: with their numbers of records, in order."""
        self.files = [file for file, _ in files]
        self._ends = list(itertools.accumulate(n for _, n in files))
        self._owner = next(_OWNERS)
        weakref.finalize(self, _OPEN.drop, self._owner)

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def shard_of(self, record: int) -> int:
        """The number of the file that holds a record."""
        return bisect.bisect(self._ends, record)

    def read(self, records: Sequence[int]) -> list[bytes]:
        """The records, in the order given; what ArrayRecord raises is passed on."""
        wanted: dict[int, list[int]] = {}  # shard -> places in `records`
        for place, record in enumerate(records):
            wanted.setdefault(self.shard_of(record), []).append(place)
        found = [b""] * len(records)
        for shard, places in wanted.items():
            start = self._ends[shard - 1] if shard > 0 else 0
            try:
                reader = _OPEN.get((self._owner, shard), self.files[shard])
                contents = reader.read([records[place] - start for place in places])
            except BaseException:
                _OPEN.drop(self._owner, shard)  # it opens its file late: it may be the opening that failed
                raise
            for place, content in zip(places, contents, strict=True):
                found[place] = content
        return found


class Windows:
    """The records of one split of the prepared folder `path` by number, read and checked."""

    def __init__(self, path: Path, split: str, context: int, hashes: dict[str, str]) -> None:
        """hashes: sha256 of the folder's files by name."""
        self._split, self._context, self._hashes = split, context, hashes
        try:
            width, self._dtype, splits = read_description(path)
            lengths, _ = splits[split]
            if width != context + 1:
                raise ValueError(f"its features.json says {width}, not {context + 1} tokens")
        except (*NOT_DESCRIBED, OSError) as error:
            raise UserError(
                f"{path} is damaged: its split {split} cannot be opened ({error}); prepare the data again"
            ) from error
        self._shards = Shards([(path / shard_name(split, i), n) for i, n in enumerate(lengths)])
        self._damaged: set[int] = set()  # shards whose files are known to be damaged

    def __len__(self) -> int:
        return len(self._shards)

    def read(self, records: list[int], vocab_size: int) -> np.ndarray:
        """The windows, [n, context + 1] of the type in which they were written (`core.tokenizer.id_dtype`).

        Raises:
            BadRecord: the first record that is damaged, or that holds an id beyond `vocab_size`.
            UserError: a file cannot be read for another reason.
        """
        try:
            rows = [self._decode(content) for content in self._shards.read(records)]
        except UNREADABLE:
            rows = [self._read_one(record, vocab_size) for record in records]
        windows = np.stack(rows)
        if windows.max() >= vocab_size:
            for record, row in zip(records, rows, strict=True):
                self._check(record, row, vocab_size)
        return windows.astype(self._dtype)

    def read_or_skip(self, records: list[int], vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
        """(windows, bad [n]): as `read`, but a bad record gives a row of zeros, marked bad."""
        try:
            return self.read(records, vocab_size), np.zeros(len(records), bool)
        except BadRecord:
            pass
        tokens = np.zeros((len(records), self._context + 1), self._dtype)
        bad = np.zeros(len(records), bool)
        for i, record in enumerate(records):
            try:
                tokens[i] = self._read_one(record, vocab_size)
            except BadRecord:
                bad[i] = True
        return tokens, bad

    def _decode(self, content: bytes) -> np.ndarray:
        # As int64, in which they are written: an id that is too large would wrap around in a narrower type.
        row = np.array(parse(content), np.int64)
        if row.shape != (self._context + 1,):
            raise ValueError(f"it is not a window of {self._context + 1} tokens")
        return row

    def _read_one(self, record: int, vocab_size: int) -> np.ndarray:
        try:
            row = self._decode(self._shards.read([record])[0])
        except UNREADABLE as error:
            self._require_damage(record, error)
            raise BadRecord(
                f"{self._place(record)} cannot be read, since its file is damaged: prepare the data again or "
                "leave such records out with --on-bad-record skip (all files are checked by `python -m "
                f"train_tpu.prepare --verify {self._shards.files[0].parent}`)"
            ) from error
        self._check(record, row, vocab_size)
        return row

    def _require_damage(self, record: int, error: Exception) -> None:
        """A UserError unless the file of an unreadable record is damaged: its content, not the way to it."""
        shard = self._shards.shard_of(record)
        file = self._shards.files[shard]
        try:
            if shard not in self._damaged:
                found = hash_files(file.parent, [file.name], sync=False)[file.name]["sha256"]
                if found != self._hashes[file.name]:
                    self._damaged.add(shard)
        except OSError as refused:
            raise UserError(
                f"{self._place(record)} cannot be read, and no damaged record is the cause: "
                f"{os_error(refused) or refused}"
            ) from error
        if shard not in self._damaged:
            raise UserError(
                f"{self._place(record)} cannot be read ({error}), though the file is what it was when it was "
                "prepared: run the command again, and prepare the data again if that does not help"
            ) from error

    def _check(self, record: int, row: np.ndarray, vocab_size: int) -> None:
        if (top := int(row.max())) >= vocab_size:
            raise BadRecord(
                f"{self._place(record)} holds the token id {top}, but the tokenizer has "
                f"{vocab_size} ids: prepare the data again with it"
            )

    def _place(self, record: int) -> str:
        return f"{self._split} record {record} in {self._shards.files[self._shards.shard_of(record)]}"
