"""A mixture: several prepared sources read as one, in shares that phases of the run change.

Every window of the endless sequence comes from one source. A phase begins at an index of that sequence and
is cut into blocks of 4,000 windows. Each block holds as many windows of a source as its weight says (largest
remainders are rounded up), in an order that is seeded by the block's first index. Within a source, windows
follow in the source's own seeded epochs, the ones of a run that reads it alone. So source and record are a
function of (seed, index), and what comes at an index does not depend on any later phase.
"""

import bisect
import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from core.data.dataset import TRAIN, Dataset, Split
from core.errors import UserError

BLOCK = 4000  # windows: thousandths are exact shares of it
Counts = tuple[tuple[str, int], ...]
"""Windows of each source in a block, by name; sources that it does not read are not in it."""


class Phase(NamedTuple):
    """From which window on a mixture holds."""

    first: int
    counts: Counts

    @property
    def size(self) -> int:
        """Windows in a block."""
        return sum(n for _, n in self.counts)

    def __str__(self) -> str:
        return ", ".join(f"{name} {100 * n / self.size:.4g}%" for name, n in self.counts)


@dataclasses.dataclass(frozen=True)
class Mixture:
    """Open sources and the phases in which they are mixed; otherwise like a `Dataset`."""

    sources: dict[str, Dataset]
    """By name, of one tokenizer and one context; a single one may have the name ''."""
    phases: tuple[Phase, ...]
    """In order. They may name sources that are no longer read; none are given until it is known when they
    begin."""

    @property
    def context(self) -> int:
        """That of every source."""
        return next(iter(self.sources.values())).context

    @property
    def tokenizer_record(self) -> dict[str, Any]:
        """That of every source."""
        return next(iter(self.sources.values())).tokenizer_record

    @property
    def splits(self) -> dict[str, Split]:
        """`train`, the sum of all sources, and every source's own held-out splits: wiki/valid."""
        trained = [dataset.splits[TRAIN] for dataset in self.sources.values()]
        names = [field.name for field in dataclasses.fields(Split) if field.name != "name"]
        sums = {name: sum(getattr(split, name) for split in trained) for name in names}
        heldout = {
            f"{source}/{name}": dataclasses.replace(dataset.splits[name], name=f"{source}/{name}")
            for source, dataset in self.sources.items()
            for name in dataset.heldout
        }
        return {TRAIN: Split(name=TRAIN, **sums), **heldout}

    @property
    def heldout(self) -> list[str]:
        """Names of the held-out splits."""
        return [name for name in self.splits if name != TRAIN]

    @property
    def fingerprint(self) -> str:
        """Hash of the sources' fingerprints and of the phases: equal fingerprints mean equal batches."""
        return hashlib.sha256(json.dumps(self.record(), sort_keys=True).encode()).hexdigest()

    def record(self) -> dict[str, Any]:
        """What config.json and manifests say of it; `phases_of` reads the phases back."""
        phases = [{"first": phase.first, "windows": dict(phase.counts)} for phase in self.phases]
        return {"sources": {name: data.fingerprint for name, data in self.sources.items()}, "phases": phases}

    def place(self, index: int, seed: int) -> tuple[str, int]:
        """The source of window `index` of the sequence, and how many windows of that source come before."""
        number = bisect.bisect(self._firsts, index) - 1
        if number < 0:
            raise UserError(f"sequence {index} was read before its data became a mixture, so it is not known")
        phase = self.phases[number]
        if len(self.phases) == len(phase.counts) == 1:
            return phase.counts[0][0], index - phase.first
        offset = (index - phase.first) % phase.size
        return self._places(number, index - offset, seed)[offset]

    @functools.cached_property
    def _firsts(self) -> list[int]:
        return [phase.first for phase in self.phases]

    @functools.cached_property
    def _places(self) -> Callable[[int, int, int], list[tuple[str, int]]]:
        """What `place` gives for the windows of a block, by its phase's number and its first index."""

        @functools.lru_cache(maxsize=16)
        def places(number: int, first: int, seed: int) -> list[tuple[str, int]]:
            phase, before = self.phases[number], _before(self.phases[: number + 1], seed)
            sources, ranks = _block(phase.counts, first, seed)
            block = (first - phase.first) // phase.size
            starts = [before.get(name, 0) + block * n for name, n in phase.counts]
            names = [name for name, _ in phase.counts]
            at = (ranks + np.array(starts)[sources]).tolist()
            return [(names[source], place) for source, place in zip(sources.tolist(), at, strict=True)]

        return places

    def read_before(self, index: int, seed: int) -> dict[str, int]:
        """Windows of each source that come before window `index` of the sequence."""
        phases = tuple(phase for phase in self.phases if phase.first < index)
        found = _before((*phases, Phase(index, ())), seed)
        return {name: found.get(name, 0) for name in self.sources}

    def used_up(self, name: str, seed: int, end: int) -> int | None:
        """The index before `end` at which a source has been read once from end to end; None: there is none.

        From there on its windows come again.
        """
        n = self.sources[name].splits[TRAIN].windows
        at = bisect.bisect_left(range(end), n, key=lambda index: self.read_before(index, seed)[name])
        return at if at < end else None


