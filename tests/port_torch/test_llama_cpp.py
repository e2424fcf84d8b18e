"""GGUF files in llama.cpp itself: token ids, and 64 greedy tokens, equal to ours.

It needs `pip install llama-cpp-python`, which is compiled from source for half an hour on two cores, so it is
not among the packages of this project.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers

from core.chat import open_chat
from core.data.conversations import Turn
from core.sampling import Sampling
from core.tokenizer import load_tokenizer, open_tokenizer
from port_torch.gguf_tokenizer import LLAMA3, QWEN2
from port_torch.hf_tokenizer import write_tokenizer
from port_torch.model import load
from port_torch.sampling import stream
from tests.core.test_special_tokens import CHAT
from tests.models import random_params
from tests.port_torch.folders import tensors_of, write_folder
from tests.port_torch.test_field_models import MODELS, make
from tests.port_torch.test_gguf import KINDS, SCALED, SMALL, write_model
from tests.port_torch.trained import train
from tests.train_tpu.processes import run_here

llama_cpp = pytest.importorskip("llama_cpp", reason="pip install llama-cpp-python")
pytestmark = pytest.mark.slow

N_TOKENS = 64


def convert(folder: Path, out: Path, kind: str = "f32") -> Path:
    run_here(folder, out, "--type", kind, module="port_torch.gguf")
    return out


def greedy(file: Path, prompts: list[list[int]]) -> list[list[int]]:
    """What llama.cpp adds to each prompt, its cache in float32."""
    llama = llama_cpp.Llama(str(file), n_ctx=128, verbose=False, type_k=0, type_v=0, n_threads=1)
    texts = []
    for prompt in prompts:
        llama.reset()
        made = llama.generate(prompt, temp=0.0, top_k=1, repeat_penalty=1.0)
        texts.append([next(made) for _ in range(N_TOKENS)])
    llama.close()
    return texts


def ours(folder: Path, prompts: list[list[int]]) -> list[list[int]]:
    steps = stream(load(folder), prompts, Sampling(temperature=0.0), N_TOKENS)
    return [list(row) for row in zip(*steps, strict=True)]


@pytest.mark.parametrize("name", MODELS)
def test_the_fields_models(name: str, tmp_path: Path):
    """Random weights of their shapes, scaled positions among them (llama3 and yarn)."""
    make(name, tmp_path / "folder")
    bytes_with_a_merge(tmp_path / "folder")
    prompts = [[3, 1, 4, 1, 5, 9, 2, 6], [250]]
    assert greedy(convert(tmp_path / "folder", tmp_path / "file"), prompts) == ours(
        tmp_path / "folder", prompts
    )


@pytest.mark.parametrize("name", [*KINDS, SCALED[0]])
def test_our_mixtures(name: str, tmp_path: Path):
    """Biases, heads wider than the model, an untied head, linear scaling."""
    config = KINDS.get(name) or dataclasses.replace(SMALL, rope_scaling=name)
    write_model(tmp_path / "folder", config)
    prompts = [[3, 1, 4, 1, 5, 9, 2, 6], [250]]
    assert greedy(convert(tmp_path / "folder", tmp_path / "file"), prompts) == ours(
        tmp_path / "folder", prompts
    )


def bytes_with_a_merge(folder: Path) -> None:
    """A tokenizer of 258 ids, for models whose tokens are drawn."""
    letters = sorted({*pre_tokenizers.ByteLevel.alphabet()} - {"ÿ"})  # a byte that UTF-8 never has
    ids = {text: i for i, text in enumerate([*letters, "th", "<s>", "</s>"])}
    made = tokenizers.Tokenizer(models.BPE(ids, [("t", "h")]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.add_special_tokens(["<s>", "</s>"])
    made.save(str(folder / "tokenizer.json"))


PIECES = [
    " ", "  ", "   ", "\n", "\r\n", "\t", "\0", "\x0b", "\x85", "\u3000", "\ufeff", "\u200d", "\xa0",
    "\u2028", "😀", "é", "e\u0301", "漢字", "नमस्ते", "ไทย", "한국어", "ς", "ß", "ǅ", "\ue000", "\U0010ffff",
    "the", " the", "ing", "A", "Ab", "aB", "<s>", "</s>", "<|im_end|>", "<tool>", "'s", "'S", "'ll", "'LL",
    "don't", "1", "12", "1234567", " 9", "½", "²", "①", "Ⅷ", "٣", "_", "-", "==", "::", "/", "\\", "'", '"',
    "...", "…", "«", "$", "€", "^", "`", "~", "|", "!", " !", "! ", "a\u0300b",
]  # fmt: skip


def texts(n: int, seed: int) -> list[str]:
    """Texts of what tokenizers split in different ways; a fifth of them of any characters."""
    rng = np.random.default_rng(seed)
    made = []
    while len(made) < n:
        length = int(rng.integers(1, 14))
        if rng.random() < 0.2:
            made.append("".join(map(chr, rng.integers(1, 0x3000, length))))
        else:
            made.append("".join(PIECES[i] for i in rng.integers(len(PIECES), size=length)))
    # The one difference that was found: (?i:'s) of the library takes this letter for an s.
    return [text for text in made if "\u017f" not in text]


def split_by(expression: str) -> Any:
    return pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(expression), "isolated"),
        pre_tokenizers.ByteLevel(False, use_regex=False),
    ])  # fmt: skip


SPLITS = {
    "gpt-2": pre_tokenizers.ByteLevel(False),
    "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(False)]),
    "qwen2": split_by(QWEN2),
    "smaug-bpe": split_by(LLAMA3),
    "llama-bpe": split_by(LLAMA3),
}


def awkward_bpe(name: str, file: Path) -> None:
    """A BPE that merges across every border, so that each split that differs gives other ids."""
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1590, special_tokens=CHAT, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    made.train_from_iterator(texts(6000, seed=9), trainer)
    made.pre_tokenizer = SPLITS[name]
    if name == "llama-bpe":  # whose words are tokens, whether they can be merged or not
        vocabulary = dict(made.get_vocab(with_added_tokens=False))
        merges = [tuple(merge) for merge in json.loads(made.to_str())["model"]["merges"]]
        made.model = models.BPE(vocabulary, merges[:-400], ignore_merges=True)
        made.add_special_tokens(CHAT)
    made.add_tokens([AddedToken("<tool>", special=False, normalized=False)])
    made.save(str(file))


@pytest.mark.parametrize("name", [*SPLITS, "mistral"])
def test_token_ids(name: str, tmp_path: Path):
    folder = tmp_path / "folder"
    config = dataclasses.replace(SMALL, n_layers=1, vocab_size=32_000 if name == "mistral" else 1600)
    write_folder(folder, config, tensors_of(config, random_params(config)))
    if name == "mistral":
        run_here(folder, tmp_path / "file", "--tokenizer", "mistral", module="port_torch.gguf")
        tokenizer = load_tokenizer("mistral")
    else:
        awkward_bpe(name, folder / "tokenizer.json")
        convert(folder, tmp_path / "file")
        tokenizer = open_tokenizer(folder / "tokenizer.json")
    llama = llama_cpp.Llama(str(tmp_path / "file"), vocab_only=True, verbose=False)
    drawn = texts(3000, seed=0)
    found = [llama.tokenize(text.encode(), add_bos=True, special=False) for text in drawn]
    llama.close()
    differing = [(text, ids) for text, ids in zip(drawn, found, strict=True) if ids != tokenizer.begin(text)]
    assert not differing
    if name != "mistral":  # ids would be others if it were split as another one
        other = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        other.encode_special_tokens = True
        for another, split in SPLITS.items():
            other.pre_tokenizer = split
            same = [other.encode(text, add_special_tokens=False).ids == ids[1:]
                    for text, ids in zip(drawn, found, strict=True)]  # fmt: skip
            assert all(same) == ({name, another} in ({name}, {"llama-bpe", "smaug-bpe"}))


@pytest.mark.parametrize("kind", ["mistral", "bpe"])
def test_a_trained_model_through_the_commands(kind: str, tmp_path: Path, cache: Path, text: Path):
    """Trained, exported, written as GGUF: texts become the same tokens, and continue in the same way."""
    name = "mistral"
    if kind == "bpe":
        awkward_bpe("smollm", tmp_path / "tokenizer.json")
        name = str(tmp_path / "tokenizer.json")
    run = train(cache if kind == "mistral" else tmp_path, text, "llama", tokenizer=name)
    run_here(run, tmp_path / "folder", module="port_torch.convert")
    convert(tmp_path / "folder", tmp_path / "file")
    tokenizer = load_tokenizer(name)
    asked = [f"Document {i}: the square of" for i in range(10)]
    prompts = [tokenizer.begin(prompt)[-30:] for prompt in asked]
    llama = llama_cpp.Llama(str(tmp_path / "file"), vocab_only=True, verbose=False)
    assert [llama.tokenize(prompt.encode())[-30:] for prompt in asked] == prompts
    llama.close()
    assert greedy(tmp_path / "file", prompts) == ours(tmp_path / "folder", prompts)


def test_8_bits_are_read(tmp_path: Path):
    """Its logits of q8_0 come as close to those of float32 as the rounding of the weights lets them."""
    make("smollm2-135m", tmp_path / "folder")
    bytes_with_a_merge(tmp_path / "folder")
    logits = []
    for kind in ("f32", "q8_0"):
        file = convert(tmp_path / "folder", tmp_path / kind, kind)
        llama = llama_cpp.Llama(str(file), n_ctx=64, verbose=False, logits_all=True, n_threads=1)
        llama.eval([3, 1, 4, 1, 5, 9, 2, 6])
        logits.append(np.array(llama.scores[:8]))
        llama.close()
    exact, rounded = logits
    # Each product is off by 0.3% to 0.5% of its size (half of max / 127 over a block, at random), through two
    # layers and the activations, which llama.cpp rounds to 8 bits too.
    off = np.linalg.norm(rounded - exact) / np.linalg.norm(exact)
    assert 0 < off < 0.05


@pytest.mark.parametrize("name", ["mistral", "smollm"])
def test_a_conversation(name: str, tmp_path: Path):
    """What the file's template writes, read with special tokens, has the ids that the model was tuned on."""
    from llama_cpp.llama_chat_format import Jinja2ChatFormatter

    folder, base = tmp_path / "folder", name
    config = dataclasses.replace(SMALL, n_layers=1, vocab_size=32_064 if name == "mistral" else 1600)
    write_folder(folder, config, tensors_of(config, random_params(config)))
    if name != "mistral":
        awkward_bpe(name, tmp_path / "tokenizer.json")
        base = f"{tmp_path / 'tokenizer.json'},bos=<|endoftext|>,eos=<|endoftext|>"
    chat = open_chat(load_tokenizer(base), None, "chatml", folder)
    write_tokenizer(folder, chat.tokenizer, config.context, chat.template)
    convert(folder, tmp_path / "file")
    llama = llama_cpp.Llama(str(tmp_path / "file"), vocab_only=True, verbose=False)
    assert llama.token_eos() == chat.stop
    marks = {"eos_token": chat.stop_text, "bos_token": "<s>" if name == "mistral" else "<|endoftext|>"}
    render = Jinja2ChatFormatter(llama.metadata["tokenizer.chat_template"], **marks)
    said = [text.strip() or "x" for text in texts(150, seed=5) if "<|" not in text and "s>" not in text]
    for system, user, assistant in zip(said[::3], said[1::3], said[2::3], strict=False):
        turns = [Turn("system", system), Turn("user", user), Turn("assistant", assistant), Turn("user", user)]
        prompt = render(messages=[{"role": turn.role, "content": turn.content} for turn in turns]).prompt
        assert llama.tokenize(prompt.encode(), add_bos=False, special=True) == chat.prompt(turns)
    llama.close()
