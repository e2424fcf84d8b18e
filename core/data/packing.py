"""Tokens to windows to shards: files of ArrayRecord, and TFDS's description of them.

A split's documents joined are one stream of tokens. Its windows have context + 1 tokens and begin `context`
apart, so that every token but the first is predicted exactly once. A shard holds `WINDOWS_PER_SHARD` of them;
it is written by itself, out of the pieces (`core.data.pieces`) that have its tokens, in a few MB of memory.
TFDS's own builders would gather a whole split first (and need TensorFlow beyond 1 GB), and its sequential
writer writes one shard after another, at a fifth of the speed.
"""

import contextlib
import functools
import hashlib
import itertools
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from google.protobuf.descriptor_pb2 import FieldDescriptorProto as Field
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from core.checkpoint.manifest import sync_path

DATASET_NAME = "windows"
WINDOWS_PER_SHARD = 1 << 14
CHUNK = 256  # windows that are made at once
READ = 1 << 20  # tokens that are read at once

Spans = list[tuple[str, list[tuple[int, int]]]]
"""(file of tokens, [(first token, number of tokens)]), in the order of the stream."""


def shard_name(split: str, number: int) -> str:
    """The file of a shard, as TFDS names it."""
    return f"{DATASET_NAME}-{split}.array_record-{number:05d}"


class Shard(NamedTuple):
    """A shard to be written."""

    name: str
    """The file in the folder DATA of the job's folder."""
    spans: Spans
    """Its tokens, in files of the job's folder."""
    windows: int
    context: int
    fill: int
    """With which the last window of a held-out split is filled up."""
    dtype: str
    """Of the tokens."""


DATA = "data"
"""The folder within the job's where shards are written."""


def written_size(shard: Shard, folder: Path) -> int | None:
    """Bytes of the records of a shard that was written out of the same tokens; None if it was not."""
    try:
        note = json.loads((folder / f"{shard.name}.json").read_text())
    except FileNotFoundError:
        return None
    return (
        note["bytes"] if note["made_of"] == _digest(shard) and (folder / DATA / shard.name).exists() else None
    )


def write_shard(shard: Shard, folder: Path) -> int:
    """Writes a shard, whole or not at all; the bytes of its records. A note says what it was made of."""
    partial = folder / f".{shard.name}.{os.getpid()}"
    size = write_records(partial, _windows(shard, folder))
    sync_path(partial)
    partial.replace(folder / DATA / shard.name)
    note = folder / f"{shard.name}.json"
    half = folder / f".{note.name}.{os.getpid()}"
    half.write_text(json.dumps({"made_of": _digest(shard), "bytes": size}))
    half.replace(note)
    return size


def _digest(shard: Shard) -> str:
    return hashlib.sha256(json.dumps(shard).encode()).hexdigest()


