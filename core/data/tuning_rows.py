"""Rows of a JSONL file: texts, prompts with the responses that are to be learned, or conversations.

    {"text": "..."}                                             all of it is learned
    {"prompt": "...", "response": "..."}                        the prompt as it is, then the response
    {"instruction": "...", "input": "...", "output": "..."}     put into `INSTRUCTION`; input may be missing
    {"messages": [{"role": "user", "content": "..."}, ...]}     a conversation (core/data/conversations.py)

A response may be called response, output or completion, and an input context, as Dolly has it. A field that
is null counts as missing. Nothing of a row is dropped silently: a field that the response may depend on and
for which its form has no place is refused; any other (a category, an id) is counted in `RowFile.unused`.

Reading rows needs neither JAX nor PyTorch: a malformed row is found before they are imported.
"""

import collections
import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from core.data.conversations import CHATS, Conversation, Turn, filled, read_conversation
from core.data.text import read_json_lines
from core.errors import UserError

INSTRUCTION = "### Instruction:\n{instruction}\n\n### Response:\n"
INSTRUCTION_WITH_INPUT = "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
FORMS = 'give {"text"}, {"prompt", "response"}, {"instruction", "input", "output"} or {"messages"}'
QUESTIONS = ("text", "prompt", "instruction")
"""The field that says of which form a row is."""
RESPONSES = ("response", "output", "completion")
INPUTS = ("input", "context")
SYSTEM = "system"
OTHERS = (SYSTEM, "history")
"""What a response may depend on; a conversation has a place for the first."""
CHAT = "chat"
"""The form of conversations."""


class Row(NamedTuple):
    """One line of the file that is no conversation."""

    prompt: str
    """Empty for a text."""
    response: str


@dataclasses.dataclass(frozen=True)
class RowFile:
    """The rows of a file, all of one form."""

    rows: Sequence[Row | Conversation]
    form: str
    """text, prompt, instruction or chat."""
    sha256: str
    unused: dict[str, int]
    """Field that is not used -> how many rows have something in it."""
    has_context: bool = False
    """Whether the input of a row is its field `context`, which was once ignored."""
    unanswered: int = 0
    """Conversations that end with the user's turn, which is left out."""


def read_rows(path: Path, chat: bool = False) -> RowFile:
    """The rows of a JSONL file.

    chat: a prompt or an instruction becomes the user's turn of a conversation, and its response the answer.

    Raises:
        UserError: the file cannot be read, or a line, which it names, is not a row, is of another form than
            those before, is ambiguous, or has a field that is text and for which its form has no place.
    """
    rows, form, has_context, unanswered = [], "", False, 0
    unused: collections.Counter[str] = collections.Counter()
    for where, fields in read_json_lines(path):
        if not isinstance(fields, dict):
            raise UserError(f"{where} is not a JSON object: {FORMS}")
        spoken = _conversation_fields(fields, where)
        if spoken:
            used, kind = spoken, CHAT
            read = read_conversation(fields, spoken, where)
            row, ignored = read.conversation, read.unused
            unanswered += read.unanswered
        else:
            used, ignored = _used_fields(fields, where, chat), ()
            kind, row = used[0], _make_row(fields, used, where)
            if chat:
                kind, row = CHAT, _as_conversation(fields, used, where)
        form = form or kind
        if kind != form:
            raise UserError(f"{where} is a row of {kind!r}, and those before are of {form!r}: give one form")
        rows.append(row)
        unused.update(name for name in fields if name not in used and filled(fields[name]))
        unused.update(ignored)
        has_context |= "context" in used
    if not rows:
        raise UserError(f"{path} is empty: {FORMS} per line")
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    return RowFile(rows, form, sha256, dict(unused), has_context, unanswered)


