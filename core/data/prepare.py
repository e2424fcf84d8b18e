"""Text to training data, once; `python -m train_tpu.prepare` is the command. `making` does the work."""

import contextlib
import fcntl
import hashlib
import json
import re
import shutil
import sys
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Unpack

import numpy as np

from core import checks
from core.console import make_console
from core.data import dataset as ds
from core.data import versions
from core.data.making import make, work_path
from core.data.packing import DATA
from core.data.sources import open_sources
from core.data.splits import VALID, VALID_FRACTION, VALID_FRACTION_OF_FEW, Plan, TextOptions, make_plan
from core.data.summary import print_summary
from core.errors import UserError
from core.file_tokenizer import keeps_text
from core.folders import require_new
from core.progress import Activity
from core.tokenizer import (
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
    workers: int | None = None,
    **options: Unpack[TextOptions],
) -> Path:
    """Prepares `sources` into the new folder `out` and returns it.

    `train_tpu.prepare.PrepareConfig` describes the arguments.
    Nothing called `out` exists before all of it is written; what is interrupted is resumed by the next call.
    A `UserError` for input that cannot be used.
    """
    checks.counts(context=context, workers=workers)
    if out.is_dir() and not (work_path(out) / DATA).exists():
        shutil.rmtree(work_path(out), ignore_errors=True)  # a run that was killed when all was done left it
    require_new(out)
    with Activity("looking at the text", console=make_console()):
        plan = make_plan(sources, valid or {}, valid_fraction, **options)
    loaded = load_tokenizer(tokenizer)
    opened = make(out, plan, loaded, context, workers, None)
    print_summary(opened, plan)
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
    workers: int | None = None,
    **options: Unpack[TextOptions],
) -> Path:
    """Makes a new version of the prepared folder `out`, which has `sources` as well; its folder.

    The arguments are those of `prepare`, but `tokenizer` and `context` need not be given: they are those of
    `out`. A `UserError` for others, or for input that cannot be used.
    """
    checks.counts(context=context, workers=workers)
    if not is_prepared(str(out)):
        raise UserError(f"--append {out} is no prepared data: make it with --out, or name a folder that is")
    parent = ds.open_dataset(versions.version_paths(out)[-1])
    if parent.version != len(versions.version_paths(out)):  # DIR/v2 itself: what reads DIR would not find v3
        raise UserError(
            f"{out} is version {parent.version} of prepared data: append to the folder that holds the "
            "versions"
        )
    if options.get("overlap") and not (parent.heldout or options.get("eval_items")):
        raise UserError(
            f"--overlap has nothing to compare the new text with, as {out} holds nothing out: name texts "
            "with --eval-items FILE"
        )
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
    with Activity("looking at the text", console=make_console()):
        held = {split: [versions.HeldOut(parent, split, loaded)] for split in parent.heldout}
        plan = make_plan(sources, {}, 0.0, held=held, **options)
        _know_documents(parent, plan, loaded)
    opened = make(new, plan, loaded, parent.context, workers, parent)
    print_summary(opened, plan)
    print(
        f"{out} now has version {opened.version}, {opened.fingerprint[:12]}: new runs read it, and runs that "
        f"began on version {parent.version} continue with that"
    )
    return new


def _know_documents(parent: ds.Dataset, plan: Plan, tokenizer: Tokenizer) -> None:
    """Tells `plan` which documents `parent` has already, as far as that matters."""
    if parent.ends_held_out is not None:
        plan.leave_out(np.array(parent.ends_held_out, np.uint64))
    elif VALID in parent.splits:
        print(
            f"note: an older program prepared {parent.path} and did not record whether it holds out the ends "
            "of documents: copies of such documents are not found, and would train; --overlap drop leaves "
            "out what shares 13 words with an end"
        )
    if not keeps_text(tokenizer):
        print(
            "note: the tokenizer does not keep all of a text, so copies of documents that are there as a "
            "whole are not found"
        )
        return
    for split in parent.splits:
        if split != ds.TRAIN or plan.dedup:
            for hashes in versions.document_hashes(parent, split, tokenizer):
                if split == ds.TRAIN:
                    plan.count_as_seen(hashes)
                else:
                    plan.leave_out(hashes)


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
