"""Text to training data, once; `python -m train_tpu.prepare` is the command.

1. Worker processes read the text and tokenise it, in pieces (`pieces`), which stay on the disk.
2. This process goes over what is known of the pieces, in the order of the text: which document goes where,
   and where reading ends (`splits`).
3. The workers write the shards out of the pieces (`packing`).

Everything is a function of the text and the options, and appears whole or not at all: what a preparation that
was interrupted has made is used by the next one, whatever the number of workers, and the result is the same.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Collection, Iterator
from pathlib import Path

from rich.console import Console
from rich.table import Table

from core import checks
from core.data import dataset as ds
from core.data import overlap as overlaps
from core.data import versions
from core.data.formats import Form
from core.data.packing import DATA, Shard, describe, written
from core.data.pieces import Dealer, Job, part_key, tokens_of
from core.data.sources import open_sources
from core.data.splits import VALID, VALID_FRACTION, VALID_FRACTION_OF_FEW, Overlapping, Plan, make_plan
from core.data.workers import Workers
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

SMALLEST_PIECE, LARGEST_PIECE = 1 << 20, 1 << 24
"""Bytes of a piece's text: what a process loses that is killed, and what it holds in memory."""
PIECES = 64  # at least, of what is to be read; none is smaller than that for it
WORTH_KEEPING = 1 << 28
"""Bytes of tokens from which on what an error ends is kept, to be resumed when its cause is gone."""


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
    template: str | None = None,
    dedup: bool = False,
    overlap: Overlapping | None = None,
    eval_items: list[str] | None = None,
) -> Path:
    """Prepares `sources` into the new folder `out` and returns it.

    `train_tpu.prepare.PrepareConfig` describes the arguments.
    Nothing called `out` exists before all of it is written; what is interrupted is resumed by the next call.
    A `UserError` for input that cannot be used.
    """
    checks.counts(context=context, workers=workers)
    checks.counts(most=2**63, train_tokens=train_tokens)
    if out.is_dir() and not (_work(out) / DATA).exists():
        shutil.rmtree(_work(out), ignore_errors=True)  # a run that was killed when all was done left it
    require_new(out)
    with Activity("looking at the text", console=Console()):
        plan = make_plan(
            sources, valid or {}, valid_fraction, train_tokens, field, format, template, dedup, overlap,
            eval_items,
        )  # fmt: skip
    loaded = load_tokenizer(tokenizer)
    n_workers = len(os.sched_getaffinity(0)) if workers is None else workers
    opened = _make(out, plan, loaded, context, n_workers, None)
    _print_summary(opened, plan, train_tokens)
    if not keeps_text(loaded):
        print(
            f"note: the tokenizer {tokenizer} does not keep all of a text (unknown characters, blanks or "
            "capitals), so bits per byte, which divide by all bytes, do not compare with those of others"
        )
    return out


def append(
    sources: list[str],
    out: Path,
    tokenizer: str | None = None,
    context: int | None = None,
    train_tokens: int | None = None,
    field: str = "text",
    format: Form | None = None,
    workers: int | None = None,
    template: str | None = None,
    dedup: bool = False,
    overlap: Overlapping | None = None,
    eval_items: list[str] | None = None,
) -> Path:
    """Makes a new version of the prepared folder `out`, which has `sources` as well; its folder.

    The arguments are those of `prepare`, but `tokenizer` and `context` need not be given: they are those of
    `out`. A `UserError` for others, or for input that cannot be used.
    """
    checks.counts(context=context, workers=workers)
    checks.counts(most=2**63, train_tokens=train_tokens)
    if not is_prepared(str(out)):
        raise UserError(f"--append {out} is no prepared data: make it with --out, or name a folder that is")
    parent = ds.open_dataset(versions.version_paths(out)[-1])
    if context not in (None, parent.context):
        raise UserError(
            f"{out} has windows of {parent.context} tokens, not {context}: append without --context, or "
            "prepare all of the text anew with --out"
        )
    if tokenizer is not None:
        given = tokenizer_record(load_tokenizer(tokenizer))
        require_same(given, parent.tokenizer_record, "--tokenizer", f"the data {out}")
    loaded = load_tokenizer_of(parent.tokenizer_record, [parent.path], f"the data {out}")
    new = out / f"v{parent.version + 1}"
    require_new(new)
    with Activity("looking at the text", console=Console()):
        plan = make_plan(sources, {}, 0.0, train_tokens, field, format, template, dedup, overlap, eval_items)
        _read_back(parent, plan, loaded)
    n_workers = len(os.sched_getaffinity(0)) if workers is None else workers
    opened = _make(new, plan, loaded, parent.context, n_workers, parent)
    _print_summary(opened, plan, train_tokens)
    print(
        f"{out} now has version {opened.version}, {opened.fingerprint[:12]}: new runs read it, and runs that "
        f"began on version {parent.version} continue with that"
    )
    return new


