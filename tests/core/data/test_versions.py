"""Appending: versions that are whole by themselves, and the one that a run began on."""

import itertools
import json
import os
from pathlib import Path

import numpy as np
import pytest

from core.checkpoint.manifest import digest
from core.data import packing, versions
from core.data.batches import train_batches
from core.data.dataset import open_dataset, open_windows
from core.data.prepare import open_or_prepare, prepare
from core.data.versions import document_hashes, version_paths
from core.errors import UserError
from core.tokenizer import load_tokenizer
from tests.core.data.test_prepare import (
    CONTEXT,
    contents,
    documents,
    expected_stream,
    stream_of,
    windows_of,
    write_jsonl,
)
from train_tpu import prepare as command


def make(folder: Path, n: int = 60) -> tuple[Path, list[str], list[str]]:
    """Prepared data with a held-out set, and its texts."""
    texts, held = documents(n), documents(7, seed=1)
    source, valid = write_jsonl(folder / "t.jsonl", texts), write_jsonl(folder / "v.jsonl", held)
    return prepare([source], folder / "out", "bytes", CONTEXT, valid={"held": valid}), texts, held


def files_in(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def batches(data: Path, wanted: tuple[str, ...] = (), n: int = 40) -> np.ndarray:
    dataset = open_or_prepare(str(data), "bytes", CONTEXT, data.parent / "cache", wanted)
    read = train_batches(dataset, seed=3, batch=4, vocab_size=258)
    rows = np.concatenate([batch.tokens for batch in itertools.islice(read, n)])
    read.close()
    return rows


def test_a_new_version_has_all_and_an_old_one_stays(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(packing, "WINDOWS_PER_SHARD", 100)
    out, _, held = make(tmp_path)
    first, before, rows = open_dataset(out), files_in(out), batches(out)
    new = documents(40, seed=2)
    arguments = [write_jsonl(tmp_path / "new.jsonl", [*new, held[3]]), "--append", str(out)]
    assert command.main(arguments) == 0
    said = capsys.readouterr().out
    assert "1 documents that are exact copies of held-out ones" in said and "now has version 2" in said
    assert files_in(out) == before and open_dataset(out) == first
    second = open_dataset(out / "v2")
    second.verify()
    assert (second.version, second.parent) == (2, json.loads(before["dataset.json"])["sha256"])
    old, added = windows_of(out, "train"), windows_of(out / "v2", "train")
    assert (added[: len(old)] == old).all()
    stream = expected_stream(new)
    assert stream_of(added[len(old) :]) == stream[: (len(stream) - 1) // CONTEXT * CONTEXT + 1]
    assert (windows_of(out / "v2", "held") == windows_of(out, "held")).all()
    assert second.splits["held"] == first.splits["held"]
    assert second.splits["train"].documents == 100
    assert len(open_windows(second, "train")) == second.splits["train"].windows == len(added)
    assert second.dropped["heldout_documents_left_out"] == 1
    shard = "windows-train.array_record-00000"
    assert os.path.samefile(out / shard, out / "v2" / shard)  # noqa: PTH121 (no room is taken)

    capsys.readouterr()
    assert (batches(out, (first.fingerprint,)) == rows).all()  # a run that began on it
    assert "version 1 of 2" in capsys.readouterr().out
    newest = batches(out)
    assert "version 2 of 2" in capsys.readouterr().out
    assert newest.shape == rows.shape and not (newest == rows).all()
    assert (batches(out / "v2") == newest).all()  # by its own name

    command.main([write_jsonl(tmp_path / "more.jsonl", documents(9, seed=3)), "--append", str(out)])
    assert version_paths(out) == [out, out / "v2", out / "v3"]
    assert open_dataset(out / "v3").parent == second.seal
    assert (batches(out, (second.fingerprint,)) == newest).all()


def test_copies_of_what_is_there_are_left_out(tmp_path, capsys):
    out, texts, _ = make(tmp_path)
    new = documents(30, seed=2)
    source = write_jsonl(tmp_path / "new.jsonl", [*texts[:20], *new, *new[:5]])
    command.main([source, "--append", str(out), "--dedup"])
    left = open_dataset(out / "v2")
    # The last of the old documents is cut off by the end of train, so it may count as new.
    assert left.dropped["duplicate_documents"] == 25
    assert left.splits["train"].documents == 60 + 30


@pytest.mark.parametrize("dedup", [[], ["--dedup"]])
def test_no_document_trains_whose_end_is_held_out(tmp_path, capsys, dedup):
    """Neither the held-out split nor train has such a document as a whole; every version knows it."""
    texts, new, more = documents(60), documents(30, seed=2), documents(20, seed=3)
    out = prepare([write_jsonl(tmp_path / "t.jsonl", texts)], tmp_path / "out", "bytes", CONTEXT)
    first = open_dataset(out)
    assert first.splits["valid"].documents == first.splits["train"].documents == 60  # ends, and the rest
    capsys.readouterr()
    for version, fresh in enumerate((new, more), 2):
        mixed = [text for pair in itertools.zip_longest(texts, fresh) for text in pair if text is not None]
        command.main([write_jsonl(tmp_path / "a.jsonl", mixed), "--append", str(out), *dedup])
        said = capsys.readouterr().out
        assert "left out: 60 documents that are exact copies of held-out ones, or of ones whose end" in said
        before, after = out if version == 2 else out / "v2", out / f"v{version}"
        old, added = windows_of(before, "train"), windows_of(after, "train")
        stream = expected_stream(fresh)
        assert (added[: len(old)] == old).all()
        assert stream_of(added[len(old) :]) == stream[: (len(stream) - 1) // CONTEXT * CONTEXT + 1]
        assert open_dataset(after).ends_held_out == first.ends_held_out
    with pytest.raises(UserError, match="60 documents are copies of held-out ones"):
        command.main([write_jsonl(tmp_path / "t2.jsonl", texts), "--append", str(out)])


def test_a_file_whose_end_is_held_out_does_not_train_again(tmp_path):
    """Of a single document, train lacks the last tokens, too, so that it is in no split as it was."""
    text = " ".join(documents(60))
    (tmp_path / "t.txt").write_text(text)
    (tmp_path / "copy.txt").write_text(text)
    out = prepare([str(tmp_path / "t.txt")], tmp_path / "out", "bytes", CONTEXT)
    new = write_jsonl(tmp_path / "new.jsonl", documents(30, seed=2))
    command.main([str(tmp_path / "copy.txt"), new, "--append", str(out)])
    added = open_dataset(out / "v2")
    assert added.dropped["heldout_documents_left_out"] == 1
    assert added.splits["train"].documents == 1 + 30


def test_data_of_an_older_program_does_not_say_whose_ends_it_holds_out(tmp_path, capsys):
    out = prepare([write_jsonl(tmp_path / "t.jsonl", documents(60))], tmp_path / "out", "bytes", CONTEXT)
    manifest = json.loads((out / "dataset.json").read_bytes())
    del manifest["ends_held_out"], manifest["sha256"]
    (out / "dataset.json").write_text(json.dumps(manifest | {"sha256": digest(manifest)}))
    command.main([write_jsonl(tmp_path / "new.jsonl", documents(30, seed=2)), "--append", str(out)])
    assert "did not record whether it holds out the ends of documents" in capsys.readouterr().out
    assert open_dataset(out / "v2").ends_held_out is None


def test_overlap_looks_for_what_the_versions_before_hold_out(tmp_path, capsys):
    """A file that has grown holds the end that was held out, in its middle."""
    rng = np.random.default_rng(0)
    words = [f"{a}{b}" for a in ("ab", "cd", "ef", "gh") for b in range(500)]
    text = " ".join(rng.choice(words, 4000))
    (tmp_path / "t.txt").write_text(text)
    out = prepare([str(tmp_path / "t.txt")], tmp_path / "out", "bytes", CONTEXT)
    held = 4000 // 20
    (tmp_path / "t.txt").write_text(f"{text} {' '.join(rng.choice(words, 300))}")
    new = write_jsonl(tmp_path / "new.jsonl", [" ".join(rng.choice(words, 100)) for _ in range(20)])
    capsys.readouterr()
    command.main([str(tmp_path / "t.txt"), new, "--append", str(out), "--overlap", "drop"])
    said = capsys.readouterr().out
    assert "overlap: 1 training documents share a run of 13 words with held-out text; they are left" in said
    assert "valid: 1 of 1 texts share one" in said
    assert open_dataset(out / "v2").splits["train"].documents == 1 + 20
    assert open_dataset(out).splits["valid"].bytes > 4 * held  # so there was something to share


def test_the_documents_at_the_border_of_versions_are_read_back(tmp_path):
    """The text of a version ends where its windows do, and that of the next one begins anew."""
    out, _, _ = make(tmp_path)
    new, more = documents(30, seed=2), documents(10, seed=3)
    command.main([write_jsonl(tmp_path / "new.jsonl", new), "--append", str(out)])
    command.main([write_jsonl(tmp_path / "again.jsonl", [*new[:20], *more]), "--append", str(out), "--dedup"])
    third = open_dataset(out / "v3")
    assert third.dropped["duplicate_documents"] == 20
    assert third.splits["train"].documents == 60 + 30 + 10


@pytest.mark.parametrize("name", ["bytes", "mistral"])
def test_documents_are_read_back(tmp_path, monkeypatch, name):
    monkeypatch.setattr(versions, "READ", 3)
    texts, held = documents(40), documents(7, seed=1)
    source, valid = write_jsonl(tmp_path / "t.jsonl", texts), write_jsonl(tmp_path / "v.jsonl", held)
    opened = open_dataset(prepare([source], tmp_path / "out", name, CONTEXT, valid={"held": valid}))
    for split, expected in (("held", held), ("train", texts)):
        found = np.concatenate(list(document_hashes(opened, split, load_tokenizer(name)))).tolist()
        whole = [versions.hash64(text.encode()) for text in expected]
        assert found == whole[: len(found)] and len(found) >= len(whole) - (split == "train")


def test_a_file_system_without_links_gets_copies(tmp_path, monkeypatch):
    out, _, _ = make(tmp_path)
    source = write_jsonl(tmp_path / "new.jsonl", documents(30, seed=2))
    command.main([source, "--append", str(out)])
    linked = contents(out / "v2")
    (out / "v2").rename(tmp_path / "linked")

    def refuse(*_):
        raise OSError

    monkeypatch.setattr(os, "link", refuse)
    command.main([source, "--append", str(out)])
    assert contents(out / "v2") == linked


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--append", "{here}/nonesuch"], "nonesuch is no prepared data: make it with --out"),
        (["--append", "{out}", "--context", "64"], "has windows of 32 tokens, not 64"),
        (["--append", "{out}", "--tokenizer", "mistral"], "the tokenizers differ: --tokenizer has 'mistral'"),
        (["--append", "{out}", "--valid", "held={new}"], "held-out sets of .* stay what they are"),
        (["--append", "{out}", "--valid-fraction", "0"], "held-out sets of .* stay what they are"),
        (["--append", "{out}", "--out", "{here}/x"], "not both"),
        (["--append", "{out}", "--field", "body"], "no text in the field 'body'"),
        (["--append", "{out}", "--workers", "0"], "--workers is 0"),
    ],
)
def test_wrong_input_is_named_and_leaves_nothing(tmp_path, arguments, message):
    out, _, _ = make(tmp_path)
    new = write_jsonl(tmp_path / "new.jsonl", documents(30, seed=2))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=message):
        command.main([new, *(argument.format(here=tmp_path, out=out, new=new) for argument in arguments)])
    assert sorted(tmp_path.rglob("*")) == before


def test_overlap_needs_held_out_text(tmp_path):
    source, new = (write_jsonl(tmp_path / f"{n}.jsonl", documents(30, seed=n)) for n in (1, 2))
    out = prepare([source], tmp_path / "out", "bytes", CONTEXT, valid_fraction=0.0)
    with pytest.raises(
        UserError, match=r"nothing to compare .*out holds nothing out: name texts with --eval"
    ):
        command.main([new, "--append", str(out), "--overlap", "drop"])


def test_a_version_by_itself_is_not_appended_to(tmp_path):
    """Who reads DIR or DIR/v2 would never find a DIR/v2/v3."""
    out, _, _ = make(tmp_path)
    new = write_jsonl(tmp_path / "new.jsonl", documents(30, seed=2))
    command.main([new, "--append", str(out)])
    before = sorted(out.rglob("*"))
    with pytest.raises(
        UserError, match="v2 is version 2 of prepared data: append to the folder that holds the versions"
    ):
        command.main([new, "--append", str(out / "v2")])
    assert sorted(out.rglob("*")) == before
