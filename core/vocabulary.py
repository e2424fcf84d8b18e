"""Room for new tokens in a model: rows added to its embedding, and to its head where that is not tied."""

import dataclasses

import numpy as np

from core.config import ModelConfig
from core.leaves import Leaf, model_leaves

MULTIPLE = 64
"""A vocabulary that has to grow is padded to a multiple, at which matrix products are fast."""


def with_room(config: ModelConfig, n_ids: int) -> ModelConfig:
    """The model with rows for so many token ids; itself if it has them, padded, already."""
    if n_ids <= config.vocab_size:
        return config
    return dataclasses.replace(config, vocab_size=-(-n_ids // MULTIPLE) * MULTIPLE)


def vocabulary_leaves(config: ModelConfig) -> list[tuple[Leaf, int]]:
    """The leaves that have a row for every id, each with the axis of the ids."""
    return [(leaf, leaf.axes.index("vocab")) for leaf in model_leaves(config) if "vocab" in leaf.axes]


def with_rows(array: np.ndarray, axis: int, known: int, size: int) -> np.ndarray:
    """The array with `size` rows along an axis; those behind the first `known` are the mean of these.

    A mean gives a new token about the score that any token has at a place (Hewitt 2021), where a random row
    could be the likeliest token of all. Rows of the padding that no token had are begun anew, too.
    """
    held = np.take(array, np.arange(known), axis)
    mean = held.mean(axis, keepdims=True, dtype=np.float64).astype(array.dtype)
    return np.concatenate([held, np.repeat(mean, size - known, axis)], axis)
