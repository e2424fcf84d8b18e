"""Which document of which source goes into which split, and where reading ends."""

import dataclasses
import hashlib
import re
from collections.abc import Iterator

import numpy as np

from core import checks
from core.data import dataset as ds
from core.data.copies import Copies
from core.data.file_source import cut_point
from core.data.formats import Form
from core.data.packing import Packer
from core.data.source import Source
from core.data.sources import open_sources
from core.data.text import repair
from core.errors import UserError

VALID = "valid"
VALID_FRACTION = 0.01
# Hashing whole documents cannot hold out a small part of a few of them: then every document's end is.
FEW_DOCUMENTS = 1000
VALID_FRACTION_OF_FEW = 0.05

BATCH_BYTES = 1 << 20  # of text, for one call of a worker: long enough to hide the call, short in memory


@dataclasses.dataclass
class DocumentBatch:
    """Neighbouring documents in the order in which they are read; a list has an entry for each."""

    splits: list[str]
    bytes: list[int]
    """Length of the text in UTF-8."""
    seen: list[tuple[int, int, int, int]]
    """Empty documents, repaired documents and training sources met until then, this one's included; and the
    position in all sources after it."""
    hashes: list[int | None]
    """64 bits of the hash of the whole document; None for the first of two parts that one was cut into."""


