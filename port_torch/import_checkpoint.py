"""`python -m port_torch.import_checkpoint SOURCE OUT`: a checkpoint of weights from elsewhere.

What it writes holds parameters alone; `python -m train_tpu.run --init-from OUT` trains on from them.
What the command does is in port_torch/importing.py, which is imported once it is known that it can be done.
"""

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro

from core import checks, cli
from core.checkpoint.steps import run_folder
from core.errors import UserError, run_command
from core.folder_kinds import Kind, kind_of, require_kind
from core.folders import require_new
from core.hub_models import local


@dataclasses.dataclass(frozen=True)
class ImportConfig:
    """Import weights as an MTLM checkpoint: an exported folder, a Hugging Face Llama, or an original MTLM1
    (.pt) or MTLM2 (Orbax) checkpoint."""

    source: Annotated[Path, tyro.conf.Positional]
    """The folder or file to import, or hf:OWNER/NAME[@REVISION], a model on the Hugging Face Hub."""
    out: Annotated[Path, tyro.conf.Positional]
    """The checkpoint to write; it must not exist."""
    tokenizer: str | None = None
    """mistral, bytes or a path to a tokenizer.json (,bos=TOKEN,eos=TOKEN: see train_tpu.prepare). Default:
    the folder's own; mistral where it has none."""
    n_heads: int | None = None
    """Attention heads of an original MTLM1, which its file does not record. Default: heads of 64 elements."""
    context: int | None = None
    """Longest sequence of an original MTLM1, which its file does not record. Default: 1024."""

    def __post_init__(self) -> None:
        checks.counts(**checks.fields(self, "n_heads", "context"))


def main() -> int:
    """Runs the command."""
    config = cli.parse(ImportConfig, prog="python -m port_torch.import_checkpoint")
    check(config)
    config = dataclasses.replace(config, source=local(config.source))
    from port_torch.importing import import_weights  # slow: JAX and PyTorch

    import_weights(config)
    return 0


def check(config: ImportConfig) -> None:
    """Refuses what cannot be done before anything is read."""
    require_new(config.out)
    run = run_folder(config.out)
    if run != config.out and kind_of(run) in (Kind.CHECKPOINT, Kind.ADAPTERS):
        raise UserError(
            f"{config.out} lies among the checkpoints of the run {run}, which would take it for one of its "
            "own: choose another folder"
        )
    require_kind(config.source, "import", Kind.WEIGHTS)


if __name__ == "__main__":
    run_command(main)
