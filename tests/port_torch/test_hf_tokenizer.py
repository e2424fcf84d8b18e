"""The tokenizer files against sentencepiece and our own tokenizers, as transformers reads them."""

import dataclasses
import importlib.resources
import json
from pathlib import Path

import pytest
import sentencepiece
import tokenizers

from core.errors import UserError
from core.mistral_tokenizer import MISTRAL_FILE
from core.tokenizer import ORIGINAL, load_tokenizer, open_tokenizer, tokenizer_record
from port_torch.folder_tokenizer import folder_tokenizer
from port_torch.hf_config import hf_config
from port_torch.hf_tokenizer import opens_with_auto_tokenizer, write_tokenizer
from tests.core.test_special_tokens import CHAT
from tests.core.test_tokenizer import bpe_file
from tests.port_torch.folders import SMALL, manifest_of
from tests.port_torch.texts import encode_and_decode, fuzzed_texts

MODEL = importlib.resources.files("mistral_common").joinpath(MISTRAL_FILE)


def expected_of(name: str, texts: list[str]) -> list[tuple[list[int], str]]:
    """What sentencepiece, or our tokenizer of that name, makes of the texts, with `<s>` before them."""
    ours = load_tokenizer(name)
    reference = sentencepiece.SentencePieceProcessor(model_file=str(MODEL)) if name == "mistral" else ours
    every = [list(map(int, reference.encode(text))) for text in texts]
    return [([ours.bos, *ids], reference.decode(ids)) for ids in every]


@pytest.mark.parametrize("name", ["mistral", "bytes", "file"])
def test_1000_texts_are_encoded_and_decoded_alike(name: str, tmp_path: Path):
    if name == "file":
        name = str(bpe_file(tmp_path, ["<s>", "</s>"]))
    (tmp_path / "out").mkdir()
    write_tokenizer(tmp_path / "out", load_tokenizer(name), 96)
    texts = fuzzed_texts()
    for text, got, expected in zip(
        texts, encode_and_decode(str(tmp_path / "out"), texts), expected_of(name, texts), strict=True
    ):
        assert got == expected, repr(text)


def test_long_runs_of_one_character(tmp_path: Path):
    """Where equal scores and equal unions meet, the order of the merges decides."""
    write_tokenizer(tmp_path, load_tokenizer("mistral"), 96)
    runs = [
        f"{before}{character * n}b" for character in " =-*/#" for before in ("", "a") for n in range(1, 70)
    ]
    assert encode_and_decode(str(tmp_path), runs) == expected_of("mistral", runs)


def test_special_tokens_and_settings(tmp_path: Path):
    from transformers import AutoTokenizer

    write_tokenizer(tmp_path, load_tokenizer("mistral"), 96)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.model_max_length) == (1, 2, 96)
    assert len(tokenizer) == 32_000
    assert (tmp_path / "tokenizer.model").read_bytes() == MODEL.read_bytes()


def of_kind(kind: str, folder: Path) -> str:
    """A tokenizer's name, or the path of a file made here."""
    if kind in ("mistral", "bytes"):
        return kind
    specials = {"own": ["<s>", "</s>", "<pad>"], "gpt2": ["<|endoftext|>"]}[kind]
    return str(bpe_file(folder, specials))


@pytest.mark.parametrize(
    ("kind", "pad"), [("mistral", "<unk>"), ("bytes", "<s>"), ("own", "<pad>"), ("gpt2", "<|endoftext|>")]
)
def test_batches_are_padded_and_no_end_is_taken_out_of_the_loss(tmp_path: Path, kind: str, pad: str):
    """transformers' own collator masks every label that is the padding's id."""
    from transformers import AutoTokenizer, DataCollatorForLanguageModeling

    ours = load_tokenizer(of_kind(kind, tmp_path))
    (tmp_path / "out").mkdir()
    write_tokenizer(tmp_path / "out", ours, 96)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.pad_token == pad and len(tokenizer) == ours.vocab_size
    texts = ["the cat sat", "a"]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    rows = [ours.begin(text) for text in texts]
    assert batch["attention_mask"].sum(1).tolist() == [len(row) for row in rows]
    assert [ids[-len(row) :].tolist() for ids, row in zip(batch["input_ids"], rows, strict=True)] == rows
    documents = [{"input_ids": [*row, ours.eos]} for row in rows]
    labels = DataCollatorForLanguageModeling(tokenizer, mlm=False)(documents)["labels"]
    # GPT-2's kind has one token for both ends and padding, as the field has it.
    assert kind == "gpt2" or (labels[:, -1] == ours.eos).all()


