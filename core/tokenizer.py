"""Text to token ids and back: `mistral`, `bytes`, or the path of a tokenizer.json.

A tokenizer is known by its content hash, not by its name or path: data, checkpoints and exports hold the
record {name, sha256, vocab_size}, with {bos, eos} where the file's content alone does not say them
(core/special_tokens.py), and `require_same` compares two of them. Prepared data, run folders and imported
parameters also carry the file itself (`Tokenizer.carry`), so that it may be moved or deleted;
`load_tokenizer_of` finds it.
"""

import abc
import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import SupportsIndex

import numpy as np

from core.errors import UserError
from core.folders import write_atomically
from core.special_tokens import Named, as_in_folder, join_name, named_in, split_name

TOKENIZER_FILE = "tokenizer.json"
"""Name of the tokenizer's file in the folders that carry it."""
ORIGINAL = "mtlm_tokenizer.json"
"""The same in an exported folder whose tokenizer.json had to be written in another form."""
BUILT_IN = ("mistral", "bytes")


class Tokenizer(abc.ABC):
    """What every tokenizer offers. Pickling one stores its name; the other process loads it anew."""

    name: str
    """What `load_tokenizer` takes to load it again."""
    vocab_size: int
    """Number of ids, `bos` and `eos` included; at most core.config.MAX_VOCAB."""
    bos: int | None
    """Id of `<s>`, which opens every document; None: nothing does."""
    eos: int
    """Id of `</s>`, which closes every document."""
    sha256: str
    """Hash of the content that defines the ids."""
    content: bytes | None = None
    """The tokenizer.json; None for a built-in tokenizer."""
    named: Named = {}  # noqa: RUF012 (nobody writes into it)
    """`bos` and `eos` as texts, where they are not those that are taken of the content alone."""

    @property
    def dtype(self) -> np.dtype:
        """Of its ids."""
        return id_dtype(self.vocab_size)

    @property
    def prefix(self) -> int:
        """The id before a text that needs one: `bos`, else `eos`, behind which documents begin in training.

        lm-evaluation-harness calls it prefix_token_id, and takes it in the same way.
        """
        return self.eos if self.bos is None else self.bos

    @abc.abstractmethod
    def encode(self, text: str) -> np.ndarray:
        """The ids of `text`, [n], of its `dtype`, without `bos` and `eos`; `<s>` in the text is plain text.

        A `UserError` where `text` holds a lone surrogate, which no UTF-8 text does.
        """

    def begin(self, text: str) -> list[int]:
        """The ids of a document that begins with `text`: what a model is given to continue.

        They are never none: without a `bos`, an empty text is what follows the end of another document.
        """
        ids = self.encode(text).tolist()
        return ids if self.bos is None and ids else [self.prefix, *ids]

    @abc.abstractmethod
    def decode(self, ids: Iterable[SupportsIndex]) -> str:
        """The text of `ids`; bytes that are not UTF-8 become U+FFFD.

        `bos`, `eos` and the ids at the end of a padded vocabulary, which the tokenizer lacks, are skipped.
        """

    def named_for(self, file: Path) -> str:
        """What `load_tokenizer` takes to load it from a copy of its file; its name if it has none."""
        return self.name if self.content is None else join_name(file, self.named)

    def carry(self, folder: Path) -> None:
        """Writes the tokenizer's file, if it has one, into `folder` as `TOKENIZER_FILE`."""
        if self.content is not None and file_hash(folder / TOKENIZER_FILE) != self.sha256:
            write_atomically(folder / TOKENIZER_FILE, self.content)

    def __reduce__(self):
        return load_tokenizer, (self.name,)


def id_dtype(vocab_size: int) -> np.dtype:
    """The type in which ids of such a vocabulary are stored."""
    return np.dtype(np.uint16 if vocab_size <= 2**16 else np.uint32)


def open_tokenizer(given: str | Path) -> Tokenizer:
    """The tokenizer that a user names; the files next to a tokenizer.json may say its bos and eos."""
    return load_tokenizer(as_in_folder(given))


def load_tokenizer(name: str | Path) -> Tokenizer:
    """The tokenizer `mistral`, `bytes`, or that of a tokenizer.json file; a `UserError` otherwise.

    A file may be followed by the tokens that open and close a document: `FILE,bos=TOKEN,eos=TOKEN`.
    """
    if name == "mistral":
        from core.mistral_tokenizer import MistralTokenizer  # which imports this module

        return MistralTokenizer()
    if name == "bytes":
        return ByteTokenizer()
    file, named = split_name(name)
    if Path(file).is_file():
        from core.file_tokenizer import FileTokenizer  # likewise

        return FileTokenizer(Path(file), named)
    if file in BUILT_IN:
        raise UserError(f"the tokenizer {file} has tokens of its own for bos and eos: give {file} alone")
    raise UserError(f"unknown tokenizer {str(name)!r}: give mistral, bytes or the path of a tokenizer.json")


