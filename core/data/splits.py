"""Which document of which source goes into which split, and where reading ends."""

import functools
import re
from collections.abc import Callable
from typing import Literal, TypedDict

import numpy as np

from core import checks
from core.data import dataset as ds
from core.data import overlap as overlaps
from core.data import packing
from core.data.copies import Copies, Seen
from core.data.formats import Form
from core.data.packing import Shard, Spans, shard_name
from core.data.pieces import Part, Piece
from core.data.source import Source
from core.data.sources import open_sources
from core.errors import UserError

VALID = "valid"
VALID_FRACTION = 0.01
# Hashing whole documents cannot hold out a small part of a few of them: then every document's end is.
FEW_DOCUMENTS = 1000
VALID_FRACTION_OF_FEW = 0.05

Overlapping = Literal["count", "drop"]
PathOf = Callable[[int, int], str]  # (part, number) of a piece -> the file of its tokens


class Plan:
    """Which document goes into which split, where reading ends, and what was counted on the way.

    It takes pieces in the order of the text and holds nothing but sums, a hash for each document, and where
    the tokens of each split are: so the result depends on the text alone, whoever made the pieces and when.
    """

    def __init__(
        self,
        train: list[Source],
        heldout: dict[str, list[Source]],
        fraction: float,
        few: bool,
        train_tokens: int | None,
        dedup: bool = False,
        overlap: Overlapping | None = None,
        compared: dict[str, list[Source]] | None = None,
    ) -> None:
        """overlap: whether documents that share a run of words with `compared` are counted or left out.

        compared: held-out text by the name of its set.
        """
        self.train, self.fraction, self.few = train, fraction, few
        self.overlap, self.compared = overlap, compared or {}
        self.train_tokens = train_tokens
        cut = fraction if few and fraction > 0 else None
        self.parts = [
            Part(part, name, None)
            for name, group in heldout.items()
            for source in group
            for part in source.parts()
        ]
        self._source_of: list[int] = [0] * len(self.parts)  # its number among the training sources, from 1
        for number, source in enumerate(train, 1):
            parts = source.parts()
            self.parts += [Part(part, ds.TRAIN, cut) for part in parts]
            self._source_of += [number] * len(parts)
        sizes = [part.source.size for part in self.parts]
        self.size = sum(sizes)
        self._before = np.cumsum([0, *sizes])  # size of what is before each part
        self._position = 0  # of `size`, after what was taken

        names = [ds.TRAIN, *heldout] + ([VALID] if fraction > 0 else [])
        self.documents = dict.fromkeys(names, 0)
        self.bytes = dict.fromkeys(names, 0)
        self.tokens = dict.fromkeys(names, 0)
        self._spans: dict[str, list[np.ndarray]] = {name: [] for name in names}
        self._pieces: list[tuple[int, int]] = []  # that have tokens in them, by their numbers in the spans
        self.dropped = {"empty_documents": 0, "repaired_documents": 0, "train_tokens_at_end": 0}
        self._without_text = 0
        # Empty documents and rows without text behind the last one taken.
        self._behind = np.zeros(2, np.int64)
        self._copies, self._heldout = Copies(), Copies()
        self._heldout_in_train = 0
        self._seen = Seen() if dedup else None
        self._duplicates = 0
        self._never = np.empty(0, np.uint64)  # hashes of `leave_out`, sorted
        self._n_never = 0
        self._overlapping = 0
        self._shared: list[np.ndarray] = []  # held-out runs of words in training documents, piece by piece
        self._sources_taken = 0
        self._cut: list[np.ndarray] = []  # hashes of documents whose ends are held out, piece by piece

    def leave_out(self, hashes: np.ndarray) -> None:
        """Documents that are not to train, by their hashes: those that older versions hold out."""
        self._never = np.unique(np.concatenate([self._never, hashes]))

    def count_as_seen(self, hashes: np.ndarray) -> None:
        """Documents of which --dedup is to leave copies out."""
        if self._seen is not None:
            self._seen.add(hashes)

    def take(self, part: int, number: int, piece: Piece) -> None:
        """Takes the next piece of the text, or as much of it as reading goes."""
        documents = piece.documents[:-1]
        split = self.parts[part].split
        trains = np.full(len(documents), split == ds.TRAIN)
        if split == ds.TRAIN and not self.few:  # by the text alone, so copies are held out together
            trains &= documents["hash"] / 2.0**64 >= self.fraction
        kept = np.ones(len(documents), bool)
        if self._seen is not None:
            new = self._seen.add(documents["hash"])
            kept = new if split == ds.TRAIN else kept
        duplicates = ~kept
        never = np.isin(documents["hash"], self._never)
        kept &= ~never
        overlapping = trains & kept & (documents["shared"] > 0)
        if self.overlap == "drop":
            kept &= ~overlapping
        n = len(documents)
        if self.train_tokens is not None:
            counted = documents["tokens"] * (trains & kept)
            reached = self.tokens[ds.TRAIN] + np.cumsum(counted) >= self.train_tokens
            n = int(reached.argmax()) + 1 if reached.any() else n
        self._count(part, piece, n)
        self._duplicates += int((duplicates & ~never)[:n].sum())
        self._n_never += int(never[:n].sum())
        self._overlapping += int(overlapping[:n].sum())
        of_overlapping = np.repeat(overlapping[:n], documents["shared"][:n])
        self._shared.append(np.unique(piece.shared[: len(of_overlapping)][of_overlapping]))
        self._compare(documents["hash"][:n][kept[:n]], split)
        self._take_tokens(part, number, documents[:n], trains[:n], kept[:n])

    def _count(self, part: int, piece: Piece, n: int) -> None:
        """Counts what was met until the piece's first `n` documents were read."""
        met = [piece.documents[name] for name in ("empty", "without_text")]
        if n:
            before = self._behind + [values[:n].sum() for values in met]
            self.dropped["empty_documents"] += int(before[0])
            self._without_text += int(before[1])
            self._behind = np.zeros(2, np.int64)
            self._sources_taken = max(self._sources_taken, self._source_of[part])
        self._behind = self._behind + [values[n:].sum() for values in met]
        self.dropped["repaired_documents"] += int(piece.documents["repaired"][:n].sum())
        self._position = int(self._before[part]) + piece.position

    def _compare(self, hashes: np.ndarray, split: str) -> None:
        """Looks for copies among the documents taken, and in what was taken before."""
        if split != ds.TRAIN:  # these are read first
            self._heldout.add(hashes)
        else:
            self._heldout_in_train += self._heldout.among(hashes)
            self._copies.add(hashes)

    def _take_tokens(
        self, part: int, number: int, documents: np.ndarray, trains: np.ndarray, kept: np.ndarray
    ) -> None:
        ends = np.cumsum(documents["tokens"] + documents["end_tokens"])
        middles = ends - documents["tokens"]
        starts = middles - documents["end_tokens"]
        split = self.parts[part].split
        groups = [(split, middles, "", kept & trains if split == ds.TRAIN else kept)]
        if split == ds.TRAIN and self.fraction > 0:
            if self.few:
                groups.append((VALID, starts, "end_", kept))
                self._cut.append(documents["hash"][kept & (documents["end_tokens"] > 0)])
            else:
                groups.append((VALID, middles, "", kept & ~trains))
        for name, first, kind, mask in groups:
            sizes, lengths = documents[f"{kind}bytes"][mask], documents[f"{kind}tokens"][mask]
            self.documents[name] += int((sizes > 0).sum())
            self.bytes[name] += int(sizes.sum())
            self.tokens[name] += int(lengths.sum())
            self._spans[name].append(_joined(len(self._pieces), first[mask], lengths))
        self._pieces.append((part, number))

    @property
    def dedup(self) -> bool:
        """Whether copies are left out."""
        return self._seen is not None

    @property
    def is_full(self) -> bool:
        """Whether the train split has the tokens that were asked for."""
        return self.train_tokens is not None and self.tokens[ds.TRAIN] >= self.train_tokens

    def finish(self, context: int) -> None:
        """Counts what is known when all is taken."""
        if not self.is_full:  # with what is behind the last document
            self.dropped["empty_documents"] += int(self._behind[0])
            self._without_text += int(self._behind[1])
            self._sources_taken = len(self.train)
        self.dropped["train_tokens_at_end"] = max(self.tokens[ds.TRAIN] - 1, 0) % context
        # These are not dropped, but counted.
        self.dropped["copied_documents"] = self._copies.count()
        self.dropped["heldout_documents_in_train"] = self._heldout_in_train
        if self._without_text:
            self.dropped["rows_without_text"] = self._without_text
        if self._seen is not None:
            self.dropped["duplicate_documents"] = self._duplicates
        if len(self._never):
            self.dropped["heldout_documents_left_out"] = self._n_never
        if self.overlap is not None:
            self.dropped["overlapping_documents"] = self._overlapping
        if self.overlap == "drop":
            self.dropped["overlapping_documents_left_out"] = self._overlapping

    def ends_held_out(self) -> tuple[int, ...] | None:
        """The hashes of the whole documents whose ends are held out; None where there is no split `VALID`,
        which alone may hold ends."""
        if VALID not in self.documents:
            return None
        return tuple(np.unique(np.concatenate([np.empty(0, np.uint64), *self._cut])).tolist())

    def shared_runs(self) -> np.ndarray:
        """The held-out runs of words that were found in training text, sorted."""
        return np.unique(np.concatenate([np.empty(0, np.uint64), *self._shared]))

    @functools.cached_property
    def found(self) -> dict[str, overlaps.Found]:
        """What became of the texts of each set that was compared; asked when all is taken."""
        shared = self.shared_runs()
        return {
            name: overlaps.found_of(overlaps.texts_of(group), shared) for name, group in self.compared.items()
        }

    def overlap_record(self) -> np.ndarray:
        """`core.data.overlap.LOOKED_FOR` of all sets, of the documents that train."""
        record = overlaps.merged(found.record for found in self.found.values())
        record["shared"] &= self.overlap != "drop"  # those documents do not train
        return record

    def done(self) -> float:
        """Roughly the fraction of the text that is taken: of the tokens asked for, or of all."""
        limit = self.train_tokens
        asked = 0 if limit is None else self.tokens[ds.TRAIN] / max(limit, 1)
        return min(1.0, max(asked, self._position / max(self.size, 1)))

    @property
    def copies_are_exact(self) -> bool:
        """Whether the numbers of copies are no estimates."""
        return self._copies.is_exact and self._heldout.is_exact

    def sources_read(self) -> list[str]:
        """Names of the training sources that were read; others lie behind the end."""
        return [source.name for source in self.train[: self._sources_taken]]

    def windows(self, split: str, context: int) -> int:
        """How many windows a split has; the last one of a held-out split is filled up."""
        predicted = max(self.tokens[split] - 1, 0)
        return predicted // context if split == ds.TRAIN else -(-predicted // context)

    def counts(self, context: int) -> list[ds.Split]:
        """What each split contains, of what was taken."""
        return [
            ds.Split(
                name, self.documents[name], self.bytes[name], self.tokens[name], self.windows(name, context)
            )
            for name in self.documents
        ]

    def shards(
        self, context: int, fill: int, dtype: np.dtype, path: PathOf, first: dict[str, int] | None = None
    ) -> dict[str, list[Shard]]:
        """The shards of each split.

        path: the file of tokens of a piece (part, number).
        first: the number of a split's first shard, where that is not 0.
        """
        return {
            split: self._shards(split, context, fill, dtype, path, (first or {}).get(split, 0))
            for split in self.documents
        }

    def _shards(
        self, split: str, context: int, fill: int, dtype: np.dtype, path: PathOf, first: int
    ) -> list[Shard]:
        spans = np.concatenate([*self._spans[split], np.empty((0, 3), np.int64)])
        ends = np.cumsum(spans[:, 2])
        n_windows, shards = self.windows(split, context), []
        for start in range(0, n_windows, packing.WINDOWS_PER_SHARD):
            n = min(packing.WINDOWS_PER_SHARD, n_windows - start)
            low, high = start * context, (start + n) * context + 1  # tokens; the last window may lack some
            i, j = np.searchsorted(ends, low, "right"), np.searchsorted(ends, high) + 1
            part = spans[i:j].copy()
            begin = int(ends[i] - part[0, 2])
            part[0, 1] += low - begin
            part[0, 2] -= low - begin
            part[-1, 2] -= max(int(part[:, 2].sum()) - (high - low), 0)
            name = shard_name(split, first + len(shards))
            shards.append(Shard(name, self._by_file(part, path), n, context, fill, dtype.name))
        return shards

    def _by_file(self, spans: np.ndarray, path: PathOf) -> Spans:
        borders = np.flatnonzero(np.diff(spans[:, 0])) + 1
        return [
            (path(*self._pieces[group[0, 0]]), [tuple(place) for place in group[:, 1:].tolist()])
            for group in np.split(spans, borders)
        ]


