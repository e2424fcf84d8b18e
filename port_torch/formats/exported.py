"""A folder that port_torch.convert wrote: the way back, to the bit if it was exported in float32."""

from pathlib import Path

from core.config import ModelConfig
from core.errors import UserError
from core.manifest import EXPORT_MANIFEST
from port_torch.folder import CONFIG, open_folder
from port_torch.formats.imported import Imported
from port_torch.formats.llama import read_params
from port_torch.hf_config import model_config

NAME = "mtlm-export"


def recognises(path: Path) -> bool:
    """Whether `path` is a folder with a manifest of ours."""
    return (path / EXPORT_MANIFEST).exists()


def read(path: Path) -> Imported:
    """Opens the folder, which its manifest must prove whole, and reads its weights.

    Raises:
        UserError: a file differs from the manifest, or config.json or the tensors from its model.
    """
    folder = open_folder(path)
    assert folder.manifest is not None, "recognises() found one"
    config = ModelConfig(**folder.manifest.config["model"])
    for name, theirs in model_config(folder.config).function().items():
        ours = getattr(config, name)
        if theirs != ours:
            raise UserError(
                f"{path / CONFIG} says {name} {theirs}, and {EXPORT_MANIFEST} {ours}: export the model again"
            )
    return Imported(config, read_params(folder, config), tokenizer_folder=path, manifest=folder.manifest)