def phases_of(data: dict[str, Any]) -> tuple[Phase, ...]:
    """The phases of recorded data, as config.json and manifests describe it; none where it is no mixture."""
    recorded = data["mixture"]["phases"] if "mixture" in data else ()
    return tuple(Phase(phase["first"], tuple(phase["windows"].items())) for phase in recorded)


def phase_number(data: dict[str, Any], sequences: int) -> int:
    """How many phases of recorded data had begun when so many sequences had been read."""
    return sum(phase.first < sequences for phase in phases_of(data))


def describe_phases(phases: Sequence[Phase], end: int | None = None) -> str:
    """The shares of each phase in words; end: how many sequences there will be."""
    of = "" if end is None else f" of {end:,}"
    return "; ".join(f"from sequence {p.first:,}{of} on {p}" if p.first else str(p) for p in phases)


def alone(dataset: Dataset) -> Mixture:
    """A dataset as the mixture of itself; its records are called by their numbers alone."""
    return Mixture({"": dataset}, (Phase(0, (("", 1),)),))


@functools.lru_cache(maxsize=64)
def _before(phases: tuple[Phase, ...], seed: int) -> dict[str, int]:
    """Windows of each source before the last of `phases` begins."""
    if len(phases) < 2:
        return {}
    *_, phase, last = phases
    read = dict(_before(phases[:-1], seed))
    blocks, rest = divmod(last.first - phase.first, phase.size)
    sources, _ = _block(phase.counts, last.first - rest, seed)
    of_rest = np.bincount(sources[:rest], minlength=len(phase.counts)).tolist()
    for (name, n), more in zip(phase.counts, of_rest, strict=True):
        read[name] = read.get(name, 0) + blocks * n + more
    return read


@functools.lru_cache(maxsize=16)
def _block(counts: Counts, first: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(sources, ranks) of the block whose first window has the index `first`.

    sources: of each place, the number of its source in `counts`. ranks: how many places before it have the
        same one.
    """
    n = [count for _, count in counts]
    digest = hashlib.sha256(f"mixture, seed {seed}, block from {first}".encode()).digest()
    keys = _mixed(np.frombuffer(digest[:8], "<u8") + np.arange(sum(n), dtype=np.uint64))
    sources = np.repeat(np.arange(len(n)), n)[np.argsort(keys)]
    ranks = np.empty(sum(n), np.int64)
    for number, count in enumerate(n):
        ranks[sources == number] = np.arange(count)
    return sources, ranks


def _mixed(keys: np.ndarray) -> np.ndarray:
    """SplitMix64 (Steele, Lea and Flood, 2014): 64 bits in which every bit depends on all of the key's, and
    which no two keys have in common.

    NumPy's own permutations may differ between its versions.
    """
    keys = keys * np.uint64(0x9E3779B97F4A7C15)
    keys = (keys ^ (keys >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    keys = (keys ^ (keys >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return keys ^ (keys >> np.uint64(31))
