import contextlib
import gzip
import hashlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
import tokenizers
from array_record.python.array_record_module import ArrayRecordReader
from tensorflow_datasets.core.example_serializer import ExampleSerializer

from core.data import corpus, making, packing, workers
from core.data import prepare as module
from core.data import splits as splits_module
from core.data.batches import train_batches
from core.data.dataset import open_dataset
from core.data.file_source import FileSource
from core.data.prepare import choose_tokenizer, open_or_prepare, prepare
from core.errors import UserError
from core.tokenizer import ByteTokenizer, id_dtype, load_tokenizer
from tests.core.data.conftest import Worker
from tests.core.test_tokenizer import bpe_file
from train_tpu import prepare as command

ROOT = Path(__file__).parents[3]
DATA = ROOT.parent / "shared" / "data"
CONTEXT = 32


@pytest.fixture(autouse=True)
def one_core(monkeypatch) -> None:
    """One tokenizing worker where a test does not say how many."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})


def documents(n: int, seed: int = 0) -> list[str]:
    rng = np.random.default_rng(seed)
    words = ["alpha", "beta", "gamma", "naïve", "日本", "x", "lorem", "ipsum,", "dolor.\n\n", "sit"]
    return [f"Document {i}: " + " ".join(rng.choice(words, rng.integers(1, 60))) for i in range(n)]


def write_jsonl(path: Path, texts: list[str]) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def expected_stream(texts: list[str], name: str = "bytes") -> list[int]:
    tokenizer = load_tokenizer(name)
    return [i for text in texts for i in (tokenizer.bos, *tokenizer.encode(text).tolist(), tokenizer.eos)]


def windows_of(path: Path, split: str) -> np.ndarray:
    """All records of a split, read by TFDS itself."""
    source = tfds.builder_from_directory(str(path)).as_data_source(split)
    return np.stack([item["tokens"] for item in source])


def stream_of(windows: np.ndarray) -> list[int]:
    """The stream that the windows' predicted tokens make up, plus its first token."""
    assert (windows[1:, 0] == windows[:-1, -1]).all()  # each begins with the last token of the one before
    return [int(windows[0, 0]), *windows[:, 1:].ravel().tolist()]


def run(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "train_tpu.prepare", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120, check=False)


