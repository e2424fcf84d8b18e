"""Text to training data, once: `python -m train_tpu.prepare SOURCE... --out DIR`.

Every document becomes `<s>` tokens `</s>`; a split's documents joined are one stream, which is cut into
windows of context + 1 tokens (`packing`) and written as ArrayRecord. Documents are read here, tokenised
by worker processes and written here, in order: the result does not depend on the number of workers.
"""

import contextlib
import dataclasses
import fcntl
import glob
import hashlib
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import numpy as np
import rich.progress
import tyro
from rich.console import Console
from rich.table import Table

from core.errors import UserError, run_command
from core.tokenizer import load_tokenizer, require_same, tokenizer_record
from train_tpu import data as ds
from train_tpu.packing import Packer, WindowWriter, encode_batches
from train_tpu.sources import Source, cut_point, open_sources

VALID = "valid"
VALID_FRACTION = 0.01
# Hashing whole documents cannot hold out a small part of a few of them: then every document's end is.
FEW_DOCUMENTS = 1000
VALID_FRACTION_OF_FEW = 0.05

BATCH_BYTES = 1 << 20  # of text, for one call of a worker: long enough to hide the call, short in memory
SURROGATES = re.compile("[\ud800-\udfff]")


@dataclasses.dataclass
class PrepareConfig:
    """Tokenise text and pack it for training. Needs no network and no accelerator (except `hf:`)."""

    sources: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE...")]
    """Files (.txt, .jsonl, .parquet, also as .gz, .xz, .zst), folders, globs, `builtin`, `tfds:NAME`,
    `hf:DATASET[:CONFIG]`."""
    out: Path
    """Folder to make; it must not exist."""
    tokenizer: str = "mistral"
    """`mistral`, `bytes` or the path of a tokenizer.json."""
    context: int = 1024
    """Tokens of a training window."""
    valid: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="NAME=PATH")] = ()
    """NAME=PATH: a held-out set of its own (repeatable). The sources then wholly train."""
    valid_fraction: float | None = None
    """Part of the documents to hold out, by hash (default 0.01); of fewer than 1000 documents
    the end of each, in that proportion (default 0.05)."""
    train_tokens: int | None = None
    """Read no further than the document with which the train split reaches this many tokens; what is held out
    of the sources is then that of the documents read. Sets of --valid are whole. Default: all text."""
    field: str = "text"
    """JSON field, Parquet column or TFDS feature that holds the text."""
    workers: int | None = None
    """Tokenising processes; default: one for every core."""


def prepare(
    sources: list[str],
    out: Path,
    tokenizer: str,
    context: int,
    valid: dict[str, str] | None = None,
    valid_fraction: float | None = None,
    train_tokens: int | None = None,
    field: str = "text",
    workers: int | None = None,
) -> Path:
    """Prepares `sources` into the new folder `out` and returns it; see `PrepareConfig` for the arguments.

    Nothing called `out` exists before all of it is written. A `UserError` for input that cannot be used.
    """
    if context < 1:
        raise UserError(f"--context is {context}; it must be at least 1")
    if workers is not None and workers < 1:
        raise UserError(f"--workers is {workers}; it must be at least 1")
    if train_tokens is not None and train_tokens < 1:
        raise UserError(f"--train-tokens is {train_tokens}; it must be at least 1")
    if out.exists() or out.is_symlink():
        raise UserError(f"{out} exists already: remove it or choose another --out")
    plan = _make_plan(sources, valid or {}, valid_fraction, train_tokens, field)
    record = tokenizer_record(load_tokenizer(tokenizer))
    with _partial_folder(out) as folder:
        try:
            _write(folder, plan, tokenizer, context, workers or len(os.sched_getaffinity(0)))
            opened = ds.write_manifest(
                folder, context, record, plan.counts(), plan.dropped, plan.sources_read(), train_tokens
            )
        except OSError as error:
            raise UserError(
                f"{out} could not be written ({error}): make room or choose another --out"
            ) from error
        folder.rename(out)
    _print_summary(opened, plan.dropped, train_tokens)
    return out


def is_prepared(data: str) -> bool:
    """Whether `data` names a prepared folder, and not text."""
    return (Path(data) / ds.MANIFEST).is_file()


