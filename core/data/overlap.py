"""Which training documents share a run of 13 words with held-out text: the test of GPT-3 (Brown et al. 2020,
appendix C).

A word is a run of letters and digits, in lower case; what is between words, punctuation included, counts for
nothing. (GPT-3 splits at blanks and removes punctuation, so that "well-known" is one word there. Here it is
two, as in text tokenised to "well @-@ known".) A run of 13 is known by 64 bits of a hash. The runs of
held-out text are held sorted, 8 bytes each, once for all processes; training text streams past them.

What this cannot see: a text of fewer than 13 words, one that is paraphrased or translated, and one that
differs in a word out of every 13, as by another spelling. Two runs in 2^64 have the same hash.

Prepared data records the held-out texts that were looked for, and which of them share a run with its training
text, in `RECORD`: 9 bytes each, by which eval.compare knows the evaluation items to leave out.
"""

import hashlib
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from core.data.source import Source
from core.errors import UserError

N = 13
MOST = 1 << 27
"""Runs that are held: 1 GiB."""
WORD = re.compile(r"[^\W_]+")
RECORD = "overlap.npy"
"""The file of prepared data that holds `LOOKED_FOR` of every text."""
LOOKED_FOR = np.dtype([("text", np.uint64), ("shared", np.bool_)])
"""`text_key` of a held-out text, and whether it shares a run with the training text."""
CACHED_WORDS = 1 << 20  # whose hashes are cached
# Odd, so that no bit of a word's hash is lost; word i of a run counts FACTOR^i times.
FACTOR = np.uint64(0x9E3779B97F4A7C15)
WEIGHTS = np.array([pow(int(FACTOR), i, 2**64) for i in range(N)], np.uint64)

_hashes: dict[str, int] = {}


def words(text: str) -> list[str]:
    """The words of a text, normalised."""
    return WORD.findall(text.lower())


def runs(text: str) -> np.ndarray:
    """The hashes of all runs of `N` words of a text, uint64 [words - N + 1]; none of fewer words."""
    found = words(text)
    if len(found) < N:
        return np.empty(0, np.uint64)
    if len(_hashes) > CACHED_WORDS:
        _hashes.clear()
    hashed = np.fromiter((_hashes.get(word) or _hash(word) for word in found), np.uint64, len(found))
    return sum(weight * hashed[i : len(hashed) - N + 1 + i] for i, weight in enumerate(WEIGHTS))


def _hash(word: str) -> int:
    _hashes[word] = _hash64(word)
    return _hashes[word]


def _hash64(text: str) -> int:
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def texts_of(sources: Iterable[Source]) -> Iterator[str]:
    """The texts of sources that are to be found again."""
    for source in sources:
        for text, _ in source.documents():
            if text:
                yield text


def gather(texts: Iterable[str]) -> np.ndarray:
    """The runs of all texts, sorted, each once.

    Raises:
        UserError: they are more than `MOST`.
    """
    gathered, waiting, n_waiting = np.empty(0, np.uint64), [], 0
    for text in texts:
        waiting.append(runs(text))
        n_waiting += len(waiting[-1])
        if n_waiting > max(len(gathered), MOST // 16):
            gathered, waiting, n_waiting = np.unique(np.concatenate([gathered, *waiting])), [], 0
        if len(gathered) > MOST:
            break
    gathered = np.unique(np.concatenate([gathered, *waiting]))
    if len(gathered) > MOST:
        raise UserError(
            f"the held-out text has more than {MOST:,} runs of {N} words, so --overlap would take more than "
            f"{MOST >> 27} GiB: give less of it"
        )
    return gathered


class Overlap:
    """Held-out runs to look for."""

    def __init__(self, held: np.ndarray) -> None:
        """held: sorted runs, as of `gather`."""
        self._held = held

    def find(self, text: str) -> np.ndarray:
        """Those of the text's runs that are held out, each once."""
        found = np.unique(runs(text))
        if not len(found) or not len(self._held):
            return found[:0]
        places = np.searchsorted(self._held, found)
        return found[self._held[np.minimum(places, len(self._held) - 1)] == found]


def text_key(text: str) -> int | None:
    """64 bits of a hash of a text as it is; None for one that is too short to be looked for."""
    return None if len(words(text)) < N else _hash64(text)


class Found(NamedTuple):
    """A set of held-out texts after they were looked for in training text."""

    n: int
    n_short: int
    """Too short to be looked for."""
    n_shared: int
    """That share a run with training text."""
    record: np.ndarray
    """Of `LOOKED_FOR`, one of each text that is not too short."""


def found_of(texts: Iterable[str], shared: np.ndarray) -> Found:
    """What is known of held-out texts, given the sorted runs of them that are in training text."""
    overlap, n, keys = Overlap(shared), 0, []
    for text in texts:
        n += 1
        if (key := text_key(text)) is not None:
            keys.append((key, len(overlap.find(text)) > 0))
    record = np.array(keys, LOOKED_FOR)
    return Found(n, n - len(record), int(record["shared"].sum()), record)


def merged(records: Iterable[np.ndarray]) -> np.ndarray:
    """Records of the same training text as one, sorted, each text once: shared if one of them says so."""
    joined = np.concatenate([np.empty(0, LOOKED_FOR), *records])
    texts, where = np.unique(joined["text"], return_inverse=True)
    record = np.zeros(len(texts), LOOKED_FOR)
    record["text"] = texts
    np.logical_or.at(record["shared"], where, joined["shared"])
    return record


def joint(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Merged records of two training texts as that of both: the texts that were looked for in each."""
    both = np.intersect1d(first["text"], second["text"])
    return merged(record[np.isin(record["text"], both)] for record in (first, second))


def save(array: np.ndarray, path: Path) -> None:
    """Writes runs for `load`, or a record."""
    with path.open("wb") as file:
        np.save(file, array)


def load(path: Path) -> Overlap:
    """The runs of a file. It is mapped, so all processes share its memory."""
    return Overlap(np.load(path, mmap_mode="r"))