def left_in(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


@pytest.mark.parametrize("name", ["bytes", "mistral"])
def test_every_token_is_predicted_once_in_order(tmp_path, name):
    train, valid = documents(50), documents(7, seed=1)
    out = prepare(
        [write_jsonl(tmp_path / "t.jsonl", train)],
        tmp_path / "out",
        name,
        CONTEXT,
        valid={"held": write_jsonl(tmp_path / "v.jsonl", valid)},
    )
    dataset = open_dataset(out)
    stream = expected_stream(train, name)
    n = (len(stream) - 1) // CONTEXT
    assert stream_of(windows_of(out, "train")) == stream[: n * CONTEXT + 1]
    split = dataset.splits["train"]
    assert (split.documents, split.tokens, split.windows) == (50, len(stream), n)
    assert split.bytes == sum(len(text.encode()) for text in train)

    stream = expected_stream(valid, name)
    windows = windows_of(out, "held")
    read = stream_of(windows)
    assert read[: len(stream)] == stream
    assert set(read[len(stream) :]) <= {load_tokenizer(name).eos}  # filled up, less than one window
    assert 0 <= len(read) - len(stream) < CONTEXT
    split = dataset.splits["held"]
    assert (split.documents, split.tokens, split.windows) == (7, len(stream), len(windows))
    assert split.bytes == sum(len(text.encode()) for text in valid)
    manifest = json.loads((out / "dataset.json").read_text())
    assert manifest["dropped"]["train_tokens_at_end"] == (dataset.splits["train"].tokens - 1) % CONTEXT


@pytest.mark.parametrize("length", [CONTEXT + 1, 2 * CONTEXT, 2 * CONTEXT + 1, 7 * CONTEXT + 5])
def test_windows_at_the_borders(tmp_path, monkeypatch, length):
    """Out of a stream that lies in pieces of two files, between what belongs to other splits."""
    monkeypatch.setattr(packing, "CHUNK", 2)
    monkeypatch.setattr(packing, "READ", 20)
    rng = np.random.default_rng(length)
    stream = rng.integers(0, 2**16, length).astype(np.uint16)
    parts = np.split(stream, np.sort(rng.integers(0, length + 1, 5)))
    spans = []
    for name, group in (("a", parts[:3]), ("b", parts[3:])):
        others = [rng.integers(0, 9, 3).astype(np.uint16) for _ in group]
        np.concatenate([ids for pair in zip(others, group, strict=True) for ids in pair]).tofile(
            tmp_path / name
        )
        ends = np.cumsum([3 + len(part) for part in group]).tolist()
        spans.append((name, [(end - len(part), len(part)) for end, part in zip(ends, group, strict=True)]))
    n = -(-(length - 1) // CONTEXT)
    found = packing._windows(packing.Shard("x", spans, n, CONTEXT, 7, "uint16"), tmp_path)
    whole = np.concatenate(list(found))
    assert whole.shape == (n, CONTEXT + 1)
    predicted = whole[:, 1:].ravel()
    assert predicted[: length - 1].tolist() == stream[1:].tolist()
    assert (predicted[length - 1 :] == 7).all()
    assert (whole[1:, 0] == whole[:-1, -1]).all() and whole[0, 0] == stream[0]


@pytest.mark.parametrize("vocabulary", [2, 128, 129, 2**16, 2**18])
def test_records_are_those_of_tfds(vocabulary):
    dtype = id_dtype(vocabulary)
    drawn = np.random.default_rng(0).uniform(0, np.log(vocabulary), (20, CONTEXT + 1))
    windows = np.exp(drawn).astype(dtype)  # as many short ids as long ones
    windows[0] = vocabulary - 1
    features = tfds.features.FeaturesDict(
        {"tokens": tfds.features.Tensor(shape=(CONTEXT + 1,), dtype=dtype.type)}
    )
    serializer = ExampleSerializer(features.get_serialized_info())
    rows = [features.encode_example({"tokens": window}) for window in windows]
    assert packing.serialize(windows) == [serializer.serialize_example(row) for row in rows]


def test_the_description_has_the_bytes_of_all_records(tmp_path, monkeypatch):
    monkeypatch.setattr(packing, "WINDOWS_PER_SHARD", 20)
    monkeypatch.setattr(workers, "start_process", Worker)  # a process would not know of the line above
    out = prepare([write_jsonl(tmp_path / "t.jsonl", documents(60))], tmp_path / "out", "bytes", CONTEXT)
    for split, (lengths, size) in packing.read_description(out).splits.items():
        readers = [ArrayRecordReader(str(path)) for path in sorted(out.glob(f"*-{split}.array_record-*"))]
        assert [reader.num_records() for reader in readers] == lengths
        assert size == sum(len(record) for reader in readers for record in reader.read_all())


def test_result_does_not_depend_on_workers_or_shards(tmp_path, monkeypatch, real_workers):
    monkeypatch.setattr(making, "SMALLEST_PIECE", 500)  # so that there are many
    source = write_jsonl(tmp_path / "t.jsonl", documents(60))
    outs = [prepare([source], tmp_path / f"out{n}", "bytes", CONTEXT, workers=n) for n in (1, 3)]
    monkeypatch.setattr(packing, "WINDOWS_PER_SHARD", 20)
    monkeypatch.setattr(workers, "start_process", Worker)  # a process would not know of the line above
    outs.append(prepare([source], tmp_path / "shards", "bytes", CONTEXT))
    one, three, shards = (open_dataset(out) for out in outs)
    assert one.fingerprint == three.fingerprint
    assert one.splits == shards.splits
    assert len(shards.files) > len(one.files) + 5
    assert (windows_of(outs[0], "train") == windows_of(outs[2], "train")).all()


def test_few_files_are_open_at_a_time(tmp_path, monkeypatch):
    """In preparing 20 files into 70 shards, and in training from these: with 30 descriptors to open."""
    monkeypatch.setattr(making, "SMALLEST_PIECE", 500)
    monkeypatch.setattr(packing, "WINDOWS_PER_SHARD", 20)
    texts = documents(300)
    files = [write_jsonl(tmp_path / f"{n:02d}.jsonl", texts[15 * n : 15 * n + 15]) for n in range(20)]
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = os.dup(0)  # the lowest number that is free
    os.close(free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free + 30, hard))
    try:
        out = prepare(files, tmp_path / "out", "bytes", CONTEXT, valid_fraction=0, workers=2)
        read = train_batches(open_dataset(out), seed=0, batch=50, vocab_size=258)
        batches = [next(read) for _ in range(open_dataset(out).splits["train"].windows // 50)]
        read.close()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert len(list(out.glob("windows-train*"))) > 60
    windows = windows_of(out, "train")
    stream = expected_stream(texts)
    assert stream_of(windows) == stream[: len(windows) * CONTEXT + 1]
    for batch in batches:
        assert (batch.tokens == windows[batch.records]).all()


def test_held_out_by_hash(tmp_path, monkeypatch):
    monkeypatch.setattr(splits_module, "FEW_DOCUMENTS", 100)
    texts = documents(300)
    held = {t for t in texts if int.from_bytes(hashlib.sha256(t.encode()).digest()[:8], "big") < 0.1 * 2**64}
    assert 20 < len(held) < 40
    for name, order in (("a", texts), ("b", texts[::-1])):
        source = write_jsonl(tmp_path / f"{name}.jsonl", order)
        out = prepare([source], tmp_path / name, "bytes", CONTEXT, valid_fraction=0.1)
        stream = expected_stream([t for t in order if t in held])
        assert stream_of(windows_of(out, "valid"))[: len(stream)] == stream
        assert open_dataset(out).splits["valid"].documents == len(held)
        assert open_dataset(out).splits["train"].documents == 300 - len(held)


def up_to(texts: list[str], train_tokens: int, held: set[str] = frozenset()) -> list[str]:
    """The documents up to the one with which those outside `held` reach `train_tokens`, in bytes tokens."""
    total = 0
    for n, text in enumerate(texts, start=1):
        total += 0 if text in held else len(text.encode()) + 2
        if total >= train_tokens:
            return texts[:n]
    return texts


@pytest.mark.parametrize(
    "train_tokens", [20_000, *(pytest.param(n, marks=pytest.mark.slow) for n in (1500, 50_001))]
)
def test_reading_ends_with_the_document_that_reaches_the_tokens(tmp_path, monkeypatch, train_tokens):
    texts, valid = documents(300), documents(9, seed=1)
    texts[3] = ""
    texts[4] = "lone \ud800 surrogate " * 9
    files = [texts[:100], texts[100:200], texts[200:]]
    sources = [write_jsonl(tmp_path / f"{n}.jsonl", part) for n, part in enumerate(files)]
    held = {"held": write_jsonl(tmp_path / "v.jsonl", valid)}
    manifests = []
    for n_workers, size in ((3, 300), (1, 1 << 20)):
        monkeypatch.setattr(making, "SMALLEST_PIECE", size)
        out = tmp_path / f"{n_workers}-{size}"
        prepare(sources, out, "bytes", CONTEXT, valid=held, workers=n_workers, train_tokens=train_tokens)
        manifests.append(json.loads((out / "dataset.json").read_text()))
    assert all(manifest == manifests[0] for manifest in manifests)

    manifest, split = manifests[0], open_dataset(out).splits["train"]
    read = up_to([text.replace("\ud800", "\ufffd") for text in texts if text], train_tokens)
    stream = expected_stream(read)
    assert train_tokens <= len(stream) < train_tokens + len(read[-1].encode()) + 2
    assert (split.documents, split.tokens) == (len(read), len(stream))
    assert split.bytes == sum(len(text.encode()) for text in read)
    n = (len(stream) - 1) // CONTEXT
    assert stream_of(windows_of(out, "train")) == stream[: n * CONTEXT + 1]
    assert manifest["train_tokens"] == train_tokens
    assert manifest["sources"] == sources[: 1 + (len(read) + 1 > 100) + (len(read) + 1 > 200)]
    assert (manifest["dropped"]["empty_documents"], manifest["dropped"]["repaired_documents"]) == (1, 1)
    stream = expected_stream(valid)
    assert stream_of(windows_of(out, "held"))[: len(stream)] == stream  # whole


def test_what_is_held_out_by_hash_ends_where_reading_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(splits_module, "FEW_DOCUMENTS", 100)
    texts = documents(400)
    held = {t for t in texts if int.from_bytes(hashlib.sha256(t.encode()).digest()[:8], "big") < 0.1 * 2**64}
    source = write_jsonl(tmp_path / "t.jsonl", texts)
    read = up_to(texts, 15_000, held)
    assert 3 < len(held & set(read)) < len(held) - 20
    for n_workers, size in ((3, 700), (1, 1 << 20)):
        monkeypatch.setattr(making, "SMALLEST_PIECE", size)
        out = tmp_path / f"{n_workers}-{size}"
        prepare([source], out, "bytes", CONTEXT, valid_fraction=0.1, workers=n_workers, train_tokens=15_000)
        splits = open_dataset(out).splits
        assert splits["train"].tokens == len(expected_stream([t for t in read if t not in held]))
        stream = expected_stream([t for t in read if t in held])
        assert stream_of(windows_of(out, "valid"))[: len(stream)] == stream
        assert splits["valid"].tokens == len(stream)


def test_the_last_of_few_documents_keeps_its_held_out_end(tmp_path):
    texts = ["\n\n".join(documents(20, seed)) for seed in range(10)]
    source = write_jsonl(tmp_path / "t.jsonl", texts)
    first = len(texts[0].encode())
    out = prepare([source], tmp_path / "out", "bytes", CONTEXT, train_tokens=first)  # two of them
    splits = open_dataset(out).splits
    assert splits["train"].documents == splits["valid"].documents == 2
    assert splits["train"].bytes + splits["valid"].bytes == first + len(texts[1].encode())


def test_nothing_is_read_far_behind_the_end(tmp_path, monkeypatch, capsys):
    def endless(self):
        while True:
            yield "some words " * 100, 0

    monkeypatch.setattr(FileSource, "documents", endless)
    source = write_jsonl(tmp_path / "t.jsonl", ["x"])
    out = prepare([source], tmp_path / "out", "bytes", CONTEXT, valid_fraction=0, train_tokens=100_000)
    assert open_dataset(out).splits["train"].tokens == -(-100_000 // 1102) * 1102
    assert "train was to reach 100,000 tokens: read no further than 100,282" in capsys.readouterr().out


def test_text_that_does_not_reach_the_tokens_is_taken_whole(tmp_path, capsys):
    source = write_jsonl(tmp_path / "t.jsonl", [*documents(50), "", " "])
    outs = [
        prepare([source], tmp_path / str(n), "bytes", CONTEXT, valid_fraction=0, train_tokens=n)
        for n in (None, 10**9)
    ]
    all_of_it, limited = (open_dataset(out) for out in outs)
    assert limited.fingerprint == all_of_it.fingerprint
    assert json.loads((outs[1] / "dataset.json").read_text())["dropped"]["empty_documents"] == 2
    found = all_of_it.splits["train"].tokens
    assert f"train was to reach 1,000,000,000 tokens: all the text has {found:,}" in capsys.readouterr().out


def test_few_documents_hold_out_their_ends(tmp_path):
    text = "\n\n".join(documents(60))
    (tmp_path / "book.txt").write_text(text)
    dataset = open_dataset(prepare([str(tmp_path / "book.txt")], tmp_path / "out", "bytes", CONTEXT))
    n = dataset.splits["valid"].tokens
    held = bytes(stream_of(windows_of(tmp_path / "out", "valid"))[1 : n - 1]).decode()
    assert text.endswith(held)
    assert 0.03 < len(held) / len(text) < 0.06
    assert dataset.splits["train"].bytes + dataset.splits["valid"].bytes == len(text.encode())


def test_empty_and_damaged_documents_are_counted(tmp_path, capsys):
    texts = ["one " * 30, "", "  \n", "lone \ud800 surrogate " * 9, "two " * 30]
    source = write_jsonl(tmp_path / "t.jsonl", texts)
    out = prepare([source], tmp_path / "out", "bytes", CONTEXT, valid_fraction=0)
    dropped = json.loads((out / "dataset.json").read_text())["dropped"]
    assert (dropped["empty_documents"], dropped["repaired_documents"]) == (2, 1)
    assert open_dataset(out).splits["train"].documents == 3
    printed = capsys.readouterr().out
    assert "2 empty documents" in printed and "repaired: 1 documents" in printed


def test_a_held_out_file_does_not_train(tmp_path, capsys):
    folder = tmp_path / "text"
    folder.mkdir()
    write_jsonl(folder / "train.jsonl", documents(20))
    held = write_jsonl(folder / "other.jsonl", documents(5, seed=1))
    out = prepare([str(folder)], tmp_path / "out", "bytes", CONTEXT, valid={"held": held})
    assert open_dataset(out).splits["train"].documents == 20
    assert "is held out as held" in capsys.readouterr().out


def test_copies_are_counted_and_said(tmp_path, capsys):
    """Those that train again, and those that a set of --valid holds out as well."""
    texts, held = documents(40), documents(5, seed=1)
    source = write_jsonl(tmp_path / "t.jsonl", [*texts, texts[3], texts[3], held[0]])
    valid = {"held": write_jsonl(tmp_path / "v.jsonl", held)}
    out = prepare([source], tmp_path / "out", "bytes", CONTEXT, valid=valid, workers=1)
    said = capsys.readouterr().out
    assert "copies: 2 documents are exact copies of earlier ones" in said
    assert "1 training documents are exact copies of held-out ones" in said
    dropped = json.loads((out / "dataset.json").read_text())["dropped"]
    assert (dropped["copied_documents"], dropped["heldout_documents_in_train"]) == (2, 1)
    assert open_dataset(out).splits["train"].documents == 43  # none is left out


@pytest.mark.parametrize("few", [True, False])
def test_copies_are_left_out(tmp_path, monkeypatch, capsys, few):
    """As if they had not been there, wherever pieces are cut; copies of what --valid holds out, too."""
    monkeypatch.setattr(splits_module, "FEW_DOCUMENTS", 1000 if few else 0)
    monkeypatch.setattr(making, "SMALLEST_PIECE", 3_000)
    texts = documents(100)
    drawn = [texts[n] for n in np.random.default_rng(1).integers(0, 100, 300)]
    whole, once = (
        write_jsonl(tmp_path / "t.jsonl", drawn),
        write_jsonl(tmp_path / "o.jsonl", list(dict.fromkeys(drawn))),
    )
    a = prepare([whole], tmp_path / "a", "bytes", CONTEXT, dedup=True, valid_fraction=0.1)
    n = 300 - len(set(drawn))
    assert f"left out: {n} documents that are exact copies of earlier ones" in capsys.readouterr().out
    b = prepare([once], tmp_path / "b", "bytes", CONTEXT, valid_fraction=0.1)
    assert open_dataset(a).fingerprint == open_dataset(b).fingerprint
    assert json.loads((a / "dataset.json").read_text())["dropped"]["duplicate_documents"] == n
    held = {"held": write_jsonl(tmp_path / "v.jsonl", texts[:10])}
    c = open_dataset(prepare([whole], tmp_path / "c", "bytes", CONTEXT, valid=held, dedup=True))
    assert c.splits["train"].documents == len(set(drawn) - set(texts[:10]))
    assert c.splits["held"].documents == 10


def test_nothing_left_but_copies_is_refused(tmp_path):
    source = write_jsonl(tmp_path / "t.jsonl", documents(5) * 2)
    held = {"held": write_jsonl(tmp_path / "v.jsonl", documents(5))}
    with pytest.raises(UserError, match=r"'train' is empty.*; 10 documents are copies, which --dedup leaves"):
        prepare([source], tmp_path / "out", "bytes", CONTEXT, valid=held, dedup=True)
    assert left_in(tmp_path) == ["t.jsonl", "v.jsonl"]


def test_verify_names_the_damaged_file(tmp_path):
    out = prepare([write_jsonl(tmp_path / "t.jsonl", documents(50))], tmp_path / "out", "bytes", CONTEXT)
    dataset = open_dataset(out)
    dataset.verify()
    for file in sorted(out.iterdir()):
        original = file.read_bytes()
        if file.name != "dataset.json":
            file.write_bytes(original[:-1] + bytes([original[-1] ^ 1]))
            with pytest.raises(UserError, match=f"{file.name} is corrupt"):
                dataset.verify()
            for other in (original[:-1], original + b"0"):
                file.write_bytes(other)
                sizes = rf"{file.name} has {len(other)} bytes where dataset\.json says {len(original)}"
                with pytest.raises(UserError, match=sizes):
                    open_dataset(out)
            file.unlink()
            with pytest.raises(UserError, match=f"{file.name} is missing"):
                open_dataset(out)
        else:
            file.write_bytes(original[: len(original) // 2])
            with pytest.raises(UserError, match=r"dataset\.json is damaged"):
                open_dataset(out)
        file.write_bytes(original)
    dataset.verify()


def test_the_command_verifies_all_of_it(tmp_path, capsys):
    out = prepare([write_jsonl(tmp_path / "t.jsonl", documents(50))], tmp_path / "out", "bytes", CONTEXT)
    assert command.main(["--verify", str(out)]) == 0
    assert f"{out} is intact: 4 files" in capsys.readouterr().out
    shard = next(out.glob("windows-train*"))
    original = shard.read_bytes()
    shard.write_bytes(original[:-1] + bytes([original[-1] ^ 1]))
    open_dataset(out)  # of a shard only the size is compared at every start
    with pytest.raises(UserError, match=f"{shard.name} is corrupt"):
        command.main(["--verify", str(out)])
    with pytest.raises(UserError, match="--out DIR"):
        command.main([str(tmp_path / "t.jsonl")])
    for others, said in (([str(tmp_path)], str(tmp_path)), (["--dedup", "--out", "x"], "--out, --dedup")):
        with pytest.raises(UserError, match=f"does nothing else: leave out {said}$"):
            command.main(["--verify", str(out), *others])


def test_what_an_older_version_made_opens_with_a_note(tmp_path, capsys):
    source = write_jsonl(tmp_path / "t.jsonl", documents(50))
    out = prepare([source], tmp_path / "out", "bytes", CONTEXT)
    sealed = open_or_prepare(str(out), "bytes", CONTEXT, tmp_path)
    assert capsys.readouterr().err == ""
    manifest = out / "dataset.json"
    content = json.loads(manifest.read_text())
    for field, changed, message in (
        ("fingerprint", "0" * 64, "not match its own sha256"),
        ("splits", content["splits"] | {"train": content["splits"]["train"] | {"bytes": 1}}, "own sha256"),
        ("sha256", "0" * 64, "own sha256"),
    ):
        manifest.write_text(json.dumps(content | {field: changed}))
        with pytest.raises(UserError, match=message):
            open_dataset(out)
    del content["sha256"]
    manifest.write_text(json.dumps(content | {"fingerprint": "0" * 64}))
    with pytest.raises(UserError, match="its fingerprint is not that of its contents"):
        open_dataset(out)
    manifest.write_text(json.dumps(content))
    older = open_or_prepare(str(out), "bytes", CONTEXT, tmp_path)
    assert older.fingerprint == sealed.fingerprint
    assert "an older version prepared" in capsys.readouterr().err


def test_a_tokenizer_that_loses_text_is_refused_or_said(tmp_path, capsys):
    odd = [text + " \u20ac zzz" for text in documents(50)]
    source = write_jsonl(tmp_path / "t.jsonl", odd)
    for unknown in (None, "<unk>"):
        model = tokenizers.models.WordLevel({"<s>": 0, "</s>": 1, "Document": 2, "<unk>": 3}, unknown or "no")
        made = tokenizers.Tokenizer(model)
        made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
        made.save(str(tmp_path / "words.json"))
        if unknown is None:
            with pytest.raises(UserError, match="no id for characters outside its vocabulary"):
                prepare([source], tmp_path / "out", str(tmp_path / "words.json"), CONTEXT)
        else:
            prepare([source], tmp_path / "out", str(tmp_path / "words.json"), CONTEXT)
            assert "does not keep all of a text" in capsys.readouterr().out
    prepare([source], tmp_path / "bytes", "bytes", CONTEXT)
    assert "does not keep" not in capsys.readouterr().out


def test_what_a_worker_cannot_encode_is_one_sentence(tmp_path, monkeypatch):
    def fail(self, text):
        raise UserError("cannot encode it")

    monkeypatch.setattr(ByteTokenizer, "encode", fail)
    source = write_jsonl(tmp_path / "t.jsonl", documents(50))
    with pytest.raises(UserError, match=r"^cannot encode it$"):
        prepare([source], tmp_path / "out", "bytes", CONTEXT, workers=1)


def test_a_killed_worker_is_one_sentence(tmp_path, monkeypatch, real_workers):
    start = workers.start_process

    def start_and_kill():
        process = start()
        process.kill()
        return process

    monkeypatch.setattr(workers, "start_process", start_and_kill)
    (tmp_path / "made").mkdir()
    source = write_jsonl(tmp_path / "t.jsonl", documents(50))
    with pytest.raises(UserError, match=r"a tokenizing process was killed \(SIGKILL\).*--workers N"):
        prepare([source], tmp_path / "made/out", "bytes", CONTEXT, workers=2)
    assert left_in(tmp_path / "made") == []


def test_the_second_of_two_runs_waits_for_the_text(tmp_path, monkeypatch, capsys):
    source, cache = write_jsonl(tmp_path / "t.jsonl", documents(50)), tmp_path / "cache"
    calls, begun = [], threading.Event()

    def slow(*arguments):
        calls.append(arguments)
        begun.set()
        deadline = time.monotonic() + 60
        while "waiting for another process" not in capsys.readouterr().out and time.monotonic() < deadline:
            time.sleep(0.01)
        return prepare(*arguments)

    monkeypatch.setattr(module, "prepare", slow)
    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(open_or_prepare, source, "bytes", CONTEXT, cache)
        assert begun.wait(60)
        second = threads.submit(open_or_prepare, source, "bytes", CONTEXT, cache)
        assert first.result() == second.result()
    assert len(calls) == 1
    # The file of the lock is left there, and blocks nobody.
    shutil.rmtree(first.result().path)
    monkeypatch.setattr(module, "prepare", prepare)
    assert open_or_prepare(source, "bytes", CONTEXT, cache) == first.result()


def test_open_or_prepare(tmp_path, capsys, monkeypatch):
    source, cache = Path(write_jsonl(tmp_path / "t.jsonl", documents(50))), tmp_path / "cache"
    first = open_or_prepare(str(source), "bytes", CONTEXT, cache)
    assert "once" in capsys.readouterr().out
    assert open_or_prepare(str(source), "bytes", CONTEXT, cache) == first
    assert capsys.readouterr().out == ""
    assert open_or_prepare(str(first.path), "bytes", CONTEXT, cache) == first
    assert open_or_prepare(str(source), "mistral", CONTEXT, cache).path != first.path
    assert open_or_prepare(str(source), "bytes", CONTEXT + 1, cache).path != first.path
    write_jsonl(source, documents(51))
    assert open_or_prepare(str(source), "bytes", CONTEXT, cache).splits["train"].documents == 51
    with pytest.raises(UserError, match=r"the model has 'mistral'.*the data .* has 'bytes'"):
        open_or_prepare(str(first.path), "mistral", CONTEXT, cache)
    with pytest.raises(UserError, match=r"context is 64, but .* was prepared for 32"):
        open_or_prepare(str(first.path), "bytes", 64, cache)
    monkeypatch.setattr(corpus, "_files", lambda: ())
    monkeypatch.setattr(corpus, "documents", lambda: ((t, 1) for t in documents(1100)))
    assert (
        sum(s.documents for s in open_or_prepare("builtin", "bytes", CONTEXT, cache).splits.values()) == 1100
    )


def test_prepared_data_carries_its_tokenizer(tmp_path):
    file = bpe_file(tmp_path, ["<s>", "</s>"])
    source = write_jsonl(tmp_path / "t.jsonl", documents(20))
    out = prepare([source], tmp_path / "out", str(file), CONTEXT)
    dataset = open_dataset(out)
    # As it was before data carried it: a run on such data is resumed on data prepared again.
    hashes = {name: entry["sha256"] for name, entry in dataset.files.items() if name != "tokenizer.json"}
    contents = json.dumps([dataset.tokenizer_record["sha256"], CONTEXT, hashes])
    assert dataset.fingerprint == hashlib.sha256(contents.encode()).hexdigest()

    file.unlink()
    tokenizer = choose_tokenizer(None, str(out), "bytes")
    assert tokenizer.name == str(out / "tokenizer.json")
    assert open_or_prepare(str(out), tokenizer.name, CONTEXT, tmp_path / "cache") == dataset
    assert choose_tokenizer(None, source, "bytes").name == choose_tokenizer("bytes", str(out), "").name


def test_command_prints_what_it_did_and_what_is_next(tmp_path, capsys):
    source, out = write_jsonl(tmp_path / "t.jsonl", documents(40)), tmp_path / "out"
    assert command.main([source, "--out", str(out), "--tokenizer", "bytes", "--context", str(CONTEXT)]) == 0
    said = capsys.readouterr().out
    split = open_dataset(out).splits["train"]
    assert f"{split.tokens:,}" in said and f"{split.bytes / split.tokens:.3f}" in said
    flags = f"--preset mtlm1-tiny --context {CONTEXT} --data {out}"
    assert f"next: python -m train_tpu.run {flags}" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.txt"], "no file, folder or glob 'missing.txt'"),
        ([], "no text is given"),
        (["{bad}"], "bad.jsonl line 1 is not JSON"),
        (["{good}", "--field", "body"], "no text in the field 'body'"),
        (["{good}", "--tokenizer", "nonesuch"], "unknown tokenizer 'nonesuch'"),
        (["{good}", "--context", "0"], "--context is 0"),
        (["{good}", "--context", "100000"], "the split 'train' is empty"),
        (["{empty}"], "the split 'train' is empty"),
        (["{good}", "--valid-fraction", "1.5"], "--valid-fraction is 1.5"),
        (["{good}", "--train-tokens", "0"], "--train-tokens is 0"),
        (["{good}", "--valid", "held"], "write NAME=PATH"),
        (["{good}", "--valid", "train={good}"], "is not train or all"),
        (["{good}", "--valid", "held={good}"], "nothing to train on"),
        (["{good}", "--valid", "held={empty}"], "the split 'held' is empty"),
    ],
)
def test_wrong_input_is_named_and_leaves_nothing(tmp_path, arguments, message):
    files = {
        "good": write_jsonl(tmp_path / "good.jsonl", documents(30)),
        "bad": str(tmp_path / "bad.jsonl"),
        "empty": write_jsonl(tmp_path / "empty.jsonl", [""]),
    }
    (tmp_path / "bad.jsonl").write_text("{\n")
    (tmp_path / "made").mkdir()
    given = [argument.format(**files) for argument in arguments]
    with pytest.raises(UserError, match=message):
        command.main([*given, "--out", str(tmp_path / "made/out")])
    assert left_in(tmp_path / "made") == []


def test_wrong_input_is_one_sentence_and_exit_code_2(tmp_path):
    (tmp_path / "made").mkdir()
    (tmp_path / "bad.jsonl").write_text("{\n")
    done = run(str(tmp_path / "bad.jsonl"), "--out", str(tmp_path / "made/out"))
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and "bad.jsonl line 1 is not JSON" in done.stderr
    assert done.stderr.count("\n") == 1
    assert left_in(tmp_path / "made") == []


def test_an_existing_folder_is_refused(tmp_path):
    source = write_jsonl(tmp_path / "t.jsonl", documents(10))
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="out exists already"):
        prepare([source], tmp_path / "out", "bytes", CONTEXT)


# It hangs until its parent ends. Killed, that one would leave it with a stderr that is still to be read.
SLOW_WORKER = """
import os, sys, time
from core.data import file_source, workers

documents, parent = file_source.FileSource.documents, os.getppid()

def slow_documents(self):
    for n, document in enumerate(documents(self)):
        while n == 90 and os.getppid() == parent:
            time.sleep(0.05)
        yield document

file_source.FileSource.documents = slow_documents
workers.work(sys.stdin.buffer, sys.stdout.buffer)
"""

SLOW_COMMAND = f"""
import subprocess, sys
from core.errors import run_command
from core.data import making, workers
from train_tpu import prepare

making.SMALLEST_PIECE = 10_000
code = {SLOW_WORKER!r}
pipe = subprocess.PIPE
workers.start_process = lambda: subprocess.Popen([sys.executable, "-c", code], stdin=pipe, stdout=pipe)
run_command(prepare.main)
"""


@pytest.fixture
def slow_run(tmp_path):
    """The command in a real process, in the middle of its work: its source hangs after 1 MB."""
    write_jsonl(tmp_path / "slow.jsonl", ["some words " * 1000] * 100)
    write_jsonl(tmp_path / "t.jsonl", documents(80))
    (tmp_path / "made").mkdir()
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW_COMMAND, *slow_arguments(tmp_path), "--workers", "2"],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 60
    made: list[Path] = []
    while len(made) < 20 or len({piece.name.rpartition("-")[0] for piece in made}) < 2:  # of both sources
        assert time.monotonic() < deadline and process.poll() is None, process.communicate()
        time.sleep(0.05)
        made = list((tmp_path / "made").glob(".out.partial/*.npz"))
    yield process
    process.kill()
    process.communicate()


def slow_arguments(folder: Path, out: str = "made/out") -> list[str]:
    held, source = folder / "t.jsonl", folder / "slow.jsonl"
    return ["--out", str(folder / out), "--tokenizer", "bytes", "--valid", f"held={held}", str(source)]


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_interrupted_is_resumed(slow_run, tmp_path, monkeypatch, capsys):
    slow_run.send_signal(signal.SIGINT)
    _, errors = slow_run.communicate(timeout=30)
    assert slow_run.returncode == 130
    assert "interrupted: " in errors and "the same command resumes" in errors and "Traceback" not in errors
    assert left_in(tmp_path / "made") == [".out.partial"]
    monkeypatch.setattr(making, "SMALLEST_PIECE", 10_000)
    before = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "made/.out.partial").glob("*.npz")}
    for out in ("made/out", "whole"):
        command.main(slow_arguments(tmp_path, out))
    assert "resuming: " in capsys.readouterr().out and len(before) >= 20
    assert contents(tmp_path / "made/out") == contents(tmp_path / "whole")
    assert left_in(tmp_path / "made") == ["out"]


