"""GGUF files, read back by the package's own reader and computed by llama.cpp's formulas in float64.

tests/port_torch/test_llama_cpp.py runs them in llama.cpp itself, where it is installed.
"""

import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import sentencepiece
import tokenizers
import torch
from tokenizers import AddedToken, Regex, models, normalizers, pre_tokenizers

from core.config import PRESETS, ModelConfig
from core.errors import UserError
from core.tokenizer import load_tokenizer
from core.tokenizer_json import _from_sentencepiece, with_tokens
from port_torch.gguf_tokenizer import LLAMA3, QWEN2, gguf_vocabulary
from port_torch.model import load
from tests.core.test_special_tokens import CHAT
from tests.core.test_tokenizer import MODEL, bpe_file
from tests.models import GPT, LLAMA, flat, random_params
from tests.port_torch.folders import tensors_of, write_folder
from tests.port_torch.test_model import mirror_logits
from tests.reference import logits64
from tests.train_tpu.processes import refusal_here, run_here

SMALL = dataclasses.replace(LLAMA, vocab_size=450, d_model=64, n_heads=4, d_mlp=96)
KINDS: dict[str, ModelConfig] = {
    "llama": SMALL,
    "llama, grouped": dataclasses.replace(SMALL, n_kv_heads=2, head_dim=32, rope_theta=1e5, norm_eps=1e-3),
    "llama, biases": dataclasses.replace(SMALL, biases=True, tied=False),
    "qwen2": dataclasses.replace(SMALL, qkv_biases=True, n_kv_heads=2),
    "qwen3": dataclasses.replace(SMALL, qk_norm=True, n_kv_heads=2, head_dim=8),
}
SCALED = ("linear,factor=4", "llama3,factor=8,low_freq_factor=1,high_freq_factor=4,original_context=32")
LIMIT = 2e-5
"""Of the largest logit: the mirror's float32 sums through three layers, as in test_field_models.py."""


def write_model(folder: Path, config: ModelConfig, dtype: torch.dtype = torch.float32, **fields: Any) -> dict:
    """A folder of random weights with a byte-level BPE of SmolLM2's special tokens; gives its tensors."""
    tensors = tensors_of(config, random_params(config), dtype)
    write_folder(folder, config, tensors, str(dtype).removeprefix("torch."), **fields)
    bpe_file(folder, CHAT)
    return tensors


def convert(folder: Path, out: Path, *arguments: str) -> "gguf.GGUFReader":
    run_here(folder, out, *arguments, module="port_torch.gguf")
    return gguf.GGUFReader(out)


def value(reader: "gguf.GGUFReader", name: str) -> Any:
    """The value of a key; None where there is none."""
    field = reader.fields.get(name)
    return None if field is None else field.contents()


def weights(reader: "gguf.GGUFReader") -> dict[str, np.ndarray]:
    """Every tensor in its shape, dequantised."""
    return {
        t.name: gguf.dequantize(t.data, t.tensor_type).reshape(tuple(map(int, t.shape[::-1])))
        for t in reader.tensors
    }


