"""A folder's tokenizer as GGUF has it: tokens with scores or merges, and the name of a pre-tokenizer.

llama.cpp has its own code for token ids: for sentencepiece's byte pairs ("llama"), and for byte-level BPE
("gpt2"), where a name stands for the regular expressions that split a text. A tokenizer for which neither
gives the same ids is refused.
"""

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from core.errors import UserError
from core.file_tokenizer import FileTokenizer, letters_of_bytes
from core.mistral_tokenizer import MistralTokenizer
from core.tokenizer import Tokenizer
from core.tokenizer_json import as_library, mistral_file
from port_torch.folder import inside, read_json
from port_torch.folder_tokenizer import PROBE, SENTENCEPIECE

# `tokenizer.ggml.token_type`; sentencepiece's pieces have the same numbers.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)

# How a text is split before pairs are merged, as tokenizer.json has it.
DIGIT = r"\p{N}"
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
LLAMA3 = QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
PRE_TOKENIZERS = {
    # (the expressions, one after the other; whether a word of the vocabulary is taken without merges): name
    ((GPT2,), False): "gpt-2",
    ((DIGIT, GPT2), False): "smollm",
    ((QWEN2,), False): "qwen2",
    ((LLAMA3,), True): "llama-bpe",
    ((LLAMA3,), False): "smaug-bpe",
}
"""`tokenizer.ggml.pre` of the splits that llama.cpp makes alike."""
KNOWN = "GPT-2, SmolLM2, Qwen2 or Llama 3"
BYTE_LEVEL = "ByteLevel"
OTHER_IDS = f"gives other ids than the {SENTENCEPIECE} next to it, which llama.cpp would use"


class Vocabulary(NamedTuple):
    """What GGUF says of a tokenizer; one entry for each row of the model's embeddings."""

    model: str
    """`tokenizer.ggml.model`: llama or gpt2."""
    pre: str
    """`tokenizer.ggml.pre`."""
    tokens: list[str]
    types: list[int]
    scores: list[float] | None
    """Of sentencepiece's pieces."""
    merges: list[str] | None
    """Of BPE: the two parts of each, best first."""
    unknown: int | None
    space_first: bool
    """Whether a space is put before a text."""


def gguf_vocabulary(folder: Path, tokenizer: Tokenizer, n_rows: int) -> Vocabulary:
    """The folder's tokenizer, its vocabulary padded to `n_rows` entries, those of the embeddings.

    Raises:
        UserError: llama.cpp has nothing that gives the same ids.
    """
    if isinstance(tokenizer, MistralTokenizer):
        vocabulary = _of_sentencepiece(tokenizer, mistral_file())
    elif isinstance(tokenizer, FileTokenizer):
        vocabulary = _of_file(folder, tokenizer)
    else:
        _refuse(tokenizer, "is not one that a GGUF file can hold: train with mistral or a byte-level BPE")
    return _padded(vocabulary, n_rows)


def _of_file(folder: Path, tokenizer: FileTokenizer) -> Vocabulary:
    """A tokenizer.json: a byte-level BPE, or a copy of a sentencepiece model with or without more tokens."""
    content = json.loads(as_library(tokenizer).to_str())  # in one form, whichever release wrote it
    kind = content["model"]["type"]
    if kind != "BPE":
        _refuse(tokenizer, f"is of the kind {kind}, and only BPE is written as GGUF here")
    if any(content["model"].get(name) for name in ("continuing_subword_prefix", "end_of_word_suffix")):
        _refuse(tokenizer, "marks the parts of its words with a prefix or suffix, as llama.cpp does not")
    for token in content["added_tokens"]:
        if token["lstrip"] or token["rstrip"] or token["single_word"]:
            how = "stands for a whole word only" if token["single_word"] else "takes blanks around it along"
            _refuse(tokenizer, f"has the token {token['content']!r}, which {how}, as in llama.cpp none does")
    steps = _steps(content["pre_tokenizer"])
    if steps[-1:] == [BYTE_LEVEL]:
        return _of_bytes(tokenizer, content, steps[:-1])
    file = inside(folder, SENTENCEPIECE)
    if file.is_file():
        model_file = file.read_bytes()
    elif content["model"] == json.loads(as_library(MistralTokenizer()).to_str())["model"]:  # as for a chat
        model_file = mistral_file()
    else:
        what = f"is no byte-level BPE, and there is no {file}, the sentencepiece model that it was made of"
        _refuse(tokenizer, what)
    vocabulary = _of_sentencepiece(tokenizer, model_file)
    if content["model"]["vocab"] != {piece: number for number, piece in enumerate(vocabulary.tokens)}:
        _refuse(tokenizer, OTHER_IDS)
    return _with_added(vocabulary, tokenizer, content["added_tokens"])


