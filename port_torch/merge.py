"""`python -m port_torch.merge ADAPTER OUT`: a LoRA adapter and its base as one folder of weights.

The adapter is one that port_torch.finetune, peft or TRL saved. What the command does is in merging.py.
"""

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro

from core import cli
from core.errors import UserError, run_command
from core.extras import require_peft
from core.folder_kinds import ADAPTER_CONFIG, Kind, kind_of
from core.folders import require_new


@dataclasses.dataclass(frozen=True)
class MergeConfig:
    """Merge a LoRA adapter into its base model, and prove that the result computes the same."""

    adapter: Annotated[Path, tyro.conf.Positional]
    """A folder with adapter_config.json, such as a LoRA run's `adapter`."""
    out: Annotated[Path, tyro.conf.Positional]
    """The folder to write; it must not exist."""
    base: Path | None = None
    """The folder that the adapter was trained on, or hf:OWNER/NAME[@REVISION]. Default: the one that the
    adapter names."""
    tokenizer: str | None = None
    """mistral, bytes or a path to a tokenizer.json. Default: the adapter's own, else the base's."""


def main() -> int:
    """Runs the command."""
    config = cli.parse(MergeConfig, prog="python -m port_torch.merge")
    if config.adapter.exists() and kind_of(config.adapter) is not Kind.ADAPTER:
        raise UserError(
            f"{config.adapter} is no LoRA adapter (it has no {ADAPTER_CONFIG}): give the folder `adapter` of "
            "a LoRA run, or one that peft saved"
        )
    require_new(config.out)
    require_peft()
    from port_torch.merging import merge  # slow: PyTorch and transformers

    merge(config.adapter, config.out, config.base, config.tokenizer)
    return 0


if __name__ == "__main__":
    run_command(main)
