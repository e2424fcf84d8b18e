"""Two recipes compared by several runs of each: the noise of training seeds and that of questions together.

A run's score on a question is taken as the sum of five effects (a crossed random-effects model: all runs
answer the same N questions, and each run belongs to one recipe):

    recipe + question + recipe on question + run + run on question

Questions (Miller 2024, "Adding Error Bars to Evals") and seeds (Madaan et al. 2024, "Quantifying Variance in
Evaluation Benchmarks") are both drawn from all that there might be. Questions' difficulty is common to both
recipes and cancels. The difference of the means over S_a and S_b runs has the variance

    V_a / S_a + V_b / S_b + W / N

where V is the variance of a run's score over seeds on these questions, and W that of `recipe on question`
between the recipes, which remains however many runs there are. Analysis of variance estimates them:

    M_r    residual mean square of runs x questions of recipe r
    V_r    variance of the scores of the runs of r, at least M_r / N
    W      variance over questions of the difference of means, less M_a / S_a + M_b / S_b; at least 0

A ratio of sums such as bits per byte has a weight for each question (its bytes). Its values are linearized,
value - ratio x weight, as in `eval.ratio`.

The part of seeds alone has the degrees of freedom of Welch and Satterthwaite, often 2 or 3; W has N - 1. The
critical value is the mean of both t quantiles, weighted by the two parts of the variance (Cochran 1964,
"Approximate significance levels of the Behrens-Fisher test"). Satterthwaite's formula for the whole sum gives
shorter intervals, which with two seeds cover as little as 91% (docs/LOG.md).
"""

import bisect
import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

LEVEL, POWER = 0.05, 0.8
MOST_SEEDS = 10**6
POINTS = 32  # of each distribution of estimated variances
LEAST_P = 1e-300  # smaller ones are said to be it
ROUNDING = 1e-12  # of the scores: a smaller difference or standard error is none
Numbers = float | np.ndarray


class Noise(NamedTuple):
    """Where the difference between two recipes gets its variance from; numbers, or arrays of one shape."""

    seeds: tuple[Numbers, Numbers]
    """V: variance of one run's score over seeds, for each recipe."""
    questions: Numbers
    """W / N: what remains however many runs there are."""
    n_questions: int
    least: tuple[Numbers, Numbers] = (0.0, 0.0)
    """M / N: V is never estimated to be less."""

    def of_seeds(self, runs: tuple[int, int]) -> tuple[Numbers, Numbers]:
        """The parts of seeds in the variance of the difference, with so many runs of each recipe."""
        return self.seeds[0] / runs[0], self.seeds[1] / runs[1]

    def stderr(self, runs: tuple[int, int]) -> Numbers:
        """Of the difference between the means of so many runs of each recipe."""
        return np.sqrt(sum(self.of_seeds(runs)) + self.questions)

    def seed_df(self, runs: tuple[int, int]) -> Numbers:
        """Degrees of freedom of the part of seeds, by Welch and Satterthwaite; of both where it is 0."""
        parts = self.of_seeds(runs)
        squares = sum(part**2 / (n - 1) for part, n in zip(parts, runs, strict=True))
        return np.where(squares > 0, sum(parts) ** 2 / np.where(squares > 0, squares, 1), sum(runs) - 2)

    def critical(self, runs: tuple[int, int], level: float = LEVEL) -> Numbers:
        """How many standard errors a difference must have to be significant (two-sided), by Cochran."""
        from scipy import stats  # slow

        of_seeds, variance = sum(self.of_seeds(runs)), self.stderr(runs) ** 2
        share = np.where(variance > 0, of_seeds / np.where(variance > 0, variance, 1), 1)
        quantiles = [stats.t.isf(level / 2, df) for df in (self.seed_df(runs), self.n_questions - 1)]
        return share * quantiles[0] + (1 - share) * quantiles[1]

    def p(self, difference: float, runs: tuple[int, int]) -> float:
        """The level at which a difference is just significant."""
        stderr = self.stderr(runs)
        if not stderr:
            return float(difference == 0)
        if not difference:
            return 1.0
        t = abs(difference) / stderr
        low, high = math.log(LEAST_P), 0.0  # log p lies between
        for _ in range(40):  # 691 / 2^40: p is known to a part in 10^9
            middle = (low + high) / 2
            low, high = (low, middle) if self.critical(runs, math.exp(middle)) < t else (middle, high)
        return math.exp(high)

    def power(self, difference: float, n: int) -> float:
        """Chance that a difference of that size is found significant at `LEVEL` with n runs of each recipe.

        The mean over what the variances of seeds may be estimated at; that of questions is taken as known.
        """
        from scipy import stats  # slow

        runs = n, n
        stderr = self.stderr(runs)
        if not stderr:
            return float(difference != 0)
        quantiles = (np.arange(POINTS) + 0.5) / POINTS
        estimates = stats.chi2.ppf(quantiles, n - 1) / (n - 1)
        seeds = (self.seeds[0] * estimates[:, None], self.seeds[1] * estimates)
        estimated = self._replace(seeds=tuple(map(np.maximum, seeds, self.least)))
        needed = estimated.critical(runs) * estimated.stderr(runs)
        return float(stats.norm.sf((needed - abs(difference)) / stderr).mean())

    def seeds_needed(self, difference: float) -> int | None:
        """Fewest runs of each recipe with which that difference is found with a chance of `POWER`.

        None: no number of runs suffices, as the questions alone hide it.
        """
        if not difference or self.power(difference, MOST_SEEDS) < POWER:
            return None
        numbers = range(2, MOST_SEEDS)
        return numbers[0] + bisect.bisect_left(numbers, POWER, key=lambda n: self.power(difference, n))


