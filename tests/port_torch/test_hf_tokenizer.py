"""The tokenizer files against sentencepiece and our own tokenizers, as transformers reads them."""

import dataclasses
import importlib.resources
from pathlib import Path

import pytest
import sentencepiece
import tokenizers

from core.errors import UserError
from core.tokenizer import MISTRAL_FILE, load_tokenizer, tokenizer_record
from port_torch.folder_tokenizer import folder_tokenizer
from port_torch.hf_tokenizer import write_tokenizer
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