def open_or_prepare(data: str, tokenizer: str, context: int, cache: Path) -> ds.Dataset:
    """The dataset `data` names: a prepared folder, or text that is prepared once, into the folder `cache`.

    Text is prepared again when the tokenizer, the context or the files (path, size, time) change.
    """
    record = tokenizer_record(load_tokenizer(tokenizer))
    if is_prepared(data):
        dataset = ds.open_dataset(data)
        require_same(record, dataset.tokenizer_record, "the model", f"the data {data}")
        if context != dataset.context:
            raise UserError(
                f"the model's context is {context}, but {data} was prepared for {dataset.context}: "
                f"prepare it again with --context {context} or choose a model of context {dataset.context}"
            )
        return dataset
    identities = [source.identity() for source in open_sources([data])]
    key = json.dumps(
        [ds.FORMAT, record["sha256"], context, VALID_FRACTION, VALID_FRACTION_OF_FEW, identities]
    )
    label = re.sub(r"[^A-Za-z0-9]+", "-", Path(data).name).strip("-") or "text"
    out = cache / f"{label}-{hashlib.sha256(key.encode()).hexdigest()[:12]}"
    if not out.exists():
        print(f"preparing {data} with the tokenizer {tokenizer}, once, into {out}", flush=True)
        prepare([data], out, tokenizer, context)
    return ds.open_dataset(out)


@dataclasses.dataclass
class _Batch:
    """Neighbouring documents in the order in which they are read; a list has an entry for each."""

    splits: list[str]
    bytes: list[int]
    """Length of the text in UTF-8."""
    seen: list[tuple[int, int, int]]
    """Empty documents, repaired documents and training sources met until then, this one's included."""


