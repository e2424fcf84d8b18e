"""The files of an exported folder, from Flax's checkpoint or from the mirror."""

import contextlib
import dataclasses
import json
import math
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors import SafetensorError

from core.checkpoint.manifest import EXPORT_MANIFEST, Manifest, seal
from core.config import ModelConfig
from core.errors import UserError
from core.folders import require_space
from core.progress import Activity
from core.special_tokens import join_name, split_name
from core.tokenizer import Tokenizer
from port_torch import hf
from port_torch.card import is_ours, shown_path
from port_torch.folder import CONFIG, INDEX, WEIGHTS, save_tensors
from port_torch.hf_config import hf_config, stock_type
from port_torch.hf_tokenizer import opens_with_auto_tokenizer, write_tokenizer
from port_torch.names import Place, exported_tensors

if TYPE_CHECKING:
    from core.model import Params

CODE = ("configuration_mtlm.py", "modeling_mtlm.py")
PATHS = {"data", "out", "init_from", "source", "tokenizer", "template", "eval_data_dir"}  # settings
LICENSE = Path(__file__).parents[1] / "LICENSE"


def reader(params: "Params") -> Callable[[Place], torch.Tensor]:
    """What gives the tensor of a leaf out of parameters of core.model, in the same memory."""
    from core.checkpoint.checkpointer import flatten  # slow: JAX, which a run in PyTorch does not need

    leaves = flatten(params)[0]

    def read(leaf: Place) -> torch.Tensor:
        array = torch.from_dlpack(leaves[leaf.path])
        array = array if leaf.layer is None else array[leaf.layer]
        return array.T if leaf.transposed else array

    return read


def write_weights(
    folder: Path,
    model: ModelConfig,
    read: Callable[[Place], torch.Tensor],
    dtype: str,
    max_shard_size: str = "5GB",
) -> dict[str, dict[str, Any]]:
    """Writes what `read` gives of every leaf as safetensors, one file in memory at a time.

    Gives every tensor's shape and type.
    """
    names = exported_tensors(model)
    torch_dtype = getattr(torch, dtype)
    require_space(folder.parent, model.n_params * torch_dtype.itemsize, "the weights take")

    def tensor(name: str) -> torch.Tensor:
        array = read(names[name]).detach().to("cpu", torch_dtype).contiguous()
        if array.shape != names[name].shape:
            raise ValueError(f"{name} has the shape {array.shape}, not {names[name].shape}")
        return array

    pattern = WEIGHTS.replace(".safetensors", "{suffix}.safetensors")
    split = split_state_dict_into_shards_factory(
        names, filename_pattern=pattern, max_shard_size=max_shard_size,
        get_storage_size=lambda leaf: math.prod(leaf.shape) * torch_dtype.itemsize,
    )  # fmt: skip
    with Activity("writing the weights"):
        for file, held in split.filename_to_tensors.items():
            save_tensors({name: tensor(name) for name in held}, folder / file)
    if split.is_sharded:
        write_json(folder / INDEX, {"metadata": split.metadata, "weight_map": split.tensor_to_filename})
    return {name: {"shape": list(leaf.shape), "dtype": dtype} for name, leaf in names.items()}


def write_rest(
    folder: Path, model: ModelConfig, tokenizer: Tokenizer, manifest: Manifest, dtype: str, card: str
) -> None:
    """Writes everything but the weights, which are there: configuration, code, tokenizer, card, manifest.

    manifest: of the checkpoint, with the lineage and the tree of the export; its local paths are left out.
    """
    write_json(folder / CONFIG, hf_config(model, tokenizer.bos, tokenizer.eos, dtype))
    # Padding is never predicted; naming an id for it keeps `generate` from warning about it.
    special = {"bos": tokenizer.bos, "eos": tokenizer.eos, "pad": tokenizer.eos}
    write_json(folder / "generation_config.json", {f"{k}_token_id": v for k, v in special.items()})
    if stock_type(model) is None:
        for name in CODE:
            shutil.copy(Path(hf.__file__).with_name(name), folder)
    write_tokenizer(folder, tokenizer, model.context, manifest.chat_template)
    if stock_type(model) == "qwen2" and not opens_with_auto_tokenizer(folder, tokenizer):
        print(
            "note: transformers 5 opens the tokenizer of every Qwen2 folder as Qwen2's own, which gives "
            "other ids than this one: open it with PreTrainedTokenizerFast, as the model card says",
            file=sys.stderr,
        )
    (folder / "README.md").write_text(card, encoding="utf-8")
    if is_ours(manifest):  # else the license of what it was made from applies
        shutil.copy(LICENSE, folder)
    exported = dataclasses.replace(manifest, kind="params", files={})
    seal(folder, without_local_paths(exported), EXPORT_MANIFEST)


def without_local_paths(manifest: Manifest) -> Manifest:
    """The manifest with every local path cut to its last part."""

    def shortened(value: Any) -> Any:
        if isinstance(value, list):  # of several sources
            return [shortened(part) for part in value]
        if not isinstance(value, str):
            return value
        path, named = split_name(value)  # a tokenizer may name tokens
        return join_name(shown_path(path), named)

    config = dict(manifest.config)
    if "run" in config:
        named = PATHS & config["run"].keys()
        paths = {name: shortened(config["run"][name]) for name in named}
        config["run"] = config["run"] | paths
    lineage = [
        {k: shortened(v) if k == "path" else v for k, v in entry.items()} for entry in manifest.lineage
    ]
    tokenizer = manifest.tokenizer | {"name": shortened(manifest.tokenizer["name"])}
    return dataclasses.replace(manifest, config=config, lineage=lineage, tokenizer=tokenizer)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes an object in the layout of every JSON file of the folder."""
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


@contextlib.contextmanager
def disk_errors(out: Path) -> Iterator[None]:
    """Turns safetensors' own error for a failed write into a UserError."""
    try:
        yield
    except SafetensorError as error:
        raise UserError(f"the weights cannot be written into {out.absolute().parent}: {error}") from error
