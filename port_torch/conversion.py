"""A checkpoint as a folder for transformers, proved by its logits: what port_torch.convert does."""

import contextlib
import ctypes
import dataclasses
import gc
import time
from pathlib import Path
from typing import TYPE_CHECKING

import jax

from core.checkpoint.checkpointer import restore_params
from core.checkpoint.manifest import load_manifest
from core.checkpoint.steps import tokenizer_carriers
from core.config import ModelConfig
from core.folders import new_folder
from core.memory import peak_memory
from core.model import abstract_params
from core.tokenizer import load_tokenizer_of
from port_torch.adapter_conversion import convert_adapters
from port_torch.card import held_out_scores, model_card
from port_torch.export import disk_errors, reader, write_rest, write_weights
from port_torch.flax_parity import flax_logits, require_finite, rounded
from port_torch.hub import push
from port_torch.parity import compare, probe_tokens
from port_torch.tuned import command_to_try

if TYPE_CHECKING:
    from port_torch.convert import ConvertConfig

M_MMAP_THRESHOLD = -3  # of malloc.h


def convert(config: "ConvertConfig", step_dir: Path) -> None:
    """Converts one checkpoint, in order: reference logits, files, reading them back, renaming.

    The folder is written under a hidden name; it gets its own when a model loaded from it computes what Flax
    does.

    Args:
        config: the command's settings, checked.
        step_dir: the checkpoint.

    Raises:
        UserError: the checkpoint is damaged or not finite, or the folder does not compute the same.
    """
    started, memory_before = time.monotonic(), peak_memory()
    return_freed_memory()
    jax.config.update("jax_platforms", "cpu")  # where float32 is float32

    # 1. The checkpoint: verified, finite, its tokenizer the one named.
    manifest = load_manifest(step_dir)
    model = ModelConfig(**manifest.config["model"])
    carriers = tokenizer_carriers(step_dir)
    tokenizer = load_tokenizer_of(manifest.tokenizer, carriers, str(step_dir), config.tokenizer)
    params = restore_params(step_dir, abstract_params(model))
    require_finite(params, f"{step_dir}")
    if config.adapter_for is not None:
        convert_adapters(config.out, config.adapter_for, step_dir, manifest, params, tokenizer)
        if config.push_to_hub:
            push(config.out, config.push_to_hub, config.private, config.dry_run)
        return

    # 2. What the folder must compute: the logits of the weights as they will be in it.
    tokens = probe_tokens(model, tokenizer.prefix)
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
        card = model_card(config.out.name, model, manifest, scores, tokenizer)
        entry = {"operation": "convert", "step": manifest.step, "dtype": config.dtype}
        exported = dataclasses.replace(manifest, lineage=[*manifest.lineage, entry], tree=tree)
        write_rest(folder, model, tokenizer, exported, config.dtype, card)

        # 4. Read back; what computes something else is removed.
        compare(folder, model, tokens, expected)

    # 5. In place.
    seconds, memory = time.monotonic() - started, peak_memory() - memory_before
    print(
        f"wrote and checked {config.out}: {model.n_params:,} parameters, {config.dtype}, {seconds:.1f} s, "
        f"{memory / 1e6:,.0f} MB peak memory (the float32 weights: {4 * model.n_params / 1e6:,.1f} MB)"
    )
    print(f"next: {command_to_try(config.out, manifest)}")
    if config.push_to_hub:
        push(config.out, config.push_to_hub, config.private, config.dry_run)


def return_freed_memory() -> None:
    """Makes malloc return every freed block of 1 MB or more to the system.

    glibc keeps those of up to 32 MB for itself, as most tensors are: 0.5 GB and more of a 200M model.
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**20)
