"""A folder that port_torch.convert wrote: the way back, to the bit if it was exported in float32."""

from pathlib import Path

from core.checkpoint.manifest import EXPORT_MANIFEST
from core.config import ModelConfig
from core.errors import UserError
from port_torch.folder import CONFIG, EXPORT_FORMAT
from port_torch.formats.imported import Imported
from port_torch.formats.llama import read_params
from port_torch.model_folder import open_model

NAME = EXPORT_FORMAT


def recognizes(path: Path) -> bool:
    """Whether `path` is a folder with a manifest of ours."""
    return (path / EXPORT_MANIFEST).exists()


def read(path: Path) -> Imported:
    """Opens the folder, which its manifest must prove whole, and reads its weights.

    Raises:
        UserError: a file differs from the manifest, or config.json or the tensors from its model.
    """
    opened = open_model(path)
    manifest = opened.folder.manifest
    if manifest is None:
        raise RuntimeError(f"{path} had a manifest when `recognizes` looked, and has none now")
    config = ModelConfig(**manifest.config["model"])
    for name, theirs in opened.config.function().items():
        ours = getattr(config, name)
        if theirs != ours:
            raise UserError(
                f"{path / CONFIG} says {name} {theirs}, and {EXPORT_MANIFEST} {ours}: export the model again"
            )
    return Imported(config, read_params(opened), tokenizer_folder=path, manifest=manifest)
