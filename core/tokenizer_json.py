"""Our tokenizers in the `tokenizers` library, and tokenizers with tokens added to those of another one."""

import importlib.resources
from collections.abc import Sequence
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from core.file_tokenizer import FileTokenizer
from core.mistral_tokenizer import MISTRAL_FILE, SPACE, MistralTokenizer
from core.tokenizer import Tokenizer


def as_library(tokenizer: Tokenizer) -> tokenizers.Tokenizer:
    """The tokenizer of the library that gives this one's ids; nothing is cut or padded unless asked for."""
    if isinstance(tokenizer, MistralTokenizer):
        return _from_sentencepiece(mistral_file())
    if isinstance(tokenizer, FileTokenizer):
        built = tokenizers.Tokenizer.from_buffer(tokenizer.content)
        built.no_truncation()
        built.no_padding()
        return built
    return _of_bytes()


def mistral_file() -> bytes:
    """Mistral's sentencepiece model, as the package mistral-common carries it."""
    return importlib.resources.files("mistral_common").joinpath(MISTRAL_FILE).read_bytes()


def special_tokens(built: tokenizers.Tokenizer) -> dict[str, int]:
    """The ids of the special tokens, by their texts."""
    added = built.get_added_tokens_decoder()
    return {token.content: number for number, token in added.items() if token.special}


def with_tokens(tokenizer: Tokenizer, tokens: Sequence[str], file: Path) -> Tokenizer:
    """The tokenizer with special tokens besides its own, the new ones behind all its ids.

    file: where the new tokenizer.json is going to be (`Tokenizer.carry` writes it).
    """
    built = as_library(tokenizer)
    if special_tokens(built).keys() >= set(tokens):
        return tokenizer
    built.add_special_tokens(
        [tokenizers.AddedToken(token, special=True, normalized=False) for token in tokens]
    )
    return FileTokenizer(file, tokenizer.named, built.to_str(pretty=True).encode())


def _from_sentencepiece(model_file: bytes) -> tokenizers.Tokenizer:
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


def _of_bytes() -> tokenizers.Tokenizer:
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
