"""`python -m port_torch.import_checkpoint FOLDER_OR_FILE OUT`: a checkpoint of weights from elsewhere.

What it writes holds parameters alone; `python -m train_tpu.run --init-from OUT` trains on from them.
"""

import dataclasses
import hashlib
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import tyro

from core.checkpoint import save_params
from core.config import training_flags
from core.errors import UserError, run_command
from core.manifest import MANIFEST, Manifest, code_version
from core.tokenizer import MISTRAL_SHA256, Tokenizer, load_tokenizer, require_same, tokenizer_record
from port_torch.formats import exported, llama, mtlm1_torch, mtlm2_orbax
from port_torch.formats.imported import Imported

# In the order in which they are asked: an exported folder is also one in the form of Hugging Face.
FORMATS: tuple[ModuleType, ...] = (exported, llama, mtlm1_torch, mtlm2_orbax)

# What two tokenizers must agree on to be taken for the same: words, spaces, other scripts, bytes, symbols.
PROBE = (
    "The 3 quick  brown foxes;\n\tdef f(x): return x**2\n Grüße, привет, 你好, こんにちは 🙂\x07 <s> ½ — end "
)


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


def main() -> int:
    """The command; prints what was imported and how to train it."""
    config = tyro.cli(ImportConfig, prog="python -m port_torch.import_checkpoint")
    source = detect(config.source)
    imported = read(source, config)
    tokenizer = choose_tokenizer(imported, config.tokenizer, config.source)
    manifest = make_manifest(imported, tokenizer, source.NAME, config.source)
    out = save_params(config.out, imported.params, manifest)
    model = imported.config
    print(f"imported {config.source} ({source.NAME}): {model.n_params:,} parameters")
    if imported.assumed:
        print(f"taken as in the original, since the file does not tell: {imported.assumed}")
    print(f"wrote {out}; train it on with")
    print(f"  python -m train_tpu.run --init-from {out} {training_flags(model)} --data TEXT --out RUN")
    return 0


def detect(path: Path) -> ModuleType:
    """The module of the format that `path` has."""
    if not path.exists():
        raise UserError(f"{path} does not exist: give a folder or a file to import")
    if (path / MANIFEST).exists() or (path / "checkpoints").is_dir():
        raise UserError(f"{path} is ours already: give it to train_tpu.run --init-from as it is")
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


def choose_tokenizer(imported: Imported, name: str | None, source: Path) -> dict[str, Any]:
    """The record of the tokenizer that the model was trained with.

    Raises:
        UserError: none is known, or the one named is another: its ids must be the model's.
    """
    folder, manifest = imported.tokenizer_folder, imported.manifest
    file = folder / "tokenizer.json" if folder and (folder / "tokenizer.json").is_file() else None
    if manifest:
        tokenizer = _of_export(manifest, name, file, source)
    elif name:
        tokenizer = load_tokenizer(name)
        if file and not _agree(tokenizer, load_tokenizer(file)):
            raise UserError(
                f"the tokenizer {name!r} is not that of {source}: it gives other ids than {file}; leave "
                "--tokenizer out, or name the right one"
            )
    elif folder and _is_mistral(folder / "tokenizer.model"):
        tokenizer = load_tokenizer("mistral")
    elif file:
        tokenizer = load_tokenizer(file)
    elif folder:
        raise UserError(f"{source} holds no tokenizer.json: name its tokenizer with --tokenizer")
    else:
        tokenizer = load_tokenizer("mistral")
    if tokenizer.vocab_size != imported.config.vocab_size:
        raise UserError(
            f"{source} is a model of {imported.config.vocab_size} token ids, and the tokenizer "
            f"{tokenizer.name!r} has {tokenizer.vocab_size}: name the model's own with --tokenizer"
        )
    return tokenizer_record(tokenizer)


def _of_export(manifest: Manifest, name: str | None, file: Path | None, source: Path) -> Tokenizer:
    """The tokenizer that the manifest records: the one named, that of its name, or the folder's own file."""
    record = manifest.tokenizer
    if name:
        tokenizer = load_tokenizer(name)
        require_same(record, tokenizer_record(tokenizer), str(source), "--tokenizer")
        return tokenizer
    for candidate in (record["name"], file):
        if candidate in ("mistral", "bytes") or (candidate and Path(candidate).is_file()):
            tokenizer = load_tokenizer(candidate)
            if tokenizer.sha256 == record["sha256"]:
                return tokenizer
    raise UserError(
        f"{source} was made with the tokenizer {record['name']!r} ({record['sha256'][:12]}), which is not "
        "there: name the file with --tokenizer"
    )


def _is_mistral(file: Path) -> bool:
    return file.is_file() and hashlib.sha256(file.read_bytes()).hexdigest() == MISTRAL_SHA256


def _agree(a: Tokenizer, b: Tokenizer) -> bool:
    """Whether two tokenizers, perhaps in other file formats, have the same ids as far as a probe shows."""
    same = (a.vocab_size, a.bos, a.eos) == (b.vocab_size, b.bos, b.eos)
    return same and a.encode(PROBE).tolist() == b.encode(PROBE).tolist()


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
