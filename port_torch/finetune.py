"""`python -m port_torch.finetune FOLDER --data FILE.jsonl --out DIR`: a folder's model trained on rows.

Rows are texts, prompts with responses, or conversations, of which only what answers is learned
(core/data/tuning_rows.py); they are packed without seeing each other (core/data/row_packing.py). All weights
are trained, or LoRA adapters, which are merged into the result. What the command does is in
training/finetuning.py, imported after the rows have been read.
"""

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro

from core import cli
from core.errors import run_command
from core.folder_kinds import Kind, require_kind
from core.hub_models import pinned
from core.run.tuning import OPTIMIZER, TUNING_OPTIONS, TuningSource, open_rows
from port_torch.training.settings import MirrorOptimizerConfig, TrainerConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinetuneConfig(TuningSource, TrainerConfig):
    """Fine-tune an exported model on rows of text, or of prompts and responses; the same command resumes."""

    compiled_by_default = False  # what it takes, a run of minutes never earns back

    init_from: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")]
    """The exported folder to start from, or a compatible Hugging Face Llama's; or hf:OWNER/NAME[@REVISION], a
    model on the Hugging Face Hub."""
    out: Path
    """The run folder. The model is written into its folder `model`."""
    optim: MirrorOptimizerConfig = MirrorOptimizerConfig(**OPTIMIZER)
    compile: bool | None = None
    """Use torch.compile: some 20 s before the first update, for updates that take 1 to 4% less time (H200,
    CUDA kernels, all weights trained; with LoRA not measured). Default: no."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_tuning()


def main() -> int:
    """Runs the command; core.run.interrupt says what its exit codes mean."""
    config = cli.parse(FinetuneConfig, prog="python -m port_torch.finetune", groups=TUNING_OPTIONS)
    require_kind(config.init_from, "start", Kind.WEIGHTS)
    file = open_rows(config)
    config = dataclasses.replace(config, init_from=pinned(config.init_from))
    from port_torch.training.finetuning import run  # slow: PyTorch, which a malformed row does not wait for

    return run(config, file)


if __name__ == "__main__":
    run_command(main)
