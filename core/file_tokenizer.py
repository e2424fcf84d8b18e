"""A tokenizer.json of the `tokenizers` library: loaded, and proved not to lose text, or refused.

Four kinds of model are read (BPE, Unigram, WordPiece, WordLevel), and each meets characters that its
vocabulary lacks in its own way: some raise, BPE drops them without a word. Bits per byte count the bytes of
such characters, so a tokenizer is accepted only if it has an id for everything.
"""

import hashlib
import json
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any, SupportsIndex

import numpy as np

from core.config import MAX_VOCAB
from core.errors import UserError
from core.special_tokens import ROLES, Named, join_name
from core.tokenizer import Tokenizer, utf8

PAIRS = (("<s>", "</s>"), ("<|endoftext|>",) * 2)
"""Tokens that open and close a document, in the order in which they are looked for."""

# Characters that a text may not lose: of many scripts, none of them blank, a control character or an accent.
VISIBLE = "".join(map(chr, range(0x21, 0x7F))) + "éßñÀøÅ½²€£¥©®§¶…—“”«»¿¡÷±√∞≠≤←→αβΩжЯאبहไ漢字かなカ한글🙂🚀"
# A text with what tokenizers like to change: blanks, line ends, capitals, accents, other scripts, symbols.
TEXT = f"The 3 quick  brown foxes;\n\tdef f(x): return x**2\n\n{VISIBLE} é Grüße, привет <s> end"


class FileTokenizer(Tokenizer):
    """A tokenizer.json of the `tokenizers` library; `name` is its path, with the tokens that are named.

    `bos` and `eos` are named, or they are `<s>` and `</s>`, or `<|endoftext|>`, which then serves as both.
    The ids are those of the library with truncation and padding off and special tokens read as text. Where a
    text spells `<s>` and the library makes `bos` of it nevertheless, its characters are encoded one by one.
    """

    def __init__(self, path: Path, named: Named, content: bytes | None = None) -> None:
        """named: the tokens for bos and eos, as `core.special_tokens` has them; content: what the file is
        going to hold, where it is not written yet."""
        import tokenizers

        self.content = content = path.read_bytes() if content is None else content
        self.sha256 = hashlib.sha256(content).hexdigest()
        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(content)
            description = json.loads(self._tokenizer.to_str())
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # the library raises nothing narrower, and its panics are no Exception
            raise UserError(f"{path} is not a tokenizer.json: {error}") from error
        ids = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(ids.values(), default=-1) + 1
        if self.vocab_size > MAX_VOCAB:
            raise UserError(
                f"{path} has {self.vocab_size} ids: choose a tokenizer of at most {MAX_VOCAB}, which is "
                "the largest vocabulary that is tested"
            )
        default = next((pair for pair in PAIRS if set(pair) <= ids.keys()), None)
        pair = {role: named.get(role, default and default[i]) for i, role in enumerate(ROLES)}
        unknown = [
            f"no token {token} for its {role}" for role, token in pair.items() if token not in {None, *ids}
        ]
        if pair["eos"] is None or unknown:
            special = [token["content"] for token in description["added_tokens"] if token["special"]]
            listed = f"; its special tokens are {', '.join(special[:8])}" if special else ""
            missing = unknown[0] if unknown else "neither the tokens <s> and </s> nor <|endoftext|>"
            raise UserError(
                f"{path} has {missing}, to open and close a document{listed}: name those that do so, with "
                f"--tokenizer '{path},bos=TOKEN,eos=TOKEN' (bos=none if documents begin with none)"
            )
        self.bos = None if pair["bos"] is None else ids[pair["bos"]]
        self.eos = ids[pair["eos"]]
        self.named = {} if default == tuple(pair.values()) else pair
        self.name = join_name(path.resolve(), self.named)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True  # "<s>" in a document is text, not a token
        flaw = _flaw(description, pair.values()) or self._flaw_of_probe()
        if flaw:
            raise UserError(f"{path} {flaw}")

    def encode(self, text: str) -> np.ndarray:
        utf8(text)
        encoding = self._encode(text)
        ids = np.array(encoding.ids, self.dtype)
        marks = [i for i in (self.bos, self.eos) if i is not None]
        spelled = np.flatnonzero(np.isin(ids, marks))
        if not len(spelled):
            return ids
        parts, done = [], 0
        for start, end in (encoding.offsets[place] for place in spelled):
            parts += [text[done:start], *text[start:end]]
            done = end
        parts.append(text[done:])
        ids = np.array([i for part in parts if part for i in self._encode(part).ids], self.dtype)
        if set(marks) & set(ids.tolist()):
            raise UserError(
                f"the tokenizer {self.name} makes the token that opens or closes a document of text: choose "
                "another one"
            )
        return ids

    def decode(self, ids: Iterable[SupportsIndex]) -> str:
        kept = [int(i) for i in ids if i not in (self.bos, self.eos)]
        return self._tokenizer.decode(kept, skip_special_tokens=False)

    def _encode(self, text: str) -> Any:
        try:
            return self._tokenizer.encode(text, add_special_tokens=False)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:
            raise UserError(f"the tokenizer {self.name} cannot encode a text: {error}") from error

    def _flaw_of_probe(self) -> str | None:
        """What is wrong with how single characters and a text are encoded; None where nothing is."""
        lost = "".join(character for character in VISIBLE if not self._keeps(character))
        if lost:
            return (
                f"leaves the characters {lost[:20]} out of a text (its normalizer or pre-tokenizer removes "
                "them), and bits per byte would count them: choose a tokenizer that keeps them"
            )
        try:
            self.encode(TEXT)
        except UserError as error:
            return f"cannot be used: {error}"
        return None

    def _keeps(self, character: str) -> bool:
        normalizer, pre_tokenizer = self._tokenizer.normalizer, self._tokenizer.pre_tokenizer
        try:
            text = normalizer.normalize_str(character) if normalizer else character
            pieces = [piece for piece, _ in pre_tokenizer.pre_tokenize_str(text)] if pre_tokenizer else [text]
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException:  # the probe of a whole text says what it is
            return True
        return bool("".join(pieces).strip(" \u2581\u0120"))  # without what stands for a space before it


