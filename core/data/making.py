"""Text to a prepared folder, step by step, each of which resumes where an earlier process was when it ended.

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
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from core.console import make_console
from core.data import dataset as ds
from core.data import overlap, versions
from core.data.packing import DATA, Shard, write_description, written_size
from core.data.pieces import Dealer, Job, part_key, tokens_of
from core.data.splits import Plan
from core.data.workers import Workers
from core.errors import UserError
from core.progress import Activity
from core.tokenizer import TOKENIZER_FILE, Tokenizer, identity, tokenizer_record

SMALLEST_PIECE, LARGEST_PIECE = 1 << 20, 1 << 24
"""Bytes of a piece's text: what a process loses that is killed, and what it holds in memory."""
FEWEST_PIECES = 64  # at least, of what is to be read; none is smaller than that for it
WORTH_KEEPING = 1 << 28
"""Bytes of tokens from which on what an error ends is kept, to be resumed when its cause is gone."""


def make(
    out: Path, plan: Plan, tokenizer: Tokenizer, context: int, workers: int | None, parent: ds.Dataset | None
) -> ds.Dataset:
    """Makes the folder `out` of what is planned, and of what `parent` has; opens it.

    workers: processes that read, tokenise and write. Default: one for each core.

    Raises:
        UserError: the text cannot be used, a split is empty, or the disk refuses.
    """
    n_workers = len(os.sched_getaffinity(0)) if workers is None else workers
    with Activity(f"preparing {out}", console=make_console()), _work_folder(out) as folder:
        try:
            data = folder / DATA
            data.mkdir(exist_ok=True)
            tokenizer.carry(data)
            _write(folder, plan, tokenizer, context, n_workers, parent)
            splits, dropped, sources = plan.counts(context), plan.dropped, plan.sources_read()
            ends = plan.ends_held_out()
            if parent is not None:
                splits = [_sum(parent.splits[ds.TRAIN], splits[0]), *list(parent.splits.values())[1:]]
                names = dict.fromkeys([*parent.dropped, *dropped])
                dropped = {name: parent.dropped.get(name, 0) + dropped.get(name, 0) for name in names}
                sources = [*parent.sources, *sources]
                ends = parent.ends_held_out
            record = tokenizer_record(tokenizer)
            limit = plan.train_tokens
            ds.write_manifest(data, context, record, splits, dropped, sources, limit, parent, ends)
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


def _write(
    folder: Path, plan: Plan, tokenizer: Tokenizer, context: int, n_workers: int, parent: ds.Dataset | None
) -> None:
    """Tokenises and writes all splits behind those of `parent`, and counts them in `plan`."""
    before = {} if parent is None else versions.described(parent)
    expected = plan.size if plan.train_tokens is None else min(plan.size, 4 * plan.train_tokens)
    piece_bytes = max(SMALLEST_PIECE, min(expected // FEWEST_PIECES, LARGEST_PIECE))
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
    _write_overlap(folder / DATA, plan, parent)
    write_description(folder / DATA, context, tokenizer.dtype, described)


def _gather_runs(folder: Path, plan: Plan) -> Path:
    """Writes what the training text is compared with; the file."""
    path = folder / "heldout-runs.npy"
    with Activity("reading held-out text"):
        runs = overlap.gather(text for group in plan.compared.values() for text in overlap.texts_of(group))
    if not len(runs):
        raise UserError(
            f"no text of --valid or --eval-items has {overlap.N} words, so --overlap has nothing to look for"
        )
    overlap.save(runs, path)
    return path


def _write_overlap(data: Path, plan: Plan, parent: ds.Dataset | None) -> None:
    """Writes which held-out texts share runs with the training text, of `parent` and this one.

    Nothing where part of the training text was not compared.
    """
    before = None if parent is None else parent.overlap_record()
    if plan.overlap is None or (parent is not None and before is None):
        return
    record = plan.overlap_record()
    overlap.save(record if before is None else overlap.joint(before, record), data / overlap.RECORD)


def _require_text(plan: Plan, context: int) -> None:
    """A UserError if a split has no window."""
    left_out = [
        (plan.dropped.get("rows_without_text", 0), "rows have no text in the field"),
        (plan.dropped.get("heldout_documents_left_out", 0), "documents are copies of held-out ones"),
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
    sizes = {shard.name: size for shard in shards if (size := written_size(shard, folder)) is not None}
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
    folder = work_path(out)
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


def work_path(out: Path) -> Path:
    """Where a preparation into `out` keeps what it makes, until all is made."""
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