def file_logits(reader: "gguf.GGUFReader", tokens: np.ndarray) -> np.ndarray:
    """Logits [S, V] of tokens [S] in float64, of the file alone, as llama.cpp reads it.

    src/models/llama.cpp, qwen2.cpp and qwen3.cpp; ggml_rope_ext rotates neighbours for a Llama (NORM) and the
    halves of a head for a Qwen (NEOX).
    """
    arch, p = value(reader, "general.architecture"), weights(reader)
    p = {name: tensor.astype(np.float64) for name, tensor in p.items()}

    def key(name: str) -> Any:
        return value(reader, f"{arch}.{name}")

    heads, kv_heads, size = (
        key(name) for name in ("attention.head_count", "attention.head_count_kv", "attention.key_length")
    )
    s, half = len(tokens), size // 2
    frequencies = key("rope.freq_base") ** (-2 * np.arange(half) / size) / p.get("rope_freqs.weight", 1)
    if key("rope.scaling.type") == "linear":
        frequencies = frequencies / key("rope.scaling.factor")
    angle = np.exp(1j * np.arange(s)[:, None] * frequencies)[:, None]

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + key("attention.layer_norm_rms_epsilon")) * p[name]

    def linear(x: np.ndarray, name: str) -> np.ndarray:
        return x @ p[f"{name}.weight"].T + p.get(f"{name}.bias", 0)

    def turned(x: np.ndarray) -> np.ndarray:
        first, second = (x[..., ::2], x[..., 1::2]) if arch == "llama" else (x[..., :half], x[..., half:])
        z = (first + 1j * second) * angle
        return np.concatenate([z.real, z.imag], -1)  # the same order for queries and keys

    x = p["token_embd.weight"][tokens]
    for layer in range(key("block_count")):
        name = f"blk.{layer}"
        y = norm(x, f"{name}.attn_norm.weight")
        q, k, v = (linear(y, f"{name}.attn_{m}").reshape(s, -1, size) for m in "qkv")
        if f"{name}.attn_q_norm.weight" in p:
            q, k = (norm(t, f"{name}.attn_{m}_norm.weight") for t, m in ((q, "q"), (k, "k")))
        q, k = turned(q), turned(k)
        k, v = (t.repeat(heads // kv_heads, axis=1) for t in (k, v))
        scores = np.einsum("ihd,jhd->hij", q, k) / size**0.5 + np.triu(np.full((s, s), -np.inf), 1)
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        y = np.einsum("hij,jhd->ihd", scores / scores.sum(-1, keepdims=True), v).reshape(s, -1)
        x = x + linear(y, f"{name}.attn_output")
        y = norm(x, f"{name}.ffn_norm.weight")
        gate = linear(y, f"{name}.ffn_gate")
        x = x + linear(gate / (1 + np.exp(-gate)) * linear(y, f"{name}.ffn_up"), f"{name}.ffn_down")
    return norm(x, "output_norm.weight") @ p.get("output.weight", p["token_embd.weight"]).T


@pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=[pytest.mark.slow] if k in ("llama", "qwen2") else []) for k in KINDS]
)
def test_the_file_computes_what_the_folder_does(kind: str, tmp_path: Path):
    config = KINDS[kind]
    write_model(tmp_path / "folder", config)
    reader = convert(tmp_path / "folder", tmp_path / "model.gguf", "--type", "f32")
    tokens = np.random.default_rng(1).integers(0, config.vocab_size, (1, 40))
    leaves = {name: torch.tensor(leaf).double() for name, leaf in flat(random_params(config)).items()}
    expected = logits64(config, leaves, tokens)[0].numpy()
    # The keys of the epsilon are float32 in the file; logits reach 40.
    np.testing.assert_allclose(file_logits(reader, tokens[0]), expected, atol=1e-5)
    assert value(reader, "general.architecture") == kind.partition(",")[0]
    assert value(reader, f"{kind.partition(',')[0]}.context_length") == config.context
    assert value(reader, f"{kind.partition(',')[0]}.feed_forward_length") == config.d_mlp


@pytest.mark.parametrize("scaling", [pytest.param(SCALED[0], marks=pytest.mark.slow), SCALED[1]])
def test_scaled_positions(scaling: str, tmp_path: Path):
    config = dataclasses.replace(SMALL, rope_scaling=scaling)
    write_model(tmp_path / "folder", config)
    reader = convert(tmp_path / "folder", tmp_path / "model.gguf", "--type", "f32")
    tokens = np.random.default_rng(1).integers(0, config.vocab_size, (1, 90))
    expected = mirror_logits(load(tmp_path / "folder"), tokens)[0]
    found = file_logits(reader, tokens[0])
    assert np.abs(found - expected).max() <= LIMIT * np.abs(expected).max()
    plain = dataclasses.replace(config, rope_scaling=None)
    leaves = {name: torch.tensor(leaf).double() for name, leaf in flat(random_params(config)).items()}
    assert np.abs(found - logits64(plain, leaves, tokens)[0].numpy()).max() > 0.1  # it matters


def test_yarn_is_described(tmp_path: Path):
    """llama.cpp computes it from these keys (test_llama_cpp.py)."""
    config = dataclasses.replace(SMALL, rope_scaling="yarn,factor=4,original_context=32")
    write_model(tmp_path / "folder", config)
    reader = convert(tmp_path / "folder", tmp_path / "model.gguf")
    found = {name: value(reader, f"llama.rope.scaling.{name}") for name in ("type", "factor")}
    assert found == {"type": "yarn", "factor": 4.0}
    assert value(reader, "llama.rope.scaling.original_context_length") == 32


