"""Text to training data, once; `python -m train_tpu.prepare` is the command.

Every document becomes `<s>` tokens `</s>`; a split's documents joined are one stream, which is cut into
windows of context + 1 tokens (`packing`) and written as ArrayRecord. Documents are read here, tokenised
by worker processes and written here, in order: the result does not depend on the number of workers.
"""

import contextlib
import fcntl
import glob
import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from core import checks
from core.data import dataset as ds
from core.data.formats import Form
from core.data.packing import Packer, WindowWriter, encode_batches
from core.data.sources import open_sources
from core.data.splits import VALID_FRACTION, VALID_FRACTION_OF_FEW, Plan, make_plan
from core.errors import UserError
from core.file_tokenizer import keeps_text
from core.folders import require_new
from core.progress import Activity
from core.tokenizer import (
    TOKENIZER_FILE,
    Tokenizer,
    identity,
    load_tokenizer,
    load_tokenizer_of,
    open_tokenizer,
    require_same,
    tokenizer_record,
)


def prepare(
    sources: list[str],
    out: Path,
    tokenizer: str,
    context: int,
    valid: dict[str, str] | None = None,
    valid_fraction: float | None = None,
    train_tokens: int | None = None,
    field: str = "text",
    format: Form | None = None,
    workers: int | None = None,
) -> Path:
    """Prepares `sources` into the new folder `out` and returns it.

    `train_tpu.prepare.PrepareConfig` describes the arguments.
    Nothing called `out` exists before all of it is written. A `UserError` for input that cannot be used.
    """
    checks.counts(context=context, workers=workers)
    checks.counts(most=2**63, train_tokens=train_tokens)
    require_new(out)
    with Activity("looking at the text", console=Console()):
        plan = make_plan(sources, valid or {}, valid_fraction, train_tokens, field, format)
    loaded = load_tokenizer(tokenizer)
    n_workers = len(os.sched_getaffinity(0)) if workers is None else workers
    with Activity(f"preparing {out}", console=Console()), _partial_folder(out) as folder:
        try:
            loaded.carry(folder)
            _write(folder, plan, loaded, context, n_workers)
            opened = ds.write_manifest(
                folder,
                context,
                tokenizer_record(loaded),
                plan.counts(),
                plan.dropped,
                plan.sources_read(),
                train_tokens,
            )
        except OSError as error:
            raise UserError(
                f"{out} could not be written ({error}): make room or choose another --out"
            ) from error
        folder.rename(out)
    _print_summary(opened, plan, train_tokens)
    if not keeps_text(loaded):
        print(
            f"note: the tokenizer {tokenizer} does not keep all of a text (unknown characters, blanks or "
            "capitals), so bits per byte, which divide by all bytes, do not compare with those of others"
        )
    return out


def is_prepared(data: str) -> bool:
    """Whether `data` names a prepared folder, and not text."""
    return (Path(data) / ds.MANIFEST).is_file()


def choose_tokenizer(given: str | None, data: str, default: str) -> Tokenizer:
    """The tokenizer that the user names, else that of prepared data, else the one named `default`."""
    if given is None and is_prepared(data):
        dataset = ds.open_dataset(data)
        return load_tokenizer_of(dataset.tokenizer_record, [dataset.path], f"the data {data}")
    return open_tokenizer(default if given is None else given)


def open_or_prepare(data: str, tokenizer: str, context: int, cache: Path) -> ds.Dataset:
    """The dataset `data` names: a prepared folder, or text that is prepared once, into the folder `cache`.

    Text is prepared again when the tokenizer, the context or the files (path, size, time) change.
    """
    record = tokenizer_record(load_tokenizer(tokenizer))
    if is_prepared(data):
        dataset = open_prepared(Path(data))
        require_same(record, dataset.tokenizer_record, "the model", f"the data {data}")
        if context != dataset.context:
            raise UserError(
                f"the model's context is {context}, but {data} was prepared for {dataset.context}: "
                f"prepare it again with --context {context} or choose a model of context {dataset.context}"
            )
        return dataset
    identities = [source.identity() for source in open_sources([data], say=lambda _: None)]
    key = json.dumps(
        [ds.FORMAT, *identity(record), context, VALID_FRACTION, VALID_FRACTION_OF_FEW, identities]
    )
    label = re.sub(r"[^A-Za-z0-9]+", "-", Path(data).name).strip("-") or "text"
    out = cache / f"{label}-{hashlib.sha256(key.encode()).hexdigest()[:12]}"
    with _prepared_by_one(out):
        if not out.exists():
            print(f"preparing {data} with the tokenizer {tokenizer}, once, into {out}", flush=True)
            prepare([data], out, tokenizer, context)
    return open_prepared(out)


