"""Small folders and checkpoints for tests, written without the code that reads them."""

import dataclasses
import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from core.checkpoint.checkpointer import save_params
from core.checkpoint.manifest import EXPORT_MANIFEST, Manifest, seal
from core.config import ModelConfig
from core.model import Params
from core.tokenizer import load_tokenizer, tokenizer_record
from port_torch.hf_config import hf_config
from port_torch.names import exported_tensors
from tests.models import BOTH, flat

# With the vocabulary of the tokenizer `bytes`.
SMALL = {kind: dataclasses.replace(config, vocab_size=258) for kind, config in BOTH.items()}


def manifest_of(config: ModelConfig) -> Manifest:
    """What a checkpoint of 7 steps with the tokenizer `bytes` would say."""
    return Manifest(
        kind="params", step=7, sequences=70, tokens=700, config={"model": dataclasses.asdict(config)},
        tokenizer=tokenizer_record(load_tokenizer("bytes")), data=None, lineage=[{"operation": "test"}],
    )  # fmt: skip


def write_checkpoint(folder: Path, config: ModelConfig, params: Params) -> Path:
    """A checkpoint of parameters."""
    return save_params(folder, params, manifest_of(config))


def tensors_of(config: ModelConfig, params: Params, dtype: torch.dtype = torch.float32) -> dict:
    """The exported tensors."""
    leaves = flat(params)
    tensors = {}
    for name, leaf in exported_tensors(config).items():
        values = leaves[leaf.path] if leaf.layer is None else leaves[leaf.path][leaf.layer]
        values = torch.from_numpy(values.T.copy() if leaf.transposed else values.copy())
        tensors[name] = values.to(dtype)
    return tensors


def write_folder(folder: Path, config: ModelConfig, tensors: dict, dtype: str = "float32", **fields) -> Path:
    """A folder in the form of Hugging Face without a manifest; `fields` are put into config.json."""
    folder.mkdir(parents=True)
    content = hf_config(config, 256, 257, dtype) | fields
    (folder / "config.json").write_text(json.dumps(content))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def write_export(folder: Path, config: ModelConfig, params: Params) -> Path:
    """An exported folder of ours, but for what only others read."""
    write_folder(folder, config, tensors_of(config, params))
    seal(folder, manifest_of(config), EXPORT_MANIFEST)
    return folder
