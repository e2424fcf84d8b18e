"""Random keys: every one is a function of (seed, purpose, index), so none is carried, split or saved."""

import enum

import jax
from jaxtyping import Array, Integer, Key


class Purpose(enum.IntEnum):
    """What a key is for. The numbers are part of the format: a resumed run must find the same ones."""

    INIT = 0
    DROPOUT = 1
    """The index is that of the sequence in the stream of training sequences."""
    SAMPLE = 2
    """The index is that of the generated sequence."""
    GROW = 3
    """Layers drawn when a model grows; the index is the step."""
    LORA = 4
    """The first values of adapters."""
    LORA_DROPOUT = 5
    """Of what adapters are given; the index is as for DROPOUT."""


def make_key(
    seed: int | Integer[Array, ""], purpose: Purpose, index: int | Integer[Array, ""] = 0
) -> Key[Array, ""]:
    """The key of (seed, purpose, index). Works inside a compiled function, on traced seeds and indices."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), purpose), index)
