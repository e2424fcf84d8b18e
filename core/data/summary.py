"""What is said at the end of a preparation."""

from core.console import Table
from core.data import dataset as ds
from core.data import overlap
from core.data.splits import VALID, Plan


def print_summary(dataset: ds.Dataset, plan: Plan) -> None:
    """Prints what each split contains, and what was left out or found."""
    train_tokens = plan.train_tokens
    dropped = plan.dropped
    table = Table(
        ("split",),
        ("documents", "bytes", "tokens", "bytes/token", "windows"),
        title=f"tokenizer {dataset.tokenizer_record['name']}, context {dataset.context}",
    )
    for split in dataset.splits.values():
        counts = (f"{n:,}" for n in (split.documents, split.bytes, split.tokens))
        table.add_row(split.name, *counts, f"{split.bytes / split.tokens:.3f}", f"{split.windows:,}")
    table.print()
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
        ends = ", or of ones whose end is held out" if dataset.ends_held_out else ""
        print(f"left out: {n:,} documents that are exact copies of held-out ones{ends}")
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
    n = plan.dropped["overlapping_documents"]
    left = "they are left out" if plan.overlap == "drop" else "they are kept (--overlap drop leaves them out)"
    print(f"overlap: {n:,} training documents share a run of {overlap.N} words with held-out text; {left}")
    for name, found in plan.found.items():
        print(
            f"  {name}: {found.n_shared:,} of {found.n:,} texts share one; {found.n_short:,} have fewer than "
            f"{overlap.N} words, and cannot be looked for"
        )
    if VALID in plan.documents:
        print(f"  the split {VALID}, held out by hash, is not looked for: --valid NAME=PATH sets are")
