"""AdamW and Muon for parameters stacked over layers, and the learning-rate schedules.

Which leaf decays and which is a matrix is told from its path: leaves have a leading axis of layers, so
that rules by rank, as most libraries have them, would decay the norm scales and hand the embedding to
Muon. The learning rate is not part of the optimizer: it is an input of the compiled step.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import optax
from optax.contrib import MuonDimensionNumbers, scale_by_muon

from core import checks


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """The update rule and the course of the learning rate."""

    optimizer: Literal["adamw", "muon"] = "muon"
    """Muon moves the layers' matrices; AdamW moves embeddings, norms, biases and the head."""
    lr: float = 1e-3
    """Peak learning rate."""
    weight_decay: float = 0.1
    """Decoupled, of matrices and tables; never of norms and biases."""
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    clip: float = 1.0
    """Largest global norm of a gradient; larger ones are scaled down to it. 0 turns it off."""
    momentum: float = 0.95
    """Muon's."""
    schedule: Literal["cosine", "wsd"] = "wsd"
    """Cosine to the last step, or warmup-stable-decay: constant, then linear over the last steps."""
    warmup: int = 200
    """Steps in which the learning rate rises linearly to its peak."""
    decay: float = 0.2
    """wsd: the part of all steps that the final decay takes."""
    final_lr: float = 0.0
    """Learning rate at the end, as a part of the peak."""
    schedule_start: int = 0
    """Step at which the schedule begins, warmup and all. `stacking.grow --schedule restart` sets it."""
    rewarm: int = 0
    """Steps from rewarm_at on in which the rate rises linearly to the schedule's. Growing sets both."""
    rewarm_at: int = 0

    def __post_init__(self) -> None:
        checks.positive(**checks.fields(self, "lr", "eps"))
        checks.below_one(**checks.fields(self, "beta1", "beta2", "momentum"))
        checks.fractions(**checks.fields(self, "decay", "final_lr"))
        checks.not_negative(**checks.fields(self, "clip", "weight_decay"))
        checks.counts(0, **checks.fields(self, "warmup", "schedule_start", "rewarm", "rewarm_at"))


def learning_rate(config: OptimizerConfig, step: int, steps: int) -> float:
    """The rate of update `step` (0-based) of `steps`: the schedule's, below it while re-warming."""
    rate = _scheduled(config, step - config.schedule_start, steps - config.schedule_start)
    if step >= config.rewarm_at and config.rewarm:
        rate *= min(1.0, (step - config.rewarm_at + 1) / config.rewarm)
    return rate


def _scheduled(config: OptimizerConfig, step: int, steps: int) -> float:
    """Linear warmup, then cosine, or constant with a linear decay at the end; steps of the schedule."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    low = config.lr * config.final_lr
    if config.schedule == "cosine":
        done = (step - config.warmup) / max(1, steps - config.warmup)
        return low + (config.lr - low) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
    decay_steps = round(config.decay * steps)
    left = max(0, steps - step)
    return config.lr if left >= decay_steps else low + (config.lr - low) * left / decay_steps


def path_names(path: tuple) -> tuple[str, ...]:
    """A leaf's path as names: ("layers", "attn", "q", "kernel")."""
    return tuple(str(getattr(key, "key", getattr(key, "name", key))) for key in path)


def is_decayed(path: tuple) -> bool:
    """Matrices and tables decay; norm scales and biases do not."""
    return path_names(path)[-1] in ("kernel", "table")


def is_layer_matrix(path: tuple) -> bool:
    """What Muon orthogonalises: the kernels [layers, in, out] inside the layers."""
    names = path_names(path)
    return names[0] == "layers" and names[-1] == "kernel"


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """Gradients to updates for a learning rate of 1: the step multiplies them by the rate and adds them.

    Clipping is not in it: the step needs the global norm anyway, and clips by it.
    """
    adam = optax.chain(
        optax.scale_by_adam(config.beta1, config.beta2, config.eps),
        optax.add_decayed_weights(config.weight_decay, _by_path(is_decayed)),
        optax.scale(-1.0),
    )
    if config.optimizer == "adamw":
        return adam
    # Each layer's matrix for itself: input and output are axes 1 and 2, axis 0 is a batch. RMS 0.2 gives
    # updates the size of Adam's, so that one learning rate serves both (Liu et al. 2025, Moonlight).
    # optax.contrib.muon is not used whole: its Adam decays norms and biases, and is Nesterov's.
    dimensions = _by_path(lambda _: MuonDimensionNumbers(reduction_axis=1, output_axis=2))
    matrices = optax.chain(
        scale_by_muon(beta=config.momentum, weight_dimension_numbers=dimensions),
        optax.stateless(_scale_like_adam),
        optax.add_decayed_weights(config.weight_decay),
        optax.scale(-1.0),
    )
    labels = _by_path(lambda path: "muon" if is_layer_matrix(path) else "adam")
    return optax.partition({"muon": matrices, "adam": adam}, labels)


def _scale_like_adam(updates: Any, _: Any) -> Any:
    """Orthogonalised [layers, in, out] updates to an RMS of 0.2, whatever the shape of the matrix."""
    return jax.tree.map(lambda u: u * 0.2 * max(u.shape[1:]) ** 0.5, updates)


def _by_path(rule: Callable[[tuple], Any]) -> Callable[[Any], Any]:
    return lambda tree: jax.tree_util.tree_map_with_path(lambda path, _: rule(path), tree)
