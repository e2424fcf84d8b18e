"""Text to tokens in pieces, which is what takes time: dealt to processes, and kept on the disk until the end.

A piece is the documents of a part of a source (`Source.parts`) from one border to the next, and the borders
depend on the text alone. It is two files: NAME.tokens, the ids of its documents one after another, and
NAME.npz, a record of each document. Both appear whole, the second one last: where it is, the piece is made.
NAME begins with a hash of everything that the piece is made of, so a piece that is there is never made again,
whatever ended the process that made it, and what is made of other text or otherwise is never taken for it.

A compressed file cannot be entered in the middle. A process that is to make piece n reads from where it is in
the file, or from the beginning, and tokenises only what is in piece n: reading takes a twentieth of the time.
"""

import dataclasses
import hashlib
import io
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from core.checkpoint.manifest import sync_path
from core.data.file_source import cut_point
from core.data.overlap import load
from core.data.source import Source
from core.data.text import repair
from core.tokenizer import Tokenizer, load_tokenizer

PIECE_FORMAT = 1
"""A version: it changes when a piece of the same text is made otherwise."""
TRAIN = "train"

DOCUMENT = np.dtype(
    [
        ("hash", np.uint64),  # of the whole text
        ("bytes", np.int64),  # of the text in UTF-8, without the end that is held out
        ("tokens", np.int64),
        ("end_bytes", np.int64),  # of the end that is held out; its tokens come first
        ("end_tokens", np.int64),
        ("empty", np.int64),  # empty documents directly before this one
        ("without_text", np.int64),  # rows directly before it, of which a field is missing or null
        ("repaired", np.int64),  # 1: it held half a surrogate pair
        ("shared", np.int64),  # runs of words that it shares with held-out text, where these are looked for
    ]
)
"""A piece ends with a record of no document, for what comes behind its last one."""


@dataclasses.dataclass(frozen=True)
class Part:
    """What one process reads at a time, in order."""

    source: Source
    split: str
    """`TRAIN`, of which some documents may yet be held out, or the held-out set that it belongs to."""
    cut: float | None
    """The end of each document that is held out, as a fraction of it; None: documents stay whole."""


@dataclasses.dataclass(frozen=True)
class Job:
    """What a process needs to make pieces, and in which folder."""

    folder: Path
    tokenizer: str
    """What `load_tokenizer` takes."""
    parts: list[Part]
    keys: list[str]
    """With which the names of a part's pieces begin."""
    piece_bytes: int
    """A piece ends with the document with which its text has this many bytes."""
    heldout_runs: Path | None
    """The file of what training text is compared with (`core.data.overlap`)."""

    def path(self, part: int, number: int) -> Path:
        """A piece's file of records; the tokens lie next to it."""
        return self.folder / f"{self.keys[part]}-{number:06d}.npz"


def part_key(part: Part, tokenizer: list, piece_bytes: int, compared_with: str) -> str:
    """Hash of what the pieces of a part are made of.

    tokenizer: `core.tokenizer.identity` of its record. compared_with: a hash of the held-out runs.
    """
    source = part.source.identity()
    made_of = [PIECE_FORMAT, source, part.split, part.cut, tokenizer, piece_bytes, compared_with]
    return hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:16]


class Piece(NamedTuple):
    """What is known of a piece but its tokens."""

    documents: np.ndarray
    """[documents + 1] of `DOCUMENT`."""
    position: int
    """In its part, after it (`Source.documents`)."""
    is_last: bool
    """Whether its part ends with it."""
    shared: np.ndarray
    """The held-out runs of words that are in it, of one document after another."""


def tokens_of(path: Path) -> Path:
    """The file of a piece's tokens, next to that of its records."""
    return path.with_suffix(".tokens")


def read_piece(path: Path) -> Piece:
    """A piece that was made."""
    with np.load(path) as content:
        documents, shared = content["documents"], content["shared"]
        return Piece(documents, int(content["position"]), bool(content["is_last"]), shared)


