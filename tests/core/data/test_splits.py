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
from core.data.pieces import Piece, cut_into_pieces, encode
from core.data.splits import Plan, make_plan
from core.tokenizer import load_tokenizer

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


def take_all(plan: Plan, piece_bytes: int) -> dict[str, list[str]]:
    """The documents of each split that the plan gives."""
    tokenizer, ids = load_tokenizer("bytes"), {}
    for part, place in enumerate(plan.parts):
        for number, texts in enumerate(cut_into_pieces(place.source, piece_bytes)):
            ids[part, number], documents = encode(texts, place.cut, tokenizer)
            plan.take(part, number, Piece(documents, texts.position, texts.is_last, np.empty(0, np.uint64)))
    plan.finish(context=8)
    taken = {}
    for split, spans in plan._spans.items():
        stream = [ids[plan._pieces[piece]][at : at + n] for piece, at, n in np.concatenate(spans).tolist()]
        joined = np.concatenate([np.empty(0, np.uint16), *stream]).tolist()
        documents = bytes(i if i < 256 else 255 for i in joined).split(b"\xff")  # which is in no UTF-8
        taken[split] = [document.decode() for document in documents if document]
    return taken


@pytest.mark.parametrize("asked", [None, 5])
def test_what_is_read_ahead_is_not_done(tmp_path, asked):
    """Documents of the same length: the part that is done is that of the documents taken, or asked for."""
    write(tmp_path / "a.jsonl", ["the same text"] * 10, "lines")
    plan = make_plan([str(tmp_path)], {}, 0, None if asked is None else asked * len("<the same text>"))
    pieces = list(cut_into_pieces(plan.parts[0].source, 1))
    done = []
    for number, texts in enumerate(pieces):
        done.append(plan.done())
        _, documents = encode(texts, None, load_tokenizer("bytes"))
        plan.take(0, number, Piece(documents, texts.position, texts.is_last, np.empty(0, np.uint64)))
    assert done == pytest.approx([min(i / (asked or 10), 1) for i in range(11)], abs=0.02)


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
        patch.setattr(splits, "FEW_DOCUMENTS", 1000 if few else 0)
        plan = make_plan([str(folder)], {}, 0.3, None)
        taken = take_all(plan, data.draw(st.integers(1, 60)))

    everything = [text for texts in files for text in texts]
    whole = [text for text in everything if text.strip()]
    repaired = [text.encode("utf-16", "surrogatepass").decode("utf-16", "replace") for text in whole]
    assert plan.dropped["empty_documents"] == len(everything) - len(whole)
    assert plan.dropped["repaired_documents"] == sum(a != b for a, b in zip(whole, repaired, strict=True))
    assert plan.dropped["copied_documents"] == len(repaired) - len(set(repaired))
    assert plan.bytes == {split: sum(len(t.encode()) for t in texts) for split, texts in taken.items()}
    if few:  # cut in two; a part that is blank is left out
        kept = [len(word) for texts in taken.values() for text in texts for word in text.split()]
        assert sum(kept) == sum(len(word) for text in repaired for word in text.split())
    else:
        held = set(taken["valid"])
        assert taken["valid"] == [text for text in repaired if text in held]
        assert taken["train"] == [text for text in repaired if text not in held]  # copies fall together
