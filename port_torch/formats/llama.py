"""A folder of `transformers`' LlamaForCausalLM, whoever made it, if this decoder can be that model."""

from pathlib import Path

from port_torch.folder import CONFIG
from port_torch.formats.imported import Imported, assemble
from port_torch.model_folder import ModelFolder, open_model

NAME = "llama"


def recognizes(path: Path) -> bool:
    """Whether `path` is a folder in the form of Hugging Face; `read` refuses models other than a Llama."""
    return (path / CONFIG).exists()


def read(path: Path) -> Imported:
    """Opens the folder and reads its weights; a UserError where `open_model` refuses it."""
    opened = open_model(path)
    return Imported(opened.config, read_params(opened), tokenizer_folder=path)


def read_params(opened: ModelFolder) -> dict:
    """The parameters in a folder."""
    names = {(leaf.path, leaf.layer): name for name, leaf in opened.leaves.items()}

    def read_leaf(path: str, layer: int | None):
        name = names[path, layer]
        values = opened.folder.read_float32(name)
        return values.T if opened.leaves[name].transposed else values

    return assemble(opened.config, read_leaf)
