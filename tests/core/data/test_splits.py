"""What is counted of documents that are drawn, in files that are drawn: nothing is lost without a word."""

import gzip
import json
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.data import splits
from core.data.packing import Packer
from core.data.splits import Plan, make_plan

TEXTS = st.one_of(
    st.sampled_from(["", " \n", "one document", "another one.\n\nIts end."]),
    st.text(alphabet="ab \n\u2028é😀\ufeff\0", max_size=30),
)
SURROGATES = st.sampled_from(["half \ud83d pair", "\udc00"])


def write(path: Path, texts: list[str], form: str) -> None:
    if form == "parquet":
        pyarrow.parquet.write_table(pyarrow.table({"text": pyarrow.array(texts, pyarrow.string())}), path)
    elif form == "array":
        path.write_text(json.dumps([{"text": text} for text in texts], indent=1))
    elif form == "lines":
        path.write_text("".join(json.dumps({"n": 1, "text": text}) + "\n\n" for text in texts))
    else:
        path.write_bytes(gzip.compress("".join(json.dumps({"text": t}) + "\n" for t in texts).encode()))


SUFFIXES = {"parquet": ".parquet", "array": ".json", "lines": ".NDJSON", "packed": ".jsonl.gz"}


def take_all(plan: Plan) -> list[tuple[str, str]]:
    """(split, text) of all that the plan gives; a document has as many tokens as bytes here."""
    plan.packers = {name: Packer(8, np.dtype(np.uint16)) for name in plan.documents}
    taken = []
    for batch, documents in plan.batches():
        assert plan.take(batch, np.array([len(d) for d in documents])) == len(documents)
        taken += zip(batch.splits, (d.decode() for d in documents), strict=True)
    for _ in plan.finish(eos=0):
        pass
    return taken


def test_what_is_read_ahead_is_not_done(tmp_path, monkeypatch):
    """Documents of the same length: the part that is done is that of the documents taken."""
    write(tmp_path / "a.jsonl", ["the same text"] * 10, "lines")
    monkeypatch.setattr(splits, "BATCH_BYTES", 1)
    plan = make_plan([str(tmp_path)], {}, 0, None, "text", None)
    plan.packers = {name: Packer(8, np.dtype(np.uint16)) for name in plan.documents}
    done = []
    for batch, documents in list(plan.batches()):
        done.append(plan.done())
        plan.take(batch, np.array([len(d) for d in documents]))
    assert [*done, plan.done()] == pytest.approx([i / 10 for i in range(11)], abs=0.02)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_what_is_counted_is_all_there_was(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("drawn")
    form = data.draw(st.sampled_from(sorted(SUFFIXES)))
    kinds = TEXTS if form == "parquet" else TEXTS | SURROGATES  # no Parquet file holds half a pair
    files = data.draw(st.lists(st.lists(kinds, min_size=1, max_size=5), min_size=1, max_size=3))
    for number, texts in enumerate(files):
        write(folder / f"{number}{SUFFIXES[form]}", texts, form)
    few = data.draw(st.booleans())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(splits, "BATCH_BYTES", data.draw(st.integers(1, 60)))
        patch.setattr(splits, "FEW_DOCUMENTS", 1000 if few else 0)
        plan = make_plan([str(folder)], {}, 0.3, None, "text", None)
        taken = take_all(plan)

    everything = [text for texts in files for text in texts]
    whole = [text for text in everything if text.strip()]
    repaired = [text.encode("utf-16", "surrogatepass").decode("utf-16", "replace") for text in whole]
    assert plan.dropped["empty_documents"] == len(everything) - len(whole)
    assert plan.dropped["repaired_documents"] == sum(a != b for a, b in zip(whole, repaired, strict=True))
    assert plan.dropped["copied_documents"] == len(repaired) - len(set(repaired))
    assert sum(plan.bytes.values()) == sum(len(text.encode()) for _, text in taken)
    if few:  # cut in two, the end first; a part that is blank is left out
        kept = [len(word) for _, text in taken for word in text.split()]
        assert sum(kept) == sum(len(word) for text in repaired for word in text.split())
    else:
        assert [text for _, text in taken] == repaired
        by_split = {split: {t for s, t in taken if s == split} for split in ("train", "valid")}
        assert not by_split["train"] & by_split["valid"]  # copies fall together
