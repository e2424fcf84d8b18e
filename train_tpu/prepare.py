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
    if out.exists() or out.is_symlink():
        raise UserError(f"{out} exists already: remove it or choose another --out")
    plan = _make_plan(sources, valid or {}, valid_fraction, field)
    record = tokenizer_record(load_tokenizer(tokenizer))
    with _partial_folder(out) as folder:
        try:
            _write(folder, plan, tokenizer, context, workers or len(os.sched_getaffinity(0)))
            splits, dropped = plan.counts(), plan.dropped
            opened = ds.write_manifest(folder, context, record, splits, dropped, plan.source_names)
        except OSError as error:
            raise UserError(
                f"{out} could not be written ({error}): make room or choose another --out"
            ) from error
        folder.rename(out)
    _print_summary(opened, dropped)
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


class _Plan:
    """Which document goes into which split, and what was counted on the way."""

    def __init__(
        self, train: list[Source], heldout: dict[str, list[Source]], fraction: float, few: bool
    ) -> None:
        self.train, self.heldout, self.fraction, self.few = train, heldout, fraction, few
        self.size = sum(source.size for source in [*train, *(s for group in heldout.values() for s in group)])
        self.source_names = [source.name for source in train]
        names = [ds.TRAIN, *heldout] + ([VALID] if fraction else [])
        self.documents = dict.fromkeys(names, 0)
        self.bytes = dict.fromkeys(names, 0)
        self.packers: dict[str, Packer] = {}
        self.dropped = {"empty_documents": 0, "repaired_documents": 0, "train_tokens_at_end": 0}
        self.position = 0  # of `size`, for the progress bar

    def batches(self) -> Iterator[tuple[str, list[bytes]]]:
        """(split, documents): about `BATCH_BYTES` each, in order within a split."""
        waiting: dict[str, list[bytes]] = {name: [] for name in self.documents}
        sizes = dict.fromkeys(waiting, 0)
        for split, text in self._assigned():
            self.documents[split] += 1
            self.bytes[split] += len(text)
            waiting[split].append(text)
            sizes[split] += len(text)
            if sizes[split] >= BATCH_BYTES:
                yield split, waiting[split]
                waiting[split], sizes[split] = [], 0
        yield from ((split, documents) for split, documents in waiting.items() if documents)

    def _assigned(self) -> Iterator[tuple[str, bytes]]:
        for name, group in self.heldout.items():
            for text in self._clean(group):
                yield name, text.encode()
        for text in self._clean(self.train):
            if self.few:
                cut = int(len(text) * (1 - self.fraction))
                cut = cut_point(text, cut, within=(len(text) - cut) // 4)
                for split, part in ((ds.TRAIN, text[:cut]), (VALID, text[cut:])):
                    if part.strip():
                        yield split, part.encode()
            else:
                document = text.encode()
                held = self.fraction > 0 and _hash01(document) < self.fraction
                yield VALID if held else ds.TRAIN, document

    def _clean(self, group: list[Source]) -> Iterator[str]:
        before = self.position
        for source in group:
            for text, position in source.documents():
                self.position = before + position
                if not text.strip():
                    self.dropped["empty_documents"] += 1
                    continue
                repaired = SURROGATES.sub("\ufffd", text)
                self.dropped["repaired_documents"] += repaired != text
                yield repaired
            before += source.size

    def counts(self) -> list[ds.Split]:
        return [
            ds.Split(name, self.documents[name], self.bytes[name], packer.tokens, packer.windows)
            for name, packer in self.packers.items()
        ]


def _make_plan(sources: list[str], valid: dict[str, str], fraction: float | None, field: str) -> _Plan:
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
        return _Plan(train, heldout, fraction=0.0, few=False)
    few = fraction != 0 and _fewer_than(FEW_DOCUMENTS, train)
    if fraction is None:
        fraction = VALID_FRACTION_OF_FEW if few else VALID_FRACTION
    return _Plan(train, heldout, fraction, few)


def _fewer_than(n: int, sources: list[Source]) -> bool:
    documents = (text for source in sources for text, _ in source.documents() if text.strip())
    return all(count < n for count, _ in enumerate(documents, start=1))


def _hash01(document: bytes) -> float:
    """A number in [0, 1) that depends on the document's text alone."""
    return int.from_bytes(hashlib.sha256(document).digest()[:8], "big") / 2**64


def _write(folder: Path, plan: _Plan, tokenizer: str, context: int, workers: int) -> None:
    """Tokenises and writes all splits, and counts them in `plan`."""
    plan.packers = {name: Packer(context) for name in plan.documents}
    writer = WindowWriter(folder, context, list(plan.packers))
    encoded = encode_batches(plan.batches(), tokenizer, workers)
    with _Progress(plan.size) as progress, contextlib.closing(encoded):
        for split, ids in encoded:
            writer.write(split, plan.packers[split].add(ids))
            progress.update(plan.position, tokens=len(ids), text_bytes=sum(plan.bytes.values()))
    eos = load_tokenizer(tokenizer).eos
    for split, packer in plan.packers.items():
        if split == ds.TRAIN:
            plan.dropped["train_tokens_at_end"] = packer.rest
        else:
            writer.write(split, packer.last(fill=eos))
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

    def __init__(self, size: int) -> None:
        self._size = max(size, 1)
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
        self._task = self._bar.add_task("reading", total=self._size)

    def __enter__(self) -> "_Progress":
        self._bar.start()
        return self

    def __exit__(self, *_) -> None:
        self._bar.stop()

    def update(self, position: int, tokens: int, text_bytes: int) -> None:
        """position: of `size`, read so far; tokens: new ones; text_bytes: of text, read so far."""
        self._tokens += tokens
        now = time.monotonic()
        seconds = max(now - self._started, 1e-3)
        rates = f"{self._tokens / seconds / 1e3:,.0f}k tokens/s, {text_bytes / seconds / 1e6:.1f} MB/s"
        if self._console.is_terminal:
            self._bar.update(self._task, completed=position, description=rates)
        elif now - self._last_line >= self.LINE_EVERY:
            self._last_line = now
            left = seconds * (self._size - position) / max(position, 1)
            print(f"{position / self._size:4.0%} read, {rates}, {left:.0f} s left", flush=True)


def _print_summary(dataset: ds.Dataset, dropped: dict[str, int]) -> None:
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
