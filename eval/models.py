"""What is evaluated: a checkpoint with Flax, or a folder of weights with PyTorch."""

from pathlib import Path
from typing import Any, NamedTuple

from core.checkpoint.checkpointer import restore_params
from core.checkpoint.manifest import EXPORT_MANIFEST, NEW_RUN, Manifest, load_manifest, recorded_hash
from core.checkpoint.steps import find_step, run_folder, tokenizer_carriers
from core.compilation_cache import keep_compiled
from core.config import ModelConfig
from core.errors import UserError
from core.extras import install_command
from core.gpu_memory import require_free_memory
from core.hub_models import origin
from core.model import abstract_params
from core.run.settings import FREE_SETTINGS, current_names, resolved
from core.tokenizer import Tokenizer, load_tokenizer_of
from eval.batching import Backend
from eval.flax_backend import FlaxBackend
from eval.settings import Device, is_checkpoint, require_model, results_folder


class Model(NamedTuple):
    """A model ready to be evaluated."""

    backend: Backend
    tokenizer: Tokenizer
    identity: dict[str, Any]
    """What proves which model it is, and what is known of it; goes into the results."""
    results: Path
    """Where results go if nothing else is said."""


def open_model(path: Path, dtype: str, device: Device = "auto", tokenizer: str | None = None) -> Model:
    """Opens a run, a checkpoint in it, or a folder of weights.

    Args:
        path: a folder with checkpoints is run with Flax, one with a Hugging Face config.json with PyTorch.
        dtype: float32 or bfloat16, of activations (of weights, too, with PyTorch).
        device: for folders; JAX chooses its devices itself (JAX_PLATFORMS).
        tokenizer: the name or file of the model's tokenizer, where it is not found otherwise.

    Raises:
        UserError: there is no model, it is damaged, or a package that it needs is not installed.
    """
    require_model(path, device)
    if is_checkpoint(path):
        return _open_checkpoint(path, dtype, tokenizer)
    return _open_folder(path, dtype, device, tokenizer)


def _open_checkpoint(path: Path, dtype: str, given: str | None) -> Model:
    require_free_memory()
    keep_compiled()
    step_dir = find_step(path)
    manifest = load_manifest(step_dir)
    config = ModelConfig(**manifest.config["model"])
    tokenizer = load_tokenizer_of(manifest.tokenizer, tokenizer_carriers(step_dir), str(step_dir), given)
    params = restore_params(step_dir, abstract_params(config))
    backend = FlaxBackend(config, params, dtype)
    known = _known(run_folder(step_dir).name, config, manifest)
    identity = known | {"kind": "checkpoint", "sha256": recorded_hash(step_dir)}
    return Model(backend, tokenizer, identity, results_folder(step_dir))


def _open_folder(path: Path, dtype: str, device: Device, given: str | None) -> Model:
    try:
        import torch

        from eval.torch_backend import TorchBackend
        from port_torch.folder import export_manifest, weights_hash
        from port_torch.folder_tokenizer import folder_tokenizer
        from port_torch.model import load
        from port_torch.sampling import choose_device
    except ImportError as error:
        raise UserError(
            f"{path} is not a checkpoint, and a folder of weights needs PyTorch ({error}): "
            f"{install_command('torch')}"
        ) from None
    chosen = choose_device(device)
    devices = [f"cuda:{i}" for i in range(torch.cuda.device_count())] if chosen == "cuda" else ["cpu"]
    models = [load(path, getattr(torch, dtype), device) for device in devices]
    manifest = export_manifest(path)
    config = models[0].config
    tokenizer = folder_tokenizer(path, manifest, given, config.vocab_size)
    name = origin(path) or path.absolute().name
    if manifest:
        identity = _known(name, config, manifest) | {"sha256": recorded_hash(path, EXPORT_MANIFEST)}
    else:
        identity = {"name": name, "parameters": config.n_params, "sha256": weights_hash(path)}
    return Model(TorchBackend(models), tokenizer, identity | {"kind": "folder"}, results_folder(path))


def _known(name: str, config: ModelConfig, manifest: Manifest) -> dict[str, Any]:
    return {
        "name": name,
        "parameters": config.n_params,
        "step": manifest.step,
        "tokens": manifest.tokens,
        "lineage": [entry["operation"] for entry in manifest.lineage],
        "config": manifest.config["model"],
        "tokenizer": manifest.tokenizer,
        "training": _training(manifest),
    }


def _training(manifest: Manifest) -> dict[str, Any] | None:
    """By what eval.compare tells recipes from seeds: seed, fingerprints of the data, the checkpoint or folder
    that it began with, and all other settings that change losses; None for a model not trained here."""
    if "run" not in manifest.config or manifest.data is None:
        return None
    run = resolved(current_names(manifest.config["run"]))
    sources = manifest.data.get("mixture", {}).get("sources", {"": manifest.data["fingerprint"]})
    began = [entry.get("path") for entry in manifest.lineage if entry["operation"] in (*NEW_RUN, "grow")]
    return {
        "seed": run.pop("seed"),
        "data": sorted(sources.values()),
        "began_with": began[-1] if began else None,
        "settings": {name: value for name, value in run.items() if name not in FREE_SETTINGS},
    }


def describe(model: Model, dtype: str) -> str:
    """One line for the user: what is evaluated, and with what."""
    known = model.identity
    step = f" at step {known['step']:,}" if "step" in known else ""
    opening = "nothing" if model.tokenizer.bos is None else "bos"
    return (
        f"{known['name']}{step}, {known['parameters']:,} parameters: {model.backend.describe()}, {dtype}; "
        f"tokenizer {model.tokenizer.name}, {opening} before every text"
    )
