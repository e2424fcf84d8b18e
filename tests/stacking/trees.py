"""A whole state grown in memory: `stacking.transform.grow_leaf` of every leaf."""

from typing import Any

import jax

from core.leaves import path_names
from stacking.plan import Plan
from stacking.transform import grow_leaf, parameter_of


def grow(tree: Any, plan: Plan, *, reset_optimizer: bool = False, fresh: Any = None) -> Any:
    """The tree of the grown model: of parameters, moments or a `TrainState`.

    fresh: newly initialised parameters of the grown model, where the plan has fresh layers.
    """
    drawn = {path_names(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(fresh)}

    def one(path: tuple, leaf: jax.Array) -> jax.Array:
        names = path_names(path)
        return grow_leaf(
            names, leaf, plan, reset_optimizer=reset_optimizer, fresh=drawn.get(parameter_of(names))
        )

    return jax.tree_util.tree_map_with_path(one, tree)