def _read_back(parent: ds.Dataset, plan: Plan, tokenizer: Tokenizer) -> None:
    """Tells `plan` which documents `parent` has already, as far as that matters."""
    if not keeps_text(tokenizer):
        print(
            "note: the tokenizer does not keep all of a text, so copies of the documents there are not found"
        )
        return
    for split in parent.splits:
        if split != ds.TRAIN or plan.dedup:
            for hashes in versions.document_hashes(parent, split, tokenizer):
                plan.count_as_seen(hashes) if split == ds.TRAIN else plan.leave_out(hashes)


def _make(
    out: Path, plan: Plan, tokenizer: Tokenizer, context: int, n_workers: int, parent: ds.Dataset | None
) -> ds.Dataset:
    """Makes the folder `out` of what is planned, and of what `parent` has."""
    with Activity(f"preparing {out}", console=Console()), _work_folder(out) as folder:
        try:
            data = folder / DATA
            data.mkdir(exist_ok=True)
            tokenizer.carry(data)
            _write(folder, plan, tokenizer, context, n_workers, parent)
            splits, dropped, sources = plan.counts(context), plan.dropped, plan.sources_read()
            if parent is not None:
                splits = [_sum(parent.splits[ds.TRAIN], splits[0]), *list(parent.splits.values())[1:]]
                names = dict.fromkeys([*parent.dropped, *dropped])
                dropped = {name: parent.dropped.get(name, 0) + dropped.get(name, 0) for name in names}
                sources = [*parent.sources, *sources]
            record = tokenizer_record(tokenizer)
            limit = plan.train_tokens
            ds.write_manifest(data, context, record, splits, dropped, sources, limit, parent)
        except OSError as error:
            raise UserError(
                f"{out} could not be written ({error}): make room or choose another --out"
            ) from error
        data.rename(out)
    return ds.open_dataset(out)


def _sum(a: ds.Split, b: ds.Split) -> ds.Split:
    counts = {
        name: getattr(a, name) + getattr(b, name) for name in ("documents", "bytes", "tokens", "windows")
    }
    return ds.Split(a.name, **counts)


def is_prepared(data: str) -> bool:
    """Whether `data` names a prepared folder, and not text."""
    return (Path(data) / ds.MANIFEST).is_file()


def choose_tokenizer(given: str | None, data: str, default: str) -> Tokenizer:
    """The tokenizer that the user names, else that of prepared data, else the one named `default`."""
    if given is None and is_prepared(data):
        dataset = ds.open_dataset(data)
        return load_tokenizer_of(dataset.tokenizer_record, [dataset.path], f"the data {data}")
    return open_tokenizer(default if given is None else given)


def open_or_prepare(
    data: str, tokenizer: str, context: int, cache: Path, wanted: Collection[str] = ()
) -> ds.Dataset:
    """The dataset `data` names: a prepared folder, or text that is prepared once, into the folder `cache`.

    wanted: fingerprints, of which a folder may have an older version (`core.data.versions`).

    Text is prepared again when the tokenizer, the context or the files (path, size, time) change.
    """
    record = tokenizer_record(load_tokenizer(tokenizer))
    if is_prepared(data):
        dataset = open_prepared(Path(data), wanted)
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


