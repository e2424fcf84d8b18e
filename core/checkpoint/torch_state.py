"""The state of a run as PyTorch saves it, leaf by leaf of the state in JAX. Nothing here needs PyTorch.

    the leaf in JAX                                the tensors in PyTorch
    params/layers/attn/q/kernel [L, in, out]       params/layers.0.attn.q.weight [out, in], one for each layer
    opt_state/0/mu/norm/scale                      exp_avg/norm.weight
    opt_state/0/nu/norm/scale                      exp_avg_sq/norm.weight
    opt_state/0/count                              updates/0 and updates/1, one for each group of parameters
    opt_state/inner_states/muon/.../count          updates/2
    guard/losses                                   guard/losses
    opt_state/.../ns_coeffs                        nothing: Muon's constants

Both engines read the other's checkpoints by this table.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import safe_open

from core.leaves import find_leaf

STATE = "state.safetensors"  # of a checkpoint that PyTorch wrote
GUARD = "guard/"  # older checkpoints of PyTorch have less of it, or nothing
ROLES = {"params": "params", "mu": "exp_avg", "nu": "exp_avg_sq"}
CONSTANTS = {"ns_coeffs": (3.4445, -4.7750, 2.0315)}  # that optax keeps in the state, for Muon
ADAM, MUON = (0, 1), (2,)  # groups of parameters: those that decay and the others, and Muon's


class Part(NamedTuple):
    """A tensor of PyTorch that is a leaf of JAX, or one layer of it."""

    name: str
    shape: list[int]
    dtype: str
    layer: int | None
    """Its index on the leaf's first axis; None for a whole leaf."""
    transposed: bool


def parts_of(path: str, shape: Iterable[int]) -> list[Part]:
    """The tensors that a leaf of JAX's state is in PyTorch, by its path and shape; none for a constant.

    Raises:
        ValueError: PyTorch has nothing like it.
    """
    names, shape = path.split("/"), list(shape)
    if path.startswith(GUARD):
        return [Part(path, shape, "torch.float32" if shape else "torch.int64", None, False)]
    if names[-1] in CONSTANTS:
        return []
    if names[-1] == "count":
        groups = MUON if "muon" in names else ADAM
        return [Part(f"updates/{group}", [], "torch.float32", None, False) for group in groups]
    leaf = find_leaf(names)
    role = ROLES.get(names[-len(leaf.path.split("/")) - 1]) if leaf else None
    if role is None:
        raise ValueError(f"{path} has no counterpart in PyTorch")
    of_one = shape[1:] if leaf.in_layers else shape
    of_one = of_one[::-1] if leaf.transposed else of_one
    layers: Iterable[int | None] = range(shape[0]) if leaf.in_layers else (None,)
    return [
        Part(f"{role}/{leaf.torch_name(layer)}", of_one, "torch.float32", layer, leaf.transposed)
        for layer in layers
    ]


def as_saved(wanted: dict[str, Any], tree: dict[str, Any]) -> dict[str, Part]:
    """What a checkpoint of PyTorch whose manifest lists `tree` must hold for these leaves, by name.

    wanted: leaves of JAX with their shapes, by path.
    """
    parts = {part.name: part for path, leaf in wanted.items() for part in parts_of(path, leaf.shape)}
    return {name: part for name, part in parts.items() if name in tree or not name.startswith(GUARD)}


def read(step_dir: Path, wanted: dict[str, Any]) -> list[np.ndarray]:
    """The wanted leaves of JAX, in their order, out of a checkpoint that PyTorch wrote.

    wanted: leaves with shape and dtype, by path. What an older checkpoint lacks of the guard is zero.
    """
    with safe_open(step_dir / STATE, framework="numpy") as file:
        held = set(file.keys())

        def whole(path: str, shape: tuple[int, ...]) -> np.ndarray:
            parts = parts_of(path, shape)
            if not parts:
                return np.array(CONSTANTS[path.split("/")[-1]])
            return tensor(parts[0]) if parts[0].layer is None else np.stack([tensor(part) for part in parts])

        def tensor(part: Part) -> np.ndarray:
            if part.name not in held and part.name.startswith(GUARD):
                return np.zeros(part.shape, np.float32)
            array = file.get_tensor(part.name)
            return array.T if part.transposed else array

        return [
            np.ascontiguousarray(whole(path, leaf.shape), leaf.dtype).reshape(leaf.shape)
            for path, leaf in wanted.items()
        ]
