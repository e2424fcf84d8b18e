"""`python -m port_torch.gguf FOLDER OUT --type q8_0`: an exported folder as one GGUF file, for llama.cpp.

What the command does is in port_torch/gguf_file.py, which is imported once it is known that it can be done.
"""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import tyro

from core import cli
from core.errors import UserError, run_command
from core.extras import require_package
from core.folder_kinds import Kind, require_kind
from core.folders import require_place
from core.hub_models import local


@dataclasses.dataclass(frozen=True)
class GgufConfig:
    """Turn an exported folder of a Llama, Qwen2 or Qwen3 into one GGUF file for llama.cpp."""

    folder: Annotated[Path, tyro.conf.Positional]
    """A folder that port_torch.convert or port_torch.finetune wrote, or a Hugging Face Llama's, Qwen2's or
    Qwen3's; or hf:OWNER/NAME[@REVISION], a model on the Hugging Face Hub."""
    out: Annotated[Path, tyro.conf.Positional]
    """The file to write, such as model.gguf."""
    type: Literal["f32", "f16", "bf16", "q8_0"] = "f16"
    """Type of the matrices; norms and biases are float32. q8_0: 8 bits per weight, and a scale for every
    32."""
    tokenizer: str | None = None
    """mistral or a path to a tokenizer.json. Default: the folder's own."""
    overwrite: bool = False
    """Replace the file if it is there."""


def main() -> int:
    """Runs the command."""
    config = cli.parse(GgufConfig, prog="python -m port_torch.gguf")
    check(config)
    config = dataclasses.replace(config, folder=local(config.folder))
    from port_torch.gguf_file import write_gguf  # slow: PyTorch

    write_gguf(config)
    return 0


def check(config: GgufConfig) -> None:
    """Refuses what cannot be done before anything is read."""
    require_kind(config.folder, "gguf", Kind.WEIGHTS)
    folder, out = config.folder.absolute(), config.out.absolute()
    if config.out.is_dir():
        raise UserError(
            f"{config.out} is a folder: name the file to write, such as {config.out / 'model.gguf'}"
        )
    if folder in out.parents:
        raise UserError(f"{config.out} lies in the folder that is read: name a file outside of it")
    if (config.out.exists() or config.out.is_symlink()) and not config.overwrite:
        raise UserError(f"{config.out} exists already: name another file, or replace it with --overwrite")
    require_place(out.parent)
    require_package("gguf", "writing GGUF needs the package gguf")


if __name__ == "__main__":
    run_command(main)
