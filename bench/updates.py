"""What every row of a training benchmark is given: the same tokens in the same order, and one learning rate.

The tokens are random, of a fixed seed, and frequent as words are (the n-th id 1/n times as often as the
first): what there is to learn shows within a few updates, and the embedding's gradient has its hot rows.
"""

import numpy as np

from core.config import ModelConfig

LR = 3e-4
BATCHES = 4
"""Different ones, read in turn."""
WARM_UP = 5
"""Updates before the clock starts: what is compiled is in the first; PyTorch's are recorded in the third."""


def token_batches(model: ModelConfig, batch: int) -> np.ndarray:
    """Ids by Zipf's law, [BATCHES, batch, context + 1]."""
    share = 1 / np.arange(1, model.vocab_size + 1)
    size = BATCHES, batch, model.context + 1
    return np.random.default_rng(0).choice(model.vocab_size, size, p=share / share.sum())
