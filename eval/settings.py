"""What the commands are given: model, device and names of tasks; checked before anything slow is imported."""

from pathlib import Path
from typing import Literal

from core.checkpoint.manifest import MANIFEST, load_manifest
from core.checkpoint.steps import find_step, list_steps, run_folder
from core.errors import UserError
from core.folder_kinds import Kind, require_kind
from core.hub_models import is_hub_name, origin, parse_hub_name

Device = Literal["auto", "cpu", "cuda"]


def require_model(path: Path, device: Device = "auto") -> None:
    """A UserError where there is no model, or where --device does not apply to it."""
    if not is_hub_name(path) and not path.exists():
        raise UserError(
            f"{path} is not there: give a run, one checkpoint in it, an exported folder, or hf:OWNER/NAME "
            "for a model on the Hugging Face Hub"
        )
    require_kind(path, "evaluate", Kind.CHECKPOINT, Kind.WEIGHTS)
    if is_checkpoint(path) and device != "auto":
        raise UserError(
            f"{path} is a checkpoint, which JAX runs on the devices it finds: set JAX_PLATFORMS=cpu or "
            "cuda instead of --device"
        )


def is_checkpoint(path: Path) -> bool:
    """Whether `path` is a run folder, its folder of checkpoints, or one of them."""
    return (path / "checkpoints").is_dir() or (path / MANIFEST).exists() or bool(list_steps(path))


def results_folder(path: Path) -> Path:
    """Default folder of results: eval/step-N in the run, or FOLDER-eval next to a folder or a checkpoint that
    lies in no run; for a model of the Hugging Face Hub NAME-eval in the working directory, as no one looks
    for it in the cache."""
    if is_checkpoint(path):
        step_dir = find_step(path).absolute()
        run = run_folder(step_dir)
        if run != step_dir:
            return run / "eval" / f"step-{load_manifest(step_dir).step}"
        path = step_dir
    if published := origin(path):
        return Path(f"{parse_hub_name(Path(published)).repository.partition('/')[2]}-eval").absolute()
    return path.absolute().with_name(f"{path.absolute().name}-eval")


def task_names(text: str) -> list[str]:
    """The names in a list with commas between, each once; a UserError where there is none."""
    names = list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    if not names:
        raise UserError(f"{text!r} does not name a task")
    return names