class Plan:
    """Which document goes into which split, where reading ends, and what was counted on the way.

    Documents are read some batches ahead of the tokens that say where reading ends. So what a document adds
    to the counts is kept in its batch until it is known to be taken: the result depends on the text alone.
    """

    def __init__(
        self,
        train: list[Source],
        heldout: dict[str, list[Source]],
        fraction: float,
        few: bool,
        train_tokens: int | None,
    ) -> None:
        self.train, self.heldout, self.fraction, self.few = train, heldout, fraction, few
        self.train_tokens = train_tokens
        self.size = sum(source.size for source in [*train, *(s for group in heldout.values() for s in group)])
        names = [ds.TRAIN, *heldout] + ([VALID] if fraction > 0 else [])
        self.documents = dict.fromkeys(names, 0)
        self.bytes = dict.fromkeys(names, 0)
        self.packers: dict[str, Packer] = {}
        self.dropped = {"empty_documents": 0, "repaired_documents": 0, "train_tokens_at_end": 0}
        self._copies, self._heldout = Copies(), Copies()
        self._heldout_in_train = 0
        self._met = (0, 0, 0, 0)  # as `DocumentBatch.seen`, of what is read
        self._sources_taken = 0
        self._position = 0  # of `size`, after what was taken

    def batches(self) -> Iterator[tuple[DocumentBatch, list[bytes]]]:
        """Documents, about `BATCH_BYTES` of them together."""
        batch, documents, size = DocumentBatch([], [], [], []), [], 0
        for split, text, hashed in self._assigned():
            batch.splits.append(split)
            batch.hashes.append(hashed)
            batch.bytes.append(len(text))
            batch.seen.append(self._met)
            documents.append(text)
            size += len(text)
            if size >= BATCH_BYTES:
                yield batch, documents
                batch, documents, size = DocumentBatch([], [], [], []), [], 0
        if documents:
            yield batch, documents

    def take(self, batch: DocumentBatch, lengths: np.ndarray) -> int:
        """How many documents of the next batch are used: all, unless reading ends within it; counts them.

        lengths: their tokens.
        """
        train = np.array(batch.splits) == ds.TRAIN
        n = len(lengths)
        if self.train_tokens is not None:
            reached = self.packers[ds.TRAIN].tokens + np.cumsum(lengths * train) >= self.train_tokens
            if reached.any():
                n = int(reached.argmax()) + 1
        for split, size in zip(batch.splits[:n], batch.bytes[:n], strict=True):
            self.documents[split] += 1
            self.bytes[split] += size
        self._count(batch.seen[n - 1])
        self._compare(batch, n)
        return n

    def _compare(self, batch: DocumentBatch, n: int) -> None:
        """Looks for copies among the batch's first `n` documents, and in what was taken before."""
        hashes: dict[bool, list[int]] = {False: [], True: []}
        for split, hashed in zip(batch.splits[:n], batch.hashes[:n], strict=True):
            if hashed is not None:
                hashes[split in self.heldout].append(hashed)
        train, heldout = (np.array(hashes[held], np.uint64) for held in (False, True))
        self._heldout.add(heldout)  # these are read first
        self._heldout_in_train += self._heldout.among(train)
        self._copies.add(train)

    @property
    def is_full(self) -> bool:
        """Whether the train split has the tokens that were asked for."""
        return self.train_tokens is not None and self.packers[ds.TRAIN].tokens >= self.train_tokens

    def finish(self, eos: int) -> Iterator[tuple[str, np.ndarray]]:
        """The last windows of the held-out splits, filled up with `eos`."""
        if not self.is_full:
            self._count(self._met)  # with the empty documents behind the last one
        self.dropped["train_tokens_at_end"] = self.packers[ds.TRAIN].rest
        # These are not dropped, but counted.
        self.dropped["copied_documents"] = self._copies.count()
        self.dropped["heldout_documents_in_train"] = self._heldout_in_train
        for split, packer in self.packers.items():
            if split != ds.TRAIN:
                yield split, packer.last(fill=eos)

    def done(self) -> float:
        """Roughly the fraction of the work that is done: of the tokens asked for, or of the text."""
        limit = self.train_tokens
        asked = 0 if limit is None else self.packers[ds.TRAIN].tokens / max(limit, 1)
        return min(1.0, max(asked, self._position / max(self.size, 1)))

    @property
    def copies_are_exact(self) -> bool:
        """Whether the numbers of copies are no estimates."""
        return self._copies.is_exact and self._heldout.is_exact

    def sources_read(self) -> list[str]:
        """Names of the training sources that were read; others lie behind the end."""
        return [source.name for source in self.train[: self._sources_taken]]

    def _count(self, seen: tuple[int, int, int, int]) -> None:
        empty, repaired, self._sources_taken, self._position = seen
        self.dropped |= {"empty_documents": empty, "repaired_documents": repaired}

    def _assigned(self) -> Iterator[tuple[str, bytes, int | None]]:
        """(split, document or part of one, hash)."""
        for name, group in self.heldout.items():
            for text in self._clean(group):
                document = text.encode()
                yield name, document, hash64(document)
        for text in self._clean(self.train, training=True):
            document = text.encode()
            hashed = hash64(document)
            if self.few:
                cut = int(len(text) * (1 - self.fraction))
                cut = cut_point(text, cut, within=(len(text) - cut) // 4)
                # The end goes first: where the document is the last one taken, both parts of it are.
                # A copy is cut where this one is, so no end that is held out trains.
                parts = [(VALID, text[cut:]), (ds.TRAIN, text[:cut])]
                parts = [(split, part.encode()) for split, part in parts if part.strip()]
                for split, part in parts[:-1]:
                    yield split, part, None
                yield *parts[-1], hashed
            else:  # by the text alone, so copies are held out together
                held = self.fraction > 0 and hashed / 2**64 < self.fraction
                yield VALID if held else ds.TRAIN, document, hashed

    def _clean(self, group: list[Source], training: bool = False) -> Iterator[str]:
        empty, repaired, sources, before = self._met
        for source in group:
            sources += training
            for text, position in source.documents():
                if text.strip():
                    whole = repair(text)
                    repaired += whole != text
                    self._met = empty, repaired, sources, before + position
                    yield whole
                else:
                    empty += 1
            before += source.size
            self._met = empty, repaired, sources, before

    def counts(self) -> list[ds.Split]:
        """What each split contains, of what was taken."""
        return [
            ds.Split(name, self.documents[name], self.bytes[name], packer.tokens, packer.windows)
            for name, packer in self.packers.items()
        ]


def make_plan(
    sources: list[str],
    valid: dict[str, str],
    fraction: float | None,
    train_tokens: int | None,
    field: str,
    form: Form | None,
) -> Plan:
    """The plan for sources as `PrepareConfig` names them, and what it says of the rest.

    Raises:
        UserError: a source cannot be opened, held-out parts make no sense, or nothing is left to train on.
    """
    if fraction is not None and valid:
        raise UserError("give --valid or --valid-fraction, not both")
    checks.below_one(valid_fraction=fraction)
    for name in valid:
        if not re.fullmatch(r"[A-Za-z0-9_-]+", name) or name in (ds.TRAIN, "all"):
            raise UserError(
                f"--valid {name}=...: a name has letters, digits, _ and -, and is not train or all"
            )
    heldout = {name: open_sources([path], field, form, heldout=True) for name, path in valid.items()}
    held = {source.identity(): name for name, group in heldout.items() for source in group}
    train = []
    for source in open_sources(sources, field, form):
        if source.identity() in held:
            print(f"{source.name} is held out as {held[source.identity()]}, so it does not train")
        else:
            train.append(source)
    if not train:
        raise UserError("there is nothing to train on: every source is also held out by --valid")
    if valid:
        return Plan(train, heldout, 0.0, False, train_tokens)
    few = fraction != 0 and _fewer_than(FEW_DOCUMENTS, train)
    if fraction is None:
        fraction = VALID_FRACTION_OF_FEW if few else VALID_FRACTION
    return Plan(train, heldout, fraction, few, train_tokens)


def _fewer_than(n: int, sources: list[Source]) -> bool:
    documents = (text for source in sources for text, _ in source.documents() if text.strip())
    return all(count < n for count, _ in enumerate(documents, start=1))


def hash64(document: bytes) -> int:
    """A number in [0, 2^64) that depends on the document's text alone."""
    return int.from_bytes(hashlib.sha256(document).digest()[:8], "big")
