"""Two tests of scipy.stats, whose import takes over two seconds in every process of the tests."""

import numpy as np
from scipy import special


def chi_square(counts: np.ndarray, expected: np.ndarray) -> float:
    """Pearson's: the p-value of counts whose expectations have the same sum."""
    statistic = ((counts - expected) ** 2 / expected).sum()
    return float(special.gammaincc((len(counts) - 1) / 2, statistic / 2))


def uniform(numbers: np.ndarray) -> float:
    """Kolmogorov and Smirnov's, asymptotically: the p-value of numbers [n] to be even over 0 to 1."""
    n = len(numbers)
    ordered, steps = np.sort(numbers), np.arange(n + 1) / n
    distance = max((steps[1:] - ordered).max(), (ordered - steps[:-1]).max())
    return float(special.kolmogorov(np.sqrt(n) * distance))
