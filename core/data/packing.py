"""Documents to records: tokenising on all cores, cutting into windows, writing ArrayRecord through TFDS.

A tokenising worker is `python -m core.data.packing TOKENIZER`, fed through its stdin and read from its
stdout. It imports a tokenizer and nothing of JAX, and its stdin ends when its parent does, however that
dies.

Windows have context + 1 tokens and begin `context` apart, so that every token of a stream but the first
is predicted exactly once. TFDS's sequential writer keeps their order and holds one shard open at a time,
where its builders would gather a whole split first (and need TensorFlow beyond 1 GB).
"""

import contextlib
import dataclasses
import os
import queue
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import numpy as np

from core.errors import UserError
from core.tokenizer import load_tokenizer

DATASET_NAME = "windows"
WINDOWS_PER_SHARD = 1 << 14


def encode_batches(
    batches: Iterable[tuple[object, list[bytes]]], tokenizer: str, dtype: np.dtype, workers: int
) -> Iterator[tuple[object, np.ndarray, np.ndarray]]:
    """(label, documents in UTF-8) -> (label, ids, lengths int64), in the order given, whatever `workers` is.

    The ids are those of `<s>` document `</s>` for every document, joined; a length for each. At most two
    batches for every worker are held at a time.

    dtype: of the tokenizer's ids.
    """
    processes = [_start_worker(tokenizer) for _ in range(workers)]
    idle: queue.SimpleQueue[subprocess.Popen] = queue.SimpleQueue()
    for process in processes:
        idle.put(process)

    def encode(documents: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
        process = idle.get()
        try:
            _send(process.stdin, np.array([len(d) for d in documents], np.int64), b"".join(documents))
            lengths = np.frombuffer(_receive(process.stdout), np.int64)
            ids = np.frombuffer(_receive(process.stdout), dtype)
            if message := _receive(process.stdout).decode():
                raise UserError(message)
            return ids, lengths
        except (BrokenPipeError, EOFError) as error:
            code = process.wait()
            if code >= 0:  # its own traceback is on stderr
                raise RuntimeError(f"a tokenising process ended with code {code}") from error
            raise UserError(
                f"a tokenising process was killed ({signal.Signals(-code).name}), as the system does when "
                "memory runs out: free some, or prepare the data with fewer processes (--workers N)"
            ) from error
        finally:
            idle.put(process)

    pending: deque[tuple[object, Future]] = deque()
    threads = ThreadPoolExecutor(workers)
    try:
        for label, documents in batches:
            pending.append((label, threads.submit(encode, documents)))
            if len(pending) > 2 * workers:
                done, encoded = pending.popleft()
                yield done, *encoded.result()
        while pending:
            done, encoded = pending.popleft()
            yield done, *encoded.result()
    finally:
        for process in processes:
            process.kill()
        threads.shutdown(cancel_futures=True)
        for process in processes:
            process.communicate()


def _start_worker(tokenizer: str) -> subprocess.Popen:
    # The packages are importable here because of where this process was started: the worker is told.
    path = os.pathsep.join(filter(None, (str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH"))))
    return subprocess.Popen(
        [sys.executable, "-m", "core.data.packing", tokenizer],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": path},
    )


def _work(tokenizer_name: str, source: BinaryIO, sink: BinaryIO) -> None:
    """Encodes what comes from `source` into `sink`, until `source` ends."""
    tokenizer = load_tokenizer(tokenizer_name)
    bos, eos = (np.array([] if i is None else [i], tokenizer.dtype) for i in (tokenizer.bos, tokenizer.eos))
    while True:
        try:
            lengths = np.frombuffer(_receive(source), np.int64)
            text = _receive(source)
        except EOFError:
            return
        ends = np.cumsum(lengths)
        ids, message = [np.empty(0, tokenizer.dtype)], ""
        try:
            ids = [
                np.concatenate([bos, tokenizer.encode(text[start:end].decode()), eos])
                for start, end in zip(ends - lengths, ends, strict=True)
            ]
        except UserError as error:  # a document that the tokenizer cannot encode
            message = str(error)
        lengths = np.array([len(i) for i in ids], np.int64)
        _send(sink, lengths, np.concatenate(ids), message.encode())


def _send(stream: BinaryIO, *messages: bytes | np.ndarray) -> None:
    for message in messages:
        data = memoryview(message).cast("B")
        stream.write(len(data).to_bytes(8, "little"))
        stream.write(data)
    stream.flush()


def _receive(stream: BinaryIO) -> bytes:
    size = stream.read(8)
    data = stream.read(int.from_bytes(size, "little"))
    if len(size) < 8 or len(data) < int.from_bytes(size, "little"):
        raise EOFError
    return data


@dataclasses.dataclass
class Packer:
    """Cuts one split's stream into windows."""

    context: int
    dtype: np.dtype
    """Of the ids."""
    tokens: int = 0
    """Length of the stream so far."""
    windows: int = 0

    def __post_init__(self) -> None:
        self._rest = np.empty(0, self.dtype)

    def add(self, ids: np.ndarray) -> np.ndarray:
        """Appends `ids` [n] to the stream; the windows this completes, [m, context + 1]."""
        self.tokens += len(ids)
        stream = np.concatenate([self._rest, ids])
        n = max(len(stream) - 1, 0) // self.context
        self._rest = stream[n * self.context :]
        self.windows += n
        if n == 0:
            return np.empty((0, self.context + 1), self.dtype)
        views = np.lib.stride_tricks.sliding_window_view(stream, self.context + 1)
        return views[:: self.context][:n]

    @property
    def rest(self) -> int:
        """Tokens at the stream's end that no window predicts yet."""
        return max(len(self._rest) - 1, 0)

    def last(self, fill: int) -> np.ndarray:
        """The window of what is left, filled up with `fill`: [1 or 0, context + 1]."""
        if self.rest == 0:
            return np.empty((0, self.context + 1), self.dtype)
        window = np.full((1, self.context + 1), fill, self.dtype)
        window[0, : len(self._rest)] = self._rest
        self.windows += 1
        return window


class WindowWriter:
    """Writes windows of several splits into one folder that TFDS reads."""

    def __init__(self, folder: Path, context: int, splits: list[str], dtype: np.dtype) -> None:
        """dtype: of the ids, as the folder records it."""
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
        self._writer = tfds.core.SequentialWriter(info, WINDOWS_PER_SHARD, file_format="array_record")
        self._writer.initialize_splits(splits)

    def write(self, split: str, windows: np.ndarray) -> None:
        """Appends windows [n, context + 1] to a split."""
        if len(windows):
            with _disk_errors():
                self._writer.add_examples({split: [{"tokens": window} for window in windows]})

    def close(self) -> None:
        with _disk_errors():
            self._writer.close_all()


@contextlib.contextmanager
def _disk_errors() -> Iterator[None]:
    """ArrayRecord's writer says with a RuntimeError what Python says with an OSError."""
    try:
        yield
    except RuntimeError as error:
        raise OSError(str(error)) from error


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    _work(sys.argv[1], sys.stdin.buffer, sys.stdout.buffer)
