"""`python -m port_torch.convert RUN OUT`: a checkpoint as a folder that transformers, vLLM and others read.

What the command does is in port_torch/conversion.py, which is imported once it is known that it can be done.
"""

import dataclasses
import re
from pathlib import Path
from typing import Annotated, Literal

import tyro

from core import cli
from core.checkpoint.manifest import load_manifest
from core.checkpoint.steps import find_step
from core.errors import UserError, run_command
from core.extras import require_peft
from core.folder_kinds import Kind, require_kind
from core.folders import require_new
from core.hub_models import REPOSITORY, is_hub_name

SIZE = re.compile(r"[0-9]+(\.[0-9]+)?\s*[KMGT]B", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class ConvertConfig:
    """Turn a checkpoint into a Hugging Face folder, and prove that it computes the same."""

    checkpoint: Annotated[Path, tyro.conf.Positional]
    """A run folder (its newest checkpoint), or one checkpoint."""
    out: Annotated[Path, tyro.conf.Positional]
    """The folder to write; it must not exist."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type of the weights in the folder."""
    max_shard_size: str = "5GB"
    """Split the weights into files of at most this size."""
    adapter_for: Path | None = None
    """Of a LoRA run: write its adapters alone, as peft opens them on this folder, which is the export of the
    model that the run began with, or hf:OWNER/NAME[@REVISION]. Default: the whole model, adapters merged."""
    tokenizer: str | None = None
    """The checkpoint's tokenizer.json, where neither the run nor its old path has it."""
    push_to_hub: str | None = None
    """Upload the folder to this repository of the Hugging Face Hub (`user/name`) as well."""
    private: bool = False
    """With --push-to-hub: as a private repository."""
    dry_run: bool = False
    """With --push-to-hub: upload nothing, list what would be."""


def main() -> int:
    """Runs the command."""
    config = cli.parse(ConvertConfig, prog="python -m port_torch.convert")
    check(config)
    step_dir = find_step(config.checkpoint)
    if config.adapter_for is not None:
        check_adapters(config, config.adapter_for, step_dir)
    from port_torch.conversion import convert  # slow: JAX, PyTorch and transformers

    convert(config, step_dir)
    return 0


def check(config: ConvertConfig) -> None:
    """Refuses what cannot be done before anything is read."""
    require_kind(config.checkpoint, "convert", Kind.CHECKPOINT)
    require_new(config.out)
    if config.dry_run and not config.push_to_hub:
        raise UserError("--dry-run says what would be uploaded: give --push-to-hub user/name with it")
    if config.push_to_hub and not re.fullmatch(REPOSITORY, config.push_to_hub, re.ASCII):
        raise UserError(f"--push-to-hub {config.push_to_hub!r} is no name on the Hub: give user/name")
    if config.private and not config.push_to_hub:
        raise UserError("--private is about the upload: give --push-to-hub user/name with it")
    if not SIZE.fullmatch(config.max_shard_size):
        raise UserError(
            f"--max-shard-size {config.max_shard_size!r} is not a size: give one like 500MB or 5GB"
        )


def check_adapters(config: ConvertConfig, base: Path, step_dir: Path) -> None:
    """Refuses --adapter-for where there are no adapters, or no base that they could be for."""
    manifest = load_manifest(step_dir)
    if not any(path.startswith("adapters/") for path in manifest.tree):
        raise UserError(f"{step_dir} holds no adapters: leave --adapter-for out, to convert the whole model")
    if not is_hub_name(base) and not base.exists():
        made = cli.command("port_torch.convert", manifest.config["run"]["init_from"], base)
        raise UserError(f"{base} is not there: make it with `{made}`, of what the adapters were trained on")
    require_kind(base, "start", Kind.WEIGHTS)
    if (config.dtype, config.max_shard_size) != (ConvertConfig.dtype, ConvertConfig.max_shard_size):
        raise UserError("--dtype and --max-shard-size are not for adapters, which are one file of float32")
    if config.push_to_hub and not is_hub_name(base):
        raise UserError(
            f"adapters name their base, and {base} is a folder of this machine: upload that first, and give "
            "it as --adapter-for hf:OWNER/NAME"
        )
    require_peft()


if __name__ == "__main__":
    run_command(main)