def _windows(shard: Shard, folder: Path) -> Iterator[np.ndarray]:
    """The windows of a shard, at most `CHUNK` of them at a time: [n, context + 1]."""
    dtype, left = np.dtype(shard.dtype), shard.windows
    held, n_held = [np.empty(0, dtype)], 0
    for part in itertools.chain(_tokens(shard.spans, folder, dtype), [None]):
        if part is None:  # what a held-out split's last window lacks
            part = np.full(max(left * shard.context + 1 - n_held, 0), shard.fill, dtype)
        elif n_held + len(part) <= CHUNK * shard.context:
            held.append(part)
            n_held += len(part)
            continue
        stream = np.concatenate([*held, part])
        n = min((len(stream) - 1) // shard.context, left)
        if n > 0:
            views = np.lib.stride_tricks.sliding_window_view(stream, shard.context + 1)[:: shard.context]
            yield from (views[i : min(i + CHUNK, n)] for i in range(0, n, CHUNK))
        left -= n
        held = [stream[n * shard.context :].copy()]
        n_held = len(held[0])


def _tokens(spans: Spans, folder: Path, dtype: np.dtype) -> Iterator[np.ndarray]:
    """The tokens of spans, in order, some at a time; one file is open at a time."""
    for name, places in spans:
        with (folder / name).open("rb") as file:
            for first, n in places:
                file.seek(first * dtype.itemsize)
                for start in range(0, n, READ):
                    found = np.fromfile(file, dtype, min(READ, n - start))
                    if len(found) < min(READ, n - start):
                        raise OSError(f"{folder / name} is shorter than it was written")
                    yield found


def write_records(path: Path, windows: Iterator[np.ndarray]) -> int:
    """Writes windows [n, context + 1], which come some at a time, into one file; the bytes of its records."""
    from array_record.python.array_record_module import ArrayRecordWriter

    size = 0
    with _disk_errors():
        writer = ArrayRecordWriter(str(path), "group_size:1")
        for some in windows:
            for record in serialize(some):
                writer.write(record)
                size += len(record)
        writer.close()
    return size


def serialize(windows: np.ndarray) -> list[bytes]:
    """Each row of [n, context + 1] as TFDS serialises {"tokens": row}: tf.train.Example, an int64 list."""
    rows, width = windows.shape
    ids = np.ascontiguousarray(windows).reshape(-1).astype(np.uint64)
    n_bytes = np.ones(len(ids), np.int64)  # of each id as a varint: 7 bits each, the lowest first
    for shift in range(7, 64, 7):
        more = ids >= np.uint64(1 << shift)
        if not more.any():
            break
        n_bytes += more
    ends = np.cumsum(n_bytes)
    packed = np.empty(ends[-1] if len(ends) else 0, np.uint8)
    starts = ends - n_bytes
    for place in range(int(n_bytes.max(initial=0))):
        has = n_bytes > place
        bits = (ids[has] >> np.uint64(7 * place)) & np.uint64(127)
        continues = (n_bytes[has] > place + 1).astype(np.uint8) << 7
        packed[starts[has] + place] = bits.astype(np.uint8) | continues
    data = packed.tobytes()
    row_ends = ends[width - 1 :: width] if rows else []
    records, start = [], 0
    for end in row_ends:
        values = _field(1, data[start:end])  # Int64List.value, packed
        entry = _field(1, b"tokens") + _field(2, _field(3, values))  # key, Feature.int64_list
        records.append(_field(1, _field(1, entry)))  # Example.features, Features.feature
        start = end
    return records


def parse(record: bytes) -> Sequence[int]:
    """The row that `serialize` made a record of; nothing, where the record has no tokens.

    Raises:
        DecodeError: it is no protocol buffer.
    """
    entries = _example().FromString(record).features.feature
    return next((entry.value.int64_list.value for entry in entries if entry.key == "tokens"), ())


@functools.cache
def _example() -> type[Message]:
    """tf.train.Example, as far as it holds integers. TFDS has the whole, but to import it takes 0.4 s."""
    messages: dict[str, list[tuple[str, int, int | str, bool]]] = {  # name, number, type, whether repeated
        "Example": [("features", 1, "Features", False)],
        "Features": [("feature", 1, "Entry", True)],  # a map; as bytes, a list of its entries
        "Entry": [("key", 1, Field.TYPE_STRING, False), ("value", 2, "Feature", False)],
        "Feature": [("int64_list", 3, "Int64List", False)],
        "Int64List": [("value", 1, Field.TYPE_INT64, True)],
    }
    file = FileDescriptorProto(name="example.proto", syntax="proto3")
    for message, fields in messages.items():
        described = file.message_type.add(name=message)
        for name, number, kind, repeated in fields:
            label = Field.LABEL_REPEATED if repeated else Field.LABEL_OPTIONAL
            of = {"type": kind} if isinstance(kind, int) else {"type": Field.TYPE_MESSAGE, "type_name": kind}
            described.field.add(name=name, number=number, label=label, **of)
    pool = DescriptorPool()
    pool.Add(file)
    return GetMessageClass(pool.FindMessageTypeByName("Example"))


def _field(number: int, content: bytes) -> bytes:
    """A field of a protocol buffer that has a length."""
    size, length = len(content), bytearray()
    while size >= 128:
        length.append(size & 127 | 128)
        size >>= 7
    length.append(size)
    return bytes([number << 3 | 2]) + length + content


def write_description(
    folder: Path, context: int, dtype: np.dtype, splits: dict[str, tuple[list[int], int]]
) -> None:
    """Writes TFDS's description of the shards in a folder.

    splits: the number of windows of each shard, and the bytes of all records, by split.
    """
    import tensorflow_datasets as tfds

    identity = tfds.core.dataset_info.DatasetIdentity(
        name=DATASET_NAME,
        version=tfds.core.Version("1.0.0"),
        data_dir=str(folder),
        module_name=__name__,
    )
    features = tfds.features.FeaturesDict(
        {"tokens": tfds.features.Tensor(shape=(context + 1,), dtype=dtype.type)}
    )
    info = tfds.core.DatasetInfo(builder=identity, features=features, disable_shuffling=True)
    info.set_file_format("array_record")
    infos = []
    for split, (lengths, size) in splits.items():
        template = tfds.core.ShardedFileTemplate(
            dataset_name=DATASET_NAME,
            data_dir=folder,
            split=split,
            filetype_suffix="array_record",
            template="{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_INDEX}",
        )
        infos.append(
            tfds.core.SplitInfo(name=split, shard_lengths=lengths, num_bytes=size, filename_template=template)
        )
    info.set_splits(tfds.core.SplitDict(infos))
    info.write_to_directory(folder)


NOT_DESCRIBED = (ValueError, KeyError, TypeError, AttributeError)


class Description(NamedTuple):
    """What `write_description` wrote."""

    width: int
    """Tokens in a record: context + 1."""
    dtype: np.dtype
    """Of the tokens."""
    splits: dict[str, tuple[list[int], int]]
    """As `write_description` takes them."""


def read_description(folder: Path) -> Description:
    """TFDS's description of the shards in a folder, without importing TFDS, which would delay every start.

    Raises:
        OSError: it is not there.
        NOT_DESCRIBED: it is not as `write_description` writes it.
    """
    names = ("dataset_info.json", "features.json")
    info, features = (json.loads((folder / name).read_bytes()) for name in names)
    splits = {
        split["name"]: ([int(n) for n in split.get("shardLengths", ())], int(split.get("numBytes", 0)))
        for split in info["splits"]
    }
    tokens = features["featuresDict"]["features"]["tokens"]["tensor"]
    (width,) = tokens["shape"]["dimensions"]
    return Description(int(width), np.dtype(tokens["dtype"]), splits)


def write_splits(folder: Path, context: int, splits: dict[str, np.ndarray]) -> None:
    """Writes windows [n, context + 1] of each split that are in memory, with their description."""
    described = {}
    for split, windows in splits.items():
        parts = [windows[i : i + WINDOWS_PER_SHARD] for i in range(0, len(windows), WINDOWS_PER_SHARD)]
        sizes = [write_records(folder / shard_name(split, n), iter([part])) for n, part in enumerate(parts)]
        described[split] = ([len(part) for part in parts], sum(sizes))
    write_description(folder, context, next(iter(splits.values())).dtype, described)


@contextlib.contextmanager
def _disk_errors() -> Iterator[None]:
    """ArrayRecord's writer says with a RuntimeError what Python says with an OSError."""
    try:
        yield
    except RuntimeError as error:
        raise OSError(str(error)) from error
