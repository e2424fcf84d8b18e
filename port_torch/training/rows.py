"""Rows of a JSONL file as tokens: a text, or a prompt with the response that is to be learned.

    {"text": "..."}                                             all of it is learned
    {"prompt": "...", "response": "..."}                        the prompt as it stands, then the response
    {"instruction": "...", "input": "...", "output": "..."}     put into `INSTRUCTION`; input may be missing,
                                                                and output be called response

Every row is `<s>` prompt response `</s>`; the response and its end are learned, of a text everything. Prompt
and response are encoded apart, so that their border is where it is when the model answers.
"""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from core.errors import UserError
from core.loss import IGNORE
from core.text import read_json_lines
from core.tokenizer import Tokenizer
from port_torch.card import Tuning

INSTRUCTION = "### Instruction:\n{instruction}\n\n### Response:\n"
INSTRUCTION_WITH_INPUT = "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
FORMS = 'give {"text"}, {"prompt", "response"} or {"instruction", "input", "output"}'


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


class Example(NamedTuple):
    """A row, or a piece of a long text, as what the model is given and what it is to predict."""

    tokens: np.ndarray
    """int32 [n]."""
    targets: np.ndarray
    """int32 [n]: the next id, -1 where it is the prompt's."""
    n_bytes: int
    """Length of what is learned, in UTF-8."""


def read_rows(path: Path) -> RowFile:
    """The rows of a JSONL file; a UserError names the line that is none, or is of another form."""
    rows, form = [], ""
    for where, fields in read_json_lines(path):
        kind, row = _read_row(fields, where)
        form = form or kind
        if kind != form:
            raise UserError(f"{where} is a row of {kind!r}, and those before are of {form!r}: give one form")
        rows.append(row)
    if not rows:
        raise UserError(f"{path} is empty: {FORMS} a line")
    return RowFile(rows, form, hashlib.sha256(path.read_bytes()).hexdigest())


def _read_row(fields: Any, where: str) -> tuple[str, Row]:
    """(form, row) of one line."""
    if not isinstance(fields, dict):
        raise UserError(f"{where} is no JSON object: {FORMS}")

    def text(name: str) -> str:
        value = fields[name]
        if not isinstance(value, str):
            raise UserError(f"{where}: {name} is no text but {json.dumps(value)[:40]}")
        return value

    if "text" in fields:
        form, row = "text", Row("", text("text"))
    elif {"prompt", "response"} <= fields.keys():
        form, row = "prompt", Row(text("prompt"), text("response"))
    elif "instruction" in fields and {"output", "response"} & fields.keys():
        answer = text("output" if "output" in fields else "response")
        given = text("input") if "input" in fields else ""
        form, row = "instruction", Row(instruction(text("instruction"), given), answer)
    else:
        raise UserError(f"{where} has the fields {', '.join(sorted(fields)) or 'none'}: {FORMS}")
    if not row.response.strip():
        raise UserError(
            f"{where} has nothing to learn: its {'text' if form == 'text' else 'response'} is empty"
        )
    return form, row


def instruction(text: str, given: str = "") -> str:
    """The prompt made of an instruction and what it is to be applied to."""
    form = INSTRUCTION_WITH_INPUT if given.strip() else INSTRUCTION
    return form.format(instruction=text, input=given)


def examples_of(row: Row, tokenizer: Tokenizer, context: int) -> list[Example]:
    """The row's examples: one; for a long text several, each of at most `context` places; none where a prompt
    with its response is longer, since cutting it would teach answers without an end."""
    prompt = tokenizer.begin(row.prompt)
    response = [*map(int, tokenizer.encode(row.response)), tokenizer.eos]
    ids = np.array(prompt + response, np.int32)
    n_bytes = len(row.response.encode())
    tokens, targets = ids[:-1], ids[1:].copy()
    targets[: len(prompt) - 1] = IGNORE
    if len(tokens) <= context:
        return [Example(tokens, targets, n_bytes)]
    if row.prompt:
        return []
    cuts = range(0, len(tokens), context)
    pieces = [(tokens[i : i + context], targets[i : i + context]) for i in cuts]
    # The bytes of a piece are not known apart; only their sum over all pieces is used.
    return [Example(*piece, n_bytes if i == 0 else 0) for i, piece in enumerate(pieces)]


def tuning(form: str) -> Tuning:
    """What the card says of a model tuned on rows of a form."""
    end = "An answer ends with `</s>`, at which `generate` stops."
    if form == "text":
        return Tuning(
            "It was fine-tuned on further text, which it continues.", "The",
            "It was tuned on whole texts, without a format for questions.",
        )  # fmt: skip
    if form == "prompt":
        return Tuning(
            "It was fine-tuned to answer prompts.", "PROMPT",
            f"It was tuned on prompts as they stand, each followed by its response. {end}",
        )  # fmt: skip
    shown = INSTRUCTION_WITH_INPUT.format(instruction="{instruction}", input="{input}").rstrip("\n")
    return Tuning(
        "It was fine-tuned to follow instructions.", instruction("Name three colours."),
        "An instruction is put into this form, a line feed at its end; `### Input:` and its line are left "
        f"out where there is none:\n\n```\n{shown}\n```\n\n{end}",
    )  # fmt: skip
