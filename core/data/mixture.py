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
import glob
import hashlib
import json
import math
import re
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from core import checks
from core.data.dataset import TRAIN, Dataset, Split
from core.errors import UserError

BLOCK = 4000  # windows: thousandths are exact shares of it
NAME = r"[A-Za-z0-9][A-Za-z0-9_-]*"
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
    sources = np.repeat(np.arange(len(n)), n)[np.argsort(keys, kind="stable")]
    ranks = np.empty(sum(n), np.int64)
    for number, count in enumerate(n):
        ranks[sources == number] = np.arange(count)
    return sources, ranks


def _mixed(keys: np.ndarray) -> np.ndarray:
    """SplitMix64 (Steele, Lea and Flood, 2014): 64 bits in which every bit depends on all of the key's.

    NumPy's own permutations may differ between its versions.
    """
    keys = keys * np.uint64(0x9E3779B97F4A7C15)
    keys = (keys ^ (keys >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    keys = (keys ^ (keys >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return keys ^ (keys >> np.uint64(31))


# What users type.


class Asked(NamedTuple):
    """A mixture as it is asked for."""

    sources: dict[str, str]
    """Name -> what `--data` may name."""
    shares: tuple[tuple[float, Counts], ...]
    """Which part of the run has gone when a phase begins, and the mixture from there on."""


def parse_data(data: str | Sequence[str]) -> str | dict[str, str]:
    """What --data names: one source without a name, or sources by name, in the order of their names.

    Raises:
        UserError: of several, one has no name, or two have the same.
    """
    given = [data] if isinstance(data, str) else list(data)
    if not given:
        raise UserError("--data needs a value: the text or prepared data to train on")
    named = [re.fullmatch(rf"({NAME})=(.+)", text) for text in given]
    if len(given) == 1 and (not named[0] or _is_there(given[0])):
        return given[0]
    sources: dict[str, str] = {}
    for text, match in zip(given, named, strict=True):
        if not match:
            raise UserError(
                f"--data {text}: of several sources each needs a name, as in wiki={text} (letters, digits, _ "
                "and -); quote a pattern, so that the shell does not expand it"
            )
        name, source = match.groups()
        if name in sources:
            raise UserError(f"--data names two sources {name!r}: give each a name of its own")
        sources[name] = source
    return dict(sorted(sources.items()))


def _is_there(text: str) -> bool:
    """Whether a text that could be NAME=SOURCE is a file, or a pattern of files."""
    return Path(text).exists() or bool(glob.glob(text))  # noqa: PTH207


def data_paths(data: str | Sequence[str]) -> list[str]:
    """The sources that --data names, without their names."""
    parsed = parse_data(data)
    return [parsed] if isinstance(parsed, str) else list(parsed.values())


def parse_mixture(data: str | Sequence[str], weights: Sequence[str], phases: Sequence[str]) -> Asked | None:
    """The mixture that --data, --weights and --phases ask for; None for one source without a name.

    Raises:
        UserError: a weight or phase is out of range, or they do not fit the sources.
    """
    sources = parse_data(data)
    if isinstance(sources, str):
        for name, given in (("weights", weights), ("phases", phases)):
            if given:
                raise UserError(
                    f"--{name} is for several sources, each with a name: --data wiki={sources} books=..."
                )
        return None
    if len(sources) == 1 and not weights:
        weights = tuple(f"{name}=1" for name in sources)
    if not weights:
        example = " ".join(f"{name}=1" for name in sources)
        raise UserError(f"--data names {len(sources)} sources: give their shares, as in --weights {example}")
    shares = [(0.0, _counts("--weights", weights, sources))]
    for share, given in _split_phases(phases):
        if share <= shares[-1][0]:
            raise UserError(f"--phases: {share:g} comes after {shares[-1][0]:g}; give phases in their order")
        shares.append((share, _counts(f"--phases {share:g}", given, sources)))
    read = {name for _, counts in shares for name, _ in counts}
    for name in sources:
        if name not in read:
            raise UserError(f"--data names {name}, but neither --weights nor --phases gives it a share")
    return Asked(sources, tuple(shares))


def _split_phases(phases: Sequence[str]) -> list[tuple[float, list[str]]]:
    """Words such as 0.8 wiki=0.3 books=0.7 0.9 books=1, phase by phase."""
    found: list[tuple[float, list[str]]] = []
    for word in phases:
        if "=" in word:
            if not found:
                raise UserError(
                    f"--phases begins with {word}: give first which part of the run has gone, as in "
                    f"--phases 0.8 {word}"
                )
            found[-1][1].append(word)
            continue
        share = _number("--phases", word)
        checks.between_zero_and_one(phases=share)
        found.append((share, []))
    return found


def _counts(option: str, words: Sequence[str], sources: dict[str, str]) -> Counts:
    """Windows of each source in a block, in shares such as wiki=0.7."""
    weights: dict[str, float] = {}
    for word in words:
        name, _, value = word.partition("=")
        if name not in sources:
            # A resumed run has its own where none are given, even with another --data.
            raise UserError(
                f"{option} {word}: --data has no source {name!r}, but {', '.join(sources)}; give {option} "
                "for these (a resumed run has its own, until others are given)"
            )
        if name in weights:
            raise UserError(f"{option} gives {name} twice: give each source one weight")
        weights[name] = _number(f"{option} {name}", value)
        if not 0 < weights[name] < math.inf:
            raise UserError(
                f"{option} {word}: a weight must be positive and finite; leave out what is not read"
            )
    if not weights:
        raise UserError(f"{option} needs weights, as in {' '.join(f'{name}=1' for name in sources)}")
    whole = sum(map(Fraction, weights.values()))
    exact = {name: BLOCK * Fraction(weights[name]) / whole for name in sorted(weights)}
    counts = {name: math.floor(share) for name, share in exact.items()}
    by_rest = sorted(exact, key=lambda name: counts[name] - exact[name])
    for name in by_rest[: BLOCK - sum(counts.values())]:
        counts[name] += 1
    for name, n in counts.items():
        if n == 0:
            share = float(exact[name] / BLOCK)
            raise UserError(
                f"{option} {name}={weights[name]:g} is a share of {share:.2g}, less than one window in the "
                f"{BLOCK:,} among which shares hold: give it more, or leave it out"
            )
    return tuple(counts.items())


def _number(what: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise UserError(f"{what}: {text!r} is not a number") from None
