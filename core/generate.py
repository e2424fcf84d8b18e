"""`python -m core.generate RUN --prompt "..."`: text from a trained model.

core/generation.py does it; it is imported once it is known that it can be done.
"""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import tyro

from core import checks, cli
from core.batch_file import BatchFile
from core.chat import require_template
from core.checkpoint.manifest import load_manifest
from core.checkpoint.steps import find_step
from core.conversation import ConversationOptions
from core.errors import UserError, run_command
from core.folder_kinds import Kind, require_kind
from core.sampling import GENERATION_OPTIONS, Sampling, piped_prompt

OPTIONS = GENERATION_OPTIONS | {"a conversation": ("chat", "system", "template")}


@dataclasses.dataclass(frozen=True)
class GenerateConfig:
    """Generate text with a trained model."""

    run: Annotated[Path, tyro.conf.Positional]
    """A run folder, or one checkpoint in it."""
    prompt: Annotated[list[str], tyro.conf.UseAppendAction] = dataclasses.field(default_factory=list)
    """Prompt to continue; repeat the option for several. Default: read from stdin, else empty (the
    beginning of a document)."""
    files: BatchFile = BatchFile()
    max_new_tokens: int = 200
    """Most tokens to generate; a text that reaches its end is shorter."""
    sampling: Sampling = Sampling()
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Activation dtype. auto: bfloat16 on GPU and TPU, float32 on CPU."""
    tokenizer: str | None = None
    """The run's tokenizer.json, where neither the run nor its old path has it."""
    chat: bool = False
    """Converse: every line typed or piped in is a turn, which the model answers; /help lists the commands."""
    conversation: ConversationOptions = ConversationOptions()

    def __post_init__(self) -> None:
        checks.counts(max_new_tokens=self.max_new_tokens)
        if self.chat and self.prompt:
            raise UserError("--chat reads its questions line by line: leave --prompt out")
        if not self.chat and self.conversation != ConversationOptions():
            raise UserError("--system and --template are for conversations: give --chat with them")


def main() -> int:
    """The command; 130 when Ctrl-C cut a file of prompts short, after what was done is written, or came
    between two turns."""
    config = cli.parse(GenerateConfig, prog="python -m core.generate", groups=OPTIONS)
    require_kind(config.run, "chat" if config.chat else "generate", Kind.CHECKPOINT)
    step_dir = find_step(config.run)
    if config.chat:
        lines, questions = config.files.questions()
        own = load_manifest(step_dir).chat_template
        template = require_template(own, config.conversation.template, config.run)
        from core.generation import chat  # slow: JAX

        return chat(config, lines, questions, template)
    lines = config.files.read(config.prompt)
    texts = [line["prompt"] for line in lines] if lines else config.prompt or [piped_prompt() or ""]
    from core.generation import generate  # slow: JAX

    return generate(config, lines, texts)


if __name__ == "__main__":
    run_command(main)