def _of_sentencepiece(tokenizer: Tokenizer, model_file: bytes) -> Vocabulary:
    """The pieces of a sentencepiece model, if it is one of byte pairs and gives the tokenizer's ids."""
    import sentencepiece
    from sentencepiece import sentencepiece_model_pb2

    try:
        model = sentencepiece_model_pb2.ModelProto.FromString(model_file)
        processor = sentencepiece.SentencePieceProcessor(model_proto=model_file)
    except Exception as error:  # protobuf's own, and sentencepiece's RuntimeError
        raise UserError(f"{SENTENCEPIECE} is not a sentencepiece model ({error}): copy it again") from error
    if model.trainer_spec.model_type != model.trainer_spec.BPE:
        _refuse(tokenizer, f"has a {SENTENCEPIECE} that is not of byte pairs (BPE)")
    if model.normalizer_spec.precompiled_charsmap or model.normalizer_spec.remove_extra_whitespaces:
        _refuse(
            tokenizer, f"has a {SENTENCEPIECE} that changes a text before it is split, as llama.cpp does not"
        )
    if processor.encode(PROBE) != tokenizer.encode(PROBE).tolist():
        _refuse(tokenizer, OTHER_IDS)
    return Vocabulary(
        model="llama",
        pre="default",
        tokens=[piece.piece for piece in model.pieces],
        types=[piece.type for piece in model.pieces],
        scores=[piece.score for piece in model.pieces],
        merges=None,
        unknown=model.trainer_spec.unk_id,
        space_first=model.normalizer_spec.add_dummy_prefix,
    )


def _of_bytes(tokenizer: FileTokenizer, content: dict[str, Any], steps: list[str]) -> Vocabulary:
    """A byte-level BPE. steps: the expressions that it splits a text by."""
    model = content["model"]
    key = (tuple(steps), bool(model.get("ignore_merges")))
    if key not in PRE_TOKENIZERS:
        how = " then ".join(steps) or "nowhere"
        taken = ", and takes words of the vocabulary without merges" if key[1] else ""
        _refuse(
            tokenizer,
            f"splits a text {how}{taken}, and llama.cpp has nothing alike: give one of {KNOWN}'s kind",
        )
    normalizer = content["normalizer"]
    if normalizer and normalizer["type"] != "NFC":
        _refuse(tokenizer, f"changes a text before it is split ({normalizer['type']}), as llama.cpp does not")
    if normalizer:
        print(
            "note: the tokenizer composes accents (NFC), and llama.cpp does not, so a text in which they are "
            "characters of their own gets other ids",
            file=sys.stderr,
        )
    if not letters_of_bytes() <= model["vocab"].keys():
        _refuse(tokenizer, "lacks some of the 256 bytes, and llama.cpp would leave them out of a text")
    # Releases of tokenizers write a pair as one text or as two.
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    if not merges:
        _refuse(
            tokenizer, "has no merges, without which llama.cpp opens no file: train with mistral or a BPE"
        )
    if any(merge.count(" ") != 1 for merge in merges):
        _refuse(tokenizer, "merges parts with a space in them, which GGUF cannot write")
    n_ids = max([*model["vocab"].values(), *(token["id"] for token in content["added_tokens"])]) + 1
    unknown = model.get("unk_token")
    empty = Vocabulary(
        model="gpt2",
        pre=PRE_TOKENIZERS[key],
        tokens=[""] * n_ids,
        types=[UNUSED] * n_ids,
        scores=None,
        merges=merges,
        unknown=None if unknown is None else model["vocab"].get(unknown),
        space_first=False,
    )
    for text, number in model["vocab"].items():
        empty.tokens[number], empty.types[number] = text, NORMAL
    return _with_added(empty, tokenizer, content["added_tokens"])


