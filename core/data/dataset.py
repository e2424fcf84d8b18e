"""A prepared dataset: opening it, checking it, and its records.

It is a folder of ArrayRecord files, TFDS's description of them, the tokenizer's file, and dataset.json. That
one is written last, so a folder that has it is complete. It holds the format's version, the tokenizer's
record, the context, what the splits contain, what was dropped, where the text came from, the sha256 of every
file, the fingerprint that checkpoints and runs refer to, and its own sha256. Where the ends of documents are
held out, it has the hashes of these documents. Data that was compared with held-out text has a record of
that, too (`core.data.overlap`).

Whoever opens it checks dataset.json against its own sha256, the small files against theirs, and the sizes of
the shards. A shard's records have checksums of ArrayRecord's own, which are checked as they are read; all of
it is read and hashed by `python -m train_tpu.prepare --verify DIR`.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from core.checkpoint.manifest import digest, hash_files
from core.cli import command
from core.data.overlap import RECORD
from core.data.windows import Windows
from core.errors import UserError
from core.folders import write_atomically
from core.tokenizer import TOKENIZER_FILE

FORMAT = 1
FIELDS = frozenset((
    "format", "tokenizer", "context", "splits", "dropped", "sources", "train_tokens", "files", "fingerprint",
    "sha256", "version", "parent", "ends_held_out",
))  # fmt: skip
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
    sealed: bool
    """Whether dataset.json carries its own sha256. Older versions wrote none: there the fingerprint proves
    the tokenizer, the context and the hashes of the files, but not the counts of the splits."""
    seal: str = ""
    """The sha256 of dataset.json, or the fingerprint where that carries none."""
    version: int = 1
    """Above 1 for data that was appended to (`core.data.versions`)."""
    parent: str | None = None
    """The `seal` of the version before."""
    dropped: dict = dataclasses.field(default_factory=dict)
    """What was left out or found when it was prepared, counted."""
    ends_held_out: tuple[int, ...] | None = None
    """64 bits of the SHA-256 of every whole document whose end is held out: no split has such a document, so
    it cannot be read back. None where no split has the name that such ends get, or an older program made
    it."""

    @property
    def heldout(self) -> list[str]:
        """Names of the held-out splits."""
        return [name for name in self.splits if name != TRAIN]

    def overlap_record(self) -> np.ndarray | None:
        """The held-out texts that were looked for in all of the training text (`core.data.overlap`); None
        where it was prepared without --overlap."""
        return np.load(self.path / RECORD) if RECORD in self.files else None

    def verify(self) -> None:
        """Reads every file and compares its sha256; a `UserError` names the first that differs."""
        self._check_files(list(self.files))

    def check_small_files(self) -> None:
        """Compares the sizes of all files, and the sha256 of all but the shards, as `verify` does."""
        self._check_files([name for name in self.files if ".array_record" not in name])

    def _check_files(self, hashed: list[str]) -> None:
        for name, recorded in self.files.items():
            file = self.path / name
            size = file.stat().st_size if file.is_file() else None
            if size != recorded["bytes"]:
                what = "is missing" if size is None else f"has {size} bytes"
                raise UserError(
                    f"{file} {what} where {MANIFEST} says {recorded['bytes']} bytes: prepare the data again"
                )
        found = hash_files(self.path, hashed, sync=False)
        for name in hashed:
            if found[name]["sha256"] != self.files[name]["sha256"]:
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
            f"`{command('train_tpu.prepare', 'TEXT', '--out', path)}`"
        )
    try:
        content = json.loads(manifest.read_bytes())
        version = content["format"]
        seal = content.pop("sha256", None)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{manifest} is damaged ({error!r}): prepare the data again") from error
    if version != FORMAT:
        raise UserError(
            f"{manifest} has format {version}, this version reads {FORMAT}: prepare the data again"
        )
    if seal is not None and seal != digest(content):
        raise UserError(
            f"{manifest} does not match its own sha256, so it was damaged or edited: prepare the data again"
        )
    try:
        unknown = sorted(content.keys() - FIELDS)
        if unknown:
            raise KeyError(f"unknown field {unknown[0]}")
        if content["fingerprint"] != fingerprint_of(content):
            raise ValueError("its fingerprint is not that of its contents")
        dataset = Dataset(
            path=path,
            context=content["context"],
            tokenizer_record=content["tokenizer"],
            fingerprint=content["fingerprint"],
            splits={name: Split(name=name, **split) for name, split in content["splits"].items()},
            files=content["files"],
            sources=content["sources"],
            sealed=seal is not None,
            seal=seal or content["fingerprint"],
            version=content.get("version", 1),
            parent=content.get("parent"),
            dropped=content["dropped"],
            ends_held_out=_from_hex(content.get("ends_held_out")),
        )
        dataset.check_small_files()
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        raise UserError(f"{manifest} is damaged ({error!r}): prepare the data again") from error
    return dataset


def fingerprint_of(content: dict) -> str:
    """Hash of the tokenizer, the context and the files' hashes that a dataset.json holds.

    The tokenizer is in it by its hash alone, whether its file is carried or not; what the text was compared
    with is not in it.
    """
    others = (TOKENIZER_FILE, RECORD)
    hashes = {name: file["sha256"] for name, file in content["files"].items() if name not in others}
    contents = [content["tokenizer"]["sha256"], content["context"], hashes]
    return hashlib.sha256(json.dumps(contents).encode()).hexdigest()


def write_manifest(
    path: Path,
    context: int,
    tokenizer: dict,
    splits: Iterable[Split],
    dropped: dict,
    sources: list[str],
    train_tokens: int | None = None,
    parent: Dataset | None = None,
    ends_held_out: tuple[int, ...] | None = None,
) -> Dataset:
    """Hashes the files in the folder `path` and writes its dataset.json, which completes it; all of it is on
    the disk on return.

    train_tokens: with which the reading of the sources was to end, if it was.
    parent: the version that this one continues, if it does.
    ends_held_out: as `Dataset` has it.
    """
    hashed = hash_files(path, sorted(file.name for file in path.iterdir()), sync=True)
    files = {name: {"sha256": entry["sha256"], "bytes": entry["size"]} for name, entry in hashed.items()}
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
    }
    if parent is not None:
        manifest |= {"version": parent.version + 1, "parent": parent.seal}
    if ends_held_out is not None:
        manifest["ends_held_out"] = [f"{number:016x}" for number in ends_held_out]
    manifest["fingerprint"] = fingerprint_of(manifest)
    manifest["sha256"] = digest(manifest)
    write_atomically(path / MANIFEST, json.dumps(manifest, indent=1) + "\n")
    return open_dataset(path)


def _from_hex(numbers: list[str] | None) -> tuple[int, ...] | None:
    return None if numbers is None else tuple(int(number, 16) for number in numbers)


def open_windows(dataset: Dataset, split: str) -> Windows:
    """The records of a split; a `UserError` where they are not as many as dataset.json says."""
    hashes = {name: entry["sha256"] for name, entry in dataset.files.items()}
    windows = Windows(dataset.path, split, dataset.context, hashes)
    if len(windows) != dataset.splits[split].windows:
        raise UserError(
            f"{dataset.path} is damaged: its split {split} has {len(windows)} records instead of "
            f"{dataset.splits[split].windows}; prepare the data again"
        )
    return windows
