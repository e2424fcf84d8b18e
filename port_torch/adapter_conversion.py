"""The adapters of a LoRA run of JAX as a folder for peft: what port_torch.convert does with --adapter-for.

A checkpoint of such a run holds the adapters and the model that they make with their base, but not the base.
So the base's folder is given, and is proved to be it by the weights themselves: those without an adapter are
equal, and the others are with what their adapter adds.
"""

from pathlib import Path

import jax
import numpy as np
import torch
from torch import Tensor

from core.checkpoint.checkpointer import read_leaves
from core.checkpoint.manifest import Manifest
from core.config import ModelConfig
from core.errors import UserError
from core.folders import new_folder
from core.hub_models import local, origin
from core.lora import MAPS, LoraConfig
from core.model import Params
from core.run.settings import unflatten
from core.tokenizer import Tokenizer
from port_torch.adapter_export import Trained, merged_exactly, write_adapter
from port_torch.export import disk_errors, reader
from port_torch.flax_parity import flax_logits
from port_torch.folder import weights_hash
from port_torch.model_folder import open_model
from port_torch.names import exported_tensors
from port_torch.parity import EPSILON, probe_tokens
from port_torch.tuned import tuned_in

ADAPTERS = "adapters"  # what a checkpoint of a LoRA run has them under, besides `params`


def convert_adapters(
    out: Path, base: Path, step_dir: Path, manifest: Manifest, params: Params, tokenizer: Tokenizer
) -> None:
    """Writes the adapters of a checkpoint, as the folder `out` once peft computes with them what Flax does.

    Args:
        base: the folder of their base, or its name on the Hugging Face Hub.
        manifest, params: of the checkpoint `step_dir`; the parameters have the adapters merged.

    Raises:
        UserError: the base is another one, or peft does not compute the same.
    """
    model = ModelConfig(**manifest.config["model"])
    lora = unflatten(manifest.config["run"], LoraConfig)
    folder = local(base)
    opened = open_model(folder)
    began = (tuned_in(manifest) or {}).get("path", "the model that it began with")
    advice = f"give the folder that port_torch.convert makes of {began}, in float32"
    refusal = f"{step_dir} was not trained on the weights of {base}"
    here, there = model.function(), opened.config.function()
    if differing := [name for name in here if here[name] != there[name]]:
        name = differing[0]
        raise UserError(f"{refusal}, a model with {name} {there[name]}, not {here[name]}: {advice}")
    tokens = probe_tokens(model, tokenizer.prefix)
    trained = Trained(
        model, lora, read_adapters(step_dir, manifest, model, lora),
        Path(origin(folder) or folder), weights_hash(folder, opened.folder.manifest),
        {name: opened.folder.read(name).float() for name in opened.leaves},
        tokens, flax_logits(model, params, tokens), "Flax",
    )  # fmt: skip
    if name := first_differing(trained, params):
        raise UserError(f"{refusal}, whose {name} is another one: {advice}")
    with new_folder(out) as partial, disk_errors(out):
        partial.mkdir(parents=True)
        difference = write_adapter(partial, trained, tokenizer, manifest, "convert")
    print(f"logits of peft on {base} against Flax: largest difference {difference:.1e}")
    size = sum(a.numel() + b.numel() for a, b in trained.adapters.values())
    print(f"wrote and checked {out}: {lora.describe(model)}; {size:,} parameters, for {base}")


def read_adapters(
    step_dir: Path, manifest: Manifest, model: ModelConfig, lora: LoraConfig
) -> dict[str, tuple[Tensor, Tensor]]:
    """The adapters in a checkpoint, as `Trained` has them."""
    paths = [path for path in manifest.tree if path.startswith(f"{ADAPTERS}/")]
    leaves = read_leaves(
        step_dir, {p: jax.ShapeDtypeStruct(manifest.tree[p]["shape"], np.float32) for p in paths}
    )
    found = {}
    for leaf in (MAPS[name] for name in lora.targets(model)):
        a, b = (torch.tensor(np.asarray(leaves[f"{ADAPTERS}/{leaf.module}/lora_{x}"])) for x in "ab")
        for layer in range(model.n_layers):
            found[leaf.exported.format(layer)] = a[layer].T, b[layer].T
    return found


def first_differing(trained: Trained, params: Params) -> str | None:
    """The first tensor of the base that, with its adapter, is not that of the trained parameters.

    Merging rounds: sums of `rank` products, which are scaled and added, each to a part EPSILON of the sum of
    their magnitudes. Four times that is allowed, for a TPU makes a product of float32 of several narrower
    ones. Weights without an adapter were never touched.
    """
    read, whole = reader(params), merged_exactly(trained)
    for name, place in exported_tensors(trained.model).items():
        ours, off = read(place), 0.0
        pair = trained.adapters.get(name.removesuffix(".weight"))
        if pair is not None:
            a, b = (matrix.double().abs() for matrix in pair)
            off = 4 * EPSILON * ((trained.lora.rank + 3) * trained.scale * (b @ a) + ours.double().abs())
        if not ((ours.double() - whole[name]).abs() <= off).all():
            return name
    return None