def q8_bound(rows: np.ndarray) -> np.ndarray:
    """How far a weight may be off in blocks of 32.

    A block is whole numbers of d = max / 127, so a weight is off by at most d / 2; the numbers are rounded
    after a float32 product, which adds 127 * 2^-22 of d. d is kept as a float16: off by 2^-11 of itself, or
    by 2^-25 below 2^-14, which counts up to 127 times.
    """
    d = np.abs(rows.reshape(-1, 32)).max(1, keepdims=True) / 127
    bound = d * (0.5 + 127 * 2.0**-22) + 127 * np.maximum(d * 2.0**-11, 2.0**-25)
    return np.broadcast_to(bound, (len(bound), 32)).reshape(rows.shape)


@pytest.mark.parametrize("name", ["f16", "bf16", "q8_0"])
def test_every_tensor_is_the_folders_in_its_type(name: str, tmp_path: Path):
    config = KINDS["llama, grouped"]
    dtype = torch.bfloat16 if name == "bf16" else torch.float32
    tensors = write_model(tmp_path / "folder", config, dtype)
    reader = convert(tmp_path / "folder", tmp_path / "model.gguf", "--type", name)
    types = {t.name: t.tensor_type.name.lower() for t in reader.tensors}
    found = weights(reader)
    names = {
        "model.embed_tokens": "token_embd", "model.norm": "output_norm", "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm", "q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v",
        "o_proj": "attn_output", "gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down",
    }  # fmt: skip
    assert len(found) == len(tensors)
    for source, tensor in tensors.items():
        module = source.removesuffix(".weight")
        ours = tensor.float().numpy()
        if module.startswith("model.layers."):
            _, _, layer, *_, last = module.split(".")
            stem = f"blk.{layer}.{names[last]}"
        else:
            stem = names[module]
        if stem.endswith(("attn_q", "attn_k")):  # element i of a head, then element i + half
            half = config.head_size // 2
            order = [h * 2 * half + j * half + i for h in range(len(ours) // 2 // half) for i in range(half)
                     for j in range(2)]  # fmt: skip
            ours = ours[order]
        theirs, kind = found[f"{stem}.weight"], types[f"{stem}.weight"]
        assert kind == ("f32" if ours.ndim == 1 else name)
        if kind == "q8_0":
            off = np.abs(theirs - ours)
            assert (off <= q8_bound(ours)).all()
            assert off.max() > 0
        elif kind == "f16":
            np.testing.assert_array_equal(theirs, ours.astype(np.float16).astype(np.float32))
        else:  # exact: float32, or bfloat16 as they were
            np.testing.assert_array_equal(theirs, ours)


def test_what_it_says(tmp_path: Path):
    """Name, license, tokens that end a text, the template; how to run it."""
    config, folder = KINDS["llama"], tmp_path / "folder"
    write_model(folder, config, bos_token_id=0)
    (folder / "README.md").write_text(
        "---\n# see the spec:\nlicense: mit\nbase_model: them/base\n---\n\n# my model\n\ntext\n"
    )
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 2]}))
    said = run_here(folder, tmp_path / "a.gguf", module="port_torch.gguf")[0]
    reader = gguf.GGUFReader(tmp_path / "a.gguf")
    size, n = (tmp_path / "a.gguf").stat().st_size, config.n_params
    bits = (16 * n + 16 * (2 * config.n_layers + 1) * config.d_model) / n  # norms are float32
    assert f"{n:,} parameters as f16, {size / 1e6:,.1f} MB, {bits:.2f} bits per weight" in said
    assert f"llama-completion -m {tmp_path / 'a.gguf'} -no-cnv -p" in said
    keys = {
        "general.name": "my model", "general.license": "mit", "general.base_model.0.name": "base",
        "general.base_model.0.repo_url": "https://huggingface.co/them/base", "general.file_type": 1,
        "general.quantization_version": 2, "tokenizer.ggml.bos_token_id": 0, "tokenizer.ggml.eos_token_id": 0,
        "tokenizer.ggml.eot_token_id": 2, "tokenizer.ggml.add_bos_token": True,
        "tokenizer.chat_template": None,
    }  # fmt: skip
    assert {name: value(reader, name) for name in keys} == keys

    (folder / "README.md").write_text("---\n# a: [\nb: [\n---\n# my model\n")
    said = run_here(folder, tmp_path / "c.gguf", module="port_torch.gguf")[1]
    assert "is not YAML" in said
    assert value(gguf.GGUFReader(tmp_path / "c.gguf"), "general.name") == "my model"

    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    config_file = folder / "tokenizer_config.json"
    named = {"bos_token": None, "eos_token": "<|im_end|>"}
    config_file.write_text(json.dumps(named | {"chat_template": "of the config"}))
    reader = convert(folder, tmp_path / "b.gguf")
    assert value(reader, "tokenizer.chat_template") == "of the config"
    assert value(reader, "tokenizer.ggml.bos_token_id") is None
    assert value(reader, "tokenizer.ggml.add_bos_token") is False
    (folder / "chat_template.jinja").write_text(template)
    said = run_here(folder, tmp_path / "b.gguf", "--overwrite", module="port_torch.gguf")[0]
    reader = gguf.GGUFReader(tmp_path / "b.gguf")
    assert value(reader, "tokenizer.chat_template") == template
    assert said.endswith(f"  llama-cli -m {tmp_path / 'b.gguf'}\n")


