"""AdamW and Muon for parameters stacked over layers.

Which leaf decays and which Muon takes is told from its path (core/leaves.py): leaves have a leading axis of
layers, so that rules by rank, as most libraries have them, would decay the norm scales and hand the embedding
to Muon. The learning rate is not part of the optimizer: it is an input of the compiled step.
"""

from collections.abc import Callable
from typing import Any

import jax
import optax
from optax.contrib import MuonDimensionNumbers, scale_by_muon

from core.leaves import Leaf, get_leaf, path_names
from core.run.schedule import OptimizerConfig


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """Gradients to updates for a learning rate of 1: the step multiplies them by the rate and adds them.

    Clipping is not in it: the step needs the global norm anyway, and clips by it.
    """
    adam = optax.chain(
        optax.scale_by_adam(config.beta1, config.beta2, config.eps),
        optax.add_decayed_weights(config.weight_decay, _by_leaf(lambda leaf: leaf.is_matrix)),
        optax.scale(-1.0),
    )
    if config.optimizer == "adamw":
        return adam
    # Each layer's matrix for itself: input and output are axes 1 and 2, axis 0 is a batch. RMS 0.2 gives
    # updates the size of Adam's, so that one learning rate serves both (Liu et al. 2025, Moonlight).
    # optax.contrib.muon is not used whole: its Adam decays norms and biases, and is Nesterov's.
    dimensions = _by_leaf(lambda _: MuonDimensionNumbers(reduction_axis=1, output_axis=2))
    matrices = optax.chain(
        scale_by_muon(beta=config.momentum, weight_dimension_numbers=dimensions),
        optax.stateless(_scale_like_adam),
        optax.add_decayed_weights(config.weight_decay),
        optax.scale(-1.0),
    )
    labels = _by_leaf(lambda leaf: "muon" if leaf.is_layer_kernel else "adam")
    return optax.partition({"muon": matrices, "adam": adam}, labels)


def _scale_like_adam(updates: Any, _: Any) -> Any:
    """Orthogonalised [layers, in, out] updates to an RMS of 0.2, whatever the shape of the matrix."""
    return jax.tree.map(lambda u: u * 0.2 * max(u.shape[1:]) ** 0.5, updates)


def _by_leaf(rule: Callable[[Leaf], Any]) -> Callable[[Any], Any]:
    def of_leaf(path: tuple, _: Any) -> Any:
        return rule(get_leaf(path_names(path)))

    return lambda tree: jax.tree_util.tree_map_with_path(of_leaf, tree)
