"""A folder opened as a model: the decoder that config.json describes, and exactly the tensors that it has."""

from pathlib import Path
from typing import NamedTuple

import torch

from core.config import ModelConfig
from core.errors import UserError
from core.leaves import get_leaf
from port_torch.folder import CONFIG, Folder, open_folder
from port_torch.hf_config import model_config
from port_torch.names import Place, exported_tensors

EMBEDDING = get_leaf(("embed", "table")).exported_name()
HEAD = get_leaf(("head", "kernel")).exported_name()
# Old versions of transformers saved the frequencies of the rotary positions, a function of rope_theta.
FREQUENCIES = ".self_attn.rotary_emb.inv_freq"


class ModelFolder(NamedTuple):
    """A folder whose tensors are all those of `config`, and no others."""

    folder: Folder
    config: ModelConfig
    leaves: dict[str, Place]
    """Name of each tensor -> where it lies in the parameters."""


def open_model(path: Path) -> ModelFolder:
    """Opens a folder that we exported, or any Llama's that fits.

    Raises:
        UserError: it cannot be trusted (`open_folder`), config.json asks for what this decoder does not have
            (`model_config`), or the tensors are not those that it describes.
    """
    folder = open_folder(path)
    config = model_config(folder.config)
    if config.n_layers > len(folder.tensors):  # said before tables of as many layers are made
        raise UserError(
            f"{path / CONFIG} says {config.n_layers:,} layers, and the folder holds {len(folder.tensors):,} "
            "tensors: it is damaged or of another model"
        )
    folder = _without_surplus(folder, config)
    leaves = exported_tensors(config)
    folder.require({name: leaf.shape for name, leaf in leaves.items()})
    return ModelFolder(folder, config, leaves)


def _without_surplus(folder: Folder, config: ModelConfig) -> Folder:
    """The folder without tensors that say nothing: saved frequencies, the second copy of a tied head."""
    surplus = {name for name in folder.tensors if name.endswith(FREQUENCIES)}
    if config.tied and {EMBEDDING, HEAD} <= folder.tensors.keys():
        if not torch.equal(folder.read(EMBEDDING), folder.read(HEAD)):
            raise UserError(
                f"{folder.path / CONFIG} says that the head is the embedding table, but {HEAD} and "
                f"{EMBEDDING} differ: it is damaged, or tie_word_embeddings should be false"
            )
        surplus.add(HEAD)
    tensors = {name: info for name, info in folder.tensors.items() if name not in surplus}
    return folder._replace(tensors=tensors)
