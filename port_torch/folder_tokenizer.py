"""The tokenizer of a folder of weights: the one it records, the one it carries, or the one named."""

import hashlib
from pathlib import Path

from core.checkpoint.manifest import Manifest
from core.errors import UserError
from core.mistral_tokenizer import MISTRAL_SHA256
from core.special_tokens import join_name, named_in, split_name
from core.tokenizer import (
    Tokenizer,
    as_recorded,
    file_hash,
    load_tokenizer,
    load_tokenizer_of,
    open_tokenizer,
    require_same,
    tokenizer_record,
)
from port_torch.folder import inside

FILE, SENTENCEPIECE = "tokenizer.json", "tokenizer.model"
# What two tokenizers must agree on to be taken for the same: words, spaces, other scripts, bytes, symbols.
PROBE = "The 3 quick  brown foxes;\n\tdef f(x): return x**2\n Grüße, привет, 你好 🙂\x07 <s> ½ — end "


def folder_tokenizer(folder: Path, manifest: Manifest | None, name: str | None, vocab_size: int) -> Tokenizer:
    """The tokenizer that the model in `folder` was trained with.

    manifest: the folder's own, if it is an export of ours; name: what the user says; vocab_size: the model's.

    Raises:
        UserError: none is found, or it has more ids than the model, or others than the folder's.
    """
    file, model_file = inside(folder, FILE), inside(folder, SENTENCEPIECE)
    if manifest:
        tokenizer = _recorded(folder, manifest, name)
    elif name:
        tokenizer = open_tokenizer(name)
        if file.is_file() and not _agree(tokenizer, open_tokenizer(join_name(file, split_name(name)[1]))):
            raise UserError(
                f"the tokenizer {name!r} does not give the ids of {file}, so it is not the model's: leave "
                "--tokenizer out, or name the right one"
            )
    elif _is_mistral(model_file):
        tokenizer = load_tokenizer("mistral")
    elif file.is_file():
        tokenizer = open_tokenizer(file)
    else:
        raise UserError(f"{folder} holds no {FILE}: name the model's tokenizer with --tokenizer")
    require_vocabulary(folder, tokenizer, vocab_size)
    return tokenizer


def require_vocabulary(where: Path, tokenizer: Tokenizer, vocab_size: int) -> None:
    """A UserError unless the model in `where` has an embedding for every id of the tokenizer.

    It may have more: those at the end of a padded vocabulary are never given and always computed.
    """
    if tokenizer.vocab_size > vocab_size:
        raise UserError(
            f"{where} is a model of {vocab_size} token ids, and the tokenizer {tokenizer.name!r} has "
            f"{tokenizer.vocab_size}: name the model's own with --tokenizer"
        )


def _recorded(folder: Path, manifest: Manifest, name: str | None) -> Tokenizer:
    """The tokenizer that the manifest records: as named, by its own name, or as the folder carries it.

    The folder's file may be written in another way than the one recorded; the manifest proves it, too.
    """
    record, file = manifest.tokenizer, folder / FILE
    own = file_hash(file)
    if own and name is not None and file_hash(Path(split_name(name)[0])) == own:
        there = record | {"sha256": own}
        tokenizer = load_tokenizer(as_recorded(name, there))
        require_same(there, tokenizer_record(tokenizer), str(folder), "--tokenizer")
        return tokenizer
    try:
        return load_tokenizer_of(record, [folder], str(folder), name)
    except UserError:
        if name is not None or not own:
            raise
    return load_tokenizer(join_name(file, named_in(record)))


def _is_mistral(file: Path) -> bool:
    return file.is_file() and hashlib.sha256(file.read_bytes()).hexdigest() == MISTRAL_SHA256


def _agree(a: Tokenizer, b: Tokenizer) -> bool:
    """Whether two tokenizers, perhaps in different file formats, give the same ids for some test texts."""
    same = (a.vocab_size, a.bos, a.eos) == (b.vocab_size, b.bos, b.eos)
    return same and a.encode(PROBE).tolist() == b.encode(PROBE).tolist()
