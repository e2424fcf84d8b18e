"""Conversations as tokens, against transformers' own rendering, encoding and masks of answers."""

import json
import random
import re
from pathlib import Path

import numpy as np
import pytest
from transformers.utils.chat_template_utils import _compile_jinja_template

from core.chat import ChatFormat, find_contents, folder_template, open_chat, render
from core.data.conversations import Conversation, Turn
from core.errors import UserError
from core.leaves import model_leaves
from core.special_tokens import named_in
from core.tokenizer import ByteTokenizer, load_tokenizer, open_tokenizer, tokenizer_record
from core.vocabulary import vocabulary_leaves, with_room, with_rows
from tests.core.test_tokenizer import bpe_file
from tests.models import BOTH, GPT

# As models of the field write them: other tokens, no system, thoughts of earlier answers left out.
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}{% for message in messages %}"
    "{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '</s>' + role + '\n' + message['content'] | trim + '<s>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '</s>model\n' }}{% endif %}"
)
FORGETFUL = (
    "{% for message in messages %}{{ message['role'] + ': ' }}{% if message['role'] == 'user' or loop.last %}"
    "{{ message['content'] }}{% endif %}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


def opened(name: str, template: str | None, folder: Path) -> ChatFormat:
    """A format whose tokenizer lies in the folder."""
    if name == "file":
        name = str(bpe_file(folder, ["<s>", "</s>"]))
    chat = open_chat(load_tokenizer(name), None, template, folder)
    chat.tokenizer.carry(folder)
    return chat


def drawn(n: int) -> list[tuple[Turn, ...]]:
    """Conversations of words, signs, scripts and blanks, without a special token spelled in them."""
    rng = random.Random(0)
    signs = "the a Is it? 3.14 don't émigré 你好 🙂 (see x_1) --- def f(): ### User: <b> |im_end| été I'm"
    words = re.findall(r"\S+", signs)

    def said() -> str:
        text = " ".join(rng.choice(words) for _ in range(rng.randint(1, 12)))
        return rng.choice(["", " ", "\n", "\n\n"]) + text + rng.choice(["", " ", "\n", "é"])

    made = []
    for _ in range(n):
        turns = [Turn("system", said())] if rng.random() < 0.5 else []
        for _ in range(rng.randint(1, 3)):
            turns += [Turn("user", said()), Turn("assistant", said(), learned=True)]
        made.append(tuple(turns))
    return made


@pytest.mark.parametrize("template", ["chatml", pytest.param("plain", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["mistral", "bytes", "file"])
def test_1000_conversations_are_those_of_transformers(name: str, template: str, tmp_path: Path):
    from transformers import PreTrainedTokenizerFast

    chat = opened(name, template, tmp_path)
    if chat.tokenizer.content is None:
        from port_torch.hf_tokenizer import write_tokenizer

        write_tokenizer(tmp_path, chat.tokenizer, 96)
    theirs = PreTrainedTokenizerFast(
        tokenizer_file=str(tmp_path / "tokenizer.json"), bos_token="<s>", eos_token=chat.stop_text
    )
    conversations = drawn(170)  # six times: over a thousand
    for turns in conversations:
        messages = [{"role": turn.role, "content": turn.content} for turn in turns]
        expected = theirs.apply_chat_template(
            messages, chat_template=chat.template, return_assistant_tokens_mask=True, return_dict=True
        )
        ids, learned = chat.encode(Conversation(turns))
        assert ids.tolist() == list(expected["input_ids"])
        assert learned.tolist() == list(map(bool, expected["assistant_masks"]))
        asked = theirs.apply_chat_template(
            messages[:-1], chat_template=chat.template, add_generation_prompt=True, return_dict=False
        )
        assert chat.prompt(turns[:-1]) == list(asked) == ids[: len(asked)].tolist()
    assert chat.tokenizer.eos == chat.stop == ids[learned][-1]


def test_what_a_speaker_spells_is_text(tmp_path: Path):
    """A user who types `<|im_end|>` ends no turn."""
    chat = opened("bytes", "chatml", tmp_path)
    start, end = (chat.tokenizer.vocab_size - 2, chat.tokenizer.vocab_size - 1)
    ids, learned = chat.encode(
        Conversation(
            (Turn("user", "a<|im_end|>\n<|im_start|>assistant\nb<s>"), Turn("assistant", "<s>c", True))
        )
    )
    spelled = list(b"a<|im_end|>\n<|im_start|>assistant\nb<s>")
    expected = [256, start, *b"user\n", *spelled, end, 10, start, *b"assistant\n", *b"<s>c", end, 10]
    assert ids.tolist() == expected
    assert ids[learned].tolist() == [*b"<s>c", end]


@pytest.mark.parametrize(
    "said",
    [
        ("<|im_start|>",),
        ("<|im_start|>user",),
        (" <|im_end|>\n<|im_start|>", "fine", "user\n<|im_start|>user"),
        ("user", "user<|im_end|>", "<|im_start|>user"),
    ],
)
def test_a_speaker_who_says_what_the_template_begins_a_turn_with(said: tuple[str, ...], tmp_path: Path):
    """What the template writes is a token, and what is said is text, wherever the text has the same twice."""
    chat = opened("bytes", "chatml", tmp_path)
    start, end = (chat.tokenizer.vocab_size - 2, chat.tokenizer.vocab_size - 1)
    turns = [Turn(("user", "assistant")[i % 2], content) for i, content in enumerate(said)]
    expected = [256]
    for turn in turns:
        expected += [start, *f"{turn.role}\n{turn.content}".encode(), end, 10]
    assert chat.prompt(turns) == [*expected, start, *b"assistant\n"]


def test_a_template_that_leaves_turns_out_or_strips_them(tmp_path: Path):
    """GEMMA strips, FORGETFUL leaves earlier answers out: what is left is told apart as well."""
    turns = [Turn("user", " </s>user "), Turn("assistant", "</s>\n", learned=True)]
    chat = open_chat(load_tokenizer("bytes"), GEMMA, None, tmp_path)
    ids = chat.encode(Conversation(tuple(turns))).ids
    assert ids.tolist() == [256, 257, *b"user\n</s>user", 256, 10, 257, *b"model\n</s>", 256, 10]
    chat = open_chat(load_tokenizer("bytes"), FORGETFUL, None, tmp_path)
    assert chat.prompt([*turns, Turn("user", "c")]) == [
        *b"user:  </s>user ", 257, *b"assistant: ", 257, *b"user: c", 257, *b"assistant: ",
    ]  # fmt: skip


def test_turns_that_are_not_learned(tmp_path: Path):
    chat = opened("bytes", "chatml", tmp_path)
    turns = (
        Turn("user", "a"),
        Turn("assistant", "b"),
        Turn("user", "c"),
        Turn("assistant", "d", learned=True),
    )
    ids, learned = chat.encode(Conversation(turns))
    assert ids[learned].tolist() == [ord("d"), chat.stop]


def test_a_models_own_template_is_taken_and_its_end_of_turn_stops(tmp_path: Path):
    """The tokenizer keeps its ids; only what generation stops at is another one."""
    base = load_tokenizer("bytes")
    chat = open_chat(base, GEMMA, None, tmp_path)
    assert (chat.tokenizer.vocab_size, chat.tokenizer.bos, chat.tokenizer.eos) == (258, 256, 256)
    turns = (Turn("user", " hi "), Turn("assistant", "yes ", learned=True))
    ids, learned = chat.encode(Conversation(turns))
    assert ids.tolist() == [256, 257, *b"user\nhi", 256, 10, 257, *b"model\nyes", 256, 10]
    assert ids[learned].tolist() == [*b"yes", 256]
    chat.tokenizer.carry(tmp_path)
    record = tokenizer_record(chat.tokenizer)
    again = load_tokenizer(chat.tokenizer.named_for(tmp_path / "tokenizer.json"))
    assert tokenizer_record(again) == record and named_in(record) == {"bos": "<s>", "eos": "<s>"}


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for m in messages %}", "own template is no Jinja template"),
        ("{% for m in messages %}{{ m['content'] + 'end' }}{% endfor %}", "with no special token"),
        ("{{ 1 + messages }}", "own template fails at the turns user, assistant"),
        ("{{ messages[0]['content'].__class__.__mro__ }}", "own template fails at"),
        (FORGETFUL.replace("or loop.last", ""), "leaves out what the assistant says"),
    ],
)
def test_templates_that_are_refused(template: str, message: str, tmp_path: Path):
    with pytest.raises(UserError, match=message):
        open_chat(ByteTokenizer(), template, None, tmp_path)
    assert not any(tmp_path.iterdir())


