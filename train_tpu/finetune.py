"""`python -m train_tpu.finetune CHECKPOINT --data FILE.jsonl --out DIR`: a model trained on rows, in JAX.

Rows are texts, prompts with responses, or conversations, of which only what answers is learned
(core/data/tuning_rows.py); they are packed without seeing each other (core/data/row_packing.py). All weights
are trained, or LoRA adapters, which are merged into the result. port_torch.finetune does the same in PyTorch,
on the same sequences in the same order. It is done in tuning.py and trainer.py, imported once the rows have
been read.
"""

from core import cli
from core.errors import run_command
from core.folder_kinds import Kind, require_kind
from core.run.tuning import TUNING_OPTIONS, open_rows
from train_tpu.config import FinetuneConfig


def main() -> int:
    """Runs the command; core.run.interrupt says what its exit codes mean."""
    config = cli.parse(FinetuneConfig, prog="python -m train_tpu.finetune", groups=TUNING_OPTIONS)
    require_kind(config.init_from, "start", Kind.CHECKPOINT)
    file = open_rows(config)
    from core.processes import leaving_at_once  # slow: JAX, which a malformed row does not wait for
    from train_tpu.trainer import run
    from train_tpu.tuning import prepare_tuning

    with leaving_at_once():
        return run(prepare_tuning(config, file))


if __name__ == "__main__":
    run_command(main)