def _with_added(vocabulary: Vocabulary, tokenizer: Tokenizer, added: Iterable[dict[str, Any]]) -> Vocabulary:
    """The vocabulary with the tokens that a tokenizer.json adds to its model's.

    Special tokens are read in a text only if llama.cpp is asked to; the others always, as here. Those that
    open and close a document are special in any case, as for `FileTokenizer`.
    """
    tokens, types = list(vocabulary.tokens), list(vocabulary.types)
    scores = None if vocabulary.scores is None else list(vocabulary.scores)
    for token in sorted(added, key=lambda token: token["id"]):
        number, missing = token["id"], token["id"] + 1 - len(tokens)
        tokens += [""] * missing
        types += [UNUSED] * missing
        if scores is not None:
            scores += [0.0] * missing
        tokens[number] = token["content"]
        if types[number] != UNKNOWN:
            types[number] = CONTROL if token["special"] else USER_DEFINED
    for number in (tokenizer.bos, tokenizer.eos):
        if number is not None:
            types[number] = CONTROL
    return vocabulary._replace(tokens=tokens, types=types, scores=scores)


def _padded(vocabulary: Vocabulary, n_rows: int) -> Vocabulary:
    """The vocabulary with as many entries as the embeddings have rows; llama.cpp takes none twice."""
    missing = n_rows - len(vocabulary.tokens)
    tokens = [token or f"[PAD{number}]" for number, token in enumerate([*vocabulary.tokens, *[""] * missing])]
    types = [*vocabulary.types, *[UNUSED] * missing]
    scores = None if vocabulary.scores is None else [*vocabulary.scores, *[0.0] * missing]
    if len(set(tokens)) < len(tokens):
        twice = next(token for number, token in enumerate(tokens) if token in tokens[:number])
        raise UserError(
            f"the tokenizer has the token {twice!r} twice, and GGUF may have it once: rename one of them"
        )
    return vocabulary._replace(tokens=tokens, types=types, scores=scores)


def _steps(node: dict[str, Any] | None) -> list[str]:
    """The expressions that a text is split by, one after the other, `BYTE_LEVEL` last of a byte-level BPE.

    What is no such step stands there by its own description.
    """
    if node is None:
        return []
    kind = node["type"]
    if kind == "Sequence":
        return [step for part in node["pretokenizers"] for step in _steps(part)]
    if kind == "Digits" and node["individual_digits"]:
        return [DIGIT]
    plain = kind == "Split" and node["behavior"] == "Isolated" and not node["invert"]
    if plain and "Regex" in node["pattern"]:
        return [node["pattern"]["Regex"]]
    if kind == BYTE_LEVEL and not node["add_prefix_space"]:
        return [GPT2, BYTE_LEVEL] if node.get("use_regex", True) else [BYTE_LEVEL]
    said = json.dumps(
        {name: value for name, value in node.items() if name != "trim_offsets"}, ensure_ascii=False
    )
    return [said, BYTE_LEVEL] if kind == BYTE_LEVEL else [said]


def stop_tokens(folder: Path, eos: int, n_rows: int) -> list[int]:
    """The tokens besides `eos` at which transformers ends a text, as generation_config.json lists them.

    Raises:
        UserError: it lists something that is no id.
    """
    if not inside(folder, "generation_config.json").is_file():
        return []
    listed = read_json(folder, "generation_config.json").get("eos_token_id")
    ids = listed if isinstance(listed, list) else [] if listed is None else [listed]
    for number in ids:
        if not (isinstance(number, int) and 0 <= number < n_rows):
            raise UserError(
                f"{folder / 'generation_config.json'} has the eos_token_id {number!r}, which is no token's"
            )
    return [number for number in dict.fromkeys(ids) if number != eos]


def _refuse(tokenizer: Tokenizer, what: str) -> NoReturn:
    raise UserError(f"the tokenizer {tokenizer.name} {what}")
