"""Weights from elsewhere as a checkpoint that trains here: what port_torch.import_checkpoint does."""

import dataclasses
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import jax

from core import cli
from core.chat import folder_template
from core.checkpoint.checkpointer import save_params
from core.checkpoint.manifest import Manifest, code_version
from core.config import training_flags
from core.errors import UserError
from core.hub_models import origin
from core.tokenizer import TOKENIZER_FILE, Tokenizer, open_tokenizer, tokenizer_record
from port_torch.folder_tokenizer import folder_tokenizer, require_vocabulary
from port_torch.formats import exported, llama, mtlm1_torch, mtlm2_orbax
from port_torch.formats.imported import Imported
from port_torch.hf_config import stock_type

if TYPE_CHECKING:
    from port_torch.import_checkpoint import ImportConfig

# In the order in which they are asked: an exported folder is also one in the form of Hugging Face.
FORMATS: tuple[ModuleType, ...] = (exported, llama, mtlm1_torch, mtlm2_orbax)


def import_weights(config: "ImportConfig") -> None:
    """Reads the weights, writes the checkpoint, and says what was imported and how to train it.

    Args:
        config: the command's settings, checked.

    Raises:
        UserError: the weights have no known format, are damaged, or of another tokenizer.
    """
    jax.config.update("jax_platforms", "cpu")  # nothing is computed here
    source = detect(config.source)
    imported = read(source, config)
    tokenizer = choose_tokenizer(imported, config.tokenizer, config.source)
    manifest = make_manifest(imported, tokenizer_record(tokenizer), source.NAME, config.source)
    out = save_params(config.out, imported.params, manifest, tokenizer)
    model = imported.config
    kind = stock_type(model) if source is llama else source.NAME
    print(f"imported {origin(config.source) or config.source} ({kind}): {model.n_params:,} parameters")
    if imported.assumed:
        print(f"assumed as in the original, since the file does not say: {imported.assumed}")
    if tokenizer.vocab_size < model.vocab_size:
        print(f"its vocabulary is padded: {model.vocab_size:,} rows, {tokenizer.vocab_size:,} token ids")
    flags = training_flags(model, tokenizer.vocab_size).split()
    flags += ["--tokenizer", tokenizer.named_for(out / TOKENIZER_FILE), "--data", "TEXT", "--out", "RUN"]
    print(f"wrote {out}; train it further with\n  {cli.command('train_tpu.run', '--init-from', out, *flags)}")


def detect(path: Path) -> ModuleType:
    """The module of the format that `path` has; a UserError where it has none of them."""
    for module in FORMATS:
        if module.recognizes(path):
            return module
    raise UserError(
        f"{path} has no known format: give a folder with config.json and model.safetensors "
        "(ours or a Llama's), a .pt file of the original MTLM1, or an Orbax folder of the original MTLM2"
    )


def read(source: ModuleType, config: "ImportConfig") -> Imported:
    """Reads the weights; the settings that are only for one format are refused for the others."""
    given: dict[str, Any] = {"n_heads": config.n_heads, "context": config.context}
    if source is mtlm1_torch:
        return mtlm1_torch.read(config.source, **given)
    for name, value in given.items():
        if value is not None:
            raise UserError(
                f"--{name.replace('_', '-')} is for the original MTLM1; {config.source} has its own"
            )
    return source.read(config.source)


def choose_tokenizer(imported: Imported, name: str | None, source: Path) -> Tokenizer:
    """The model's tokenizer; `folder_tokenizer` says what is refused."""
    vocab_size = imported.config.vocab_size
    if imported.tokenizer_folder:
        tokenizer = folder_tokenizer(imported.tokenizer_folder, imported.manifest, name, vocab_size)
    else:
        tokenizer = open_tokenizer(name or "mistral")
        require_vocabulary(source, tokenizer, vocab_size)
    return tokenizer


def make_manifest(imported: Imported, tokenizer: dict[str, Any], name: str, source: Path) -> Manifest:
    """The checkpoint's manifest; what was ours before keeps its counters and its history."""
    template = imported.tokenizer_folder and folder_template(imported.tokenizer_folder)
    entry = {"operation": "import", "format": name, "path": origin(source) or str(source.absolute())}
    if imported.manifest:
        return dataclasses.replace(
            imported.manifest, kind="params", tokenizer=tokenizer, data=None, code=code_version(),
            lineage=[*imported.manifest.lineage, entry],
        )  # fmt: skip
    return Manifest(
        kind="params", step=0, sequences=0, tokens=0, config={"model": dataclasses.asdict(imported.config)},
        tokenizer=tokenizer, data=None, lineage=[entry], chat_template=template,
    )  # fmt: skip