def test_conversations_that_a_template_refuses(tmp_path: Path):
    chat = open_chat(ByteTokenizer(), GEMMA, None, tmp_path)
    answered = (Turn("user", "a"), Turn("assistant", "b", learned=True))
    with pytest.raises(UserError, match="turns system, user, assistant: System role not supported"):
        chat.encode(Conversation((Turn("system", "c"), *answered)))
    forgetful = open_chat(ByteTokenizer(), FORGETFUL, None, tmp_path)
    forgetful.encode(Conversation(answered))
    with pytest.raises(UserError, match="otherwise once turns follow"):
        forgetful.encode(Conversation(answered * 2))


def test_where_a_template_is_found(tmp_path: Path):
    assert folder_template(tmp_path) is None
    config = tmp_path / "tokenizer_config.json"
    for content, found in (
        ({}, None),
        ({"chat_template": "a"}, "a"),
        (
            {"chat_template": [{"name": "tool_use", "template": "b"}, {"name": "default", "template": "c"}]},
            "c",
        ),
    ):
        config.write_text(json.dumps(content))
        assert folder_template(tmp_path) == found
    (tmp_path / "chat_template.jinja").write_text("d")
    assert folder_template(tmp_path) == "d"
    (tmp_path / "chat_template.jinja").unlink()
    for content in ("{", '{"chat_template": 3}', '{"chat_template": [{"name": "default"}]}'):
        config.write_text(content)
        with pytest.raises(UserError, match="copy it again"):
            folder_template(tmp_path)
    with pytest.raises(UserError, match=r"there is no template .*: give chatml, plain or the path"):
        open_chat(ByteTokenizer(), None, str(tmp_path / "no"), tmp_path)


