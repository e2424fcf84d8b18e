"""A ratio of sums over documents, such as bits per byte, and its standard error."""

import math

import numpy as np
from jaxtyping import Float


def ratio_of_sums(values: Float[np.ndarray, " N"], weights: Float[np.ndarray, " N"]) -> tuple[float, float]:
    """sum(values) / sum(weights) of N documents, and its standard error over documents, to first order."""
    ratio, n = values.sum() / weights.sum(), len(values)
    spread = ((values - ratio * weights) ** 2).sum() * n / max(n - 1, 1)
    return float(ratio), float(math.sqrt(spread) / weights.sum())
