"""Rows of a JSONL file: texts, or prompts with the responses that are to be learned.

    {"text": "..."}                                             all of it is learned
    {"prompt": "...", "response": "..."}                        the prompt as it is, then the response
    {"instruction": "...", "input": "...", "output": "..."}     put into `INSTRUCTION`; input may be missing

A response may be called response, output or completion, and an input context, as Dolly has it. A field that
is null counts as missing. Nothing of a row is dropped silently: a field that the response may depend on and
for which its form has no place is refused; any other (a category, an id) is counted in `RowFile.unused`.

Reading rows needs neither JAX nor PyTorch: a malformed row is found before they are imported.
"""

import collections
import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

from core.data.text import read_json_lines
from core.errors import UserError

INSTRUCTION = "### Instruction:\n{instruction}\n\n### Response:\n"
INSTRUCTION_WITH_INPUT = "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
FORMS = 'give {"text"}, {"prompt", "response"} or {"instruction", "input", "output"}'
QUESTIONS = ("text", "prompt", "instruction")
"""The field that says of which form a row is."""
RESPONSES = ("response", "output", "completion")
INPUTS = ("input", "context")
CHATS = ("messages", "conversations", "conversation")
OTHERS = ("system", "history")
"""What a response may depend on and no form has a place for."""


class Row(NamedTuple):
    """One line of the file."""

    prompt: str
    """Empty for a text."""
    response: str


@dataclasses.dataclass(frozen=True)
class RowFile:
    """The rows of a file, all of one form."""

    rows: list[Row]
    form: str
    """text, prompt or instruction."""
    sha256: str
    unused: dict[str, int]
    """Field that is not used -> how many rows have something in it."""
    has_context: bool = False
    """Whether the input of a row is its field `context`, which was once ignored."""


def read_rows(path: Path) -> RowFile:
    """The rows of a JSONL file.

    Raises:
        UserError: the file cannot be read, or a line, which it names, is not a row, is of another form than
            those before, is ambiguous, or has a field that is text and for which its form has no place.
    """
    rows, form, has_context = [], "", False
    unused: collections.Counter[str] = collections.Counter()
    for where, fields in read_json_lines(path):
        if not isinstance(fields, dict):
            raise UserError(f"{where} is not a JSON object: {FORMS}")
        used = _used_fields(fields, where)
        kind, row = used[0], _make_row(fields, used, where)
        form = form or kind
        if kind != form:
            raise UserError(f"{where} is a row of {kind!r}, and those before are of {form!r}: give one form")
        rows.append(row)
        unused.update(name for name in fields if name not in used and _filled(fields[name]))
        has_context |= "context" in used
    if not rows:
        raise UserError(f"{path} is empty: {FORMS} per line")
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    return RowFile(rows, form, sha256, dict(unused), has_context)


def _filled(value: Any) -> bool:
    """Whether a field holds anything; 0 and false do."""
    return value not in (None, "", [], {})


def _used_fields(fields: dict[str, Any], where: str) -> tuple[str, ...]:
    """The names that a row is read from: its question, then its response and its input if it has them."""
    filled = [name for name, value in fields.items() if _filled(value)]
    for name in filled:
        if name in CHATS or (name in QUESTIONS + RESPONSES and isinstance(fields[name], list | dict)):
            raise UserError(
                f"{where} has a conversation in its field {name!r}, and chat templates are not supported "
                "yet: write each turn to learn as a row of prompt and response"
            )

    def found(names: tuple[str, ...]) -> list[str]:
        """Those that are filled; else an empty one, so that its row is told to hold nothing to learn."""
        held = [name for name in names if name in filled]
        return held or [name for name in names if fields.get(name) is not None][:1]

    questions, inputs = found(QUESTIONS), [name for name in INPUTS if name in filled]
    responses = [name for name in RESPONSES if name in filled] if "text" in questions else found(RESPONSES)
    for rivals in ([*questions, *responses] if "text" in questions else questions, responses, inputs):
        if len(rivals) > 1:
            raise UserError(
                f"{where} has both {rivals[0]!r} and {rivals[1]!r}, so it is ambiguous what to learn: leave "
                f"one of them out of every row, for example with `jq -c 'del(.{rivals[0]})'`"
            )
    if not questions or (questions != ["text"] and not responses):
        raise UserError(f"{where} has the fields {', '.join(sorted(fields)) or 'none'}: {FORMS}")
    form = questions[0]
    homeless = [name for name in OTHERS if name in filled] + (inputs if form != "instruction" else [])
    if homeless:
        raise UserError(
            f"{where} has the field {homeless[0]!r}, for which a row of {form!r} has no place: write it into "
            f"the {form}, or remove it from every row"
        )
    return (*questions, *responses, *inputs)


def _make_row(fields: dict[str, Any], used: tuple[str, ...], where: str) -> Row:
    """The row made of the fields in use."""
    for name in used:
        if not isinstance(fields[name], str):
            raise UserError(f"{where}: {name} must be a string, got {json.dumps(fields[name])[:40]}")
    question, *others = (fields[name] for name in used)
    if used[0] == "instruction":
        question = instruction(question, *others[1:])
    row = Row("", question) if used[0] == "text" else Row(question, others[0])
    if not row.response.strip():
        kind = "text" if used[0] == "text" else "response"
        raise UserError(f"{where} has nothing to learn: its {kind} is empty")
    return row


def instruction(text: str, given: str = "") -> str:
    """The prompt made of an instruction and what it is to be applied to."""
    form = INSTRUCTION_WITH_INPUT if given.strip() else INSTRUCTION
    return form.format(instruction=text, input=given)
