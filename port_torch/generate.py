"""Text from a folder, with PyTorch: `python -m port_torch.generate FOLDER --prompt "..."`.

Prompts stream; without one a terminal asks for more and more of them; a file of prompts becomes a file of
texts (core/batch_file.py). PyTorch is imported when the prompts have been read.
"""

import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from core import checks, cli
from core.batch_file import BatchFile, generation_settings, write_texts
from core.data.tuning_rows import instruction
from core.errors import UserError, run_command
from core.folder_kinds import Kind, require_kind
from core.hub_models import local
from core.sampling import GENERATION_OPTIONS, Sampling, piped_prompt, require_room, typed_lines
from port_torch.decoding import Decoding

if TYPE_CHECKING:
    from port_torch.sampling import Writer


@dataclasses.dataclass(frozen=True)
class GenerateConfig:
    """Generate text with an exported model, or a compatible Hugging Face Llama."""

    folder: Annotated[Path, tyro.conf.Positional]
    """A folder that port_torch.convert wrote, or a Hugging Face Llama's; or hf:OWNER/NAME[@REVISION], a model
    on the Hugging Face Hub."""
    prompt: Annotated[list[str], tyro.conf.UseAppendAction] = dataclasses.field(default_factory=list)
    """Prompt to continue; repeat the option for several. Default: asked for on a terminal, else read from
    stdin, else empty (the beginning of a document)."""
    prompt_format: Literal["plain", "instruction"] = "plain"
    """instruction: puts every prompt into the form that rows of instructions have in port_torch.finetune."""
    input: str | None = None
    """The input that the instruction is applied to, with --prompt-format instruction."""
    files: BatchFile = BatchFile()
    max_new_tokens: int = 200
    """Most tokens to generate; a text that reaches its end is shorter."""
    sampling: Sampling = Sampling()
    decoding: Decoding = Decoding()

    def __post_init__(self) -> None:
        checks.counts(max_new_tokens=self.max_new_tokens)
        if self.input is not None and self.prompt_format == "plain":
            raise UserError("--input goes with --prompt-format instruction: give both, or neither")

    def formatted(self, prompt: str) -> str:
        """The prompt as the model was tuned on it."""
        return prompt if self.prompt_format == "plain" else instruction(prompt, self.input or "")


def main() -> int:
    """The command; 130 when Ctrl-C cut a file of prompts short, after what was done is written."""
    config = cli.parse(GenerateConfig, prog="python -m port_torch.generate", groups=GENERATION_OPTIONS)
    lines = config.files.read(config.prompt)
    asks = not lines and not config.prompt and sys.stdin is not None and sys.stdin.isatty()
    prompts = [line["prompt"] for line in lines] or config.prompt
    if not prompts and not asks:
        prompts = [piped_prompt() or ""]
    prompts = [config.formatted(prompt) for prompt in prompts]
    require_kind(config.folder, "generate", Kind.WEIGHTS)
    folder = local(config.folder)
    from port_torch.sampling import open_writer  # slow: PyTorch, which a malformed line does not wait for

    writer = open_writer(folder, config.sampling, config.max_new_tokens, config.decoding)
    if asks:
        return converse(writer, config)
    tokens = [writer.tokenizer.begin(prompt) for prompt in prompts]
    require_room(tokens, writer.model.config.context)
    if not lines:
        writer.print(prompts)
        return 0
    settings = generation_settings(
        config.sampling, config.max_new_tokens, writer.tokenizer, writer.identity(), input=config.input,
        prompt_format=config.prompt_format, **writer.computed(),
    )  # fmt: skip
    return write_texts(config.files.out, lines, tokens, config.files.batch, settings, writer.added)


def converse(writer: "Writer", config: GenerateConfig) -> int:
    """Asks for text to continue until Ctrl-D, and begins anew with each. Ctrl-C stops a text."""
    what = "an instruction" if config.prompt_format == "instruction" else "text to continue"
    print(f"{what} (Ctrl-C stops a text, Ctrl-D ends):", file=sys.stderr)
    try:
        for number, text in enumerate(typed_lines()):
            try:
                writer.print([config.formatted(text)], number)
            except KeyboardInterrupt:
                print()
            except UserError as error:  # a text too long, say: the next may do
                print(f"error: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        print()
    return 0


if __name__ == "__main__":
    run_command(main)
