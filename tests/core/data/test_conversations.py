"""Conversations in rows: every form that people have, and what is refused by name."""

import json
from pathlib import Path

import pytest

from core.chat import open_chat
from core.data.conversations import Conversation, Turn
from core.data.examples import IGNORE, example_of_conversation
from core.data.tuning_rows import RowFile, read_rows
from core.errors import UserError
from core.tokenizer import ByteTokenizer

SYSTEM = {"role": "system", "content": "s"}
ASKED = {"role": "user", "content": "a"}
ANSWERED = {"role": "assistant", "content": "b"}
EXCHANGE = (Turn("user", "a"), Turn("assistant", "b", learned=True))


def read(folder: Path, *lines: dict, chat: bool = False) -> RowFile:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return read_rows(path, chat)


@pytest.mark.parametrize(
    ("row", "turns"),
    [
        ({"messages": [ASKED, ANSWERED]}, EXCHANGE),
        ({"messages": [SYSTEM, ASKED, ANSWERED]}, (Turn("system", "s"), *EXCHANGE)),
        ({"messages": [ASKED, ANSWERED], "system": "s"}, (Turn("system", "s"), *EXCHANGE)),
        ({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}, EXCHANGE),
        ({"prompt": [ASKED, ANSWERED, ASKED], "completion": [ANSWERED]},
         (EXCHANGE[0], Turn("assistant", "b"), *EXCHANGE)),
        ({"messages": [ASKED, ANSWERED | {"weight": 0}, ASKED, ANSWERED | {"weight": 1}]},
         (EXCHANGE[0], Turn("assistant", "b"), *EXCHANGE)),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}, ANSWERED]}, EXCHANGE),
    ],
)  # fmt: skip
def test_forms(row: dict, turns: tuple[Turn, ...], tmp_path: Path):
    file = read(tmp_path, row)
    assert file.rows == [Conversation(turns)] and file.form == "chat" and file.unused == {}


def test_what_is_not_used_is_counted(tmp_path: Path):
    file = read(
        tmp_path,
        {"messages": [ASKED | {"name": "Ada"}, ANSWERED, ASKED], "id": 3},
        {"messages": [ASKED, ANSWERED], "id": 4, "tools": []},
    )
    assert file.unused == {"id": 2, "messages.name": 1} and file.unanswered == 1
    assert file.rows == [Conversation(EXCHANGE)] * 2


def test_prompts_and_instructions_as_conversations(tmp_path: Path):
    for row, asked in (
        ({"prompt": "a", "response": "b"}, "a"),
        ({"instruction": "a", "output": "b", "input": ""}, "a"),
        ({"instruction": "a", "context": "c", "response": "b"}, "a\n\nc"),
    ):
        file = read(tmp_path, row, chat=True)
        assert file.rows == [Conversation((Turn("user", asked), EXCHANGE[1]))] and file.form == "chat"
    (row,) = read(tmp_path, {"prompt": "a", "response": "b", "system": "s"}, chat=True).rows
    assert row == Conversation((Turn("system", "s"), *EXCHANGE))
    both = read(tmp_path, {"prompt": "a", "response": "b"}, {"messages": [ASKED, ANSWERED]}, chat=True)
    assert both.rows == [Conversation(EXCHANGE)] * 2


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": [ASKED]}, "has no turn of the assistant to learn"),
        ({"messages": [SYSTEM]}, "has no turn of the assistant"),
        ({"messages": [ASKED, ANSWERED | {"weight": 0}]}, "has no turn of the assistant to learn"),
        ({"messages": [ASKED, ASKED, ANSWERED]}, "out of order: its turn 2 is of 'user', where 'assistant'"),
        ({"messages": [ANSWERED]}, "its turn 1 is of 'assistant', where 'user' comes next"),
        ({"messages": [ASKED, ANSWERED, SYSTEM]}, "turn 3 is of 'system'"),
        ({"messages": [SYSTEM, ASKED, ANSWERED], "system": "s"}, "turn of the system and the field 'system'"),
        ({"messages": [ASKED, ANSWERED | {"content": " "}]}, "turn 2 of messages has nothing to learn"),
        ({"messages": [ASKED, {"role": "tool", "content": "b"}]}, 'turn 2 of messages is of "tool", and'),
        ({"messages": [ASKED, {"role": "assistant", "content": "b", "tool_calls": [1]}]}, "calls a tool"),
        ({"messages": [ASKED, {"role": "assistant"}]}, "must say what is said in 'content'"),
        ({"messages": [ASKED, {"content": "b"}]}, "must say who speaks in 'role'"),
        ({"messages": [ASKED, ANSWERED | {"weight": 0.5}]}, "has the weight 0.5: give 1 .learned. or 0"),
        ({"messages": [ASKED, "b"]}, "turn 2 of messages must be an object"),
        ({"messages": [ASKED, {"role": "assistant", "content": 3}]}, "what is said must be a string, got 3"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}, ANSWERED]}, "a part that is no"),
        ({"messages": "a"}, "messages must be a list of turns"),
        ({"messages": [ASKED, ANSWERED], "system": 3}, "system must be a string"),
        ({"messages": [ASKED, ANSWERED], "conversations": [ASKED]}, "both 'messages' and 'conversations'"),
        ({"messages": [ASKED, ANSWERED], "text": "c"}, "field 'text' next to a conversation"),
        ({"messages": [ASKED, ANSWERED], "tools": [{}]}, "field 'tools' next to a conversation"),
        ({"prompt": [ASKED], "completion": "b"}, "has turns in its field 'prompt' alone"),
        ({"prompt": "a", "response": "b"}, "row of 'prompt', and those before are of 'chat'"),
    ],
)  # fmt: skip
def test_what_is_refused(row: dict, message: str, tmp_path: Path):
    with pytest.raises(UserError, match=f"line 2.*{message}"):
        read(tmp_path, {"messages": [ASKED, ANSWERED]}, row)


def test_texts_have_no_turns(tmp_path: Path):
    with pytest.raises(UserError, match="line 1 is a text, which has no turns"):
        read(tmp_path, {"text": "a"}, chat=True)


def test_a_conversation_is_cut_at_answers(tmp_path: Path):
    chat = open_chat(ByteTokenizer(), None, "chatml", tmp_path)
    conversation = Conversation((Turn("system", "s"), *EXCHANGE * 3))
    length = len(chat.encode(conversation).ids) - 1
    exchange = len(chat.encode(Conversation(EXCHANGE)).ids) - 1  # without the `<s>` before it
    whole = example_of_conversation(conversation, chat, length)
    assert whole.n_cut == 0 and len(whole.example.tokens) == length and whole.example.n_bytes == 3
    learned = whole.example.targets[whole.example.targets != IGNORE]
    assert learned.tolist() == [ord("b"), chat.stop] * 3
    cut = example_of_conversation(conversation, chat, length - 1)
    assert cut.n_cut == 2 and len(cut.example.tokens) == length - exchange and cut.example.n_bytes == 2
    nothing = example_of_conversation(conversation, chat, exchange)
    assert nothing.example is None
