"""Overlap with held-out text, compared with sets of tuples of words."""

import json
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.data import making, overlap
from core.data.dataset import open_dataset
from core.data.prepare import prepare
from core.errors import UserError
from tests.core.data.test_prepare import CONTEXT, write_jsonl
from train_tpu import prepare as command


def grams(text: str, n: int = 13) -> set[tuple[str, ...]]:
    """The oracle: words as characters that are letters or digits, one at a time."""
    words = "".join(c.lower() if c.isalnum() else " " for c in text).split()
    return {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}


def draw(n: int, seed: int, most: int = 6) -> list[str]:
    """Texts of 1 to `most` phrases out of 6, so that runs meet in some of them, with marks at random."""
    rng = np.random.default_rng(seed)
    phrases = np.random.default_rng(99).choice(["Alpha", "beta", "naïve", "x1", "日本", "II"], (6, 7))
    marks = np.array([" ", ", ", ". ", " -- ", "\n\n", "_"])
    texts = []
    for k in rng.integers(1, most + 1, n):
        words = phrases[rng.integers(0, 6, k)].ravel()
        texts.append("".join(w + m for w, m in zip(words, rng.choice(marks, len(words)), strict=True)))
    return texts


def test_what_is_found_is_what_sets_of_tuples_find():
    held, texts = draw(4, 0, 3), draw(200, 1)
    wanted = set().union(*map(grams, held))
    found = overlap.Overlap(overlap.gather(held))
    counts = [len(found.find(text)) for text in texts]
    assert counts == [len(grams(text) & wanted) for text in texts]
    assert 20 < sum(map(bool, counts)) < 180


def test_where_nothing_is_held_out_or_shared_nothing_is_found():
    none, texts = np.empty(0, np.uint64), ["too short", *draw(5, 1)]
    assert [len(overlap.Overlap(none).find(text)) for text in texts] == [0] * 6
    assert overlap.found_of(texts, none)[:3] == (6, 1 + sum(not grams(text) for text in texts[1:]), 0)


@settings(max_examples=30, deadline=None)
@given(st.text(alphabet="aB. -_'é1\n", max_size=80))
def test_words_are_letters_and_digits_in_lower_case(text):
    assert overlap.words(text) == [word.lower() for word in re.split(r"[\W_]+", text) if word]


def test_gathering_in_parts_is_gathering_at_once(monkeypatch):
    texts = draw(50, 2, 20)
    whole = overlap.gather(texts)
    assert len(whole) == len(set().union(*map(grams, texts)))
    monkeypatch.setattr(overlap, "MOST", 4000)
    assert (overlap.gather(texts) == whole).all()
    monkeypatch.setattr(overlap, "MOST", 100)
    with pytest.raises(UserError, match="more than 100 runs of 13 words"):
        overlap.gather(texts)


@pytest.mark.parametrize("choice", ["count", "drop"])
def test_overlapping_documents_are_counted_or_left_out(tmp_path, monkeypatch, capsys, choice):
    monkeypatch.setattr(making, "SMALLEST_PIECE", 1_000)
    texts = [f"{n} {text}" for n, text in enumerate(draw(120, 3))]
    held, items = draw(3, 4, 3), [*draw(3, 5, 3), "too short"]
    wanted = set().union(*map(grams, held + items))
    clean = [text for text in texts if not grams(text) & wanted]
    assert 10 < len(clean) < 110
    source, valid = write_jsonl(tmp_path / "t.jsonl", texts), write_jsonl(tmp_path / "v.jsonl", held)
    given = write_jsonl(tmp_path / "items.jsonl", items)
    arguments = ["--tokenizer", "bytes", "--context", str(CONTEXT), "--valid", f"held={valid}"]
    out = tmp_path / "out"
    command.main([source, "--out", str(out), *arguments, "--overlap", choice, "--eval-items", given])
    said = capsys.readouterr().out
    n = len(texts) - len(clean)
    assert f"overlap: {n} training documents share a run of 13 words with held-out text" in said
    seen = set().union(*map(grams, texts))
    n_items = sum(bool(grams(item) & seen) for item in items)
    n_short = sum(not grams(item) for item in items)
    assert f"items.jsonl: {n_items} of 4 texts share one; {n_short} have fewer than 13 words" in said
    record = open_dataset(out).overlap_record()
    trained = seen if choice == "count" else set().union(*map(grams, clean))
    looked_for = {overlap.text_key(text): text for text in held + items if grams(text)}
    assert record["text"].tolist() == sorted(looked_for)
    assert record["shared"].tolist() == [bool(grams(looked_for[key]) & trained) for key in sorted(looked_for)]
    assert record["shared"].any() == (choice == "count")
    dropped = json.loads((out / "dataset.json").read_text())["dropped"]
    assert dropped["overlapping_documents"] == n
    assert dropped.get("overlapping_documents_left_out") == (n if choice == "drop" else None)
    write_jsonl(tmp_path / "clean.jsonl", clean if choice == "drop" else texts)
    same = prepare(
        [str(tmp_path / "clean.jsonl")], tmp_path / "same", "bytes", CONTEXT, valid={"held": valid}
    )
    assert open_dataset(out).fingerprint == open_dataset(same).fingerprint


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--overlap", "count"], "nothing to compare the training text with"),
        (["--eval-items", "{short}"], "give --overlap count or --overlap drop, too"),
        (["--overlap", "drop", "--eval-items", "{short}"], "no text of --valid or --eval-items has 13 words"),
        (
            ["--overlap", "drop", "--eval-items", "{text}"],
            "is empty.*; 9 documents overlap with held-out text",
        ),
        (["--overlap", "drop", "--eval-items", "nonesuch"], "no file, folder or glob 'nonesuch'"),
    ],
)
def test_wrong_input_is_named_and_leaves_nothing(tmp_path, arguments, message):
    texts = [text * 30 for text in draw(9, 6)]
    files = {
        "text": write_jsonl(tmp_path / "t.jsonl", texts),
        "short": write_jsonl(tmp_path / "s.jsonl", ["a b"]),
    }
    given = [argument.format(**files) for argument in arguments]
    with pytest.raises(UserError, match=message):
        command.main([files["text"], "--out", str(tmp_path / "out"), "--tokenizer", "bytes", *given])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["s.jsonl", "t.jsonl"]
