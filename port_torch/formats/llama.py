"""A folder of `transformers`' LlamaForCausalLM, whoever made it, if this decoder can be that model."""

from pathlib import Path

import torch

from core.config import ModelConfig
from core.errors import UserError
from port_torch.folder import CONFIG, Folder, open_folder
from port_torch.formats.imported import Imported, assemble
from port_torch.hf_config import model_config
from port_torch.names import exported_tensors

NAME = "llama"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
# Old versions of transformers saved the frequencies of the rotary positions, a function of rope_theta.
FREQUENCIES = ".self_attn.rotary_emb.inv_freq"


def recognises(path: Path) -> bool:
    """Whether `path` is a folder in the form of Hugging Face; `read` refuses models other than a Llama."""
    return (path / CONFIG).exists()


def read(path: Path) -> Imported:
    """Opens the folder and reads its weights.

    Raises:
        UserError: it cannot be trusted (`open_folder`), config.json asks for what this decoder does not have
            (`model_config`), or the tensors are not those that it describes.
    """
    folder = without_surplus(open_folder(path))
    config = model_config(folder.config)
    return Imported(config, read_params(folder, config), tokenizer_folder=path)


def read_params(folder: Folder, config: ModelConfig) -> dict:
    """The parameters of a folder that must hold the tensors of `config`, all of them and no others."""
    leaves = exported_tensors(config)
    folder.require({name: leaf.shape for name, leaf in leaves.items()})
    names = {(leaf.path, leaf.layer): name for name, leaf in leaves.items()}

    def read_leaf(path: str, layer: int | None):
        name = names[path, layer]
        values = folder.read_float32(name)
        return values.T if leaves[name].transposed else values

    return assemble(config, read_leaf)


def without_surplus(folder: Folder) -> Folder:
    """The folder without tensors that say nothing: saved frequencies, the second copy of a tied head."""
    surplus = {name for name in folder.tensors if name.endswith(FREQUENCIES)}
    if folder.config.get("tie_word_embeddings") and {EMBEDDING, HEAD} <= folder.tensors.keys():
        if not torch.equal(folder.read(EMBEDDING), folder.read(HEAD)):
            raise UserError(
                f"{folder.path / CONFIG} says that the head is the embedding table, but {HEAD} and "
                f"{EMBEDDING} differ: it is damaged, or tie_word_embeddings should be false"
            )
        surplus.add(HEAD)
    tensors = {name: info for name, info in folder.tensors.items() if name not in surplus}
    return folder._replace(tensors=tensors)
