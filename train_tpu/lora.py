"""LoRA (core/lora.py) in JAX: adapters are parameters of their own, and those of the model stay as they are.

    layers/attn/q/lora_a [L, in, rank]      drawn evenly from +-1 / sqrt(in), as peft does
    layers/attn/q/lora_b [L, rank, out]     zero: at first they add nothing

A checkpoint of such a run holds them, their moments, and under `params` the model with them merged: whoever
opens a run finds a whole model. A resume takes the adapters, and the model beneath from where the run began.
"""

import functools
import operator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import unflatten_dict
from jaxtyping import Array, Integer

from core.config import ModelConfig
from core.keys import Purpose, make_key
from core.lora import MAPS, LoraConfig
from core.model import Adapter, Params

A, B = "lora_a", "lora_b"


class AdaptedState(NamedTuple):
    """What a checkpoint of adapters holds: a training state, and the model that they make."""

    params: Params
    adapters: Params
    opt_state: optax.OptState
    guard: Any


def init_adapters(config: LoraConfig, model: ModelConfig, seed: int | Integer[Array, ""]) -> Params:
    """The adapters that a run of this seed begins with; a map's do not depend on which others have some.

    Raises:
        UserError: the model lacks a map that the settings name.
    """
    adapters: Params = {}
    key = make_key(seed, Purpose.LORA)
    for name in config.targets(model):
        leaf, number = MAPS[name], list(MAPS).index(name)
        n_layers, n_in, n_out = leaf.shape(model)
        shape, bound = (n_layers, n_in, config.rank), n_in**-0.5
        a = jax.random.uniform(jax.random.fold_in(key, number), shape, minval=-bound, maxval=bound)
        adapters[f"{leaf.module}/{A}"] = a
        adapters[f"{leaf.module}/{B}"] = jnp.zeros((n_layers, config.rank, n_out))
    return unflatten_dict(adapters, sep="/")


def adapters_for(
    config: LoraConfig,
    model: ModelConfig,
    adapters: Params,
    seed: Integer[Array, ""],
    index: Integer[Array, " B"],
) -> dict[str, Adapter]:
    """The adapters as `core.model.forward` takes them in training.

    Args:
        seed: the run's.
        index: each row's number in the stream of training sequences, which its dropout masks are drawn from.
    """
    rows = jax.vmap(functools.partial(make_key, seed, Purpose.LORA_DROPOUT))(index)
    of_layer = jax.vmap(jax.vmap(jax.random.fold_in, (0, None)), (None, 0))
    found = {}
    for name in config.targets(model):
        path, number = MAPS[name].module, list(MAPS).index(name)
        pair, keys = module_of(adapters, path), None
        if config.dropout > 0:
            keys = of_layer(rows, jnp.arange(model.n_layers) * len(MAPS) + number)
        found[path] = Adapter(pair[A], pair[B] * (config.alpha / config.rank), keys, config.dropout)
    return found


def merged(config: LoraConfig, model: ModelConfig, params: Params, adapters: Params) -> Params:
    """The model's parameters with what the adapters add."""
    whole = jax.tree.map(lambda leaf: leaf, params)  # dicts of its own
    for name in config.targets(model):
        path = MAPS[name].module
        module, pair = module_of(whole, path), module_of(adapters, path)
        added = jnp.einsum("lir,lro->lio", pair[A], pair[B], precision="highest")
        module["kernel"] = module["kernel"] + added * (config.alpha / config.rank)
    return whole


def module_of(tree: Params, path: str) -> Params:
    """What a tree has of a module, by its path."""
    return functools.reduce(operator.getitem, path.split("/"), tree)
