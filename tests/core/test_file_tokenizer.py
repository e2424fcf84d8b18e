"""Tokenizers of every kind that the library builds, drawn: used with the library's own ids, or refused."""

import json
import unicodedata

import pytest
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors

from core.errors import UserError
from core.file_tokenizer import TEXT, keeps_text
from core.tokenizer import load_tokenizer
from tests.core.test_tokenizer import bpe_file

ALPHABET = list("abcdefgABC019.,!-<>/s |\u2581\néж漢€🙂\u0301")
WORDS = ["ab", "abc", "##ab", "the", "<s>", "<unk>", "<S>", "abb", "-b"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
BYTE_LEVEL = sorted(pre_tokenizers.ByteLevel.alphabet())  # which comes in another order in every call


@st.composite
def tokenizer_files(draw) -> tokenizers.Tokenizer:
    """A tokenizer of the library, with any of the parts it has."""
    kind = draw(st.sampled_from(["BPE", "Unigram", "WordPiece", "WordLevel"]))
    specials = draw(st.sampled_from([["<s>", "</s>"], ["<|endoftext|>"], ["[BOS]", "[EOS]"], ["<s>"], []]))
    sane = draw(st.booleans())  # half of them can be used
    if sane:
        specials = specials if specials == ["<|endoftext|>"] else ["<s>", "</s>"]
    inside = draw(st.booleans())  # whether the model's own vocabulary has the special tokens, too
    pieces = [*(specials if inside else []), *draw(st.lists(st.sampled_from(ALPHABET), max_size=20))]
    pieces += draw(st.lists(st.sampled_from(WORDS), max_size=4))
    pieces += BYTES[: draw(st.sampled_from([0, 0, 100, 256]))]
    pieces += BYTE_LEVEL[: draw(st.sampled_from([0, 0, 255, 256]))]
    pieces = [*dict.fromkeys(pieces), *(["<u>"] if sane else [])] or ["a"]
    vocab = {piece: number for number, piece in enumerate(pieces)}
    unknown = "<u>" if sane else draw(st.sampled_from([None, "<unk>", "missing", "<s>", pieces[-1]]))
    fallback = draw(st.booleans())
    if kind == "BPE":
        merges = [("a", "b")] if {"a", "b", "ab"} <= vocab.keys() else []
        options = {
            "unk_token": unknown,
            "dropout": None if sane else draw(st.sampled_from([None, None, 0.5])),
            "end_of_word_suffix": draw(st.sampled_from([None, None, "</w>"])),
            "continuing_subword_prefix": None if merges else draw(st.sampled_from([None, None, "##"])),
            "byte_fallback": fallback,
            "fuse_unk": draw(st.booleans()),
            "ignore_merges": draw(st.booleans()),
        }
        options = {name: value for name, value in options.items() if value is not None}
        model = models.BPE(vocab, merges, **options)
    elif kind == "Unigram":
        scored = [(piece, -1.0 - number / 7) for number, piece in enumerate(pieces)]
        model = models.Unigram(scored, vocab.get(unknown), fallback)
    elif kind == "WordPiece":
        model = models.WordPiece(vocab, unk_token=unknown or "[UNK]", max_input_chars_per_word=9)
    else:
        model = models.WordLevel(vocab, unk_token=unknown or "<unk>")
    made = tokenizers.Tokenizer(model)
    removing = [] if sane else [normalizers.Replace("b", "")]
    made.normalizer = draw(st.sampled_from([
        *removing, None, None, normalizers.NFKC(), normalizers.Lowercase(), normalizers.BertNormalizer(),
        normalizers.Replace(" ", "\u2581"), normalizers.Prepend("\u2581"),
        normalizers.ByteLevel(), normalizers.Strip(),
        normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()]),
    ]))  # fmt: skip
    removing = [
        pre_tokenizers.CharDelimiterSplit("-"), pre_tokenizers.Split("b", "removed"),
        pre_tokenizers.Punctuation("removed"),
    ]  # fmt: skip
    made.pre_tokenizer = draw(st.sampled_from([
        *([] if sane else removing), None, pre_tokenizers.Whitespace(), pre_tokenizers.WhitespaceSplit(),
        pre_tokenizers.Metaspace(),
        pre_tokenizers.ByteLevel(), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        pre_tokenizers.BertPreTokenizer(),
        pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel()]),
    ]))  # fmt: skip
    made.decoder = draw(st.sampled_from([None, decoders.ByteLevel(), decoders.WordPiece()]))
    made.add_special_tokens([AddedToken(token, special=True) for token in specials])
    if draw(st.booleans()):
        strips = {"lstrip": draw(st.booleans()), "rstrip": draw(st.booleans())}
        special = draw(st.booleans())
        made.add_tokens(
            [AddedToken(draw(st.sampled_from(["<tool>", "ab c", "<s>"])), special=special, **strips)]
        )
    if draw(st.booleans()):
        made.enable_truncation(draw(st.integers(1, 4)))
        made.enable_padding(length=draw(st.integers(1, 8)))
    if len(specials) == 2 and draw(st.booleans()):
        ids = [(token, made.token_to_id(token)) for token in specials]
        single = f"{specials[0]} $A {specials[1]}"
        made.post_processor = processors.TemplateProcessing(single=single, special_tokens=ids)
    return made


def visible(character: str) -> bool:
    """Whether a character is a letter, a digit, punctuation or a symbol, and not what stands for a space."""
    return unicodedata.category(character)[0] in "LNPS" and character != "\u2581"


