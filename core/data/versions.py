"""Prepared data that grows: `train_tpu.prepare SOURCE... --append DIR` makes a version of it, DIR/v2 and on.

A version is prepared data like any other, sealed and complete by itself. Its dataset.json has its number and
the sha256 of its parent's. It has its parent's shards as hard links, which take no room, and the new text in
shards behind them. No file of an older version changes. Held-out sets stay what they were, so that losses
compare; copies of their documents in the new text do not train.

Whoever opens DIR gets the newest version, and a run that began on an older one gets that one: runs record the
fingerprint of their data.
"""

import json
import os
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path

import numpy as np

from core.data import dataset as ds
from core.data.packing import read_description
from core.data.pieces import hash64
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
    """`hash64` of the documents of a split, read back out of its tokens, some at a time.

    A document of which the split lacks the end, as train may at its own, is none of them.
    """
    windows = ds.open_windows(parent, split)
    left = parent.splits[split].tokens - 1
    rest: list[int] = []
    for start in range(0, len(windows), READ):
        rows = windows.read(list(range(start, min(start + READ, len(windows)))), tokenizer.vocab_size)
        ids = rows[:, 1:].ravel()[:left]
        left -= len(ids)
        stream = [*rest, *([] if start else rows[0, :1].tolist()), *ids.tolist()]
        hashes, begin = [], 0
        for end, token in enumerate(stream):
            if token == tokenizer.eos:
                hashes.append(hash64(tokenizer.decode(stream[begin:end]).encode()))
                begin = end + 1
        rest = stream[begin:]
        yield np.array(hashes, np.uint64)
