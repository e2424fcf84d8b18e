"""Checkpoints of a run here: a folder of steps, each complete and proved by its manifest, or not there.

    checkpoints/00000120/manifest.json       core.checkpoint.manifest: counters, settings, files' sha256
    checkpoints/00000120/state.safetensors   parameters, both moments, updates counted by the optimizer

What training changes is in it, float32, and nothing pickled; of a LoRA run that is the adapters, and the
model beneath is the folder it started from. Random numbers have no state: they are functions of the seed.
"""

import dataclasses
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from core.checkpoint.checkpointer import differing_leaves
from core.checkpoint.manifest import Manifest, load_manifest, seal, verify
from core.checkpoint.steps import Keep, delete_dispensable, remove_unfinished, step_path
from core.errors import UserError
from core.folders import new_folder
from port_torch.export import disk_errors
from port_torch.training.step import TrainStep

STATE = "state.safetensors"
GUARD = "guard/"  # older checkpoints have less of it, or nothing
MOMENTS = ("exp_avg", "exp_avg_sq")


def state_tensors(train_step: TrainStep) -> dict[str, Tensor]:
    """Everything that an update changes, by name, where it lies."""
    optimizer = train_step.optimizer
    tensors = {f"params/{name}": p.detach() for name, p in train_step.parameters.items()}
    for name, p in train_step.parameters.items():
        tensors |= {f"{moment}/{name}": optimizer.state[p][moment] for moment in MOMENTS}
    tensors |= {f"updates/{i}": group["step"] for i, group in enumerate(optimizer.param_groups)}
    return tensors | {f"{GUARD}{name}": tensor for name, tensor in train_step.guard.tensors().items()}


def save(folder: Path, train_step: TrainStep, manifest: Manifest, keep: Keep) -> None:
    """Saves step `manifest.step` into the folder of checkpoints, then deletes those that are not to be kept.

    A step that is there already is left as it is: a run's state is a function of its step.

    Raises:
        UserError: the disk refuses; the checkpoints that are there stay.
    """
    final = step_path(folder, manifest.step)
    if final.exists():
        return
    tensors = {name: tensor.to("cpu").contiguous() for name, tensor in state_tensors(train_step).items()}
    tree = {name: {"shape": list(t.shape), "dtype": str(t.dtype)} for name, t in tensors.items()}
    folder.mkdir(parents=True, exist_ok=True)
    remove_unfinished(folder)
    with new_folder(final) as partial, disk_errors(final):
        partial.mkdir()
        save_file(tensors, partial / STATE)
        seal(partial, dataclasses.replace(manifest, tree=tree))
    delete_dispensable(folder, keep)


def restore(step_dir: Path, train_step: TrainStep) -> Manifest:
    """Puts a saved state in the place of the train_step's own; returns the manifest.

    Raises:
        UserError: a file is damaged, or the state is of another model or trainer.
    """
    verify(step_dir)
    manifest = load_manifest(step_dir)
    here = {
        name: tensor
        for name, tensor in state_tensors(train_step).items()
        if name in manifest.tree or not name.startswith(GUARD)
    }
    differing = differing_leaves(manifest.tree, here)
    if differing:
        name, (there, ours) = next(iter(differing.items()))
        raise UserError(
            f"{step_dir} is of another model or trainer: {name} is {there} in the checkpoint and {ours} "
            "here; use the command and the settings it was saved with"
        )
    with safe_open(step_dir / STATE, framework="pt") as opened, torch.no_grad():
        for name, tensor in here.items():
            tensor.copy_(opened.get_tensor(name))
    return manifest