class Killed(BaseException):
    pass


@pytest.mark.parametrize("options", [{"train_tokens": 20_000}, {"valid_fraction": 0.2, "dedup": True}])
def test_ended_at_every_step_it_makes_the_same(tmp_path, monkeypatch, options):
    """Whatever is written appears by being renamed. Ended after the first of these, the next run after its
    second, the next after its third, and again, in whichever process that is."""
    monkeypatch.setattr(making, "SMALLEST_PIECE", 5_000)
    monkeypatch.setattr(packing, "WINDOWS_PER_SHARD", 150)
    source = write_jsonl(tmp_path / "t.jsonl", documents(200) + documents(20))
    prepare([source], tmp_path / "whole", "bytes", CONTEXT, **options)
    monkeypatch.setattr(making.shutil, "rmtree", lambda *_, **__: None)  # what is killed cleans up nothing
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    n_ends, n_renamed = 0, 0
    for name in ("replace", "rename"):
        whole = getattr(Path, name)

        def ending(self, target, whole=whole):
            nonlocal n_renamed
            whole(self, target)
            n_renamed += 1
            if n_renamed == 1 + n_ends % 3:
                raise Killed

        monkeypatch.setattr(Path, name, ending)
    n_made = 0
    while n_ends <= 8:  # how often one is ended, hangs on what else its workers rename meanwhile
        n_made += 1
        out = tmp_path / f"out-{n_made}"
        while not out.exists():
            n_renamed = 0
            with contextlib.suppress(Killed, RuntimeError):
                prepare([source], out, "bytes", CONTEXT, **options, workers=1 + n_ends % 2)
            n_ends += 1
            assert n_ends < 100
        assert contents(out) == contents(tmp_path / "whole")


