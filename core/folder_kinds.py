"""What a folder is, by what lies in it; and which command takes it, where another was given it."""

import enum
import shlex
from pathlib import Path

from core.checkpoint.manifest import EXPORT_MANIFEST, MANIFEST
from core.checkpoint.steps import list_steps, step_path
from core.cli import command
from core.errors import UserError
from core.hub_models import is_hub_name, parse

DATASET = "dataset.json"  # of prepared data
TORCH_STATE = "state.safetensors"  # of a checkpoint of port_torch
RESULT = "model"  # of a run of port_torch: the folder with its model


class Kind(enum.Enum):
    """What the commands make, and what they take."""

    JAX = "a checkpoint of train_tpu, or a run with checkpoints"
    TORCH = "a training run of port_torch"
    WEIGHTS = "a folder of weights for PyTorch"
    DATA = "prepared data"
    OTHER = "none of these"


def kind_of(path: Path) -> Kind:
    """What a folder is. Nothing is verified: whoever opens it does that."""
    if (path / DATASET).exists():
        return Kind.DATA
    for folder in (path / "checkpoints", path):
        steps = list_steps(folder)
        step_dir = step_path(folder, steps[-1]) if steps else folder
        if (step_dir / TORCH_STATE).exists():
            return Kind.TORCH
        if steps or (step_dir / MANIFEST).exists():
            return Kind.JAX
    is_model = (path / EXPORT_MANIFEST).exists() or any(path.glob("*.safetensors"))
    return Kind.WEIGHTS if is_model else Kind.OTHER


IMPORT = "import it first, with `python -m port_torch.import_checkpoint {path} CHECKPOINT`"
# What a folder was given for, its kind -> what to do instead.
ADVICE = {
    ("generate", Kind.JAX): "use `python -m core.generate {path}`",
    ("generate", Kind.WEIGHTS): "use `python -m port_torch.generate {path}`",
    ("evaluate", Kind.WEIGHTS): "use `python -m eval.run {path}`",
    ("convert", Kind.WEIGHTS): "it is an exported folder already",
    ("grow", Kind.WEIGHTS): IMPORT,
    ("start", Kind.WEIGHTS): IMPORT,
    ("start", Kind.JAX): "export it first, with `python -m port_torch.convert {path} FOLDER`",
    ("import", Kind.WEIGHTS): "use `python -m port_torch.import_checkpoint {path} CHECKPOINT`",
    ("import", Kind.JAX): "it needs no import; give it to `train_tpu.run --init-from` as it is",
}


def require_kind(path: Path, purpose: str, *kinds: Kind) -> None:
    """A UserError that names the right command where `path` is of another kind than those that are taken.

    A folder of no known kind passes: whoever opens it says what it lacks. A name on the Hugging Face Hub is
    of weights, and no one is asked for it.

    Args:
        purpose: what it was given for, as `ADVICE` has it.
    """
    if is_hub_name(path):
        parse(path)  # refuses a misspelt one
        kind = Kind.WEIGHTS
    else:
        kind = kind_of(path)
    if kind in (*kinds, Kind.OTHER):
        return
    what = f"{path} is {kind.value}"
    if kind is Kind.DATA:
        raise UserError(f"{what}: train on it with `{command('train_tpu.run', '--data', path)}`")
    if kind is Kind.TORCH:
        run = next(parent for parent in (path, *path.absolute().parents) if (parent / "checkpoints").is_dir())
        path, kind = run / RESULT, Kind.WEIGHTS
        if not path.is_dir():
            raise UserError(f"{what} without its model yet: run its command to the end, which writes {path}")
        what += f", whose model is {path}"
    raise UserError(f"{what}: {ADVICE[purpose, kind].format(path=shlex.quote(str(path)))}")
