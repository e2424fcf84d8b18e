"""Which tokens open and close a document: as the user names them, or the files next to a tokenizer.json."""

import json
import pickle
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.errors import UserError
from core.special_tokens import as_in_folder, join_name, split_name
from core.tokenizer import (
    find_tokenizer,
    load_tokenizer,
    load_tokenizer_of,
    open_tokenizer,
    require_same,
    tokenizer_record,
)
from tests.core.test_tokenizer import bpe_file

CHAT = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]  # SmolLM2's and Qwen's, ids 0 to 2


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return bpe_file(tmp_path, CHAT)


def put(file: Path, name: str, **content) -> None:
    (file.parent / name).write_text(json.dumps(content))


@given(
    bos=st.none() | st.sampled_from([*CHAT, "</s>", ",x=,", "a b"]),
    eos=st.sampled_from([*CHAT, "</s>", ",x=,", "none,"]),
    which=st.sets(st.sampled_from(["bos", "eos"])),
)
def test_names_are_joined_and_split(bos, eos, which):
    named = {role: token for role, token in (("bos", bos), ("eos", eos)) if role in which}
    assert split_name(join_name("some/to,ken.json", named)) == ("some/to,ken.json", named)


def test_tokens_are_named(file):
    both = load_tokenizer(file)
    assert (both.bos, both.eos, both.name, both.named) == (0, 0, str(file), {})
    chat = load_tokenizer(f"{file},eos=<|im_end|>,bos=<|im_start|>")
    assert (chat.bos, chat.eos) == (1, 2)
    assert chat.name == f"{file},bos=<|im_start|>,eos=<|im_end|>"
    qwen = load_tokenizer(f"{file},bos=none,eos=<|im_end|>")
    assert (qwen.bos, qwen.eos, qwen.prefix) == (None, 2, 2)
    text = "the cat <|im_end|> sat"  # which is text, and stays it
    ids = qwen.encode(text).tolist()
    assert not {0, 1, 2} & set(ids) and qwen.decode([0, *ids, 2]) == f"<|endoftext|>{text}"
    assert (both.begin(text), qwen.begin(text), both.begin(""), qwen.begin("")) == ([0, *ids], ids, [0], [2])
    # What the file alone says need not be named, and makes no other tokenizer.
    assert load_tokenizer(f"{file},bos=<|endoftext|>").name == str(file)
    assert load_tokenizer(f"{file},eos=<|im_end|>").bos == 0
    for tokenizer in (both, chat, qwen):
        copy = pickle.loads(pickle.dumps(tokenizer))
        assert (copy.bos, copy.eos, tokenizer_record(copy)) == (
            tokenizer.bos, tokenizer.eos, tokenizer_record(tokenizer),
        )  # fmt: skip


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "{file},eos=<end>",
            r"has no token <end> for its eos.*special tokens are <\|endoftext\|>, <\|im_start",
        ),
        ("{file},eos=none", "has no eos, and every document ends with it"),
        ("{file},eos=a,eos=b", "names its eos twice"),
        ("bytes,eos=</s>", "the tokenizer bytes has tokens of its own"),
        ("{file}.old,eos=</s>", "unknown tokenizer"),
    ],
)
def test_names_that_are_refused(file, name, message):
    with pytest.raises(UserError, match=message):
        load_tokenizer(name.format(file=file))


def test_records(file, tmp_path):
    """Old ones have no bos and eos and mean those of the file alone; new ones have them where they differ."""
    old = {
        "name": str(file),
        "sha256": load_tokenizer(file).sha256,
        "vocab_size": load_tokenizer(file).vocab_size,
    }
    chat = load_tokenizer(f"{file},bos=none,eos=<|im_end|>")
    assert tokenizer_record(load_tokenizer(file)) == old
    record = tokenizer_record(chat)
    assert record == old | {"bos": None, "eos": "<|im_end|>"}
    with pytest.raises(
        UserError, match=r"tokenizer\.json,bos=none,eos=<\|im_end\|>' .*, the data has '.*json' "
    ):
        require_same(record, old, "the model", "the data")

    # Files next to it say something else now: records hold all the same.
    put(file, "tokenizer_config.json", bos_token="<|im_start|>", eos_token="<|im_start|>")
    carrier = tmp_path / "carrier"
    carrier.mkdir()
    chat.carry(carrier)
    for there, eos in ((old, 0), (record, 2)):
        for found in (
            load_tokenizer_of(there, [], "the data"),
            load_tokenizer_of(there | {"name": "gone"}, [carrier], "the data"),
            load_tokenizer_of(there, [], "the data", given=str(file)),
            load_tokenizer(find_tokenizer(there, [], "the data")),
        ):
            assert found.eos == eos
            require_same(there, tokenizer_record(found), "a", "b")
    with pytest.raises(UserError, match="the tokenizers differ"):
        load_tokenizer_of(record, [], "the data", given=f"{file},eos=<|im_start|>")


def test_files_of_transformers_next_to_it(file):
    """A token's text or its object, or ids of which the first of a list counts."""
    assert open_tokenizer(file).name == str(file)
    put(file, "config.json", bos_token_id=0, eos_token_id=1, hidden_size=8)
    assert (open_tokenizer(file).bos, open_tokenizer(file).eos) == (0, 1)
    put(file, "generation_config.json", eos_token_id=[2, 0])
    assert (open_tokenizer(file).bos, open_tokenizer(file).eos) == (0, 2)
    put(file, "tokenizer_config.json", bos_token=None, eos_token={"content": "<|im_start|>", "lstrip": False})
    assert (open_tokenizer(file).bos, open_tokenizer(file).eos) == (None, 1)
    assert open_tokenizer(f"{file},eos=<|im_end|>").name == f"{file},bos=none,eos=<|im_end|>"
    put(file, "tokenizer_config.json", model_max_length=9)
    put(file, "special_tokens_map.json", eos_token="<|endoftext|>")
    assert (open_tokenizer(file).bos, open_tokenizer(file).eos) == (None, 0)
    assert load_tokenizer(file).bos == 0  # which looks at the file alone
    for name, content, message in (
        ("tokenizer_config.json", "{", r"tokenizer_config\.json, which may name the tokens.*cannot be read"),
        ("tokenizer_config.json", "[]", r"cannot be read \(it is not a JSON object\)"),
        ("tokenizer_config.json", '{"eos_token": 3}', "names 3 as its eos_token"),
        ("tokenizer_config.json", '{"eos_token": "<end>"}', "has no token <end> for its eos"),
    ):
        (file.parent / name).write_text(content)
        with pytest.raises(UserError, match=message):
            open_tokenizer(file)


def test_a_run_s_own_files_name_nothing(file):
    """config.json is a run's here, and ids that the tokenizer does not list are nobody's."""
    put(file, "config.json", run={}, model={"vocab_size": 9}, tokenizer={"name": "bytes"})
    assert as_in_folder(file) == str(file)
    put(file, "config.json", bos_token_id=7, eos_token_id=7)
    assert as_in_folder(file) == str(file)
    assert as_in_folder("mistral") == "mistral"
