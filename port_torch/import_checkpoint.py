"""`python -m port_torch.import_checkpoint FOLDER_OR_FILE OUT`: a checkpoint of weights from elsewhere.

What it writes holds parameters alone; `python -m train_tpu.run --init-from OUT` trains on from them.
"""

import dataclasses
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import jax
import tyro

from core import checks, cli
from core.checkpoint import save_params
from core.config import training_flags
from core.errors import UserError, run_command
from core.folder_kinds import Kind, require_kind
from core.folders import require_new
from core.manifest import Manifest, code_version
from core.tokenizer import TOKENIZER_FILE, Tokenizer, load_tokenizer, tokenizer_record
from port_torch.folder_tokenizer import folder_tokenizer, require_vocabulary
from port_torch.formats import exported, llama, mtlm1_torch, mtlm2_orbax
from port_torch.formats.imported import Imported

# In the order in which they are asked: an exported folder is also one in the form of Hugging Face.
FORMATS: tuple[ModuleType, ...] = (exported, llama, mtlm1_torch, mtlm2_orbax)


@dataclasses.dataclass(frozen=True)
class ImportConfig:
    """Make a checkpoint that trains here of weights from elsewhere: a folder that port_torch.convert wrote, a
    stock Llama's folder, or a checkpoint of the original MTLM1 (.pt) or MTLM2 (Orbax)."""

    source: Annotated[Path, tyro.conf.Positional]
    """The folder or file to import."""
    out: Annotated[Path, tyro.conf.Positional]
    """The checkpoint to write; it must not exist."""
    tokenizer: str | None = None
    """mistral, bytes or a path to a tokenizer.json. Default: the folder's own; mistral where it has none."""
    n_heads: int | None = None
    """Heads of an original MTLM1, which its file does not tell. Default: as many as make them 64 wide."""
    context: int | None = None
    """Longest sequence of an original MTLM1, which its file does not tell. Default: 1024."""

    def __post_init__(self) -> None:
        checks.counts(**checks.fields(self, "n_heads", "context"))


def main() -> int:
    """The command; prints what was imported and how to train it."""
    config = cli.parse(ImportConfig, prog="python -m port_torch.import_checkpoint")
    require_new(config.out)
    jax.config.update("jax_platforms", "cpu")  # nothing is computed here
    source = detect(config.source)
    imported = read(source, config)
    tokenizer = choose_tokenizer(imported, config.tokenizer, config.source)
    manifest = make_manifest(imported, tokenizer_record(tokenizer), source.NAME, config.source)
    out = save_params(config.out, imported.params, manifest, tokenizer)
    model = imported.config
    print(f"imported {config.source} ({source.NAME}): {model.n_params:,} parameters")
    if imported.assumed:
        print(f"taken as in the original, since the file does not tell: {imported.assumed}")
    name = tokenizer.name if tokenizer.content is None else out / TOKENIZER_FILE
    flags = (*training_flags(model).split(), "--tokenizer", name, "--data", "TEXT", "--out", "RUN")
    print(f"wrote {out}; train it on with\n  {cli.command('train_tpu.run', '--init-from', out, *flags)}")
    return 0


def detect(path: Path) -> ModuleType:
    """The module of the format that `path` has."""
    if not path.exists():
        raise UserError(f"{path} does not exist: give a folder or a file to import")
    require_kind(path, "import", Kind.WEIGHTS)
    for module in FORMATS:
        if module.recognises(path):
            return module
    raise UserError(
        f"{path} is in none of the formats that are read: a folder with config.json and model.safetensors "
        "(ours or a Llama's), a .pt file of the original MTLM1, or an Orbax folder of the original MTLM2"
    )


def read(source: ModuleType, config: ImportConfig) -> Imported:
    """Reads the weights; the settings that are only for one format are refused for the others."""
    given: dict[str, Any] = {"n_heads": config.n_heads, "context": config.context}
    if source is mtlm1_torch:
        return mtlm1_torch.read(config.source, **given)
    for name, value in given.items():
        if value is not None:
            raise UserError(
                f"--{name.replace('_', '-')} is for the original MTLM1; {config.source} tells its own"
            )
    return source.read(config.source)


def choose_tokenizer(imported: Imported, name: str | None, source: Path) -> Tokenizer:
    """The model's tokenizer; `folder_tokenizer` says what is refused."""
    vocab_size = imported.config.vocab_size
    if imported.tokenizer_folder:
        tokenizer = folder_tokenizer(imported.tokenizer_folder, imported.manifest, name, vocab_size)
    else:
        tokenizer = load_tokenizer(name or "mistral")
        require_vocabulary(source, tokenizer, vocab_size)
    return tokenizer


def make_manifest(imported: Imported, tokenizer: dict[str, Any], name: str, source: Path) -> Manifest:
    """The checkpoint's manifest; what was ours before keeps its counters and its history."""
    entry = {"operation": "import", "format": name, "path": str(source.absolute())}
    if imported.manifest:
        return dataclasses.replace(
            imported.manifest, kind="params", tokenizer=tokenizer, data=None, code=code_version(),
            lineage=[*imported.manifest.lineage, entry],
        )  # fmt: skip
    return Manifest(
        kind="params", step=0, sequences=0, tokens=0, config={"model": dataclasses.asdict(imported.config)},
        tokenizer=tokenizer, data=None, lineage=[entry],
    )  # fmt: skip


if __name__ == "__main__":
    run_command(main)