def open_prepared(path: Path, wanted: Collection[str] = ()) -> ds.Dataset:
    """The version of prepared data that is wanted, else the newest; says what is not proved of one that an
    older version of the program made."""
    dataset = versions.open_version(path, wanted)
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


def _write(
    folder: Path, plan: Plan, tokenizer: Tokenizer, context: int, n_workers: int, parent: ds.Dataset | None
) -> None:
    """Tokenises and writes all splits behind those of `parent`, and counts them in `plan`."""
    before = {} if parent is None else versions.described(parent)
    expected = plan.size if plan.train_tokens is None else min(plan.size, 4 * plan.train_tokens)
    piece_bytes = max(SMALLEST_PIECE, min(expected // PIECES, LARGEST_PIECE))
    record = identity(tokenizer_record(tokenizer))
    heldout_runs = None if plan.overlap is None else _gather_runs(folder, plan)
    compared_with = "" if heldout_runs is None else hashlib.sha256(heldout_runs.read_bytes()).hexdigest()
    job = Job(
        folder,
        tokenizer.named_for(folder / DATA / TOKENIZER_FILE),
        plan.parts,
        [part_key(part, record, piece_bytes, compared_with) for part in plan.parts],
        piece_bytes,
        heldout_runs,
    )
    n_workers = min(n_workers, 1 + expected // (SMALLEST_PIECE // 4))  # more would find nothing to do
    with Workers(n_workers, job) as workers:
        _tokenize(job, plan, workers)
        plan.finish(context)
        _require_text(plan, context)
        shards = plan.shards(
            context,
            tokenizer.eos,
            tokenizer.dtype,
            lambda *piece: tokens_of(job.path(*piece)).name,
            first={split: len(lengths) for split, (lengths, _) in before.items()},
        )
        sizes = _write_shards(folder, [shard for group in shards.values() for shard in group], workers)
    names = {TOKENIZER_FILE, *sizes}
    for file in (folder / DATA).iterdir():  # what was begun under other options, or half written
        if file.name not in names:
            file.unlink()
    described = before | {
        split: ([shard.windows for shard in group], sum(sizes[shard.name] for shard in group))
        for split, group in shards.items()
    }
    if parent is not None:
        for split in shards:
            described[split] = tuple(a + b for a, b in zip(before[split], described[split], strict=True))
        versions.link_shards(parent, folder / DATA)
    describe(folder / DATA, context, tokenizer.dtype, described)


def _gather_runs(folder: Path, plan: Plan) -> Path:
    """Writes what the training text is compared with; the file."""
    path = folder / "heldout-runs.npy"
    with Activity("reading held-out text"):
        runs = overlaps.gather(text for group in plan.compared.values() for text in overlaps.texts_of(group))
    if not len(runs):
        raise UserError(
            f"no text of --valid or --eval-items has {overlaps.N} words, so --overlap has nothing to look for"
        )
    overlaps.save(runs, path)
    return path


def _require_text(plan: Plan, context: int) -> None:
    """A UserError if a split has no window."""
    left_out = [
        (plan.dropped.get("rows_without_text", 0), "rows have no text in the field"),
        (plan.dropped.get("duplicate_documents", 0), "documents are copies, which --dedup leaves out"),
        (plan.dropped.get("overlapping_documents_left_out", 0), "documents overlap with held-out text"),
    ]
    but = "".join(f"; {n:,} {what}" for n, what in left_out if n)
    for split in plan.counts(context):
        if split.windows == 0:
            need = context + 1 if split.name == ds.TRAIN else 1
            raise UserError(
                f"the split {split.name!r} is empty: its {split.documents} documents give "
                f"{split.tokens} tokens, and {need} are needed{but}; give more text"
                + (" or a shorter context" if split.name == ds.TRAIN else " or hold out a larger part of it")
            )


def _tokenize(job: Job, plan: Plan, workers: Workers) -> None:
    """Makes the pieces, and has `plan` take them."""
    dealer = Dealer(job, in_order=plan.train_tokens is not None)

    def take() -> bool:
        """Takes what comes next and is made; whether that is all that is needed."""
        for piece in dealer.in_order():
            plan.take(*piece)
            if plan.is_full:
                return True
        return dealer.is_done

    if take():
        return
    if before := sum(plan.tokens.values()):
        print(f"resuming: {before:,} tokens ({plan.done():.0%}) were made before", flush=True)
    begun, bytes_before = plan.done(), sum(plan.bytes.values())
    results = workers.results(dealer.next_task)
    with Activity("tokenizing", 1.0, done=begun) as progress, contextlib.closing(results):
        for task, there_is in results:
            dealer.made(task, there_is)
            done = take()
            seconds = progress.work
            thousands = (sum(plan.tokens.values()) - before) / seconds / 1e3
            megabytes = (sum(plan.bytes.values()) - bytes_before) / seconds / 1e6
            text = f"{plan.done():.0%}, {thousands:,.0f}k tokens/s, {megabytes:.1f} MB/s"
            progress.advance(plan.done() - progress.done, text)
            if done:
                break


def _write_shards(folder: Path, shards: list[Shard], workers: Workers) -> dict[str, int]:
    """Has those written that are not; the bytes of each one's records, by its name."""
    sizes = {shard.name: size for shard in shards if (size := written(shard, folder)) is not None}
    left = iter([shard for shard in shards if shard.name not in sizes])
    with Activity("writing", len(shards), "shards", done=len(sizes)) as progress:
        for shard, size in workers.results(lambda _: next(left, None)):
            sizes[shard.name] = size
            progress.advance()
    return sizes


@contextlib.contextmanager
def _work_folder(out: Path) -> Iterator[Path]:
    """A folder next to `out` to work in, as an interrupted run left it; removed at the end.

    It stays where this run is interrupted, or where an error ends much work. A run holds a lock on it, which
    the kernel lets go however the run ends.
    """
    folder = _work(out)
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder):
        keep = False
        try:
            yield folder
        except BaseException as error:
            made = sum(file.stat().st_size for file in folder.glob("*.tokens"))
            keep = made >= (1 if isinstance(error, KeyboardInterrupt) else WORTH_KEEPING)
            if keep and isinstance(error, UserError):
                raise UserError(
                    f"{error} (what is done is kept in {folder}: the next run of this --out resumes there)"
                ) from error
            raise
        finally:
            if not keep:
                shutil.rmtree(folder, ignore_errors=True)


def _work(out: Path) -> Path:
    return out.absolute().parent / f".{out.name}.partial"


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
    without = dropped.get("rows_without_text", 0)
    rows = f"{without:,} rows of which a field is missing or null, " if without else ""
    print(
        f"left out: {rows}{dropped['empty_documents']:,} empty documents and the last "
        f"{dropped['train_tokens_at_end']:,} tokens of train, which do not fill a window"
    )
    if train_tokens is not None:
        found = dataset.splits[ds.TRAIN].tokens
        print(
            f"train was to reach {train_tokens:,} tokens: "
            + (f"read no further than {found:,}" if found >= train_tokens else f"all the text has {found:,}")
        )
    if n := dropped.get("heldout_documents_left_out"):
        print(f"left out: {n:,} documents that are exact copies of held-out ones")
    if (n := dropped.get("duplicate_documents")) is not None:
        print(f"left out: {n:,} documents that are exact copies of earlier ones (--dedup)")
    if plan.overlap is not None:
        _print_overlap(plan)
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


def _print_overlap(plan: Plan) -> None:
    n, runs = plan.dropped["overlapping_documents"], plan.shared_runs()
    left = "they are left out" if plan.overlap == "drop" else "they are kept (--overlap drop leaves them out)"
    print(f"overlap: {n:,} training documents share a run of {overlaps.N} words with held-out text; {left}")
    for name, group in plan.compared.items():
        touched, short, total = overlaps.touched(overlaps.texts_of(group), runs)
        print(
            f"  {name}: {touched:,} of {total:,} texts share one; {short:,} have fewer than {overlaps.N} "
            "words, and cannot be looked for"
        )
    if VALID in plan.documents:
        print(f"  the split {VALID}, held out by hash, is not looked for: --valid NAME=PATH sets are")