def _joined(piece: int, first: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """[n, 3]: (piece, first token, tokens) of stretches in their order, joined where they meet."""
    first, lengths = first[lengths > 0], lengths[lengths > 0]
    begins = np.flatnonzero(np.append(True, first[1:] != (first + lengths)[:-1])) if len(first) else []
    spans = np.empty((len(begins), 3), np.int64)
    spans[:, 0], spans[:, 1] = piece, first[begins] if len(first) else []
    spans[:, 2] = np.add.reduceat(lengths, begins) if len(first) else []
    return spans


class TextOptions(TypedDict, total=False):
    """What is read of the text, and what of that trains; `train_tpu.prepare.PrepareConfig` describes it."""

    train_tokens: int | None
    field: str
    format: Form | None
    template: str | None
    dedup: bool
    overlap: Overlapping | None
    eval_items: list[str] | None


def make_plan(
    sources: list[str],
    valid: dict[str, str],
    fraction: float | None,
    train_tokens: int | None = None,
    field: str = "text",
    format: Form | None = None,
    template: str | None = None,
    dedup: bool = False,
    overlap: Overlapping | None = None,
    eval_items: list[str] | None = None,
    held: dict[str, list[Source]] | None = None,
) -> Plan:
    """The plan for sources as `PrepareConfig` names them, and what it says of the rest.

    held: text that is held out already, by the name of its set: `overlap` looks for it, too.

    Raises:
        UserError: a source cannot be opened, held-out parts make no sense, or nothing is left to train on.
    """
    checks.counts(most=2**63, train_tokens=train_tokens)
    _check_heldout(valid, fraction)
    _check_overlap(overlap, bool(valid or held or eval_items), bool(eval_items))
    heldout = {
        name: open_sources([path], field, format, heldout=True, template=template)
        for name, path in valid.items()
    }
    name_of = {source.identity(): name for name, group in heldout.items() for source in group}
    train = []
    for source in open_sources(sources, field, format, template=template):
        if source.identity() in name_of:
            print(f"{source.name} is held out as {name_of[source.identity()]}, so it does not train")
        else:
            train.append(source)
    if not train:
        raise UserError("there is nothing to train on: every source is also held out by --valid")
    compared = {}
    if overlap is not None:
        items = open_sources(eval_items or [], heldout=True)
        compared = heldout | (held or {}) | {source.name: [source] for source in items}
    if valid:
        return Plan(train, heldout, 0.0, False, train_tokens, dedup, overlap, compared)
    few = fraction != 0 and _fewer_than(FEW_DOCUMENTS, train)
    if fraction is None:
        fraction = VALID_FRACTION_OF_FEW if few else VALID_FRACTION
    return Plan(train, heldout, fraction, few, train_tokens, dedup, overlap, compared)


def _check_heldout(valid: dict[str, str], fraction: float | None) -> None:
    """A UserError where what is to be held out is out of range, or given twice."""
    if fraction is not None and valid:
        raise UserError("give --valid or --valid-fraction, not both")
    checks.below_one(valid_fraction=fraction)
    for name in valid:
        if not re.fullmatch(r"[A-Za-z0-9_-]+", name) or name in (ds.TRAIN, "all"):
            raise UserError(
                f"--valid {name}=...: a name has letters, digits, _ and -, and is not train or all"
            )


def _check_overlap(overlap: Overlapping | None, comparable: bool, has_items: bool) -> None:
    """A UserError for --eval-items without --overlap, and for --overlap with nothing to compare with."""
    if has_items and overlap is None:
        raise UserError(
            "--eval-items is what --overlap looks for: give --overlap count or --overlap drop, too"
        )
    if overlap is not None and not comparable:
        raise UserError(
            "--overlap has nothing to compare the training text with: name held-out sets with --valid "
            "NAME=PATH, or texts with --eval-items FILE"
        )


def _fewer_than(n: int, sources: list[Source]) -> bool:
    documents = (text for source in sources for text, _ in source.documents() if text and text.strip())
    return all(count < n for count, _ in enumerate(documents, start=1))