def pieces(theirs: sentencepiece.SentencePieceProcessor) -> tuple[list[str], list[float], list[int]]:
    """Text, score and type of every piece, as sentencepiece itself gives them."""
    ids = range(len(theirs))
    types = [
        2 if theirs.is_unknown(i) else 3 if theirs.is_control(i) else 6 if theirs.is_byte(i) else 1
        for i in ids
    ]
    return [theirs.id_to_piece(i) for i in ids], [theirs.get_score(i) for i in ids], types


def test_mistral(tmp_path: Path):
    made = gguf_vocabulary(tmp_path, load_tokenizer("mistral"), 32_000)
    expected = pieces(sentencepiece.SentencePieceProcessor(model_file=str(MODEL)))
    assert (made.tokens, made.scores, made.types) == expected
    assert (made.model, made.pre, made.unknown, made.space_first) == ("llama", "default", 0, True)


@pytest.mark.slow
def test_mistral_with_the_tokens_of_a_conversation(tmp_path: Path):
    """As port_torch.finetune leaves it: a tokenizer.json alone."""
    tokens = ("<|im_start|>", "<|im_end|>")
    tokenizer = with_tokens(load_tokenizer("mistral"), tokens, tmp_path / "tokenizer.json")
    made = gguf_vocabulary(tmp_path, tokenizer, 32_064)
    texts, scores, types = pieces(sentencepiece.SentencePieceProcessor(model_file=str(MODEL)))
    assert made.tokens == [*texts, *tokens, *(f"[PAD{i}]" for i in range(32_002, 32_064))]
    assert made.scores == [*scores, *[0.0] * 64] and made.types == [*types, 3, 3, *[5] * 62]
    assert (made.model, made.space_first) == ("llama", True)


def test_a_sentencepiece_model_next_to_its_tokenizer_json(tmp_path: Path):
    """As in TinyLlama's folder. With a token more in tokenizer.json; of another model it is refused."""
    config, folder = SMALL, tmp_path / "folder"
    write_folder(folder, config, tensors_of(config, random_params(config)))
    file, model_file = folder / "tokenizer.json", folder / "tokenizer.model"

    def train(text: str, normalized: str = "identity") -> bytes:
        made = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter([text] * 50), model_writer=made, model_type="bpe", byte_fallback=True,
            vocab_size=300, normalization_rule_name=normalized, remove_extra_whitespaces=False,
            minloglevel=2,
        )  # fmt: skip
        return made.getvalue()

    model = train("the cat sat on the mat and the dog did not")
    _from_sentencepiece(model).save(str(file))
    assert f"there is no {model_file}" in refusal_here(folder, tmp_path / "a", module="port_torch.gguf")
    model_file.write_bytes(train("The 3 quick brown foxes jumped over it"))
    assert "gives other ids than the tokenizer.model" in refusal_here(
        folder, tmp_path / "a", module="port_torch.gguf"
    )
    model_file.write_bytes(train("The 3 quick brown foxes jumped over it", "nmt_nfkc"))
    assert "changes a text before it is split" in refusal_here(
        folder, tmp_path / "a", module="port_torch.gguf"
    )
    model_file.write_bytes(b"\x0a\xff")
    assert "is not a sentencepiece model" in refusal_here(folder, tmp_path / "a", module="port_torch.gguf")
    model_file.write_bytes(model)
    changed(file, lambda t: t.add_special_tokens([AddedToken("<|end|>", special=True)]))
    reader = convert(folder, tmp_path / "model.gguf")
    tokens, scores, types = pieces(sentencepiece.SentencePieceProcessor(model_proto=model))
    keys = {
        "model": "llama", "bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0, "add_bos_token": True,
        "add_space_prefix": True, "tokens": [*tokens, "<|end|>", *(f"[PAD{i}]" for i in range(301, 450))],
        "scores": [*scores, *[0.0] * 150], "token_type": [*types, 3, *[5] * 149],
    }  # fmt: skip
    assert {name: value(reader, f"tokenizer.ggml.{name}") for name in keys} == keys