class _Plan:
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
        names = [ds.TRAIN, *heldout] + ([VALID] if fraction else [])
        self.documents = dict.fromkeys(names, 0)
        self.bytes = dict.fromkeys(names, 0)
        self.packers: dict[str, Packer] = {}
        self.dropped = {"empty_documents": 0, "repaired_documents": 0, "train_tokens_at_end": 0}
        self._met = (0, 0, 0)  # as `_Batch.seen`, of what is read
        self._sources_taken = 0
        self._position = 0  # of `size`

    def batches(self) -> Iterator[tuple[_Batch, list[bytes]]]:
        """Documents, about `BATCH_BYTES` of them together."""
        batch, documents, size = _Batch([], [], []), [], 0
        for split, text in self._assigned():
            batch.splits.append(split)
            batch.bytes.append(len(text))
            batch.seen.append(self._met)
            documents.append(text)
            size += len(text)
            if size >= BATCH_BYTES:
                yield batch, documents
                batch, documents, size = _Batch([], [], []), [], 0
        if documents:
            yield batch, documents

    def take(self, batch: _Batch, lengths: np.ndarray) -> int:
        """How many documents of the next batch are taken, all unless reading ends in it; counts them.

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
        return n

    @property
    def is_full(self) -> bool:
        """Whether the train split has the tokens that were asked for."""
        return self.train_tokens is not None and self.packers[ds.TRAIN].tokens >= self.train_tokens

    def finish(self, eos: int) -> Iterator[tuple[str, np.ndarray]]:
        """The last windows of the held-out splits, filled up with `eos`."""
        if not self.is_full:
            self._count(self._met)  # with the empty documents behind the last one
        self.dropped["train_tokens_at_end"] = self.packers[ds.TRAIN].rest
        for split, packer in self.packers.items():
            if split != ds.TRAIN:
                yield split, packer.last(fill=eos)

    def done(self) -> float:
        """The part of the work that is done, about: of the tokens asked for, or of the text."""
        asked = self.packers[ds.TRAIN].tokens / self.train_tokens if self.train_tokens else 0
        return min(1.0, max(asked, self._position / max(self.size, 1)))

    def sources_read(self) -> list[str]:
        """Names of the training sources that were read; others lie behind the end."""
        return [source.name for source in self.train[: self._sources_taken]]

    def _count(self, seen: tuple[int, int, int]) -> None:
        self.dropped["empty_documents"], self.dropped["repaired_documents"], self._sources_taken = seen

    def _assigned(self) -> Iterator[tuple[str, bytes]]:
        for name, group in self.heldout.items():
            for text in self._clean(group):
                yield name, text.encode()
        for text in self._clean(self.train, training=True):
            if self.few:
                cut = int(len(text) * (1 - self.fraction))
                cut = cut_point(text, cut, within=(len(text) - cut) // 4)
                # The end goes first: where the document is the last one taken, both parts of it are.
                for split, part in ((VALID, text[cut:]), (ds.TRAIN, text[:cut])):
                    if part.strip():
                        yield split, part.encode()
            else:
                document = text.encode()
                held = self.fraction > 0 and _hash01(document) < self.fraction
                yield VALID if held else ds.TRAIN, document

    def _clean(self, group: list[Source], training: bool = False) -> Iterator[str]:
        before = self._position
        empty, repaired, sources = self._met
        for source in group:
            sources += training
            for text, position in source.documents():
                self._position = before + position
                if text.strip():
                    whole = SURROGATES.sub("\ufffd", text)
                    repaired += whole != text
                    self._met = empty, repaired, sources
                    yield whole
                else:
                    empty += 1
            self._met = empty, repaired, sources
            before += source.size

    def counts(self) -> list[ds.Split]:
        return [
            ds.Split(name, self.documents[name], self.bytes[name], packer.tokens, packer.windows)
            for name, packer in self.packers.items()
        ]


def _make_plan(
    sources: list[str], valid: dict[str, str], fraction: float | None, train_tokens: int | None, field: str
) -> _Plan:
    if fraction is not None and valid:
        raise UserError("--valid and --valid-fraction exclude each other: leave one of them out")
    if fraction is not None and not 0 <= fraction < 1:
        raise UserError(f"--valid-fraction is {fraction}; it must lie in [0, 1)")
    for name in valid:
        if not re.fullmatch(r"[A-Za-z0-9_-]+", name) or name in (ds.TRAIN, "all"):
            raise UserError(
                f"--valid {name}=...: a name has letters, digits, _ and -, and is not train or all"
            )
    heldout = {name: open_sources([path], field) for name, path in valid.items()}
    held = {source.identity(): name for name, group in heldout.items() for source in group}
    train = []
    for source in open_sources(sources, field):
        if source.identity() in held:
            print(f"{source.name} is held out as {held[source.identity()]}, so it does not train")
        else:
            train.append(source)
    if not train:
        raise UserError("there is nothing to train on: every source is also held out by --valid")
    if valid:
        return _Plan(train, heldout, 0.0, False, train_tokens)
    few = fraction != 0 and _fewer_than(FEW_DOCUMENTS, train)
    if fraction is None:
        fraction = VALID_FRACTION_OF_FEW if few else VALID_FRACTION
    return _Plan(train, heldout, fraction, few, train_tokens)


def _fewer_than(n: int, sources: list[Source]) -> bool:
    documents = (text for source in sources for text, _ in source.documents() if text.strip())
    return all(count < n for count, _ in enumerate(documents, start=1))


def _hash01(document: bytes) -> float:
    """A number in [0, 1) that depends on the document's text alone."""
    return int.from_bytes(hashlib.sha256(document).digest()[:8], "big") / 2**64


def _write(folder: Path, plan: _Plan, tokenizer: str, context: int, workers: int) -> None:
    """Tokenises and writes all splits, and counts them in `plan`."""
    names = list(plan.documents)
    plan.packers = {name: Packer(context) for name in names}
    writer = WindowWriter(folder, context, names)
    encoded = encode_batches(plan.batches(), tokenizer, workers)
    with _Progress() as progress, contextlib.closing(encoded):
        for batch, ids, lengths in encoded:
            n = plan.take(batch, lengths)
            owners = np.repeat([names.index(split) for split in batch.splits[:n]], lengths[:n])
            for owner in np.unique(owners):
                split = names[owner]
                writer.write(split, plan.packers[split].add(ids[: len(owners)][owners == owner]))
            progress.update(plan.done(), tokens=len(owners), text_bytes=sum(plan.bytes.values()))
            if plan.is_full:
                break
    for split, window in plan.finish(load_tokenizer(tokenizer).eos):
        writer.write(split, window)
    for split, packer in plan.packers.items():
        if packer.windows == 0:
            need = context + 1 if split == ds.TRAIN else 1
            raise UserError(
                f"the split {split!r} is empty: its {plan.documents[split]} documents give "
                f"{packer.tokens} tokens, and {need} are needed; give more text"
                + (", a shorter --context" if split == ds.TRAIN else " or another --valid-fraction")
            )
    writer.close()