def test_killed_leaves_nothing_that_looks_finished(slow_run, tmp_path):
    slow_run.kill()
    slow_run.communicate()
    made = tmp_path / "made"
    assert left_in(made) == [".out.partial"]
    for folder in (made / ".out.partial", made / ".out.partial/data"):
        with pytest.raises(UserError, match="not a prepared dataset"):
            open_dataset(folder)
    # The next run of the same --out, of whatever text, takes its place.
    prepare([str(tmp_path / "t.jsonl")], made / "out", "bytes", CONTEXT)
    prepare([str(tmp_path / "t.jsonl")], tmp_path / "whole", "bytes", CONTEXT)
    assert left_in(made) == ["out"]
    assert contents(made / "out") == contents(tmp_path / "whole")


def test_processes_end_with_their_parent(real_workers):
    process = workers.start_process()
    process.stdin.close()
    assert process.wait(20) == 0


def test_two_runs_of_one_out(slow_run, tmp_path):
    with pytest.raises(UserError, match="another process is writing"):
        prepare([str(tmp_path / "t.jsonl")], tmp_path / "made/out", "bytes", CONTEXT)
    assert slow_run.poll() is None
    assert len(left_in(tmp_path / "made")) == 1


@pytest.mark.slow
def test_killed_twenty_times_it_makes_the_same(tmp_path):
    """The whole group of processes, at random moments."""
    rng = np.random.default_rng(0)
    for name in ("a", "b", "c"):
        texts = documents(3000, seed=ord(name)) + documents(300)
        with gzip.open(tmp_path / f"{name}.jsonl.gz", "wt") as file:
            file.write("".join(json.dumps({"text": text}) + "\n" for text in texts * 4))
    code = (
        "from core.data import making; making.SMALLEST_PIECE = 50_000\n"
        "from core.errors import run_command; from train_tpu.prepare import main; run_command(main)"
    )
    command = [
        sys.executable,
        "-c",
        code,
        str(tmp_path / "*.gz"),
        "--tokenizer",
        "mistral",
        "--context",
        "64",
    ]
    command += ["--dedup", "--workers", "2", "--out"]
    started = time.monotonic()
    subprocess.run([*command, str(tmp_path / "whole")], cwd=ROOT, check=True)
    whole_time = time.monotonic() - started
    n_kills, made = 0, tmp_path / "made"
    made.mkdir()
    while not (made / "out").exists():
        process = subprocess.Popen([*command, str(made / "out")], cwd=ROOT, start_new_session=True)
        try:  # of the time that one that is not killed takes, most goes into starting
            process.wait(whole_time * rng.uniform(0.1, 1.0) if n_kills < 20 else 600)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            n_kills += 1
        process.wait()
        if (made / "out").exists() and n_kills < 20:  # it was ended too late: once more
            assert contents(made / "out") == contents(tmp_path / "whole")
            shutil.rmtree(made / "out")
    assert n_kills == 20
    assert contents(made / "out") == contents(tmp_path / "whole")


