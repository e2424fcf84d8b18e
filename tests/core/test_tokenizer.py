import functools
import importlib.resources
import json
import lzma
import pickle
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece.sentencepiece_model_pb2 import ModelProto

import core.file_tokenizer as file_module
import core.mistral_tokenizer as module
from core.errors import UserError
from core.tokenizer import (
    TextStream,
    find_tokenizer,
    load_tokenizer,
    load_tokenizer_of,
    require_same,
    tokenizer_record,
)

DATA = Path(__file__).parents[3] / "shared" / "data"
MODEL = importlib.resources.files("mistral_common").joinpath(module.MISTRAL_FILE)


@pytest.fixture(scope="module")
def mistral():
    return load_tokenizer("mistral")


@pytest.fixture(scope="module")
def reference():
    """Sentencepiece itself on whole documents: what `mistral` must equal."""
    return sentencepiece.SentencePieceProcessor(model_file=str(MODEL))


def bpe_file(folder: Path, specials: list[str]) -> Path:
    """A small byte-level tokenizer.json trained here."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=specials,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the cat sat on the mat and the dog did not"] * 9, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


# Text around what the units of MistralTokenizer turn on: spaces, U+2581, line feeds, characters without a
# piece, control characters, and the words that the vocabulary does have.
AWKWARD = [
    " ", "  ", "\u2581", "\u2581a", "\n", "\r\n", "\t", "\0", "\x0b", "\x85", "\u3000", "\ufeff", "\u200d",
    "😀", "é", "e\u0301", "漢字", "the", " the", "ing", "<s>", "</s>", "<0x41>", "();\r", "'s", "=" * 70,
]  # fmt: skip
awkward = st.lists(st.one_of(st.sampled_from(AWKWARD), st.text(max_size=8)), max_size=30).map("".join)


@settings(max_examples=400, deadline=None)
@given(text=awkward)
def test_mistral_equals_sentencepiece(mistral, reference, text):
    assert mistral.encode(text).tolist() == reference.encode(text)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["wikipedia-en-2015/valid.jsonl.xz", "books-pd/valid.jsonl.xz"])
def test_mistral_equals_sentencepiece_on_real_documents(mistral, reference, name):
    if not (DATA / name).exists():
        pytest.skip(f"the corpus {name} is not beside the repository")
    with lzma.open(DATA / name, "rt", encoding="utf-8") as lines:
        texts = [json.loads(line)["text"] for line in lines]
    assert len(texts) > 1
    for text in texts:
        assert mistral.encode(text).tolist() == reference.encode(text)


def test_units_of_mistral_are_independent():
    """The facts of its model that make encoding unit by unit exact."""
    model = ModelProto.FromString(MODEL.read_bytes())
    normalizer, space = model.normalizer_spec, module.SPACE
    assert normalizer.name == "identity" and not normalizer.precompiled_charsmap
    assert normalizer.add_dummy_prefix and not normalizer.remove_extra_whitespaces
    assert not model.trainer_spec.treat_whitespace_as_suffix
    kinds = {ModelProto.SentencePiece.Type.Name(piece.type) for piece in model.pieces}
    assert kinds == {"NORMAL", "UNKNOWN", "CONTROL", "BYTE"}
    pieces = [piece.piece for piece in model.pieces]
    assert not any(space in piece.lstrip(space) or "\n" in piece for piece in pieces)


def test_mistral_is_exact_when_its_cache_overflows(monkeypatch, reference):
    monkeypatch.setattr(module._UnitCache, "MAX_UNITS", 5)
    tokenizer = load_tokenizer("mistral")
    text = "one two three four five six seven eight two one nine " * 3
    assert tokenizer.encode(text).tolist() == reference.encode(text)
    assert len(tokenizer._unit_ids) <= 5


def test_mistral_refuses_another_model(monkeypatch, tmp_path):
    (tmp_path / "data").mkdir()
    changed = bytearray(MODEL.read_bytes())
    changed[1000] ^= 1
    (tmp_path / module.MISTRAL_FILE).write_bytes(changed)
    monkeypatch.setattr(module.importlib.resources, "files", lambda _: tmp_path)
    with pytest.raises(UserError, match=r"tokenizer\.model\.v1 is not Mistral-7B-v0\.1's tokenizer"):
        load_tokenizer("mistral")


def test_special_ids(mistral, reference, tmp_path):
    assert (mistral.vocab_size, mistral.bos, mistral.eos) == (32_000, 1, 2)
    assert (reference.id_to_piece(mistral.bos), reference.id_to_piece(mistral.eos)) == ("<s>", "</s>")
    b = load_tokenizer("bytes")
    assert (b.vocab_size, b.bos, b.eos) == (258, 256, 257)
    f = load_tokenizer(bpe_file(tmp_path, ["<pad>", "<s>", "</s>"]))
    assert (f.bos, f.eos) == (1, 2)
    one = load_tokenizer(bpe_file(tmp_path, ["<|endoftext|>"]))
    assert (one.bos, one.eos) == (0, 0)


loaded = functools.cache(load_tokenizer)  # once for all examples


@pytest.mark.parametrize("name", ["mistral", "bytes", "file"])
@settings(max_examples=60, deadline=None)
@given(text=awkward)
def test_round_trip_and_stream(name, tmp_path_factory, text):
    folder = tmp_path_factory.getbasetemp()
    if name == "file" and not (folder / "tokenizer.json").exists():
        bpe_file(folder, ["<s>", "</s>"])
    tokenizer = loaded(str(folder / "tokenizer.json") if name == "file" else name)
    ids = tokenizer.encode(text)
    assert ids.dtype == np.uint16
    assert tokenizer.bos not in ids and tokenizer.eos not in ids  # "<s>" in the text is text
    expected = text.replace("\u2581", " ") if name == "mistral" else text
    assert tokenizer.decode([tokenizer.bos, *ids, tokenizer.eos]) == expected
    stream = TextStream(tokenizer)
    pieces = [stream.push(i) for i in [tokenizer.bos, *ids]]
    # "\ufeff" and the like may be text; only a character cut in two must not be shown.
    assert "\ufffd" in text or all("\ufffd" not in piece for piece in pieces)
    assert "".join(pieces) + stream.flush() == expected


@pytest.mark.parametrize("name", ["mistral", "bytes", "file"])
def test_ids_beyond_the_tokenizer_decode_to_nothing(name, tmp_path):
    """Those of a padded vocabulary, which a model may draw."""
    tokenizer = load_tokenizer(bpe_file(tmp_path, ["<s>", "</s>"]) if name == "file" else name)
    a, b = tokenizer.encode("a").tolist(), tokenizer.encode("b").tolist()
    beyond = [tokenizer.vocab_size, np.int64(tokenizer.vocab_size + 270)]
    assert tokenizer.decode([*a, *beyond, *b]) == tokenizer.decode([*a, *b])
    stream = TextStream(tokenizer)
    assert "".join(map(stream.push, [*a, *beyond, *b])) + stream.flush() == tokenizer.decode([*a, *b])


def test_stream_holds_back_an_incomplete_character():
    stream = TextStream(load_tokenizer("bytes"))
    assert [stream.push(i) for i in "é!".encode()] == ["", "é", "!"]
    assert [stream.push(i) for i in "é".encode()[:1]] == [""]
    assert stream.flush() == "\ufffd"
    assert [stream.push(i) for i in b"\xe2A"] == ["", "\ufffdA"]


def test_decode_replaces_bytes_that_are_not_utf8(mistral):
    first_byte = mistral.encode("\n")[-1] - 10  # byte pieces follow one another: "\n" is byte 10
    assert mistral.decode([first_byte + 0xFF]) == "\ufffd"
    assert load_tokenizer("bytes").decode([65, 255, 66]) == "A\ufffdB"


@pytest.mark.parametrize("name", ["mistral", "bytes"])
def test_pickled_and_loaded_again(name):
    tokenizer = load_tokenizer(name)
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert tokenizer_record(copy) == tokenizer_record(tokenizer)
    assert copy.encode("a b").tolist() == tokenizer.encode("a b").tolist()


def test_records_are_compared_by_content(tmp_path, mistral):
    a = tokenizer_record(load_tokenizer(bpe_file(tmp_path, ["<s>", "</s>"])))
    (tmp_path / "moved").mkdir()
    moved = (tmp_path / "tokenizer.json").rename(tmp_path / "moved" / "tokenizer.json")
    require_same(a, tokenizer_record(load_tokenizer(moved)), "the model", "the data")
    with pytest.raises(UserError, match=r"the model has .*tokenizer\.json.*, the data D has 'mistral'"):
        require_same(a, tokenizer_record(mistral), "the model", "the data D")


def test_a_tokenizer_is_found_by_its_hash_wherever_its_file_is(tmp_path):
    file = bpe_file(tmp_path, ["<s>", "</s>"])
    first = load_tokenizer(file)
    record = tokenizer_record(first)
    carrier, empty = tmp_path / "carrier", tmp_path / "empty"
    carrier.mkdir()
    empty.mkdir()
    first.carry(carrier)
    assert (carrier / "tokenizer.json").read_bytes() == file.read_bytes()
    load_tokenizer("bytes").carry(empty)
    assert not list(empty.iterdir())

    # A record without a carried file, as older versions wrote it, by its path.
    assert find_tokenizer(record, [empty], "the data") == str(file)
    file.rename(tmp_path / "renamed.json")
    found = load_tokenizer_of(record, [empty, carrier], "the data")
    assert tokenizer_record(found) == record | {"name": str(carrier / "tokenizer.json")}
    assert found.encode("the cat").tolist() == first.encode("the cat").tolist()
    given = load_tokenizer_of(record, [], "the data", str(tmp_path / "renamed.json"))
    assert given.sha256 == first.sha256

    other = load_tokenizer(bpe_file(tmp_path, ["<|endoftext|>"]))  # where the first one was
    for given, message in (
        (None, rf"{record['sha256'][:12]}.*{file} is another one, {other.sha256[:12]}.*--tokenizer FILE"),
        (str(file), rf"the data has .*{record['sha256'][:12]}.*--tokenizer has .*{other.sha256[:12]}"),
    ):
        with pytest.raises(UserError, match=message):
            load_tokenizer_of(record, [empty], "the data", given)
    (carrier / "tokenizer.json").write_bytes(b"damaged")
    file.unlink()
    with pytest.raises(UserError, match=r"the tokenizer of the data is not found.*is another one"):
        load_tokenizer_of(record, [carrier], "the data")
    first.carry(carrier)  # takes the place of the damaged one
    assert load_tokenizer_of(record, [carrier], "the data").sha256 == first.sha256


def test_wrong_names_and_files(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="unknown tokenizer 'mistrel'"):
        load_tokenizer("mistrel")
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(UserError, match=r"broken\.json is not a tokenizer\.json"):
        load_tokenizer(tmp_path / "broken.json")
    with pytest.raises(
        UserError,
        match=r"neither the tokens <s> and </s> nor <\|endoftext\|>.*special tokens are <s>: name those",
    ):
        load_tokenizer(bpe_file(tmp_path, ["<s>"]))
    file = bpe_file(tmp_path, ["<s>", "</s>"])
    n = load_tokenizer(file).vocab_size
    monkeypatch.setattr(file_module, "MAX_VOCAB", n - 1)
    with pytest.raises(UserError, match=f"has {n} ids: choose a tokenizer of at most {n - 1}"):
        load_tokenizer(file)


@pytest.mark.parametrize("name", ["mistral", "bytes"])
def test_lone_surrogate_is_refused(name):
    with pytest.raises(UserError, match="lone surrogate at character 1"):
        load_tokenizer(name).encode("a\ud800b")
