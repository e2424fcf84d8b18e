"""A run's LoRA adapters as a folder that `peft` opens on their base: written, and proved by its logits.

The runs of both engines end here: port_torch.finetune gives the mirror's adapters, port_torch.convert those
of JAX. They get the names of the class of transformers that their base is exported as.
"""

import dataclasses
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from core.checkpoint.manifest import EXPORT_MANIFEST, Manifest, seal
from core.config import ModelConfig
from core.hub_models import is_hub_name, parse_hub_name
from core.lora import MAPS, LoraConfig
from core.tokenizer import Tokenizer
from port_torch.adapter import BASE_HASH, CONFIG, PREFIX, WEIGHTS, transformers_model, with_adapter
from port_torch.export import without_local_paths, write_json
from port_torch.folder import save_tensors
from port_torch.hf_tokenizer import write_tokenizer
from port_torch.model import decoder_of, parameter_name
from port_torch.names import exported_tensors
from port_torch.parity import require_equal, tolerance


class Trained(NamedTuple):
    """Adapters, the base that they were trained on, and what they compute on it."""

    model: ModelConfig
    lora: LoraConfig
    adapters: dict[str, tuple[Tensor, Tensor]]
    """Of each adapted map, by its name in transformers ("model.layers.0.self_attn.q_proj"): A [rank, in] and
    B [out, rank]; float32, on the CPU."""
    base: Path
    """The folder of the base, or its name on the Hugging Face Hub."""
    base_hash: str
    """Of its weights, as `weights_hash` gives it."""
    weights: dict[str, Tensor]
    """The base's, by their exported names; float32, on the CPU."""
    tokens: np.ndarray
    """Ids, int64 [B, S]."""
    logits: np.ndarray
    """What was trained computes for them, float32 [B, S, V]."""
    source: str
    """What computed that, for messages."""

    @property
    def scale(self) -> float:
        """What B A is multiplied by."""
        return self.lora.alpha / self.lora.rank


def write_adapter(
    folder: Path, trained: Trained, tokenizer: Tokenizer, manifest: Manifest, operation: str
) -> float:
    """Writes adapters into a folder that is there, with their tokenizer and a manifest; gives the largest
    difference of peft's logits.

    Args:
        manifest: of the checkpoint that they are taken from.
        operation: what the lineage calls this.

    Raises:
        UserError: peft computes something else with them on their base.
    """
    write_json(folder / CONFIG, peft_config(trained))
    tensors = {
        f"{PREFIX}{module}.{name}.weight": matrix.contiguous()
        for module, pair in trained.adapters.items()
        for name, matrix in zip(("lora_A", "lora_B"), pair, strict=True)
    }
    save_tensors(tensors, folder / WEIGHTS)
    write_tokenizer(folder, tokenizer, trained.model.context, manifest.chat_template)
    entry = {"operation": operation, "step": manifest.step, "dtype": "float32", BASE_HASH: trained.base_hash}
    exported = dataclasses.replace(
        manifest, kind="params", lineage=[*manifest.lineage, entry], files={},
        tree={name: {"shape": list(t.shape), "dtype": "float32"} for name, t in tensors.items()},
    )  # fmt: skip
    seal(folder, without_local_paths(exported), EXPORT_MANIFEST)
    ids = torch.from_numpy(trained.tokens)
    names = {name: parameter_name(place) for name, place in exported_tensors(trained.model).items()}
    exact = decoder_of(trained.model, {names[n]: w for n, w in merged_exactly(trained).items()}).eval()
    with torch.inference_mode():
        noise = float(np.abs(exact.logits(exact(ids)).numpy() - trained.logits).max())
        opened = with_adapter(transformers_model(trained.model, trained.weights), folder)
        found = opened(ids, use_cache=False).logits.numpy()
    limit = tolerance(trained.model, trained.logits, noise)
    return require_equal(found, trained.logits, limit, "peft", trained.source)


def peft_config(trained: Trained) -> dict[str, object]:
    """The content of adapter_config.json."""
    lora, name, revision = trained.lora, str(trained.base.absolute()), None
    if is_hub_name(trained.base):
        name, revision = parse_hub_name(trained.base)
    modules = [MAPS[name].exported.rpartition(".")[2] for name in lora.targets(trained.model)]
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": name,
        "revision": revision,
        "r": lora.rank,
        "lora_alpha": int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha,
        "lora_dropout": lora.dropout,
        "target_modules": modules,
        "bias": "none",
        "inference_mode": True,
    }


def merged_exactly(trained: Trained) -> dict[str, Tensor]:
    """The weights of the base with what the adapters add, by their exported names, in float64."""
    whole = {name: weight.double() for name, weight in trained.weights.items()}
    for module, (a, b) in trained.adapters.items():
        whole[f"{module}.weight"] += trained.scale * b.double() @ a.double()
    return whole
