"""Ids beyond 16 bits and documents without bos, from text to the records that are read back."""

import json
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tokenizers import models, pre_tokenizers

from core.data.batches import heldout_windows, train_batches
from core.data.dataset import open_dataset, open_windows
from core.data.prepare import choose_tokenizer, open_or_prepare, prepare
from core.data.windows import BadRecord
from core.errors import UserError
from core.tokenizer import id_dtype, load_tokenizer
from tests.core.data.test_prepare import stream_of, windows_of, write_jsonl
from tests.core.test_special_tokens import CHAT
from tests.core.test_tokenizer import bpe_file
from train_tpu import prepare as command

MANY = 70_000
CONTEXT = 16


def words_file(folder: Path, n: int = MANY) -> Path:
    """A tokenizer whose word w17 has the id 17; the last three ids are those of <u>, <s> and </s>."""
    words = [f"w{i}" for i in range(n - 3)] + ["<u>", "<s>", "</s>"]
    made = tokenizers.Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<u>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.save(str(folder / "tokenizer.json"), pretty=False)
    return folder / "tokenizer.json"


def numbers(n: int, documents: int = 9) -> list[list[int]]:
    """Ids of documents, those around 16 bits among them."""
    drawn = np.random.default_rng(0).integers(0, n - 3, (documents, 30)).tolist()
    return [[65_535, 65_536, n - 4, *document] for document in drawn] if n > 65_536 else drawn


def write_documents(path: Path, documents: list[list[int]]) -> str:
    return write_jsonl(path, [" ".join(f"w{i}" for i in document) for document in documents])


def test_types_of_ids():
    assert [id_dtype(n) for n in (258, 65_536, 65_537)] == [np.uint16, np.uint16, np.uint32]


def test_ids_beyond_16_bits(tmp_path):
    """The words tell the ids; TFDS itself reads the records, in the type that they have on the disk."""
    documents = numbers(MANY)
    text = write_documents(tmp_path / "text.jsonl", documents)
    held = write_documents(tmp_path / "held.jsonl", documents)
    out = prepare([text], tmp_path / "out", str(words_file(tmp_path)), CONTEXT, {"held": held}, workers=1)
    stream = [i for document in documents for i in (MANY - 2, *document, MANY - 1)]
    written = windows_of(out, "train")
    assert written.dtype == np.uint32
    assert stream_of(written) == stream[: len(written) * CONTEXT + 1]
    features = json.loads((out / "features.json").read_text())
    assert "uint32" in json.dumps(features)
    dataset = open_dataset(out)
    tokens, mask = heldout_windows(dataset, "held")
    assert tokens.dtype == np.uint32 and tokens[:, 1:][mask].tolist() == stream[1:]
    batches = train_batches(dataset, seed=0, batch=4, vocab_size=MANY)
    batch = next(batches)
    batches.close()
    assert batch.tokens.dtype == np.uint32 and (batch.tokens == written[batch.records]).all()
    # An id at or beyond the tokenizer's number is a bad record; its row keeps the type.
    windows = open_windows(dataset, "train")
    with pytest.raises(BadRecord, match="holds the token id 69999, but the tokenizer has 69999 ids"):
        windows.read(list(range(len(windows))), MANY - 1)
    rows, bad = windows.read_or_skip([0, 1], 65_536)
    assert rows.dtype == np.uint32 and bad.any() and not rows[bad].any()


def test_tokens_are_read_in_the_type_that_a_model_takes(tmp_path):
    """A model with more rows than 16 bits count, of a tokenizer whose ids they hold."""
    text = write_documents(tmp_path / "text.jsonl", numbers(300))
    out = prepare([text], tmp_path / "out", str(words_file(tmp_path, 300)), CONTEXT, workers=1)
    assert windows_of(out, "train").dtype == np.uint16
    plain, wide = (
        next(train_batches(open_dataset(out), seed=0, batch=2, vocab_size=300, dtype=dtype))
        for dtype in (None, id_dtype(MANY))
    )
    assert (plain.tokens.dtype, wide.tokens.dtype) == (np.uint16, np.uint32)
    assert (plain.tokens == wide.tokens).all()


def test_documents_without_bos(tmp_path, monkeypatch, capsys):
    """The command, as for a Qwen: tokens and eos; whoever opens the data finds the same tokens again."""
    file = bpe_file(tmp_path, CHAT)
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": null, "eos_token": "<|im_end|>"}')
    texts = [f"the cat sat on mat {i}" for i in range(40)]
    text, out = write_jsonl(tmp_path / "t.jsonl", texts), tmp_path / "out"
    options = ["--out", out, "--tokenizer", file, "--context", CONTEXT, "--workers", 1, "--valid-fraction", 0]
    assert command.main([str(argument) for argument in (text, *options)]) == 0
    library = tokenizers.Tokenizer.from_file(str(file))
    stream = [i for text in texts for i in (*library.encode(text).ids, 2)]
    written = windows_of(out, "train")
    assert stream_of(written) == stream[: len(written) * CONTEXT + 1]
    record = open_dataset(out).tokenizer_record
    assert (record["bos"], record["eos"]) == (None, "<|im_end|>")

    for moved in (file, tmp_path / "tokenizer_config.json"):
        moved.rename(tmp_path / f"{moved.name}.old")
    found = choose_tokenizer(None, str(out), "bytes")
    assert (found.bos, found.eos) == (None, 2)
    assert open_or_prepare(str(out), found.name, CONTEXT, tmp_path / "cache").path == out
    other = load_tokenizer(f"{out / 'tokenizer.json'},eos=<|im_start|>")
    with pytest.raises(
        UserError, match=r"the tokenizers differ.*eos=<\|im_start\|>.*bos=none,eos=<\|im_end\|>"
    ):
        open_or_prepare(str(out), other.name, CONTEXT, tmp_path / "cache")
    # Text that is prepared on the way is prepared for each.
    paths = {
        open_or_prepare(text, name, CONTEXT, tmp_path / "cache").path for name in (found.name, other.name)
    }
    assert len(paths) == 2
