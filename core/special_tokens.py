"""Which tokens open and close a document: as a tokenizer's name says it, and as transformers' files do.

A tokenizer.json does not say it. `<s>` and `</s>` are taken, or `<|endoftext|>` for both, unless other tokens
are named: by the user, `FILE,bos=TOKEN,eos=TOKEN`, where `bos=none` means that documents begin with none, or
by the files that lie next to it in a folder of weights.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from core.errors import UserError

ROLES = ("bos", "eos")
NONE = "none"
Named = dict[str, str | None]
"""Role -> the text of its token; None: there is none. A role that is missing is not named."""


def split_name(name: str | Path) -> tuple[str, Named]:
    """A tokenizer's name without the tokens that it names, and these.

    Raises:
        UserError: a token is named twice, or eos as none.
    """
    name = str(name)
    if Path(name).is_file():
        return name, {}
    file, *parts = re.split(rf",(?=(?:{'|'.join(ROLES)})=)", name)
    named: Named = {}
    for role, _, token in (part.partition("=") for part in parts):
        if role in named:
            raise UserError(f"the tokenizer {name} names its {role} twice: name it once")
        named[role] = None if token == NONE else token
    if named.get("eos", "") is None:
        raise UserError(f"the tokenizer {name} has no eos, and every document ends with it: name a token")
    return file, named


def join_name(file: str | Path, named: Mapping[str, str | None]) -> str:
    """What `split_name` takes apart."""
    tokens = (f",{role}={NONE if named[role] is None else named[role]}" for role in ROLES if role in named)
    return "".join([str(file), *tokens])


def named_in(record: Mapping[str, Any]) -> Named:
    """The tokens that a tokenizer's record names; none where those of the file alone are meant."""
    return {role: record[role] for role in ROLES if role in record}


def as_in_folder(name: str | Path) -> str:
    """A tokenizer's name as the user gave it, with the tokens that the files next to its own name.

    What the user names holds. transformers' tokenizer_config.json and special_tokens_map.json name tokens;
    where they do not, generation_config.json and config.json have ids, of which the first of a list counts.

    Raises:
        UserError: one of these files is damaged.
    """
    file, named = split_name(name)
    if len(named) == len(ROLES) or not Path(file).is_file():
        return str(name)
    beside = _named_by_tokens(Path(file)) or _named_by_ids(Path(file))
    return join_name(file, beside | named)


def _named_by_tokens(file: Path) -> Named:
    """As transformers' tokenizer has them, which has no bos where only eos is named."""
    content = _read(file, "special_tokens_map.json") | _read(file, "tokenizer_config.json")
    tokens = {role: content.get(f"{role}_token") for role in ROLES}
    named = {
        role: token.get("content") if isinstance(token, dict) else token for role, token in tokens.items()
    }
    for role, token in named.items():
        if not isinstance(token, str | None):
            raise UserError(f"{file.parent} names {token!r} as its {role}_token, which is no token")
    if named["eos"] is None:
        del named["eos"]
    return named if any(named.values()) else {}


def _named_by_ids(file: Path) -> Named:
    """As config.json has them, if the tokenizer.json lists the id of eos among its added tokens."""
    content = _read(file, "config.json") | _read(file, "generation_config.json")
    ids = [content.get(f"{role}_token_id") for role in ROLES]
    bos, eos = (found[0] if isinstance(found, list) and found else found for found in ids)
    if not isinstance(eos, int):
        return {}
    texts = {
        token.get("id"): token.get("content") for token in _read(file, file.name).get("added_tokens", ())
    }
    return (
        {"bos": texts.get(bos if isinstance(bos, int) else None), "eos": texts[eos]} if eos in texts else {}
    )


def _read(file: Path, name: str) -> dict[str, Any]:
    """The object in the JSON file `name` next to a tokenizer's; empty where there is none."""
    try:
        content = json.loads((file.parent / name).read_bytes())
        if not isinstance(content, dict):
            raise ValueError("it is not a JSON object")
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"{file.parent / name}, which may name the tokens that open and close a document, cannot be read "
            f"({error}): copy it again from where it came, or name them, {file},bos=TOKEN,eos=TOKEN"
        ) from None
    return content