outcomes: set[str] = set()
texts = st.lists(
    st.one_of(st.sampled_from(ALPHABET), st.sampled_from([*WORDS, "<tool>", "</s>", "<|endoftext|>"])),
    max_size=12,
).map("".join)


@settings(max_examples=100, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(made=tokenizer_files(), some=st.lists(texts, min_size=1, max_size=4))
def test_drawn_tokenizers(made, some, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "drawn.json"
    made.save(str(path))
    try:
        tokenizer = load_tokenizer(path)
    except UserError as error:
        assert str(error).startswith(str(path)) and "\n" not in str(error)
        outcomes.add("refused")
        return
    outcomes.add(json.loads(path.read_text())["model"]["type"])
    made = tokenizers.Tokenizer.from_file(str(path))
    made.no_truncation()
    made.no_padding()
    made.encode_special_tokens = True
    specials = {tokenizer.bos, tokenizer.eos}
    for text in some:
        ids = tokenizer.encode(text).tolist()
        expected = made.encode(text, add_special_tokens=False).ids
        assert not specials & set(ids)
        assert ids == expected or specials & set(expected)
        assert ids == tokenizer.encode(text).tolist()
        tokenizer.decode(ids)
        for character in filter(visible, text):
            assert len(tokenizer.encode(character)), (character, text)


def test_every_kind_was_used_and_some_were_refused():
    """That the test above, whose draws are always the same, is not one of refusals alone."""
    if not outcomes:
        pytest.skip("no tokenizers were drawn")
    assert outcomes == {"refused", "BPE", "Unigram", "WordPiece", "WordLevel"}


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            models.BPE({"<s>": 0, "</s>": 1, "a": 2, "<unk>": 3}, []),
            r"\(BPE\) leaves them out silently",
        ),
        (
            models.Unigram([("<s>", 0.0), ("</s>", 0.0), ("a", -1.0)], None, True),
            r"\(Unigram\) fails at them",
        ),
        (models.WordLevel({"<s>": 0, "</s>": 1}, unk_token="<unk>"), r"\(WordLevel\) fails at them"),
        (models.WordPiece({"<s>": 0, "</s>": 1}, unk_token="<unk>"), r"\(WordPiece\) fails at them"),
        (models.WordLevel({"<s>": 0, "</s>": 1}, unk_token="<s>"), "has <s> as its unknown token"),
        (models.BPE({"<s>": 0, "</s>": 1, "u": 2}, [], unk_token="u", dropout=0.1), "dropout of 0.1"),
        (models.BPE({"<im_start>": 0, "u": 1}, [], unk_token="u"), "name those that do so, with --tokenizer"),
    ],
)
def test_what_loses_text_is_refused(tmp_path, model, message):
    tokenizers.Tokenizer(model).save(str(tmp_path / "t.json"))
    with pytest.raises(UserError, match=message):
        load_tokenizer(tmp_path / "t.json")


def test_bytes_that_no_text_has_need_no_ids(tmp_path):
    """Vocabularies trained without ByteLevel's whole alphabet lack the bytes that UTF-8 never has."""
    letters = dict(zip(sorted(pre_tokenizers.ByteLevel.alphabet()), range(2, 258), strict=True))
    split = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    every = "".join(chr(i) for i in range(0x110000) if not 0xD800 <= i < 0xE000)
    absent = set(range(256)) - set(every.encode())
    assert len(absent) == 13
    occurring = letters.keys() - set(map(chr, absent))  # GPT-2's letters of these bytes are Latin-1's

    def saved(known: set[str]) -> str:
        made = tokenizers.Tokenizer(
            models.BPE({"<s>": 0, "</s>": 1} | {k: v for k, v in letters.items() if k in known}, [])
        )
        made.pre_tokenizer, made.decoder = split, decoders.ByteLevel()
        made.save(str(tmp_path / "t.json"))
        return str(tmp_path / "t.json")

    tokenizer = load_tokenizer(saved(occurring))
    assert tokenizer.decode(tokenizer.encode("a\U00100000é\0")) == "a\U00100000é\0"
    with pytest.raises(UserError, match="leaves them out silently"):
        load_tokenizer(saved(occurring - {max(occurring)}))


def test_removed_characters_are_named(tmp_path):
    made = tokenizers.Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "u": 2}, unk_token="u"))
    made.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex("[0-9]"), "removed")
    made.save(str(tmp_path / "t.json"))
    with pytest.raises(UserError, match="leaves the characters 0123456789 out of a text"):
        load_tokenizer(tmp_path / "t.json")


def test_whether_a_text_is_kept(tmp_path):
    assert all(
        keeps_text(load_tokenizer(name)) for name in ("mistral", "bytes", bpe_file(tmp_path, ["<s>", "</s>"]))
    )
    made = tokenizers.Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "u": 2}, unk_token="u"))
    made.save(str(tmp_path / "t.json"))
    assert not keeps_text(load_tokenizer(tmp_path / "t.json"))
    assert "<s>" in TEXT


def test_a_text_that_spells_bos_stays_text(tmp_path):
    pieces = ["<s>", "</s>", "<unk>", *"<>s/ab"]
    made = tokenizers.Tokenizer(models.Unigram([(p, -float(n)) for n, p in enumerate(pieces)], 2, False))
    made.save(str(tmp_path / "t.json"))
    assert made.encode("a<s>b").ids == [7, 0, 8]  # the library itself
    assert load_tokenizer(tmp_path / "t.json").encode("a<s>b").tolist() == [7, 3, 5, 4, 8]
