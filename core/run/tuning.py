"""Fine-tuning on the rows of a file, in either engine: its settings, and what is checked first.

Rows are texts, prompts with responses, or conversations, of which only what answers is learned
(core/data/tuning_rows.py). What is made of them is in core/run/tuning_data.py.
"""

import dataclasses
from pathlib import Path
from typing import Any

from core import checks
from core.data.tuning_rows import CHAT, RowFile, read_rows
from core.errors import UserError
from core.lora import LoraConfig
from core.run.folder import begun_record, command_of, require_folder
from core.run.help import TRAINING_OPTIONS
from core.run.other_engine import engine_of

TUNING_OPTIONS = TRAINING_OPTIONS | {"options": ("data", "out", "epochs", "batch", "lr", "lora_rank")}
OPTIMIZER: dict[str, Any] = {
    "optimizer": "adamw",
    "lr": 1e-4,
    "schedule": "cosine",
    "warmup": 10,
    "weight_decay": 0.0,
}
"""The optimizer's settings where nothing is said."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TuningSource:
    """The rows that a run is tuned on, and what of the model learns them. Each command has the model, as
    `init_from`, and an optimizer, as `optim`."""

    data: Path
    """A JSONL file: rows {"text"}, {"prompt", "response"}, {"instruction", "input", "output"} or
    {"messages"}; only responses and the assistant's turns are learned. Dolly's `context` is an input; a
    response may be called `completion`, messages `conversations` (ShareGPT's)."""
    out: Path
    chat: bool = False
    """Make conversations of prompts and instructions, too: each the user's turn, its response the answer."""
    template: str | None = None
    """How conversations are written: chatml, plain (no new tokens) or the path of a Jinja file. Default: the
    model's own template, else chatml."""
    validation: float = 0.05
    """Fraction of the rows held out for validation; 0 for none."""
    lora: LoraConfig = LoraConfig()
    tokenizer: str | None = None
    """mistral, bytes or a path to a tokenizer.json. Default: the model's own."""
    epochs: float | None = None
    """Passes over the rows. Default: 3."""
    batch: int = 16
    """Global batch size: packed sequences per optimizer step, summed over devices."""
    prompts: tuple[str, ...] = ()
    """Prompts to sample from during training, put into the form of the rows. Default: prompts of held-out
    rows."""

    def check_tuning(self) -> None:
        """Raises a UserError for what is out of range. Each command's settings call it once made."""
        checks.below_one(validation=self.validation)
        if self.lora.lora_rank is not None and self.optim.optimizer == "muon":
            raise UserError(
                "--optimizer muon is for the layers' matrices, not for adapters: leave it or --lora-rank out"
            )


def open_rows(config: Any) -> RowFile:
    """The rows of --data, for a run that can be written to --out.

    Raises:
        UserError: --out is no place for it, or has a run that pretrains or is of the other engine; a row is
            malformed; --template has no conversations to write, or cannot write them.
    """
    require_folder(config.out)
    old = begun_record(config.out)
    if old and ("preset" in old["run"] or engine_of(old["run"]) != config.engine):
        raise UserError(
            f"the run in {config.out} is of {command_of(old)}: resume it with that command, or give another "
            "--out"
        )
    file = read_rows(config.data, config.chat)
    if config.template is not None and file.form != CHAT:
        raise UserError("--template is for conversations: give rows of messages, or --chat with it")
    if config.template is not None:
        from core.chat import choose_template, require_usable  # slow: the tokenizers' library

        require_usable(choose_template(None, config.template))
    return file
