"""What a folder is, by what lies in it; and which command takes it, where another was given it."""

import enum
import shlex
from pathlib import Path

from core.checkpoint.manifest import EXPORT_MANIFEST, MANIFEST, TORCH, load_manifest
from core.checkpoint.steps import find_step, list_steps, step_path
from core.cli import command
from core.errors import UserError
from core.hub_models import is_hub_name, parse_hub_name

DATASET = "dataset.json"  # of prepared data
ADAPTER_CONFIG = "adapter_config.json"  # of a LoRA adapter, as peft has it
RESULT = "model"  # of a run of port_torch: the folder with its model


class Kind(enum.Enum):
    """What the commands make, and what they take."""

    CHECKPOINT = "a checkpoint, or a run with checkpoints"
    ADAPTERS = "a LoRA run of port_torch"
    ADAPTER = "a LoRA adapter"
    WEIGHTS = "a folder of weights for PyTorch"
    DATA = "prepared data"
    OTHER = "none of these"


def kind_of(path: Path) -> Kind:
    """What a folder is. Nothing is verified: whoever opens it does that."""
    if (path / DATASET).exists():
        return Kind.DATA
    if (path / ADAPTER_CONFIG).exists():
        return Kind.ADAPTER
    for folder in (path / "checkpoints", path):
        steps = list_steps(folder)
        step_dir = step_path(folder, steps[-1]) if steps else folder
        if steps or (step_dir / MANIFEST).exists():
            return Kind.ADAPTERS if _holds_adapters(step_dir) else Kind.CHECKPOINT
    is_model = (path / EXPORT_MANIFEST).exists() or any(path.glob("*.safetensors"))
    return Kind.WEIGHTS if is_model else Kind.OTHER


def stale_model(run: Path) -> str | None:
    """A note on the model that port_torch wrote into a run folder, where the run has been continued since by
    an engine that does not renew it; None where there is none, or it is of the newest step."""
    model = run / RESULT
    if not model.is_dir() or _is_of(model, run):
        return None
    return (
        f"{model} is of another step than the newest checkpoint: "
        f"`{command('port_torch.convert', run, f'{run}-torch')}` exports that"
    )


def _is_of(model: Path, checkpoint: Path) -> bool:
    """Whether a run's model was made of that checkpoint, of a run the newest: one that was continued has an
    older model."""
    try:
        return load_manifest(model, EXPORT_MANIFEST).step == load_manifest(find_step(checkpoint)).step
    except UserError:  # whoever opens it says so
        return True


def _holds_adapters(step_dir: Path) -> bool:
    try:
        manifest = load_manifest(step_dir)
    except UserError:  # whoever opens it says so
        return False
    # Those of JAX hold the whole model, adapters merged.
    return manifest.engine == TORCH and manifest.config.get("run", {}).get("lora_rank") is not None


IMPORT = "import it first, with `python -m port_torch.import_checkpoint {path} CHECKPOINT`"
MERGE = "merge it into its base first, with `python -m port_torch.merge {path} FOLDER`"
# What a folder was given for, its kind -> what to do instead.
ADVICE = {
    ("generate", Kind.CHECKPOINT): "use `python -m core.generate {path}`",
    ("generate", Kind.WEIGHTS): "use `python -m port_torch.generate {path}`",
    ("chat", Kind.CHECKPOINT): "use `python -m core.generate {path} --chat`",
    ("chat", Kind.WEIGHTS): "use `python -m port_torch.chat {path}`",
    ("evaluate", Kind.WEIGHTS): "use `python -m eval.run {path}`",
    ("convert", Kind.WEIGHTS): "it is an exported folder already",
    ("grow", Kind.WEIGHTS): IMPORT,
    ("start", Kind.WEIGHTS): IMPORT,
    ("replay", Kind.WEIGHTS): "only runs are replayed; give the run folder that it comes from",
    ("gguf", Kind.CHECKPOINT): "export it first, with `python -m port_torch.convert {path} FOLDER`",
    ("start", Kind.CHECKPOINT): "export it first, with `python -m port_torch.convert {path} FOLDER`",
    ("import", Kind.CHECKPOINT): "it needs no import; give it to `train_tpu.run --init-from` as it is",
}


def require_kind(path: Path, purpose: str, *kinds: Kind) -> None:
    """A UserError that names the right command where `path` is of another kind than those that are taken.

    A folder of no known kind passes: whoever opens it says what it lacks. A name on the Hugging Face Hub is
    of weights, and no one is asked for it.

    Args:
        purpose: what it was given for, as `ADVICE` has it.
    """
    if is_hub_name(path):
        parse_hub_name(path)  # refuses a misspelt one
        kind = Kind.WEIGHTS
    else:
        kind = kind_of(path)
    if kind in (*kinds, Kind.OTHER):
        return
    what = f"{path} is {kind.value}"
    if kind is Kind.DATA:
        raise UserError(f"{what}: train on it with `{command('train_tpu.run', '--data', path)}`")
    if kind in (Kind.CHECKPOINT, Kind.ADAPTERS):
        parents = (path, *path.absolute().parents)
        run = next((parent for parent in parents if (parent / "checkpoints").is_dir()), path)
        model = run / RESULT
        there = model.is_dir()
        if there and _is_of(model, path):
            path, kind = model, Kind.WEIGHTS
            what += f", whose model is {path}"
            if kind in kinds:
                raise UserError(f"{what}: give that folder")
        elif kind is Kind.ADAPTERS:
            lack = f"whose model {model} is of another step" if there else "without its model yet"
            raise UserError(f"{what} {lack}: run its command to the end, which writes {model}")
        elif there:
            what += f", whose model {model} is of another step"
    if kind is Kind.ADAPTER:
        raise UserError(f"{what}: {MERGE.format(path=shlex.quote(str(path)))}")
    raise UserError(f"{what}: {ADVICE[purpose, kind].format(path=shlex.quote(str(path)))}")
