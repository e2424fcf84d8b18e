"""`python -m port_torch.finetune FOLDER --data FILE.jsonl --out DIR`: a folder's model trained on rows.

Rows are texts, prompts with responses, or conversations, of which only what answers is learned
(core/data/tuning_rows.py); they are packed without seeing each other (training/packing.py). All weights are
trained, or LoRA adapters, which are merged into the result. What the command does is in
training/finetuning.py, imported after the rows have been read.
"""

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro

from core import checks, cli
from core.data.tuning_rows import CHAT, read_rows
from core.errors import UserError, run_command
from core.folder_kinds import Kind, require_kind
from core.hub_models import pinned
from core.lora import LoraConfig
from core.run.folder import require_folder
from core.run.help import TRAINING_OPTIONS
from port_torch.training.settings import MirrorOptimizerConfig, TrainerConfig

OPTIONS = TRAINING_OPTIONS | {"options": ("data", "out", "epochs", "batch", "lr", "lora_rank")}


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinetuneConfig(TrainerConfig):
    """Fine-tune an exported model on rows of text, or of prompts and responses; the same command resumes."""

    init_from: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")]
    """The exported folder to start from, or a compatible Hugging Face Llama's; or hf:OWNER/NAME[@REVISION], a
    model on the Hugging Face Hub."""
    data: Path
    """A JSONL file: rows {"text"}, {"prompt", "response"}, {"instruction", "input", "output"} or
    {"messages"}; only responses and the assistant's turns are learned. Dolly's `context` is an input; a
    response may be called `completion`, messages `conversations` (ShareGPT's)."""
    out: Path
    """The run folder. The model is written into its folder `model`."""
    chat: bool = False
    """Make conversations of prompts and instructions, too: each the user's turn, its response the answer."""
    template: str | None = None
    """How conversations are written: chatml, plain (no new tokens) or the path of a Jinja file. Default: the
    folder's own template, else chatml."""
    validation: float = 0.05
    """Fraction of the rows held out for validation; 0 for none."""
    lora: LoraConfig = LoraConfig()
    tokenizer: str | None = None
    """mistral, bytes or a path to a tokenizer.json. Default: the folder's own."""
    epochs: float | None = None
    """Passes over the rows. Default: 3."""
    batch: int = 16
    """Global batch size: packed sequences per optimizer step, summed over GPUs."""
    optim: MirrorOptimizerConfig = MirrorOptimizerConfig(
        lr=1e-4, schedule="cosine", warmup=10, weight_decay=0.0
    )
    prompts: tuple[str, ...] = ()
    """Prompts to sample from during training, put into the form of the rows. Default: prompts of held-out
    rows."""

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.below_one(validation=self.validation)
        if self.lora.lora_rank is not None and self.optim.optimizer == "muon":
            raise UserError(
                "--optimizer muon is for the layers' matrices, not for adapters: leave it or --lora-rank out"
            )


def main() -> int:
    """Runs the command; core.run.interrupt says what its exit codes mean."""
    config = cli.parse(FinetuneConfig, prog="python -m port_torch.finetune", groups=OPTIONS)
    require_kind(config.init_from, "start", Kind.WEIGHTS)
    require_folder(config.out)
    file = read_rows(config.data, config.chat)
    if config.template is not None and file.form != CHAT:
        raise UserError("--template is for conversations: give rows of messages, or --chat with it")
    config = dataclasses.replace(config, init_from=pinned(config.init_from))
    from port_torch.training.finetuning import run  # slow: PyTorch, which a malformed row does not wait for

    return run(config, file)


if __name__ == "__main__":
    run_command(main)