def load_tokenizer_of(
    record: dict, carriers: Iterable[Path], what: str, given: str | None = None
) -> Tokenizer:
    """The tokenizer of `record`: the one that the user names (`given`), else as `find_tokenizer` finds it.

    Raises:
        UserError: it is another tokenizer, or there is none.
    """
    name = find_tokenizer(record, carriers, what) if given is None else as_recorded(given, record)
    tokenizer = load_tokenizer(name)
    there = "this version of mtlm" if given is None else "--tokenizer"
    require_same(record, tokenizer_record(tokenizer), what, there)
    return tokenizer


def as_recorded(given: str, record: dict) -> str:
    """The name that a user gives the tokenizer of `record`, with its bos and eos if it is its file."""
    file, named = split_name(given)
    return given if named or file_hash(Path(file)) != record["sha256"] else join_name(file, named_in(record))


def find_tokenizer(record: dict, carriers: Iterable[Path], what: str) -> str:
    """What `load_tokenizer` takes to load the tokenizer of `record`: a built-in name, the path that is
    recorded, or the file that the first of the folders `carriers` carries.

    what: the data or model that the record belongs to, for messages.

    Raises:
        UserError: no file with the recorded sha256 is found.
    """
    if record["name"] in BUILT_IN:
        return record["name"]
    others = []
    carried = (folder / name for folder in carriers for name in (TOKENIZER_FILE, ORIGINAL))
    for file in (Path(record["name"]), *carried):
        found = file_hash(file)
        if found == record["sha256"]:
            return join_name(file, named_in(record))
        if found:
            others.append(f"{file} is another one, {found[:12]}")
    raise UserError(
        f"the tokenizer of {what} is not found, {record['name']} with the sha256 {record['sha256'][:12]}"
        f"{''.join(f' ({other})' for other in others)}: name its file with --tokenizer FILE"
    )


def file_hash(file: Path) -> str | None:
    """sha256 of a tokenizer's file; None where there is no such file."""
    try:
        return hashlib.sha256(file.read_bytes()).hexdigest()
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return None


def tokenizer_record(tokenizer: Tokenizer) -> dict:
    """What is stored with data and weights: {"name", "sha256", "vocab_size"}, and {"bos", "eos"} where they
    are not those that are taken of the content alone."""
    return {
        "name": split_name(tokenizer.name)[0],
        "sha256": tokenizer.sha256,
        "vocab_size": tokenizer.vocab_size,
        **tokenizer.named,
    }


def identity(record: dict) -> list:
    """What makes the ids of documents: two records with the same are of one tokenizer."""
    named = named_in(record)
    return [record["sha256"], *([named] if named else [])]


def require_same(record_a: dict, record_b: dict, what_a: str, what_b: str) -> None:
    """A `UserError` naming both sides unless the two records are of one tokenizer, whatever its names."""
    if (identity(record_a), record_a["vocab_size"]) == (identity(record_b), record_b["vocab_size"]):
        return
    a, b = (
        f"{join_name(r['name'], named_in(r))!r} ({r['vocab_size']} ids, {r['sha256'][:12]})"
        for r in (record_a, record_b)
    )
    raise UserError(f"the tokenizers differ: {what_a} has {a}, {what_b} has {b}; use one tokenizer for both")


class ByteTokenizer(Tokenizer):
    """UTF-8 bytes are ids 0 to 255, `<s>` is 256 and `</s>` 257."""

    name = "bytes"
    vocab_size, bos, eos = 258, 256, 257
    sha256 = hashlib.sha256(b"ids 0-255: bytes of UTF-8; 256: <s>; 257: </s>").hexdigest()

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(utf8(text), np.uint8).astype(np.uint16)

    def decode(self, ids: Iterable[SupportsIndex]) -> str:
        return bytes(int(i) for i in ids if i < 256).decode("utf-8", errors="replace")


class TextStream:
    """Turns ids that come one by one into text that can be shown at once.

    A character may take several tokens, and whether a leading space belongs to the text depends on the
    tokens before it. So text is decoded together with the ids of the last piece shown, and what ends in
    an incomplete character waits for the next id. The pieces joined are `decode` of all ids.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []  # of the last piece shown, then of what is not shown yet
        self._n_shown = 0  # how many of them are shown

    def push(self, token: SupportsIndex) -> str:
        """The text that `token` completes, possibly empty."""
        if token in (self._tokenizer.bos, self._tokenizer.eos):
            return ""
        self._ids.append(int(token))
        text = self._unseen()
        if text.endswith("\ufffd"):
            return ""
        if text:
            del self._ids[: self._n_shown]
            self._n_shown = len(self._ids)
        return text

    def flush(self) -> str:
        """What is left, an incomplete character as U+FFFD; the stream is then at its start again."""
        text = self._unseen()
        self._ids, self._n_shown = [], 0
        return text

    def _unseen(self) -> str:
        shown = self._tokenizer.decode(self._ids[: self._n_shown])
        return self._tokenizer.decode(self._ids)[len(shown) :]


def utf8(text: str) -> bytes:
    """The text in UTF-8; a `UserError` where it holds a lone surrogate."""
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(
            f"the text holds a lone surrogate at character {error.start}, so it is not Unicode: "
            "replace or remove it"
        ) from error
