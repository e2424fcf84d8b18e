"""Our tokenizers as the files that transformers opens: tokenizer.json and tokenizer_config.json.

A tokenizer.json is all that both transformers 4.57 and 5 read alike. From a lone tokenizer.model each makes
another tokenizer, neither of them right: leading spaces and byte fallback differ.
"""

import json
from pathlib import Path

import tokenizers
from tokenizers import processors

from core.file_tokenizer import FileTokenizer
from core.mistral_tokenizer import MistralTokenizer
from core.tokenizer import ORIGINAL, Tokenizer
from core.tokenizer_json import as_library, mistral_file
from port_torch.folder_tokenizer import PROBE


def write_tokenizer(
    folder: Path, tokenizer: Tokenizer, context: int, chat_template: str | None = None
) -> None:
    """Writes the files of `tokenizer` for a model of that context, which may have learned to converse.

    What they give for a text is `<s>` (if there is one) and the ids of `tokenizer.encode`, also where the
    text itself has `<s>`, which stays text; nothing is cut or padded unless asked for. A tokenizer.json that
    gives this already is copied byte for byte.
    """
    if isinstance(tokenizer, MistralTokenizer):
        (folder / "tokenizer.model").write_bytes(mistral_file())  # for llama.cpp
    built = as_library(tokenizer)
    padding, settled = None, True
    if isinstance(tokenizer, FileTokenizer):
        own = tokenizers.Tokenizer.from_buffer(tokenizer.content)
        padding, settled = own.padding, own.padding is None and own.truncation is None
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
        "split_special_tokens": chat_template is None,
    }
    if chat_template is not None:
        config["chat_template"] = chat_template
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