def changed(file: Path, change) -> Path:
    """The tokenizer.json with what `change` does to it."""
    tokenizer = tokenizers.Tokenizer.from_file(str(file))
    change(tokenizer)
    tokenizer.save(str(file))
    return file


def test_byte_level_bpe(tmp_path: Path):
    """Tokens by their ids, merges in their order, what is special, and names for rows without a token."""

    def change(tokenizer):
        tokenizer.add_tokens([AddedToken("<tool>", special=False)])

    file = changed(bpe_file(tmp_path, CHAT), change)
    content = json.loads(file.read_text())
    made = gguf_vocabulary(tmp_path, load_tokenizer(file), 450)
    ids = content["model"]["vocab"]
    assert (made.model, made.pre, made.scores) == ("gpt2", "gpt-2", None)
    n_ids = len(ids) + 1
    assert made.tokens[:n_ids] == [*sorted(ids, key=ids.get), "<tool>"]
    assert made.types[:n_ids] == [3] * 3 + [1] * (n_ids - 4) + [4]
    assert made.tokens[n_ids:] == [f"[PAD{i}]" for i in range(n_ids, 450)]
    assert made.types[n_ids:] == [5] * (450 - n_ids)
    assert made.merges == [" ".join(pair) for pair in content["model"]["merges"]] and len(made.merges) > 20


SPLITS = {
    "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(False)]),
    "qwen2": QWEN2,
    "smaug-bpe": LLAMA3,
}


@pytest.mark.parametrize("name", SPLITS)
def test_the_pre_tokenizer_is_found_by_its_pattern(name: str, tmp_path: Path):
    split = SPLITS[name]
    if isinstance(split, str):
        split = pre_tokenizers.Sequence([
            pre_tokenizers.Split(Regex(split), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False),
        ])  # fmt: skip
    file = changed(bpe_file(tmp_path, CHAT), lambda t: setattr(t, "pre_tokenizer", split))
    assert gguf_vocabulary(tmp_path, load_tokenizer(file), 450).pre == name


def test_composed_accents_are_said(tmp_path: Path, capsys):
    file = changed(bpe_file(tmp_path, CHAT), lambda t: setattr(t, "normalizer", normalizers.NFC()))
    gguf_vocabulary(tmp_path, load_tokenizer(file), 450)
    assert "composes accents (NFC), and llama.cpp does not" in capsys.readouterr().err


def other_words(tokenizer) -> None:
    letters = {letter: i for i, letter in enumerate(["<|endoftext|>", *pre_tokenizers.ByteLevel.alphabet()])}
    tokenizer.model = models.BPE(letters, [])


REFUSED_TOKENIZERS = {
    "splits a text nowhere, and llama.cpp has nothing alike": lambda t: setattr(
        t, "pre_tokenizer", pre_tokenizers.ByteLevel(False, use_regex=False)
    ),
    r"""splits a text {"type": "ByteLevel", "add_prefix_space": true""": lambda t: setattr(
        t, "pre_tokenizer", pre_tokenizers.ByteLevel(True)
    ),
    "splits a text [0-9]+ then 's|'t": lambda t: setattr(
        t, "pre_tokenizer", pre_tokenizers.Sequence([
            pre_tokenizers.Split(Regex("[0-9]+"), "isolated"), pre_tokenizers.ByteLevel(False),
        ]),
    ),
    "changes a text before it is split (Lowercase)": lambda t: setattr(
        t, "normalizer", normalizers.Lowercase()
    ),
    "has the token '<x>', which takes blanks around it along": lambda t: t.add_special_tokens(
        [AddedToken("<x>", lstrip=True)]
    ),
    "has no merges": other_words,
}  # fmt: skip


