"""Our tokenizers as the files that transformers opens: tokenizer.json and tokenizer_config.json.

A tokenizer.json is all that both transformers 4.57 and 5 read alike. From a lone tokenizer.model each makes
another tokenizer, neither of them right: leading spaces and byte fallback differ.
"""

import importlib.resources
import json
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from core.file_tokenizer import FileTokenizer
from core.mistral_tokenizer import MISTRAL_FILE, SPACE, MistralTokenizer
from core.tokenizer import ORIGINAL, Tokenizer
from port_torch.folder_tokenizer import PROBE


def write_tokenizer(folder: Path, tokenizer: Tokenizer, context: int) -> None:
    """Writes the files of `tokenizer` for a model of that context.

    What they give for a text is `<s>` (if there is one) and the ids of `tokenizer.encode`, also where the
    text itself has `<s>`, which stays text; nothing is cut or padded unless asked for. A tokenizer.json that
    gives this already is copied byte for byte.
    """
    if isinstance(tokenizer, MistralTokenizer):
        model_file = importlib.resources.files("mistral_common").joinpath(MISTRAL_FILE).read_bytes()
        (folder / "tokenizer.model").write_bytes(model_file)  # for llama.cpp
        built = from_sentencepiece(model_file)
    elif isinstance(tokenizer, FileTokenizer):
        built = tokenizers.Tokenizer.from_buffer(tokenizer.content)
    else:
        built = of_bytes()
    padding = built.padding
    settled = built.truncation is None and padding is None
    built.no_truncation()
    built.no_padding()
    opening = [] if tokenizer.bos is None else [tokenizer.bos]
    bos, eos = (built.id_to_token(opening[0]) if opening else None), built.id_to_token(tokenizer.eos)
    opened = built.encode("a").ids == [*opening, *built.encode("a", add_special_tokens=False).ids]
    if opened and settled and isinstance(tokenizer, FileTokenizer):
        (folder / "tokenizer.json").write_bytes(tokenizer.content)
    else:
        if isinstance(tokenizer, FileTokenizer):
            (folder / ORIGINAL).write_bytes(tokenizer.content)
        if not opened and not opening:
            built.post_processor = processors.Sequence([])
        elif not opened:
            built.post_processor = processors.TemplateProcessing(
                single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokenizer.bos)]
            )
        built.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": bos,
        "eos_token": eos,
        "pad_token": pad_token(built, bos, eos, padding),
        # Behind it a batch of prompts ends where each is continued.
        "padding_side": "left",
        "model_max_length": context,
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


def opens_with_auto_tokenizer(folder: Path, tokenizer: Tokenizer) -> bool:
    """Whether transformers' AutoTokenizer gives this tokenizer's ids: config.json may lead it to another."""
    from transformers import AutoTokenizer  # slow

    text = f"{PROBE}e\u0301 1234"  # Qwen2's composes accents and splits digits
    return AutoTokenizer.from_pretrained(folder)(text, verbose=False)["input_ids"] == tokenizer.begin(text)


def pad_token(built: tokenizers.Tokenizer, bos: str | None, eos: str, padding: dict | None) -> str:
    """The token that fills up the shorter rows of a batch, so that no id has to be added for it.

    A tokenizer's own, or the unknown token, as the field does for Llama. Not `</s>` where it can be avoided:
    collators take the padding's id out of the loss wherever it stands, and the model would never learn to
    end. `<s>` is never predicted, so that this costs nothing.

    padding: that of the tokenizer.json, which names a token.
    """
    model = json.loads(built.to_str())["model"]
    unknown = model.get("unk_token")
    if model.get("unk_id") is not None:  # of a Unigram model
        unknown = model["vocab"][model["unk_id"]][0]
    candidates = [
        padding and padding["pad_token"],
        "<pad>",
        "[PAD]",
        "<|pad|>",
        unknown,
        "<unk>",
        bos,
        "<|endoftext|>",
    ]
    taken = (token for token in candidates if token and token != eos and built.token_to_id(token) is not None)
    return next(taken, eos)


def from_sentencepiece(model_file: bytes) -> tokenizers.Tokenizer:
    """A sentencepiece model of byte pairs with byte fallback, as it is in the `tokenizers` library.

    Sentencepiece merges the adjacent pair whose union has the best score; here that becomes a list of pairs
    in the order of their unions' scores. Mistral's pieces of spaces have one score and go by their ids.
    """
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto.FromString(model_file)
    ids = {piece.piece: number for number, piece in enumerate(model.pieces)}
    merges = []
    for number, piece in enumerate(model.pieces):
        if piece.type == piece.NORMAL:
            text = piece.piece
            parts = [(text[:i], text[i:]) for i in range(1, len(text))]
            merges += [(-piece.score, number, a, b) for a, b in parts if a in ids and b in ids]
    pairs = [(a, b) for *_, a, b in sorted(merges)]
    unk, *specials = (p.piece for p in model.pieces if p.type in (p.UNKNOWN, p.CONTROL))
    built = tokenizers.Tokenizer(models.BPE(ids, pairs, unk_token=unk, fuse_unk=True, byte_fallback=True))
    built.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    built.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    built.add_special_tokens([tokenizers.AddedToken(t, special=True) for t in (unk, *specials)])
    return built


def of_bytes() -> tokenizers.Tokenizer:
    """core.tokenizer's `bytes`: byte pairs without a single merge, over the bytes' printable stand-ins."""
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    others = [byte for byte in range(256) if byte not in printable]
    stand_in = {byte: chr(byte) for byte in printable} | {b: chr(256 + i) for i, b in enumerate(others)}
    ids = {stand_in[byte]: byte for byte in range(256)}
    built = tokenizers.Tokenizer(models.BPE({**ids, "<s>": 256, "</s>": 257}, []))
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    built.decoder = decoders.ByteLevel()
    built.add_special_tokens([tokenizers.AddedToken(t, special=True) for t in ("<s>", "</s>")])
    return built
