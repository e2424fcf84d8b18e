"""`python -m port_torch.convert RUN OUT`: a checkpoint as a folder that transformers, vLLM and others read.

main() is the whole course in order: checkpoint, reference logits, files, reading them back, renaming. The
folder is written under a hidden name; it gets its own when a model loaded from it computes what Flax does.
"""

import contextlib
import ctypes
import dataclasses
import gc
import json
import math
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import torch
import tyro
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors import SafetensorError
from safetensors.torch import save_file

from core.checkpoint import find_step, flatten, load_manifest, restore_params
from core.config import ModelConfig
from core.errors import UserError, run_command
from core.folders import new_folder
from core.manifest import EXPORT_MANIFEST, Manifest, seal
from core.memory import peak_memory
from core.model import Params, abstract_params
from core.tokenizer import load_tokenizer, require_same, tokenizer_record
from port_torch import hf
from port_torch.card import held_out_scores, model_card
from port_torch.folder import CONFIG, INDEX, WEIGHTS
from port_torch.hf_config import hf_config, is_llama
from port_torch.hf_tokenizer import write_tokenizer
from port_torch.hub import push
from port_torch.names import exported_tensors
from port_torch.probe import compare, flax_logits, probe_tokens, require_finite, rounded

M_MMAP_THRESHOLD = -3  # of malloc.h
CODE = ("configuration_mtlm.py", "modeling_mtlm.py")
LICENSE = Path(__file__).parents[1] / "LICENSE"
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
    """Where the checkpoint's tokenizer is now, if it is a file that has moved."""
    push_to_hub: str | None = None
    """Upload the folder to this repository of the Hugging Face Hub (`user/name`) as well."""
    dry_run: bool = False
    """With --push-to-hub: upload nothing, list what would be."""


def main() -> int:
    """Runs the command."""
    started, memory_before = time.monotonic(), peak_memory()
    config = tyro.cli(ConvertConfig, prog="python -m port_torch.convert")
    check(config)
    return_freed_memory()
    jax.config.update("jax_platforms", "cpu")  # where float32 is float32

    # 1. The checkpoint: verified, finite, its tokenizer the one named.
    step_dir = find_step(config.checkpoint)
    manifest = load_manifest(step_dir)
    model = ModelConfig(**manifest.config["model"])
    tokenizer = load_tokenizer(config.tokenizer or manifest.tokenizer["name"])
    require_same(manifest.tokenizer, tokenizer_record(tokenizer), str(step_dir), "the tokenizer here")
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
        tree = write_weights(folder, model, params, config.dtype, config.max_shard_size)
        del params
        gc.collect()
        write_json(folder / CONFIG, hf_config(model, tokenizer.bos, tokenizer.eos, config.dtype))
        # Padding is never predicted; naming an id for it keeps `generate` from warning about it.
        special = {"bos": tokenizer.bos, "eos": tokenizer.eos, "pad": tokenizer.eos}
        write_json(folder / "generation_config.json", {f"{k}_token_id": v for k, v in special.items()})
        if not is_llama(model):
            for name in CODE:
                shutil.copy(Path(hf.__file__).with_name(name), folder)
        write_tokenizer(folder, tokenizer, model.context)
        scores = held_out_scores(step_dir, manifest.step)
        card = model_card(config.out.name, model, manifest, scores)
        (folder / "README.md").write_text(card, encoding="utf-8")
        shutil.copy(LICENSE, folder)
        entry = {"operation": "convert", "step": manifest.step, "dtype": config.dtype}
        lineage = [*manifest.lineage, entry]
        exported = dataclasses.replace(manifest, kind="params", lineage=lineage, tree=tree, files={})
        seal(folder, without_local_paths(exported), EXPORT_MANIFEST)

        # 4. Read back; what computes something else is removed.
        compare(folder, model, tokens, expected)

    # 5. In place.
    seconds, memory = time.monotonic() - started, peak_memory() - memory_before
    print(
        f"{config.out}: {model.n_params:,} parameters in {config.dtype}; {seconds:.1f} s, at most "
        f"{memory / 1e6:,.0f} MB above the process after its imports "
        f"({memory / (4 * model.n_params):.2f} times the float32 weights)"
    )
    if config.push_to_hub:
        push(config.out, config.push_to_hub, config.dry_run)
    return 0


