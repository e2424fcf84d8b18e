"""Prepared data that grows: `train_tpu.prepare SOURCE... --append DIR` makes a version of it, DIR/v2 and on.

A version is prepared data like any other, sealed and complete by itself. Its dataset.json has its number and
the sha256 of its parent's. It has its parent's shards as hard links, which take no room, and the new text in
shards behind them. No file of an older version changes. Held-out sets stay what they were, so that losses
compare; copies of their documents in the new text do not train, nor do copies of documents whose ends they
are.

Whoever opens DIR gets the newest version, and a run that began on an older one gets that one: runs record the
fingerprint of their data.
"""

import itertools
import json
import os
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path

import numpy as np

from core.data import dataset as ds
from core.data.packing import read_description
from core.data.pieces import hash64
from core.data.source import Source
from core.tokenizer import Tokenizer

READ = 256  # windows that are read back at once


def version_paths(path: Path) -> list[Path]:
    """The folders of all versions of prepared data, the oldest first."""
    found = [path]
    while (path / f"v{len(found) + 1}" / ds.MANIFEST).is_file():
        found.append(path / f"v{len(found) + 1}")
    return found


def open_version(path: Path, wanted: Collection[str] = ()) -> ds.Dataset:
    """The version of prepared data whose fingerprint is wanted, else the newest.

    Raises:
        UserError: as `open_dataset`.
    """
    paths = version_paths(path)
    chosen = next((one for one in paths[::-1] if _fingerprint(one) in wanted), paths[-1])
    opened = ds.open_dataset(chosen)
    if len(paths) > 1:
        which = f"data {path}: version {opened.version} of {len(paths)}, {opened.fingerprint[:12]}"
        print(which + (", with which this run began" if opened.fingerprint in wanted else ", the newest"))
    return opened


def _fingerprint(path: Path) -> str | None:
    try:
        return json.loads((path / ds.MANIFEST).read_bytes()).get("fingerprint")
    except (OSError, ValueError, AttributeError):
        return None  # whoever opens it says what is wrong


def link_shards(parent: ds.Dataset, folder: Path) -> None:
    """Puts the parent's shards into a folder; copies of them where the file system has no hard links."""
    for name in parent.files:
        if ".array_record" in name:
            try:
                os.link(parent.path / name, folder / name)
            except OSError:
                partial = folder / f".{name}.{os.getpid()}"
                shutil.copyfile(parent.path / name, partial)
                partial.rename(folder / name)


def described(parent: ds.Dataset) -> dict[str, tuple[list[int], int]]:
    """What TFDS's description of prepared data says: windows of each shard and bytes of all, by split."""
    splits = read_description(parent.path).splits
    return {name: splits[name] for name in parent.splits}


def document_hashes(parent: ds.Dataset, split: str, tokenizer: Tokenizer) -> Iterator[np.ndarray]:
    """`hash64` of the documents of a split, read back out of its tokens (`_read_back`), some at a time."""
    for texts in _read_back(parent, split, tokenizer):
        yield np.array([hash64(text.encode()) for text in texts], np.uint64)


class HeldOut(Source):
    """A held-out split of prepared data as the source that it was, read back out of its tokens."""

    def __init__(self, parent: ds.Dataset, split: str, tokenizer: Tokenizer) -> None:
        self._parent, self._split, self._tokenizer = parent, split, tokenizer
        self.name, self.size = f"{parent.path}/{split}", parent.splits[split].documents

    def identity(self) -> str:
        return f"{self._parent.fingerprint} {self._split}"

    def documents(self) -> Iterator[tuple[str, int]]:
        read_back = _read_back(self._parent, self._split, self._tokenizer)
        yield from zip(itertools.chain.from_iterable(read_back), itertools.count(1), strict=False)


def _read_back(parent: ds.Dataset, split: str, tokenizer: Tokenizer) -> Iterator[list[str]]:
    """The documents of a split, some at a time, as its tokens have them.

    A document of which the split lacks the end, as train may at the end of every version, is none of them.
    """
    windows = ds.open_windows(parent, split)
    for first, end, tokens in _streams(parent, split):
        left, rest = tokens - 1, []
        for start in range(first, end, READ):
            rows = windows.read(list(range(start, min(start + READ, end))), tokenizer.vocab_size)
            ids = rows[:, 1:].ravel()[:left]
            left -= len(ids)
            stream = [*rest, *(rows[0, :1].tolist() if start == first else []), *ids.tolist()]
            texts, begin = [], 0
            for at, token in enumerate(stream):
                if token == tokenizer.eos:
                    texts.append(tokenizer.decode(stream[begin:at]))
                    begin = at + 1
            rest = stream[begin:]
            yield texts


def _streams(parent: ds.Dataset, split: str) -> list[tuple[int, int, int]]:
    """(first window, the one after the last, tokens) of each stream of a split.

    Every version's training text begins one of its own: the tokens that fill no window of the version before
    are not there.
    """
    if split != ds.TRAIN:
        return [(0, parent.splits[split].windows, parent.splits[split].tokens)]
    root = parent.path if parent.version == 1 else parent.path.parent
    older = [ds.open_dataset(path) for path in version_paths(root)[: parent.version - 1]]
    ends = [version.splits[split].windows for version in (*older, parent)]
    pairs = itertools.pairwise([0, *ends])
    return [(first, end, (end - first) * parent.context + 1) for first, end in pairs]