def keeps_text(tokenizer: Tokenizer) -> bool:
    """Whether a text comes back from its ids, but for blanks around it: no unknown token, nothing changed."""
    return tokenizer.decode(tokenizer.encode(TEXT)).strip() == TEXT.strip()


def _flaw(description: dict[str, Any], marks: Collection[str | None]) -> str | None:
    """What makes the model of a tokenizer.json lose text or fail at it; None where nothing does.

    marks: the tokens that open and close a document.
    """
    model = description["model"]
    kind, vocab = model["type"], model["vocab"]
    known = {piece for piece, _ in vocab} if kind == "Unigram" else vocab.keys()
    if model.get("dropout"):
        return f"has a BPE dropout of {model['dropout']}, so its ids vary from call to call: set it to null"
    steps = [*_steps(description["normalizer"]), *_steps(description["pre_tokenizer"])]
    affixes = model.get("continuing_subword_prefix") or model.get("end_of_word_suffix")
    of_bytes = "ByteLevel" in steps and kind in ("BPE", "Unigram") and not affixes
    if of_bytes and letters_of_bytes() <= known:
        return None
    if kind == "BPE" and model["byte_fallback"] and all(f"<0x{byte:02X}>" in known for byte in range(256)):
        return None
    if kind == "Unigram":
        unknown = None if model["unk_id"] is None else vocab[model["unk_id"]][0]
    else:
        unknown = model["unk_token"] if model["unk_token"] in known else None
    if unknown is None:
        fate = "leaves them out silently" if kind == "BPE" else "fails at them"
        return (
            f"has no id for characters outside its vocabulary, and its model ({kind}) {fate}: give it an "
            "unknown token that is in the vocabulary, or all 256 bytes"
        )
    if unknown in marks:
        return f"has {unknown} as its unknown token, which opens or closes a document: give it another one"
    return None


def letters_of_bytes() -> set[str]:
    """What ByteLevel writes for the 243 bytes that UTF-8 has; 0xC0, 0xC1 and those from 0xF5 on never occur.

    A vocabulary that was trained without an initial alphabet may lack the others.
    """
    from tokenizers.pre_tokenizers import ByteLevel

    # Every lead byte with every byte that may follow.
    leads = [0x800, *range(0x1000, 0x10000, 0x1000), 0x10000, 0x40000, 0x80000, 0xC0000, 0x100000]
    text = "".join(map(chr, [*range(0x800), *leads]))
    return set(ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text)[0][0])


def _steps(node: dict[str, Any] | None) -> Iterator[str]:
    """The types of a normalizer or pre-tokenizer and of what it is a sequence of."""
    if node:
        yield node["type"]
        for part in (*node.get("normalizers", ()), *node.get("pretokenizers", ())):
            yield from _steps(part)