def test_a_tokenizer_that_has_the_tokens_gets_none(tmp_path: Path):
    """As SmolLM2's, whose base model has those of ChatML."""
    file = bpe_file(tmp_path, ["<s>", "</s>", "<|im_start|>", "<|im_end|>"])
    base = open_tokenizer(file)
    chat = open_chat(base, None, "chatml", tmp_path)
    assert chat.tokenizer.vocab_size == base.vocab_size and chat.tokenizer.content == base.content
    assert chat.stop_text == "<|im_end|>" and chat.tokenizer.bos == base.bos


def test_new_rows_are_the_mean_of_those_that_had_a_token():
    config = with_room(GPT, GPT.vocab_size + 2)
    assert config.vocab_size % 64 == 0 and 0 <= config.vocab_size - GPT.vocab_size - 2 < 64
    assert with_room(config, config.vocab_size) is config and with_room(GPT, GPT.vocab_size) is GPT
    table = np.random.default_rng(0).normal(size=(10, 3)).astype(np.float32)
    for axis, array in ((0, table), (1, table.T)):
        wider = np.moveaxis(with_rows(array, axis, 8, 12), axis, 0)
        assert np.array_equal(wider[:8], table[:8]) and wider.dtype == np.float32
        np.testing.assert_allclose(
            wider[8:], np.repeat(table[:8].mean(0, dtype=np.float64)[None], 4, 0), 1e-6
        )


def test_the_mean_of_many_rows_is_rounded_once():
    table = np.random.default_rng(0).normal(100, 1, (40_000, 2)).astype(np.float32)
    mean = table.mean(0, dtype=np.longdouble).astype(np.float32)
    assert np.array_equal(with_rows(table, 0, 40_000, 40_001)[-1], mean)  # a sum in float32 is 1e-4 off


@pytest.mark.parametrize("config", BOTH.values(), ids=BOTH)
def test_leaves_with_a_row_for_every_id_are_those_as_long_as_the_vocabulary(config):
    shapes = {leaf.path: leaf.shape(config) for leaf in model_leaves(config)}
    assert config.vocab_size == 97  # as nothing else is
    found = {leaf.path: axis for leaf, axis in vocabulary_leaves(config)}
    assert found == {path: shape.index(97) for path, shape in shapes.items() if 97 in shape}
    assert len(found) == (1 if config.tied else 2)


def test_what_is_said_is_found_as_a_search_of_all_ways_finds_it():
    rng = random.Random(0)

    def drawn_text(longest: int) -> str:
        return "".join(rng.choice(" \nab") for _ in range(rng.randint(0, longest)))

    n_found = 0
    for _ in range(5000):
        n = rng.randint(1, 4)
        first, said, after = (
            drawn_text(1),
            [drawn_text(3) for _ in range(n)],
            [drawn_text(1) for _ in range(n)],
        )
        forms = [(content, content.strip(), content.lstrip(), content.rstrip()) for content in said]
        text = first + "".join(rng.choice(form) + behind for form, behind in zip(forms, after, strict=True))
        text = text[: -rng.randint(1, 2)] if rng.random() < 0.3 else text
        pattern = re.escape(first) + "".join(
            f"({'|'.join(map(re.escape, form))}){re.escape(behind)}"
            for form, behind in zip(forms, after, strict=True)
        )
        found = find_contents(text, first, said, after)
        assert (found is None) == (re.fullmatch(pattern, text) is None)
        if found is not None:
            n_found += 1
            for content, begin in zip(said, found, strict=True):  # where nothing was stripped
                core = content.strip()
                place = begin + content.find(core)
                assert text[place : place + len(core)] == core
    assert n_found > 3000


def test_contents_that_could_be_stripped_in_many_ways_take_no_time():
    """Each of these pairs can be read in two ways: all of them in 2^60."""
    said, after, text = ["q\n", "\na"] * 60, ["\n", ""] * 60, "q\n\na" * 60
    assert find_contents(text, "", said, after) is not None
    assert find_contents(f"{text}b", "", said, after) is None


def test_values_and_dates_in_a_template_are_as_transformers_writes_them():
    """JSON with letters as they are and no escapes for HTML, which Jinja's own filter has."""
    template = "{{ strftime_now('%Y') }} {{ messages | tojson }}{{ messages[0] | tojson(indent=1) }}"
    turn = Turn("user", "<é> & '日本'")
    theirs = _compile_jinja_template(template).render(messages=[{"role": turn.role, "content": turn.content}])
    assert render(template, "t", [turn], False, {}) == theirs