class Difference(NamedTuple):
    """A metric of two recipes, A and B, each of several runs on the same questions."""

    means: tuple[float, float]
    spreads: tuple[float, float]
    """Standard deviations of the scores of the runs."""
    difference: float
    """B minus A."""
    stderr: float
    """Of the difference, over seeds and questions."""
    interval: tuple[float, float]
    """95%, of the difference."""
    p: float
    seed_df: float
    """Degrees of freedom of the part of seeds."""
    seed_share: float
    """Part of the variance that more seeds would make smaller; nan where there is none."""
    seeds_needed: int | None
    """See `Noise.seeds_needed`, taking difference and variances as they were seen."""


def noise_of(
    a: Float[np.ndarray, "*many A N"], b: Float[np.ndarray, "*many B N"], weights: Float[np.ndarray, " N"]
) -> Noise:
    """The parts of the variance, from values of at least two runs of each recipe on at least two questions.

    The score of a run is sum(values) / sum(weights).
    """
    n = len(weights)
    seeds, least, residuals, means = [], [], [], []
    for values in (a, b):
        runs = values.shape[-2]
        scores = values.sum(-1) / weights.sum()
        linear = (values - scores[..., None] * weights) / weights.mean()  # of each run the sum is 0
        means.append(linear.mean(-2))
        residual = ((linear - means[-1][..., None, :]) ** 2).sum((-2, -1)) / ((runs - 1) * (n - 1))
        least.append(residual / n)
        seeds.append(np.maximum(scores.var(-1, ddof=1), least[-1]))
        residuals.append(residual / runs)
    between = (means[1] - means[0]).var(-1, ddof=1)
    questions = np.maximum(between - sum(residuals), 0) / n
    return Noise((seeds[0], seeds[1]), questions, n, (least[0], least[1]))


def compare_recipes(
    a: Float[np.ndarray, "A N"], b: Float[np.ndarray, "B N"], weights: Float[np.ndarray, " N"] | None = None
) -> Difference:
    """Compares two recipes by the values of their runs on the same N questions, at least two.

    weights: bytes of the questions, where scores are ratios of sums.

    """
    weights = np.ones(a.shape[1]) if weights is None else weights
    noise, runs = noise_of(a, b, weights), (len(a), len(b))
    scores = [values.sum(1) / weights.sum() for values in (a, b)]
    means = float(scores[0].mean()), float(scores[1].mean())
    difference, stderr = means[1] - means[0], float(noise.stderr(runs))
    rounding = ROUNDING * max(map(abs, means))
    if stderr <= rounding:
        noise, stderr = Noise((0.0, 0.0), 0.0, noise.n_questions), 0.0
        difference = difference if abs(difference) > rounding else 0.0
    half = float(noise.critical(runs)) * stderr
    return Difference(
        means,
        (float(scores[0].std(ddof=1)), float(scores[1].std(ddof=1))),
        difference,
        stderr,
        (difference - half, difference + half),
        noise.p(difference, runs),
        float(noise.seed_df(runs)),
        float(sum(noise.of_seeds(runs))) / stderr**2 if stderr else math.nan,
        noise.seeds_needed(difference),
    )
