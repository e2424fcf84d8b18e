"""AdamW and Muon for parameters stacked over layers.

Which leaf decays and which Muon takes is told from its path (core/leaves.py): leaves have a leading axis of
layers, so that rules by rank, as most libraries have them, would decay the norm scales and hand the embedding
to Muon. The learning rate is not part of the optimizer: it is an input of the compiled step.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float

from core.leaves import get_leaf, path_names
from core.model import Params
from core.ops import Kernels
from core.run.schedule import OptimizerConfig
from core.sharding import is_parallel, per_device, split_axes
from train_tpu.lora import A, B
from train_tpu.muon import muon


def apply_gradients(
    config: OptimizerConfig,
    gradients: Params,
    norm: Float[Array, ""],
    params: Params,
    opt_state: optax.OptState,
    lr: Float[Array, ""],
    ok: Bool[Array, ""],
    dtype: str = "float32",
    mesh: Mesh | None = None,
    kernels: Kernels | None = None,
) -> tuple[Params, optax.OptState]:
    """Parameters and the optimizer's state after an update; as they were where `ok` is false.

    Args:
        norm: of all gradients, which are clipped by it.
        dtype, mesh: as `make_optimizer` has them.
        kernels: what updates the leaves that AdamW has, in their memory.
    """
    shrink = config.clip / jnp.maximum(norm, config.clip) if config.clip > 0 else jnp.float32(1)
    of_kernels: dict[tuple, Array] = {}
    if kernels is not None:
        of_kernels, opt_state = _adamw_on_kernels(
            config, gradients, params, opt_state, (lr, shrink, ok), kernels, mesh
        )
        if config.optimizer == "adamw":
            return _replaced(params, of_kernels), opt_state
    if config.clip > 0:
        gradients = jax.tree.map(lambda g: g * shrink, gradients)
    optimizer = make_optimizer(config, dtype, mesh, skips_adam=kernels is not None)
    updates, new_state = optimizer.update(gradients, opt_state, params)
    new_params = jax.tree.map(lambda p, u: p + lr * u, params, updates)
    new_params, opt_state = jax.tree.map(
        lambda new, old: jnp.where(ok, new, old), (new_params, new_state), (params, opt_state)
    )
    return _replaced(new_params, of_kernels), opt_state


def _adamw_on_kernels(
    config: OptimizerConfig,
    gradients: Params,
    params: Params,
    opt_state: optax.OptState,
    controls: tuple[Array, Array, Array],
    kernels: Kernels,
    mesh: Mesh | None,
) -> tuple[dict[tuple, Array], optax.OptState]:
    """AdamW of the leaves whose moments the state has, by their paths; each device updates its parts of them.

    controls: learning rate, what gradients are multiplied by, whether there is an update.
    """
    lr, shrink, ok = controls
    adam, with_adam = _adam_state(config, opt_state)
    scalars = (lr * config.adamw_lr_ratio, (adam.count + 1).astype(jnp.float32), shrink, ~ok)
    p, g, mu, nu = (
        dict(jax.tree_util.tree_leaves_with_path(t)) for t in (params, gradients, adam.mu, adam.nu)
    )
    new_params: dict[tuple, Array] = {}
    for decays in (True, False):
        paths = [path for path in mu if _decays(path) is decays]
        if not paths:
            continue
        specs = [P()] * len(paths)
        if is_parallel(mesh):
            specs = [split_axes(path_names(path), p[path].shape, mesh.shape) for path in paths]
        settings = (config.beta1, config.beta2, config.eps, config.weight_decay if decays else 0.0)

        def update(leaves: tuple, scalars: tuple, settings: tuple = settings) -> tuple:
            return kernels.adamw(*leaves, *scalars, *settings)

        leaves = tuple([tree[path] for path in paths] for tree in (p, g, mu, nu))
        updated = per_device(mesh, update, ((specs,) * 4, P()), (specs,) * 3)(leaves, scalars)
        for tree, values in zip((new_params, mu, nu), updated, strict=True):
            tree.update(zip(paths, values, strict=True))
    count = adam.count + ok.astype(adam.count.dtype)
    adam = optax.ScaleByAdamState(count, _replaced(adam.mu, mu), _replaced(adam.nu, nu))
    return new_params, with_adam(adam)


def _replaced(tree: Any, leaves: dict[tuple, Array]) -> Any:
    """The tree with other leaves at the paths that there are others for."""
    return jax.tree_util.tree_map_with_path(lambda path, leaf: leaves.get(path, leaf), tree)


def _adam_state(
    config: OptimizerConfig, opt_state: Any
) -> tuple[optax.ScaleByAdamState, Callable[[optax.ScaleByAdamState], Any]]:
    """Adam's part of the optimizer's state, and what puts another in its place."""
    if config.optimizer == "adamw":
        return opt_state[0], lambda adam: (adam, *opt_state[1:])
    masked = opt_state.inner_states["adam"]
    chain = masked.inner_state

    def with_adam(adam: optax.ScaleByAdamState) -> Any:
        inner = masked._replace(inner_state=(adam, *chain[1:]))
        return opt_state._replace(inner_states={**opt_state.inner_states, "adam": inner})

    return chain[0], with_adam


def make_optimizer(
    config: OptimizerConfig, dtype: str = "float32", mesh: Mesh | None = None, skips_adam: bool = False
) -> optax.GradientTransformation:
    """Gradients to updates for a learning rate of 1: the step multiplies them by the rate and adds them.

    Clipping is not in it: the step needs the global norm anyway, and clips by it.

    Args:
        dtype, mesh: the type of Muon's products, and the devices that share them (train_tpu/muon.py).
        skips_adam: the updates of Adam's leaves are zero, and its state stays as it is.
    """
    adam = optax.chain(
        optax.scale_by_adam(config.beta1, config.beta2, config.eps),
        optax.add_decayed_weights(config.weight_decay, _by_path(_decays)),
        optax.scale(-config.adamw_lr_ratio),
    )
    if config.optimizer == "adamw":
        return adam
    matrices = optax.chain(
        muon(config.momentum, dtype, mesh),
        optax.add_decayed_weights(config.weight_decay),
        optax.scale(-1.0),
    )
    if skips_adam:
        adam = optax.GradientTransformation(
            adam.init, lambda updates, state, _: (optax.tree.zeros_like(updates), state)
        )
    labels = _by_path(lambda path: "muon" if get_leaf(path_names(path)).is_layer_kernel else "adam")
    return optax.partition({"muon": matrices, "adam": adam}, labels)


def _decays(path: tuple) -> bool:
    """Whether a leaf decays: matrices, those of adapters included."""
    names = path_names(path)
    return names[-1] in (A, B) or get_leaf(names).is_matrix


def _by_path(rule: Callable[[tuple], Any]) -> Callable[[Any], Any]:
    return lambda tree: jax.tree_util.tree_map_with_path(lambda path, _: rule(path), tree)