@pytest.mark.parametrize("sentence", REFUSED_TOKENIZERS)
def test_tokenizers_that_llama_cpp_does_not_compute_are_refused(sentence: str, tmp_path: Path):
    file = changed(bpe_file(tmp_path, CHAT), REFUSED_TOKENIZERS[sentence])
    with pytest.raises(UserError) as error:
        gguf_vocabulary(tmp_path, load_tokenizer(file), 450)
    assert sentence in str(error.value)


REFUSED = {
    "has learned positions and an MLP of the kind gelu, which llama.cpp does not compute": GPT,
    "has an MLP of the kind relu2": dataclasses.replace(SMALL, mlp="relu2"),
    "is a Qwen2 of width 64 whose heads are 32 wide together": dataclasses.replace(
        SMALL, qkv_biases=True, head_dim=8
    ),
    "has positions scaled by yarn with a beta_fast of its own": dataclasses.replace(
        SMALL, rope_scaling="yarn,factor=4,original_context=32,beta_fast=16"
    ),
    "is a Qwen3ForCausalLM with positions scaled by llama3": dataclasses.replace(
        SMALL, qk_norm=True, rope_scaling=SCALED[1]
    ),
}  # fmt: skip


@pytest.mark.parametrize("sentence", REFUSED)
def test_models_that_llama_cpp_does_not_compute_are_refused(sentence: str):
    from port_torch.gguf_file import require_architecture  # which imports gguf

    with pytest.raises(UserError) as error:
        require_architecture(Path("folder"), REFUSED[sentence])
    assert sentence in str(error.value)


@pytest.mark.parametrize(
    "sentence, config",
    [
        ("has learned positions and an MLP of the kind gelu, which llama.cpp does not compute", GPT),
        ("has rows of 80 weights, and q8_0 packs 32 at a time", dataclasses.replace(SMALL, d_mlp=80)),
    ],
)
def test_nothing_is_written_of_them(sentence: str, config: ModelConfig, tmp_path: Path):
    write_model(tmp_path / "folder", dataclasses.replace(config, vocab_size=450, n_layers=1))
    out = tmp_path / "model.gguf"
    assert sentence in refusal_here(tmp_path / "folder", out, "--type", "q8_0", module="port_torch.gguf")
    assert {path.name for path in tmp_path.iterdir()} == {"folder"}


def test_refusals_of_the_command(tmp_path: Path, monkeypatch):
    folder, out = tmp_path / "folder", tmp_path / "model.gguf"
    config = dataclasses.replace(SMALL, n_layers=1)
    tensors = write_model(folder, config)

    def refused(*arguments: Any) -> str:
        return refusal_here(*arguments, module="port_torch.gguf")

    assert "--type: 'q4_0' is not one of" in refused(folder, out, "--type", "q4_0")
    assert "is a folder: name the file" in refused(folder, tmp_path)
    assert "lies in the folder that is read" in refused(folder, folder / "model.gguf")
    assert "is not there: give a folder" in refused(tmp_path / "none", out)
    (folder / "tokenizer.json").rename(tmp_path / "bpe.json")
    assert "the tokenizer bytes is not one" in refused(folder, out, "--tokenizer", "bytes")
    (tmp_path / "bpe.json").rename(folder / "tokenizer.json")
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = 1e5
    write_folder(tmp_path / "large", config, tensors)
    bpe_file(tmp_path / "large", CHAT)
    assert "up_proj.weight has a weight of 1e+05, and f16 ends at 65504: give --type bf16" in refused(
        tmp_path / "large", out
    )
    assert not out.exists()
    out.write_text("mine")
    assert "exists already: name another file, or replace it with --overwrite" in refused(folder, out)
    refused(tmp_path / "large", out, "--overwrite")
    assert out.read_text() == "mine"
    assert {path.name for path in tmp_path.iterdir()} == {"folder", "large", "model.gguf"}
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "writing GGUF needs the package gguf: pip install" in refused(folder, tmp_path / "other.gguf")


def test_the_presets_that_can_be_written():
    from port_torch.gguf_file import require_architecture  # which imports gguf

    for name, config in PRESETS.items():
        if name.startswith("mtlm2"):
            with pytest.raises(UserError, match="learned positions"):
                require_architecture(Path("x"), config)
        else:
            assert require_architecture(Path("x"), config) in ("llama", "qwen3")