@contextlib.contextmanager
def _partial_folder(out: Path) -> Iterator[Path]:
    """A folder beside `out` to write into, removed on any failure. What a killed run left goes, too.

    A run holds a lock on its own; the kernel lets it go however the run ends.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    for stale in out.parent.glob(f".{glob.escape(out.name)}.partial-*"):
        with _locked(stale):
            shutil.rmtree(stale)
    folder = out.parent / f".{out.name}.partial-{os.getpid()}"
    folder.mkdir()
    try:
        with _locked(folder):
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise UserError(f"another process is writing {folder}: wait for it to end, or stop it") from None
    finally:
        os.close(handle)


class _Progress:
    """Rate and time left: a bar on a terminal, a line now and then elsewhere. A context manager."""

    LINE_EVERY = 10.0  # seconds

    def __init__(self) -> None:
        self._tokens = 0
        self._started = self._last_line = time.monotonic()
        self._console = Console()
        self._bar = rich.progress.Progress(
            rich.progress.BarColumn(),
            rich.progress.TaskProgressColumn(),
            rich.progress.TextColumn("{task.description}"),
            rich.progress.TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task("reading", total=1.0)

    def __enter__(self) -> "_Progress":
        self._bar.start()
        return self

    def __exit__(self, *_) -> None:
        self._bar.stop()

    def update(self, done: float, tokens: int, text_bytes: int) -> None:
        """done: part of the work, 0 to 1; tokens: new ones; text_bytes: of text, so far."""
        self._tokens += tokens
        now = time.monotonic()
        seconds = max(now - self._started, 1e-3)
        rates = f"{self._tokens / seconds / 1e3:,.0f}k tokens/s, {text_bytes / seconds / 1e6:.1f} MB/s"
        if self._console.is_terminal:
            self._bar.update(self._task, completed=done, description=rates)
        elif now - self._last_line >= self.LINE_EVERY:
            self._last_line = now
            left = seconds * (1 - done) / max(done, 1e-9)
            print(f"{done:4.0%} read, {rates}, {left:.0f} s left", flush=True)


def _print_summary(dataset: ds.Dataset, dropped: dict[str, int], train_tokens: int | None) -> None:
    table = Table(title=f"tokenizer {dataset.tokenizer_record['name']}, context {dataset.context}")
    table.add_column("split")
    for column in ("documents", "bytes", "tokens", "bytes/token", "windows"):
        table.add_column(column, justify="right")
    for split in dataset.splits.values():
        counts = (f"{n:,}" for n in (split.documents, split.bytes, split.tokens))
        table.add_row(split.name, *counts, f"{split.bytes / split.tokens:.3f}", f"{split.windows:,}")
    Console().print(table)
    print(
        f"left out: {dropped['empty_documents']:,} empty documents and the last "
        f"{dropped['train_tokens_at_end']:,} tokens of train, which fill no window"
    )
    if train_tokens is not None:
        found = dataset.splits[ds.TRAIN].tokens
        print(
            f"train was to reach {train_tokens:,} tokens: "
            + (f"read no further than {found:,}" if found >= train_tokens else f"all the text has {found:,}")
        )
    if dropped["repaired_documents"]:
        print(f"repaired: {dropped['repaired_documents']:,} documents with lone surrogates (now U+FFFD)")


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    config = tyro.cli(PrepareConfig, args=argv, prog="python -m train_tpu.prepare", description=__doc__)
    if not config.sources:
        raise UserError("no text is given: name files, folders, `builtin`, `tfds:NAME` or `hf:DATASET`")
    pairs = [pair.partition("=") for pair in config.valid]
    for name, _, path in pairs:
        if not path:
            raise UserError(f"--valid {name} has no path: write NAME=PATH")
    if len({name for name, _, _ in pairs}) < len(pairs):
        raise UserError("two --valid sets have one name: give each its own")
    options = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    options |= {"sources": list(config.sources), "valid": {name: path for name, _, path in pairs}}
    try:
        prepare(**options)
    except KeyboardInterrupt:
        print(f"interrupted: {config.out} was not made", file=sys.stderr)
        return 130
    print(f"\nnext: python -m train_tpu.run --data {config.out} --tokenizer {config.tokenizer}")
    return 0


if __name__ == "__main__":
    run_command(main)