@pytest.mark.parametrize(
    ("bos", "eos"),
    [
        (None, "<|endoftext|>"),  # Qwen
        (None, "<|im_end|>"),  # Qwen, for chats
        ("<|endoftext|>", "<|endoftext|>"),  # SmolLM2
        ("<|im_start|>", "<|im_end|>"),  # SmolLM2, for chats
    ],
)
def test_bos_and_eos_of_a_folder_are_those_of_transformers(tmp_path: Path, bos: str | None, eos: str):
    """A folder that transformers wrote, opened here and exported again."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    made = PreTrainedTokenizerFast(tokenizer_file=str(bpe_file(tmp_path, CHAT)), bos_token=bos, eos_token=eos)
    made.save_pretrained(tmp_path / "theirs")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "theirs")
    ours = open_tokenizer(tmp_path / "theirs" / "tokenizer.json")
    assert (ours.bos, ours.eos) == (theirs.bos_token_id, theirs.eos_token_id)
    (tmp_path / "out").mkdir()
    write_tokenizer(tmp_path / "out", ours, 96)
    again = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (again.bos_token, again.eos_token) == (bos, eos)
    opening = [] if bos is None else [theirs.bos_token_id]
    for text in fuzzed_texts(50):
        ids = theirs(text, add_special_tokens=False)["input_ids"]
        assert again(text)["input_ids"] == [*opening, *ids]
        assert ours.encode(text).tolist() == ids and ours.begin(text) == ([*opening, *ids] or [ours.eos])
    assert again("<|im_end|>")["input_ids"][len(opening) :] == ours.encode("<|im_end|>").tolist() != [2]
    # The exported folder's file is that tokenizer again, of the same record but for its name.
    found = open_tokenizer(tmp_path / "out" / "tokenizer.json")
    assert (found.bos, found.eos) == (ours.bos, ours.eos)
    manifest = dataclasses.replace(manifest_of(SMALL["llama"]), tokenizer=tokenizer_record(ours))
    for name in (None, str(tmp_path / "out" / "tokenizer.json")):
        found = folder_tokenizer(tmp_path / "out", manifest, name, ours.vocab_size + 9)
        assert (found.bos, found.eos) == (ours.bos, ours.eos)


def test_auto_tokenizer_of_a_qwen2_is_its_own(tmp_path: Path):
    """Which is why the model card of one names another class."""
    from transformers import PreTrainedTokenizerFast

    ours = load_tokenizer(f"{bpe_file(tmp_path, CHAT)},bos=none,eos=<|im_end|>")
    for name, parts, alike in (("qwen2", {"qkv_biases": True}, False), ("qwen3", {"qk_norm": True}, True)):
        folder = tmp_path / name
        folder.mkdir()
        model = dataclasses.replace(SMALL["llama"], vocab_size=400, **parts)
        content = hf_config(model, ours.bos, ours.eos, "float32")
        assert content["model_type"] == name
        (folder / "config.json").write_text(json.dumps(content))
        write_tokenizer(folder, ours, model.context)
        assert opens_with_auto_tokenizer(folder, ours) is alike
        opened = PreTrainedTokenizerFast.from_pretrained(folder)
        assert all(opened(text)["input_ids"] == ours.encode(text).tolist() for text in fuzzed_texts(50))
        assert (opened.bos_token_id, opened.eos_token_id) == (None, 2)


def test_truncation_and_padding_of_the_file_are_left_out(tmp_path: Path):
    """A file saved by a training script cuts and fills every text to its own length; ours never did."""
    path = bpe_file(tmp_path, ["<s>", "</s>"])
    given = tokenizers.Tokenizer.from_file(str(path))
    given.enable_truncation(16)
    given.enable_padding(length=16, pad_token="[PAD]")
    given.save(str(path))
    ours = load_tokenizer(path)
    (tmp_path / "out").mkdir()
    write_tokenizer(tmp_path / "out", ours, 96)
    texts = ["the cat", "the cat sat on the mat and the dog did not " * 5]
    assert encode_and_decode(str(tmp_path / "out"), texts) == expected_of(str(path), texts)
    exported = tokenizers.Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    assert [exported.encode(text).ids for text in texts] == [ours.begin(text) for text in texts]
    assert load_tokenizer(tmp_path / "out" / ORIGINAL).sha256 == ours.sha256  # what the checkpoint records


def test_a_file_that_begins_with_bos_already_is_copied(tmp_path: Path):
    path = bpe_file(tmp_path, ["<s>", "</s>"])
    given = tokenizers.Tokenizer.from_file(str(path))
    given.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    given.save(str(path), pretty=False)
    (tmp_path / "out").mkdir()
    write_tokenizer(tmp_path / "out", load_tokenizer(str(path)), 96)
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == path.read_bytes()


def test_an_exported_folder_carries_the_original_of_a_file_written_in_another_form(tmp_path: Path):
    path, folder = bpe_file(tmp_path, ["<s>", "</s>"]), tmp_path / "out"
    tokenizer = load_tokenizer(path)
    folder.mkdir()
    write_tokenizer(folder, tokenizer, 96)
    assert (folder / "tokenizer.json").read_bytes() != path.read_bytes()
    path.unlink()
    manifest = dataclasses.replace(manifest_of(SMALL["llama"]), tokenizer=tokenizer_record(tokenizer))
    # Named by the user: the file of the form that the folder has, too.
    for name in (None, str(folder / "mtlm_tokenizer.json")):
        assert folder_tokenizer(folder, manifest, name, tokenizer.vocab_size).sha256 == tokenizer.sha256
    again = folder_tokenizer(folder, manifest, str(folder / "tokenizer.json"), tokenizer.vocab_size)
    assert again.encode("the cat").tolist() == tokenizer.encode("the cat").tolist()
    with pytest.raises(UserError, match="the tokenizers differ"):
        folder_tokenizer(folder, manifest, "bytes", tokenizer.vocab_size)
