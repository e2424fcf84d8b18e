"""What the card and the end of a command say of a model that was tuned on rows, in either engine."""

from pathlib import Path
from typing import Any, NamedTuple

from core.checkpoint.manifest import NEW_RUN, Manifest
from core.cli import command, shell_quoted
from core.data.tuning_rows import CHAT, INSTRUCTION_WITH_INPUT, instruction

EXAMPLE = "Name three colours."


class Tuning(NamedTuple):
    """What is told of a fine-tuned model."""

    what: str
    """One sentence: what it was tuned to do."""
    prompt: str
    """An example of what it is given."""
    format: str
    """How that is put together."""
    arguments: str
    """Of port_torch.generate, to try it: as they are typed in a shell."""


def tuned_in(manifest: Manifest) -> dict[str, Any] | None:
    """The entry of the lineage by which a model was tuned on rows; None if its training ended otherwise."""
    begun = [entry for entry in manifest.lineage if entry["operation"] in NEW_RUN]
    return begun[-1] if begun and begun[-1]["operation"] == "finetune" else None


def converses(manifest: Manifest) -> bool:
    """Whether a model is asked by its chat template, rather than by a prompt as it stands."""
    form = (tuned_in(manifest) or {}).get("form", CHAT)  # older runs did not record it
    return manifest.chat_template is not None and form == CHAT


def tuning(manifest: Manifest) -> Tuning | None:
    """What is told of a model by its lineage; None if it was not tuned on rows."""
    entry = tuned_in(manifest)
    if entry is None:
        return None
    form = entry.get("form")
    if converses(manifest):
        return Tuning(
            "It was fine-tuned to converse.", EXAMPLE,
            "It was tuned on conversations, written by the chat template that lies with its tokenizer "
            "(`tokenizer.apply_chat_template`). MTLM does that itself: `python -m port_torch.chat FOLDER`.",
            "",
        )  # fmt: skip
    if form == "text":
        return Tuning(
            "It was fine-tuned on further text, which it continues.", "The",
            "It was tuned on whole texts, without a format for questions.", "--prompt The",
        )  # fmt: skip
    if form == "prompt":
        prompt = entry.get("example") or "PROMPT"
        return Tuning(
            "It was fine-tuned to answer prompts.", prompt,
            "It was tuned on prompts as they stand, each followed by its response.",
            f"--prompt {shell_quoted(prompt)}",
        )  # fmt: skip
    if form != "instruction":  # an older run, which did not record it
        return Tuning("It was fine-tuned on rows.", "PROMPT", "", "--prompt PROMPT")
    shown = INSTRUCTION_WITH_INPUT.format(instruction="{instruction}", input="{input}").rstrip("\n")
    arguments = f"--prompt-format instruction --prompt {shell_quoted(EXAMPLE)}"
    return Tuning(
        "It was fine-tuned to follow instructions.", instruction(EXAMPLE),
        "An instruction is put into this form, a line feed at its end; `### Input:` and its line are left "
        f"out where there is none:\n\n```\n{shown}\n```\n\nMTLM does that itself: "
        f"`python -m port_torch.generate FOLDER {arguments}`, or without `--prompt` to type one instruction "
        "after the other.",
        arguments,
    )  # fmt: skip


def command_to_try(folder: Path, manifest: Manifest) -> str:
    """What one types to ask the model in a folder."""
    if converses(manifest):
        return command("port_torch.chat", folder)
    tuned = tuning(manifest)
    return f"{command('port_torch.generate', folder)} {tuned.arguments if tuned else '--prompt The'}"
