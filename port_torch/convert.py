"""`python -m port_torch.convert RUN OUT`: a checkpoint as a folder that transformers, vLLM and others read.

main() is the whole course in order: checkpoint, reference logits, files, reading them back, renaming. The
folder is written under a hidden name; it gets its own when a model loaded from it computes what Flax does.
"""

import contextlib
import ctypes
import dataclasses
import gc
import re
import time
from pathlib import Path
from typing import Annotated, Literal

import jax
import tyro

from core import cli
from core.checkpoint import find_step, load_manifest, restore_params
from core.config import ModelConfig
from core.errors import UserError, run_command
from core.folder_kinds import Kind, require_kind
from core.folders import new_folder, require_new
from core.memory import peak_memory
from core.model import abstract_params
from core.steps import tokenizer_carriers
from core.tokenizer import load_tokenizer_of
from port_torch.card import held_out_scores, model_card
from port_torch.export import disk_errors, reader, write_rest, write_weights
from port_torch.hub import push
from port_torch.probe import compare, flax_logits, probe_tokens, require_finite, rounded

M_MMAP_THRESHOLD = -3  # of malloc.h
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
    """Above this the weights are split into several files."""
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
    started, memory_before = time.monotonic(), peak_memory()
    config = cli.parse(ConvertConfig, prog="python -m port_torch.convert")
    check(config)
    return_freed_memory()
    jax.config.update("jax_platforms", "cpu")  # where float32 is float32

    # 1. The checkpoint: verified, finite, its tokenizer the one named.
    require_kind(config.checkpoint, "convert", Kind.JAX)
    step_dir = find_step(config.checkpoint)
    manifest = load_manifest(step_dir)
    model = ModelConfig(**manifest.config["model"])
    carriers = tokenizer_carriers(step_dir)
    tokenizer = load_tokenizer_of(manifest.tokenizer, carriers, str(step_dir), config.tokenizer)
    params = restore_params(step_dir, abstract_params(model))
    require_finite(params, f"{step_dir}")

    # 2. What the folder must compute: the logits of the weights as they will be in it.
    tokens = probe_tokens(model, tokenizer.bos)
    if config.dtype != "float32":
        before = flax_logits(model, params, tokens)
        params = rounded(params, config.dtype)
        require_finite(params, f"{step_dir} in {config.dtype}")
    expected = flax_logits(model, params, tokens)
    if config.dtype != "float32":
        moved, largest = abs(expected - before).max(), abs(before).max()
        print(f"{config.dtype} weights move the logits by up to {moved:.1e} (they reach {largest:.1f})")

    # 3. The files. The parameters go out of memory when their file is there.
    with new_folder(config.out) as folder, disk_errors(config.out):
        folder.mkdir(parents=True)
        tree = write_weights(folder, model, reader(params), config.dtype, config.max_shard_size)
        del params
        gc.collect()
        scores = held_out_scores(step_dir, manifest.step)
        card = model_card(config.out.name, model, manifest, scores)
        entry = {"operation": "convert", "step": manifest.step, "dtype": config.dtype}
        exported = dataclasses.replace(manifest, lineage=[*manifest.lineage, entry], tree=tree)
        write_rest(folder, model, tokenizer, exported, config.dtype, card)

        # 4. Read back; what computes something else is removed.
        compare(folder, model, tokens, expected)

    # 5. In place.
    seconds, memory = time.monotonic() - started, peak_memory() - memory_before
    print(
        f"{config.out}: {model.n_params:,} parameters in {config.dtype}, written and checked in "
        f"{seconds:.1f} s with {memory / 1e6:,.0f} MB of memory at most (the weights in float32 are "
        f"{4 * model.n_params / 1e6:,.1f} MB)"
    )
    if config.push_to_hub:
        push(config.out, config.push_to_hub, config.private, config.dry_run)
    return 0


def check(config: ConvertConfig) -> None:
    """Refuses what cannot be done before anything is read."""
    require_new(config.out)
    if config.dry_run and not config.push_to_hub:
        raise UserError("--dry-run says what would be uploaded: give --push-to-hub user/name with it")
    if config.private and not config.push_to_hub:
        raise UserError("--private is about the upload: give --push-to-hub user/name with it")
    if not SIZE.fullmatch(config.max_shard_size):
        raise UserError(f"--max-shard-size {config.max_shard_size!r} is no size: give one like 500MB or 5GB")


def return_freed_memory() -> None:
    """Makes malloc return every freed block of 1 MB or more to the system.

    glibc keeps those of up to 32 MB for itself, as most tensors are: 0.5 GB and more of a 200M model.
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**20)


if __name__ == "__main__":
    run_command(main)
