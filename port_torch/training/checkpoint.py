"""Checkpoints of a run here: a folder of steps, each complete and proved by its manifest, or not there.

    checkpoints/00000120/manifest.json       core.checkpoint.manifest: counters, settings, files' sha256
    checkpoints/00000120/state.safetensors   parameters, moments, updates counted by the optimizer

What training changes is in it, float32, and nothing pickled; of a LoRA run that is the adapters, and the
model beneath is the folder it started from. Random numbers have no state: they are functions of the seed.
A step that JAX saved is read as well (core/checkpoint/torch_state.py says what is what).
"""

import dataclasses
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from core.checkpoint.manifest import TORCH, Manifest, differing_leaves, load_manifest, seal, verify
from core.checkpoint.steps import Keep, delete_dispensable, remove_unfinished, step_path
from core.checkpoint.torch_state import GUARD, STATE, parts_of
from core.errors import UserError
from core.folders import new_folder
from port_torch.export import disk_errors
from port_torch.training.step import TrainStep


def state_tensors(train_step: TrainStep) -> dict[str, Tensor]:
    """Everything that an update changes, by name, where it lies."""
    optimizer = train_step.optimizer
    tensors = {f"params/{name}": p.detach() for name, p in train_step.parameters.items()}
    for name, p in train_step.parameters.items():
        tensors |= {f"{moment}/{name}": tensor for moment, tensor in optimizer.state[p].items()}
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
    """Puts a saved state, of either engine, in the place of the train_step's own; returns the manifest.

    Raises:
        UserError: a file is damaged, or the state is of another model or optimizer.
    """
    verify(step_dir)
    manifest = load_manifest(step_dir)
    tree = manifest.tree if manifest.engine == TORCH else tree_of_jax(manifest.tree)
    here = {
        name: tensor
        for name, tensor in state_tensors(train_step).items()
        if name in tree or not name.startswith(GUARD)
    }
    differing = differing_leaves(tree, here)
    if differing:
        name, (there, ours) = next(iter(differing.items()))
        raise UserError(
            f"{step_dir} is of another model or trainer: {name} is {there} in the checkpoint and {ours} "
            "here; use the command and the settings it was saved with"
        )
    with torch.no_grad():
        if manifest.engine == TORCH:
            with safe_open(step_dir / STATE, framework="pt") as opened:
                for name, tensor in here.items():
                    tensor.copy_(opened.get_tensor(name))
        else:
            restore_from_jax(step_dir, manifest, here)
    return manifest


def tree_of_jax(tree: dict[str, Any]) -> dict[str, Any]:
    """What the tree of a manifest that JAX wrote is in PyTorch.

    Raises:
        UserError: PyTorch has nothing like one of its leaves.
    """
    parts = (part for path, leaf in tree.items() for part in parts_of(path, leaf["shape"]))
    return {part.name: part._asdict() for part in parts}


def restore_from_jax(step_dir: Path, manifest: Manifest, here: dict[str, Tensor]) -> None:
    """Copies what JAX saved into the tensors of those names."""
    import jax  # slow, and only such a checkpoint needs it

    from core.checkpoint.checkpointer import read_leaves

    jax.config.update("jax_platforms", "cpu")  # a GPU is PyTorch's
    leaves = {
        path: jax.ShapeDtypeStruct(leaf["shape"], leaf["dtype"]) for path, leaf in manifest.tree.items()
    }
    for path, array in read_leaves(step_dir, leaves).items():
        whole = torch.from_dlpack(array)
        for part in parts_of(path, array.shape):
            one = whole if part.layer is None else whole[part.layer]
            here[part.name].copy_(one.T if part.transposed else one)