def _conversation_fields(fields: dict[str, Any], where: str) -> tuple[str, ...]:
    """The fields that a conversation is read from; none if the row is none."""
    held = [name for name in CHATS if filled(fields.get(name))]
    pair = [
        name
        for name in ("prompt", *RESPONSES)
        if filled(fields.get(name)) and not isinstance(fields[name], str)
    ]
    if len(held) > 1 or (held and pair):
        raise UserError(
            f"{where} has both {held[0]!r} and {(held[1:] + pair)[0]!r}, so it is ambiguous what to learn: "
            "leave one of them out of every row"
        )
    if not held and not pair:
        return ()
    if not held and (pair[:1] != ["prompt"] or len(pair) != 2):
        raise UserError(
            f'{where} has turns in its field {pair[0]!r} alone: give all of them in {{"messages"}}, or '
            "prompt and completion as lists of turns"
        )
    used = (*(held or pair), *([SYSTEM] if filled(fields.get(SYSTEM)) else ()))
    for name in (*QUESTIONS, *RESPONSES, *INPUTS, "history", "tools", "functions"):
        if name not in used and filled(fields.get(name)):
            raise UserError(
                f"{where} has the field {name!r} next to a conversation, which has no place for it: remove "
                "it from every row"
            )
    return used


def _used_fields(fields: dict[str, Any], where: str, chat: bool) -> tuple[str, ...]:
    """The names that a row is read from: its question, then its response and its input if it has them."""
    names = [name for name, value in fields.items() if filled(value)]

    def found(candidates: tuple[str, ...]) -> list[str]:
        """Those that are filled; else an empty one, so that its row is told to hold nothing to learn."""
        held = [name for name in candidates if name in names]
        return held or [name for name in candidates if fields.get(name) is not None][:1]

    questions, inputs = found(QUESTIONS), [name for name in INPUTS if name in names]
    responses = [name for name in RESPONSES if name in names] if "text" in questions else found(RESPONSES)
    for rivals in ([*questions, *responses] if "text" in questions else questions, responses, inputs):
        if len(rivals) > 1:
            raise UserError(
                f"{where} has both {rivals[0]!r} and {rivals[1]!r}, so it is ambiguous what to learn: leave "
                f"one of them out of every row, for example with `jq -c 'del(.{rivals[0]})'`"
            )
    if not questions or (questions != ["text"] and not responses):
        held = [name if filled(fields[name]) else f"{name} (empty)" for name in sorted(fields)]
        raise UserError(f"{where} has the fields {', '.join(held) or 'none'}: {FORMS}")
    form = questions[0]
    if chat and form == "text":
        raise UserError(
            f"{where} is a text, which has no turns: leave --chat out, or give prompts or messages"
        )
    homeless = [name for name in OTHERS if name in names and not (chat and name == SYSTEM)]
    homeless += inputs if form != "instruction" else []
    if homeless:
        raise UserError(
            f"{where} has the field {homeless[0]!r}, for which a row of {form!r} has no place: write it into "
            f"the {form}, or remove it from every row"
        )
    return (*questions, *responses, *inputs, *([SYSTEM] if chat and SYSTEM in names else ()))


def _make_row(fields: dict[str, Any], used: tuple[str, ...], where: str) -> Row:
    """The row made of the fields in use."""
    for name in used:
        if not isinstance(fields[name], str):
            raise UserError(f"{where}: {name} must be a string, got {json.dumps(fields[name])[:40]}")
    question, *others = (fields[name] for name in used if name != SYSTEM)
    if used[0] == "instruction":
        question = instruction(question, *others[1:])
    row = Row("", question) if used[0] == "text" else Row(question, others[0])
    if not row.response.strip():
        kind = "text" if used[0] == "text" else "response"
        raise UserError(f"{where} has nothing to learn: its {kind} is empty")
    return row


def _as_conversation(fields: dict[str, Any], used: tuple[str, ...], where: str) -> Conversation:
    """The row as one exchange; an input stands under its instruction."""
    question, response, *given = (fields[name] for name in used if name != SYSTEM)
    asked = "\n\n".join([question, *given])
    if not asked.strip():
        raise UserError(f"{where} has an empty {used[0]}, and an answer follows the user's turn: write one")
    system = [Turn("system", fields[SYSTEM])] if SYSTEM in used else []
    return Conversation((*system, Turn("user", asked), Turn("assistant", response, learned=True)))


def instruction(text: str, given: str = "") -> str:
    """The prompt made of an instruction and what it is to be applied to."""
    form = INSTRUCTION_WITH_INPUT if given.strip() else INSTRUCTION
    return form.format(instruction=text, input=given)
