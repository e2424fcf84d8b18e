"""What the card and the end of a run say of a model tuned on rows of a form."""

import shlex

from core.data.conversations import Conversation
from core.data.tuning_rows import INSTRUCTION_WITH_INPUT, Row, instruction
from port_torch.card import Tuning

LONGEST_EXAMPLE = 200  # characters of a prompt that is shown as an example
EXAMPLE = "Name three colours."


def tuning(form: str, example: Row | Conversation) -> Tuning:
    """What is told of a model tuned on rows of that form.

    example: one of the rows, whose prompt is shown if it is short.
    """
    if isinstance(example, Conversation):
        return Tuning(
            "It was fine-tuned to converse.", EXAMPLE,
            "It was tuned on conversations, written by the chat template that lies with its tokenizer "
            "(`tokenizer.apply_chat_template`). MTLM does that itself: `python -m port_torch.chat FOLDER`.",
            "",
        )  # fmt: skip
    end = "An answer ends with `</s>`, at which `generate` stops."
    if form == "text":
        return Tuning(
            "It was fine-tuned on further text, which it continues.", "The",
            "It was tuned on whole texts, without a format for questions.", "--prompt The",
        )  # fmt: skip
    if form == "prompt":
        prompt = example.prompt if 0 < len(example.prompt) <= LONGEST_EXAMPLE else "PROMPT"
        return Tuning(
            "It was fine-tuned to answer prompts.", prompt,
            f"It was tuned on prompts as they stand, each followed by its response. {end}",
            f"--prompt {shell_quoted(prompt)}",
        )  # fmt: skip
    shown = INSTRUCTION_WITH_INPUT.format(instruction="{instruction}", input="{input}").rstrip("\n")
    arguments = f"--prompt-format instruction --prompt {shell_quoted(EXAMPLE)}"
    return Tuning(
        "It was fine-tuned to follow instructions.", instruction(EXAMPLE),
        "An instruction is put into this form, a line feed at its end; `### Input:` and its line are left "
        f"out where there is none:\n\n```\n{shown}\n```\n\nMTLM does that itself: "
        f"`python -m port_torch.generate FOLDER {arguments}`, or without `--prompt` to type one instruction "
        f"after the other. {end}",
        arguments,
    )  # fmt: skip


def shell_quoted(text: str) -> str:
    """The text as one word of a bash command line, on one line."""
    if text.isprintable():
        return shlex.quote(text)
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return "$'" + "".join(c if c.isprintable() else _escape(c) for c in escaped) + "'"


def _escape(character: str) -> str:
    """A character as bash writes it in $'...'."""
    known = {"\n": "\\n", "\t": "\\t", "\r": "\\r"}
    return known.get(character) or f"\\U{ord(character):08x}"
