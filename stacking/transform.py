"""Growing as a pure transform of pytrees: parameters, optimizer moments, or a whole training state.

Every leaf under `layers` has a leading axis [layers], so growing is indexing that axis, for parameters and
moments by the same map. What a leaf is, is told from its path alone: `params/layers/attn/q/kernel` is a
parameter, `.../mu/layers/attn/q/kernel` its first moment (Adam's or Muon's), `.../nu/layers/...` its second.

What the copies start with:

    parameter    copied; zeroed in o and down of an identity block; given anew in a fresh layer
    mu           copied; 0 where the parameter was zeroed or is fresh: it has no past direction
    nu           copied, always: with 0 under a warm counter the first updates would reach 6.6 times the
                 learning rate at beta2 = 0.999
    counters     kept, as the moments are. Both start anew together, when the optimizer is reset, or not at
                 all: kept moments under a counter of 0 would be corrected for a bias that they do not have
    the guard    its window is emptied: losses and gradient norms have another level in another model
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from core.errors import UserError
from core.leaves import get_leaf, path_names
from stacking.plan import Plan

MOMENTS = ("mu", "nu")


def grow(tree: Any, plan: Plan, *, reset_optimizer: bool = False, fresh: Any = None) -> Any:
    """The tree of the grown model. Pure; works under `jax.jit`.

    Args:
        tree: parameters, moments or a `TrainState`: any pytree with our paths.
        reset_optimizer: moments and counters as at the start of training (G_stack's way).
        fresh: newly initialised parameters of the grown model, where the plan has fresh layers.

    Raises:
        UserError: a leaf has another number of layers than the plan.
    """
    drawn = {path_names(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(fresh)}

    def one(path: tuple, leaf: Array) -> Array:
        names = path_names(path)
        return grow_leaf(
            names, leaf, plan, reset_optimizer=reset_optimizer, fresh=drawn.get(parameter_of(names))
        )

    return jax.tree_util.tree_map_with_path(one, tree)


def grow_leaf(
    names: tuple[str, ...],
    leaf: Array,
    plan: Plan,
    *,
    reset_optimizer: bool,
    fresh: Array | None,
) -> Array:
    """One leaf of `grow`: `names` is its path, `fresh` the newly drawn parameter that it belongs to."""
    if names[0] == "guard":
        return leaf if plan.is_noop or names[-1] == "skipped" else jnp.zeros_like(leaf)
    if "layers" not in names:
        is_counter_or_moment = names[-1] == "count" or bool(set(MOMENTS).intersection(names))
        return jnp.zeros_like(leaf) if reset_optimizer and is_counter_or_moment else leaf
    if leaf.ndim == 0 or leaf.shape[0] != plan.n_source:
        raise UserError(
            f"{'/'.join(names)} has the shape {list(leaf.shape)}, but the plan is for {plan.n_source} "
            "layers, which should be its first axis"
        )
    role = role_of(names)
    if role in MOMENTS and reset_optimizer:
        return jnp.zeros((plan.n_layers, *leaf.shape[1:]), leaf.dtype)
    grown = jnp.take(leaf, np.array(plan.sources), axis=0)
    if role != "nu":
        without_past = [layer for layer, how in enumerate(plan.how) if _is_new(how, names)]
        if without_past:
            grown = grown.at[np.array(without_past)].set(0)
    made = [layer for layer, how in enumerate(plan.how) if how == "fresh"]
    if role == "params" and made:
        if fresh is None:
            raise ValueError(f"the plan draws layers anew, and no new {'/'.join(names)} was given")
        grown = grown.at[np.array(made)].set(fresh[np.array(made)].astype(leaf.dtype))
    return grown


def role_of(names: tuple[str, ...]) -> str:
    """What a leaf under `layers` is: "params", "mu" or "nu"."""
    before = names[: names.index("layers")]
    role = before[-1] if before else "params"
    if role not in ("params", *MOMENTS):  # copying it like a parameter could be wrong
        raise ValueError(f"growing has no rule for {'/'.join(names)}")
    return role


def parameter_of(names: tuple[str, ...]) -> tuple[str, ...]:
    """The path, within the parameters, of the parameter that a layer's leaf is or belongs to."""
    return names[names.index("layers") :] if "layers" in names else names


def _is_new(how: str, names: tuple[str, ...]) -> bool:
    return how == "fresh" or (how == "identity" and get_leaf(names).writes_residual)