def open_prepared(path: Path) -> ds.Dataset:
    """The prepared dataset; says what is not proved of one that an older version made."""
    dataset = ds.open_dataset(path)
    if not dataset.sealed:
        print(
            f"note: an older version prepared {path}, so its counts of bytes, by which bits per byte are "
            "computed, carry no hash and cannot be checked; prepared again they do",
            file=sys.stderr,
        )
    return dataset


@contextlib.contextmanager
def _prepared_by_one(out: Path) -> Iterator[None]:
    """Waits, and says so, while another process prepares the same text into `out`.

    The kernel lets the lock go however that one ends.
    """
    if out.exists():
        yield
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    with (out.parent / f".{out.name}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for another process, which prepares the same text into {out}", flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _write(folder: Path, plan: Plan, tokenizer: Tokenizer, context: int, workers: int) -> None:
    """Tokenises and writes all splits, and counts them in `plan`."""
    names = list(plan.documents)
    plan.packers = {name: Packer(context, tokenizer.dtype) for name in names}
    writer = WindowWriter(folder, context, names, tokenizer.dtype)
    name = tokenizer.named_for(folder / TOKENIZER_FILE)
    encoded = encode_batches(plan.batches(), name, tokenizer.dtype, workers)
    with Activity("tokenizing", 1.0) as progress, contextlib.closing(encoded):
        for batch, ids, lengths in encoded:
            n = plan.take(batch, lengths)
            owners = np.repeat([names.index(split) for split in batch.splits[:n]], lengths[:n])
            for owner in np.unique(owners):
                split = names[owner]
                writer.write(split, plan.packers[split].add(ids[: len(owners)][owners == owner]))
            done, seconds = plan.done(), progress.work
            thousands = sum(packer.tokens for packer in plan.packers.values()) / seconds / 1e3
            megabytes = sum(plan.bytes.values()) / seconds / 1e6
            text = f"{done:.0%}, {thousands:,.0f}k tokens/s, {megabytes:.1f} MB/s"
            progress.advance(done - progress.done, text)
            if plan.is_full:
                break
    for split, window in plan.finish(tokenizer.eos):
        writer.write(split, window)
    for split, packer in plan.packers.items():
        if packer.windows == 0:
            need = context + 1 if split == ds.TRAIN else 1
            raise UserError(
                f"the split {split!r} is empty: its {plan.documents[split]} documents give "
                f"{packer.tokens} tokens, and {need} are needed; give more text"
                + (" or a shorter context" if split == ds.TRAIN else " or hold out a larger part of it")
            )
    writer.close()


@contextlib.contextmanager
def _partial_folder(out: Path) -> Iterator[Path]:
    """A folder next to `out` to write into, removed on any failure. What a killed run left goes, too.

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


def _print_summary(dataset: ds.Dataset, plan: Plan, train_tokens: int | None) -> None:
    dropped = plan.dropped
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
        f"{dropped['train_tokens_at_end']:,} tokens of train, which do not fill a window"
    )
    if train_tokens is not None:
        found = dataset.splits[ds.TRAIN].tokens
        print(
            f"train was to reach {train_tokens:,} tokens: "
            + (f"read no further than {found:,}" if found >= train_tokens else f"all the text has {found:,}")
        )
    about = "" if plan.copies_are_exact else "about "
    if n := dropped["copied_documents"]:
        print(f"copies: {about}{n:,} documents are exact copies of earlier ones; they are kept")
    if n := dropped["heldout_documents_in_train"]:
        print(
            f"contamination: {about}{n:,} training documents are exact copies of held-out ones, whose loss "
            "will look too low"
        )
    if dropped["repaired_documents"]:
        print(f"repaired: {dropped['repaired_documents']:,} documents with lone surrogates (now U+FFFD)")