def check(config: ConvertConfig) -> None:
    """Refuses what cannot be done before anything is read."""
    if config.out.exists():
        raise UserError(f"{config.out} exists already: choose another folder, or remove it first")
    if config.dry_run and not config.push_to_hub:
        raise UserError("--dry-run says what would be uploaded: give --push-to-hub user/name with it")
    if not SIZE.fullmatch(config.max_shard_size):
        raise UserError(f"--max-shard-size {config.max_shard_size!r} is no size: give one like 500MB or 5GB")


def return_freed_memory() -> None:
    """Makes malloc return every freed block of 1 MB or more to the system.

    glibc keeps those of up to 32 MB for itself, as most tensors are: 0.5 GB and more of a 200M model.
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**20)


@contextlib.contextmanager
def disk_errors(out: Path) -> Iterator[None]:
    """safetensors has a word of its own for what the disk refuses."""
    try:
        yield
    except SafetensorError as error:
        raise UserError(f"the weights cannot be written into {out.absolute().parent}: {error}") from error


def without_local_paths(manifest: Manifest) -> Manifest:
    """The manifest without the folders of whoever made it: of a path only the last part is told."""

    def shortened(value: Any) -> Any:
        if not isinstance(value, str) or value.startswith(("hf:", "tfds:")):
            return value
        return Path(value).name

    config = dict(manifest.config)
    if "run" in config:
        paths = {
            name: shortened(config["run"].get(name)) for name in ("data", "out", "init_from", "tokenizer")
        }
        config["run"] = config["run"] | paths
    lineage = [
        {k: shortened(v) if k == "path" else v for k, v in entry.items()} for entry in manifest.lineage
    ]
    tokenizer = manifest.tokenizer | {"name": shortened(manifest.tokenizer["name"])}
    return dataclasses.replace(manifest, config=config, lineage=lineage, tokenizer=tokenizer)


def write_weights(
    folder: Path, model: ModelConfig, params: Params, dtype: str, max_shard_size: str
) -> dict[str, dict[str, Any]]:
    """Writes the parameters as safetensors, one file in memory at a time; gives every shape and type."""
    leaves, names = flatten(params)[0], exported_tensors(model)
    torch_dtype = getattr(torch, dtype)
    needed = model.n_params * torch_dtype.itemsize
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"{folder.parent} has {free / 1e9:.2f} GB free, and the weights take {needed / 1e9:.2f} GB: "
            "free some space"
        )

    def tensor(name: str) -> torch.Tensor:
        path, layer, transposed, shape = names[name]
        array = torch.from_dlpack(leaves[path])  # the same memory, not a copy
        array = array if layer is None else array[layer]
        array = (array.T if transposed else array).to(torch_dtype).contiguous()
        assert array.shape == shape, (name, array.shape, shape)
        return array

    pattern = WEIGHTS.replace(".safetensors", "{suffix}.safetensors")
    split = split_state_dict_into_shards_factory(
        names, filename_pattern=pattern, max_shard_size=max_shard_size,
        get_storage_size=lambda leaf: math.prod(leaf.shape) * torch_dtype.itemsize,
    )  # fmt: skip
    for file, held in split.filename_to_tensors.items():
        save_file({name: tensor(name) for name in held}, folder / file, metadata={"format": "pt"})
        (folder / file).chmod(0o644)  # like the other files; safetensors writes for its owner alone
    if split.is_sharded:
        write_json(folder / INDEX, {"metadata": split.metadata, "weight_map": split.tensor_to_filename})
    return {name: {"shape": list(leaf.shape), "dtype": dtype} for name, leaf in names.items()}


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes an object in the layout of every JSON file of the folder."""
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_command(main)
