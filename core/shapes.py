"""Shapes that do not fit: one sentence with the module, its axes by name, what was expected and found.

For someone who edits core/model.py: JAX's own error is a traceback that ends in the product of two matrices.
"""

import re
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

from core.config import ModelConfig
from core.errors import UserError
from core.leaves import LEAVES, find_leaf, model_leaves, path_names

ABOUT_SHAPES = re.compile(r"\b(shapes?|dimensions?|sizes?|rank|axis)\b", re.IGNORECASE)  # what JAX says then


class ShapeError(UserError):
    """What a module was given does not fit it."""

    def __init__(self, names: Sequence[str], module: Any, inputs: Sequence[Any], error: Exception):
        """names: of the module, within the one that called it last."""
        super().__init__()
        self.names, self._module, self._inputs, self._error = list(names), module, inputs, error

    def __str__(self) -> str:
        names = list(filter(None, self.names))
        if any(leaf.in_layers and names[:1] == leaf.module.split("/")[1:2] for leaf in LEAVES):
            names.insert(0, "layers")
        path = "/".join(names)
        given = " and ".join(str(list(x.shape)) for x in self._inputs if hasattr(x, "shape"))
        frames = traceback.extract_tb(self._error.__traceback__)
        ours = [frame for frame in frames if "site-packages" not in frame.filename]
        line = f"{Path(ours[-1].filename).name}:{ours[-1].lineno}"
        said = str(self._error).split("\n")[0].rstrip(".: ")
        where = f"{path or 'the decoder'}{self._weights()}"
        return f"{where} does not fit what it is given, {given}: {said} ({line})"

    def _weights(self) -> str:
        """The module's own matrices, with the names of their axes."""
        found = []
        for kind in ("kernel", "table", "scale"):
            value = getattr(self._module, kind, None)
            leaf = find_leaf([*self.names[-1:], kind])
            if value is not None and leaf is not None:
                axes = leaf.axes[1:] if leaf.in_layers else leaf.axes
                found.append(f" {kind} [{', '.join(axes)}] of {list(value.shape)}")
        return ",".join(found)


def naming_shapes(name: str, part: Callable, *inputs: Any) -> Any:
    """`part(*inputs)`; an error of JAX about shapes becomes a `ShapeError` with the name of the part."""
    try:
        return part(*inputs)
    except ShapeError as error:
        error.names.insert(0, name)
        raise
    except (TypeError, ValueError) as error:
        if not ABOUT_SHAPES.search(str(error)):
            raise
        raise ShapeError([name], getattr(part, "__self__", part), inputs, error) from error


def named_axes(path: str) -> str:
    """The path of a parameter, or of what the optimizer has of one, with the names of its axes."""
    leaf = find_leaf(path.split("/"))
    return path if leaf is None else f"{path} [{', '.join(leaf.axes)}]"


def require_shapes(config: ModelConfig, params: Any) -> None:
    """Refuses parameters, arrays or their shapes, that are not those of core/leaves.py.

    Raises:
        UserError: one is too many, is missing, or has another shape; it is named with its axes.
    """
    found = {"/".join(path_names(path)): x for path, x in jax.tree_util.tree_leaves_with_path(params)}
    expected = {leaf.path: leaf.shape(config) for leaf in model_leaves(config)}
    for path in [*expected, *(path for path in found if path not in expected)]:
        here = tuple(found[path].shape) if path in found else None
        if here == expected.get(path):
            continue
        if here is None:
            raise UserError(f"{named_axes(path)} of shape {list(expected[path])} is missing in the model")
        if path not in expected:
            raise UserError(f"{path} of shape {list(here)} is a parameter without a line in core/leaves.py")
        turned = ", transposed" if here[:-2] + here[:-3:-1] == expected[path] else ""
        raise UserError(
            f"{named_axes(path)}: expected {list(expected[path])}, found {list(here)}{turned}; "
            "core/leaves.py says what core/model.py computes with"
        )
