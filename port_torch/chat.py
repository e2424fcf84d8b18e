"""A conversation with a folder's model: `python -m port_torch.chat FOLDER`.

Turns are typed, piped in line by line, or read from a file of rows (core/conversation.py). PyTorch is
imported when it is known how the model is to be asked.
"""

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro

from core import checks, cli
from core.batch_file import BatchFile, generation_settings
from core.chat import folder_template, open_template, require_template
from core.conversation import Answers, ConversationOptions, Session, answer_file, converse
from core.errors import run_command
from core.folder_kinds import Kind, require_kind
from core.hub_models import local
from core.sampling import GENERATION_OPTIONS, Sampling
from port_torch.decoding import Decoding

OPTIONS = GENERATION_OPTIONS | {"options": ("system", "template", *GENERATION_OPTIONS["options"])}


@dataclasses.dataclass(frozen=True)
class ChatConfig:
    """Converse with an exported model, or a compatible one of Hugging Face.

    Every line is a turn, and the model answers it; /help lists the commands. Piped lines are answered one
    after the other."""

    folder: Annotated[Path, tyro.conf.Positional]
    """A folder whose tokenizer has a chat template, such as port_torch.finetune makes of conversations; or
    hf:OWNER/NAME[@REVISION], a model on the Hugging Face Hub."""
    conversation: ConversationOptions = ConversationOptions()
    max_new_tokens: int = 200
    """Most tokens of an answer."""
    sampling: Sampling = Sampling()
    files: BatchFile = BatchFile()
    decoding: Decoding = Decoding()

    def __post_init__(self) -> None:
        checks.counts(max_new_tokens=self.max_new_tokens)


def main() -> int:
    """The command; 130 when Ctrl-C came at the prompt, or cut a file of questions short."""
    config = cli.parse(ChatConfig, prog="python -m port_torch.chat", groups=OPTIONS)
    lines, questions = config.files.questions()
    require_kind(config.folder, "chat", Kind.WEIGHTS)
    folder = local(config.folder)
    template = require_template(folder_template(folder), config.conversation.template, config.folder)
    from port_torch.sampling import open_writer  # slow: PyTorch

    writer = open_writer(folder, config.sampling, config.max_new_tokens, config.decoding)
    chat = open_template(writer.tokenizer, template)
    answers = Answers(chat, writer.model.config.context, config.max_new_tokens, writer.stream)
    session = Session(answers, config.conversation.system)
    if not lines:
        return converse(session, writer.about())
    settings = generation_settings(
        config.sampling, config.max_new_tokens, writer.tokenizer, writer.identity(), **writer.computed()
    )
    return answer_file(session, config.files, lines, questions, settings)


if __name__ == "__main__":
    run_command(main)