@pytest.mark.slow
def test_full_disk(tmp_path):
    source = write_jsonl(tmp_path / "t.jsonl", documents(20_000))
    (tmp_path / "made").mkdir()

    # Writing past this size fails, as on a full disk.
    code = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))\n"
    code += "from core.errors import run_command; from train_tpu.prepare import main; run_command(main)"
    done = subprocess.run(
        [sys.executable, "-c", code, source, "--out", str(tmp_path / "made/out"), "--tokenizer", "bytes"],
        capture_output=True, text=True, cwd=ROOT, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert "could not be written" in done.stderr and done.stderr.count("\n") == 1
    assert left_in(tmp_path / "made") == []


@pytest.mark.slow
def test_memory_is_bounded_whatever_the_size_of_the_corpus(tmp_path):
    source = DATA / "wikipedia-en-2015" / "train-00.jsonl.xz"
    if not source.exists():
        pytest.skip("the corpus wikipedia-en-2015 is not beside the repository")
    # A process in between, so that the largest child is one of these and not of another test.
    script = (
        "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True, stdout=2);"
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    )
    command = [sys.executable, "-m", "train_tpu.prepare", str(source), "--out", str(tmp_path / "out")]
    done = subprocess.run([sys.executable, "-c", script, *command], cwd=ROOT, check=True, capture_output=True)
    # KiB of the largest process; there are three, and together they must stay below 2 GiB
    assert int(done.stdout) < 2 * 2**20 / 3


@pytest.mark.parametrize(
    ("text", "fraction", "advice"),
    [("Little.", 0.0, "or a shorter context"), ("Much. " * 50, 0.001, "or hold out a larger part of it")],
)
def test_too_little_text_is_told_without_a_flag(tmp_path, text, fraction, advice):
    """A recipe says it in the same words, and there the settings are no flags: CONTEXT, VALID_FRACTION."""
    source = write_jsonl(tmp_path / "text.jsonl", [text] * (1 if fraction == 0 else 3))
    with pytest.raises(UserError, match=f"give more text {advice}$") as error:
        prepare([source], tmp_path / "out", "bytes", CONTEXT, valid_fraction=fraction)
    assert "--" not in str(error.value)