class PieceMaker:
    """Makes pieces, in one process. It keeps its place in the part that it reads."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._tokenizer = load_tokenizer(job.tokenizer)
        self._overlap = None if job.heldout_runs is None else load(job.heldout_runs)
        self._part, self._next, self._texts = -1, 0, iter(())

    def make(self, part: int, number: int) -> bool:
        """Makes a piece; False where the part has no such one.

        Raises:
            UserError: the text cannot be read, or not be encoded.
        """
        source = self._job.parts[part].source
        if part != self._part or number < self._next:
            self._part, self._next, self._texts = part, 0, cut_into_pieces(source, self._job.piece_bytes)
        for texts in self._texts:
            self._next += 1
            if self._next > number:
                self._write(self._job.path(part, number), texts, self._job.parts[part])
                return True
        return False

    def _write(self, path: Path, texts: "Texts", part: Part) -> None:
        ids, documents = encode(texts, part.cut, self._tokenizer)
        shared = [np.empty(0, np.uint64)]
        if self._overlap is not None and part.split == TRAIN:
            shared += [self._overlap.find(document.decode()) for document in texts.documents]
            documents["shared"][:-1] = [len(runs) for runs in shared[1:]]
        content = io.BytesIO()
        np.savez(
            content, documents=documents, position=texts.position, is_last=texts.is_last,
            shared=np.concatenate(shared),
        )  # fmt: skip
        write_whole(tokens_of(path), ids.tobytes())
        write_whole(path, content.getvalue())


class Texts(NamedTuple):
    """The documents of a piece, in UTF-8, and what was met before each of them and behind the last one."""

    documents: list[bytes]
    repaired: list[bool]
    empty: list[int]
    without_text: list[int]
    position: int
    is_last: bool


def cut_into_pieces(source: Source, piece_bytes: int) -> Iterator[Texts]:
    """The pieces of a source that is read as a whole; at least one, though it may have no document."""
    documents, repaired, empty, without_text = [], [], [0], [0]
    size, position = 0, 0
    for text, position in source.documents():
        if text is None:
            without_text[-1] += 1
        elif not text or text.isspace():
            empty[-1] += 1
        else:
            document = _utf8(text)
            repaired.append(document is None)
            documents.append(repair(text).encode() if document is None else document)
            empty.append(0)
            without_text.append(0)
            size += len(documents[-1])
            if size >= piece_bytes:
                yield Texts(documents, repaired, empty, without_text, position, False)
                documents, repaired, empty, without_text, size = [], [], [0], [0], 0
    yield Texts(documents, repaired, empty, without_text, source.size, True)


def _utf8(text: str) -> bytes | None:
    """The text in UTF-8; None if it holds half a surrogate pair. Encoding is quicker than a search."""
    try:
        return text.encode()
    except UnicodeEncodeError:
        return None


def encode(texts: Texts, cut: float | None, tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """(ids, documents): the ids of `<s>` text `</s>` for every document or part of one, joined."""
    bos, eos = (np.array([] if i is None else [i], tokenizer.dtype) for i in (tokenizer.bos, tokenizer.eos))
    records = np.zeros(len(texts.documents) + 1, DOCUMENT)
    records["empty"], records["without_text"] = texts.empty, texts.without_text
    records["repaired"][:-1] = texts.repaired
    ids = [np.empty(0, tokenizer.dtype)]
    for record, document in zip(records, texts.documents):  # noqa: B905 (the last record has none)
        record["hash"] = hash64(document)
        text = document.decode()
        parts = [("", text, document)] if cut is None else _cut(text, cut)
        for kind, part, encoded in parts:
            made = np.concatenate([bos, tokenizer.encode(part), eos])
            ids.append(made)
            record[f"{kind}bytes"], record[f"{kind}tokens"] = len(encoded), len(made)
    return np.concatenate(ids), records


def _cut(text: str, fraction: float) -> list[tuple[str, str, bytes]]:
    """(which, part, in UTF-8): the end that is held out, and what is before it; a blank one is left out.

    A copy of a document is cut where the document is, so no end that is held out trains.
    """
    at = int(len(text) * (1 - fraction))
    at = cut_point(text, at, within=(len(text) - at) // 4)
    parts = [("end_", text[at:]), ("", text[:at])]
    return [(kind, part, part.encode()) for kind, part in parts if part.strip()]


def hash64(document: bytes) -> int:
    """A number in [0, 2^64) that depends on the document's text alone."""
    return int.from_bytes(hashlib.sha256(document).digest()[:8], "big")


def write_whole(path: Path, content: bytes) -> None:
    """Writes a file that is whole whenever it is there, on the disk, too.

    Under a name of this process until then: what a process writes whose parent was killed may be written by
    its successor at the same time.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_bytes(content)
    sync_path(partial)
    partial.replace(path)


class Dealer:
    """Which process makes which piece next; gives pieces back in the order of the text."""

    def __init__(self, job: Job, in_order: bool) -> None:
        """in_order: whether to make the first pieces of the text first, since the last may not be needed.
        Otherwise each process reads a part of its own while there is one."""
        self._job, self._in_order = job, in_order
        self._claimed = [0] * len(job.parts)  # pieces of each part that were dealt or are there
        self._ended = [False] * len(job.parts)  # whether all its pieces were dealt
        self._reading: dict[int, int] = {}  # process -> the part that it has open
        self._at = (0, 0)  # part and number of the piece to be given back next

    def next_task(self, process: int) -> tuple[int, int] | None:
        """(part, number) of a piece for an idle process; None where there is none for it."""
        while (part := self._choose(process)) is not None:
            self._reading[process] = part
            number = self._claimed[part]
            self._claimed[part] += 1
            path = self._job.path(part, number)
            if not path.exists():
                return part, number
            self._ended[part] = self._ended[part] or read_piece(path).is_last
        return None

    def _choose(self, process: int) -> int | None:
        mine = self._reading.get(process)
        if mine is not None and not self._ended[mine]:
            return mine
        read = set(self._reading.values())
        shared = None
        for part, ended in enumerate(self._ended):
            if ended:
                continue
            if part not in read and (self._claimed[part] == 0 or self._job.parts[part].source.one_reader):
                return part
            if shared is None and not self._job.parts[part].source.one_reader:
                shared = part
                if self._in_order:
                    return shared
        return shared

    def made(self, task: tuple[int, int], there_is: bool) -> None:
        """Takes what came of a task: whether there is such a piece."""
        part, _ = task
        path = self._job.path(*task)
        if not there_is or read_piece(path).is_last:
            self._ended[part] = True

    @property
    def is_done(self) -> bool:
        """Whether all pieces were given back."""
        return self._at[0] == len(self._job.parts)

    def in_order(self) -> Iterator[tuple[int, int, Piece]]:
        """(part, number, piece) of those that are made and come next in the text."""
        while self._at[0] < len(self._job.parts):
            part, number = self._at
            path = self._job.path(part, number)
            if not path.exists():
                return
            piece = read_piece(path)
            self._at = (part + 1, 0) if piece.is_last else (part, number + 1)
            yield part, number, piece
