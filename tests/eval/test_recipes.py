"""Two recipes by several seeds: the variance against least squares and scipy's tests, coverage against
simulations of known variances, and what the command says and refuses."""

import math
from typing import NamedTuple

import numpy as np
import pytest
from scipy import stats

from eval.compare import compare_pages
from eval.recipes import Noise, compare_recipes, noise_of


class Truth(NamedTuple):
    """Standard deviations of what a score is made of."""

    seeds: tuple[float, float]
    recipe_on_question: float
    residual: float
    question: float = 3.0  # cancels


def draw(
    rng: np.random.Generator, truth: Truth, runs: tuple[int, int], n: int, many: tuple[int, ...] = ()
) -> list[np.ndarray]:
    """Values [*many, runs, n] of two recipes that are equally good."""
    common = rng.normal(0, truth.question, (*many, 1, n))
    return [
        common
        + rng.normal(0, truth.recipe_on_question / math.sqrt(2), (*many, 1, n))
        + rng.normal(0, seeds, (*many, count, 1))
        + rng.normal(0, truth.residual, (*many, count, n))
        for seeds, count in zip(truth.seeds, runs, strict=True)
    ]


def dummies(*factors: np.ndarray) -> np.ndarray:
    """A column for each level of each factor."""
    return np.hstack([factor[:, None] == np.unique(factor) for factor in factors]).astype(float)


def rss(design: np.ndarray, y: np.ndarray) -> float:
    """What least squares leaves, in squares."""
    return float(((y - design @ np.linalg.lstsq(design, y, rcond=None)[0]) ** 2).sum())


def test_the_variance_is_that_of_an_analysis_by_least_squares():
    """Balanced, 3 runs of each recipe on 7 questions: mean squares as differences between fits with columns
    for question, run, and question in recipe, as any package of linear models has them."""
    runs, n = 3, 7
    a, b = draw(np.random.default_rng(3), Truth((1.0, 1.5), 2.0, 0.7), (runs, runs), n)
    y = np.vstack([a, b]).ravel()
    run, question = (places.ravel() for places in np.mgrid[: 2 * runs, :n])
    recipe = run // runs
    full = rss(dummies(run, question + n * recipe), y)
    interaction = (rss(dummies(run, question), y) - full) / (n - 1)
    of_runs = (rss(dummies(question + n * recipe), y) - full) / (2 * (runs - 1))
    residual = full / (2 * (runs - 1) * (n - 1))
    # E[interaction] = residual + runs / 2 x W, E[of_runs] = residual + n x seeds (Searle et al. 1992, ch. 4).
    assert interaction > residual and of_runs > residual  # nothing is cut off at 0
    noise = noise_of(a, b, np.ones(n))
    assert noise.questions == pytest.approx((interaction - residual) * 2 / runs / n)
    assert sum(noise.seeds) == pytest.approx(2 * of_runs / n)
    found = compare_recipes(a, b)
    assert found.difference == pytest.approx(b.mean() - a.mean())
    assert found.stderr**2 == pytest.approx(
        2 * of_runs / (runs * n) + (interaction - residual) * 2 / runs / n
    )
    assert found.seed_share == pytest.approx(2 * of_runs / (runs * n) / found.stderr**2)
    assert found.spreads == pytest.approx((a.mean(1).std(ddof=1), b.mean(1).std(ddof=1)))


def test_of_each_recipe_the_least_is_its_own_residual():
    """Mean squares of what run and question do not explain in it, over the number of questions."""
    rng, n = np.random.default_rng(4), 9
    values = [rng.normal(0, spread, (runs, n)) for spread, runs in ((0.5, 3), (2.0, 4))]
    expected = []
    for ours in values:
        run, question = (places.ravel() for places in np.mgrid[: len(ours), :n])
        expected.append(rss(dummies(run, question), ours.ravel()) / ((len(ours) - 1) * (n - 1)) / n)
    noise = noise_of(*values, np.ones(n))
    assert noise.least == pytest.approx(tuple(expected), rel=1e-9)
    assert all(of_seeds >= least for of_seeds, least in zip(noise.seeds, noise.least, strict=True))


def test_by_seeds_alone_it_is_welchs_t_test():
    """The same on every question: nothing is due to questions."""
    scores = np.array([0.31, 0.35, 0.30]), np.array([0.36, 0.41, 0.44, 0.38])
    found = compare_recipes(*(values[:, None] * np.ones(20) for values in scores))
    welch = stats.ttest_ind(scores[1], scores[0], equal_var=False)
    assert found.p == pytest.approx(welch.pvalue)
    assert found.seed_df == pytest.approx(welch.df)
    assert found.interval == pytest.approx(tuple(welch.confidence_interval()))
    assert found.seed_share == pytest.approx(1)


def test_by_questions_alone_it_is_the_paired_t_test():
    """All runs of a recipe answer alike: nothing is due to seeds, and more of them would not help."""
    rng = np.random.default_rng(4)
    a = rng.normal(0, 1, 40)
    b = a + rng.normal(0.1, 0.5, 40)
    found = compare_recipes(np.tile(a, (2, 1)), np.tile(b, (3, 1)))
    paired = stats.ttest_rel(b, a)
    assert found.p == pytest.approx(paired.pvalue)
    assert found.interval == pytest.approx(tuple(paired.confidence_interval()))
    assert found.seed_share == pytest.approx(0, abs=1e-9)
    assert found.seeds_needed is None
    n_bytes = rng.uniform(100, 5000, 40)
    pages = compare_recipes(np.tile(a * n_bytes, (2, 1)), np.tile(b * n_bytes, (2, 1)), n_bytes)
    two = compare_pages(a * n_bytes, b * n_bytes, n_bytes)
    assert (pages.difference, pages.stderr, pages.p) == pytest.approx((two.difference, two.stderr, two.p))


def test_runs_with_one_score_by_luck_have_the_noise_of_their_answers():
    """Equal scores, by other questions right: squares of 1/2 around the means, 8 of them with 3 degrees of
    freedom, so M = 2/3; and no recipe is better at any question."""
    runs = np.array([[1.0, 0.0, 1.0, 0.0], [0.0, 1.0, 0.0, 1.0]])
    noise = noise_of(runs, runs, np.ones(4))
    assert noise.seeds == pytest.approx((2 / 3 / 4, 2 / 3 / 4))
    assert noise.questions == 0


def test_equal_answers_are_no_difference_whatever_the_rounding():
    same = np.array([1.0, 0.0, 1.0, 1.0, 0.0, 1.0, 1.0])
    found = compare_recipes(np.tile(same, (3, 1)), np.tile(same, (7, 1)))
    assert (found.difference, found.stderr, found.p, found.seeds_needed) == (0, 0, 1, None)
    assert math.isnan(found.seed_share)


N_DRAWS = 3000
# A binomial share of them, four standard errors about 95%: 6e-5 of chance to fail.
MARGIN = 4 * math.sqrt(0.95 * 0.05 / N_DRAWS)


def covered(a: np.ndarray, b: np.ndarray, weights: np.ndarray | None = None, **changed) -> float:
    """How often the 95% interval has the true difference, 0, in it; changed: other parts of the noise."""
    weights = np.ones(a.shape[-1]) if weights is None else weights
    runs = a.shape[-2], b.shape[-2]
    noise = noise_of(a, b, weights)._replace(**changed)
    difference = (b.sum(-1).mean(-1) - a.sum(-1).mean(-1)) / weights.sum()
    return float((np.abs(difference) <= noise.critical(runs) * noise.stderr(runs)).mean())


@pytest.mark.parametrize(
    ("truth", "runs", "most"),
    [
        # Without seed noise, with it alone, and with both. Cochran's interval is to cover at least 95%, and
        # with 2 to 4 runs it covers up to 99% (docs/LOG.md); with 20 both t quantiles are nearly one.
        (Truth((0.0, 0.0), 1.0, 0.5), (3, 3), 1.0),
        (Truth((0.2, 0.2), 0.05, 0.3), (3, 4), 1.0),
        (Truth((0.2, 0.2), 1.6, 0.5), (2, 2), 1.0),
        (Truth((0.2, 0.2), 1.6, 0.5), (3, 3), 1.0),
        (Truth((0.3, 0.05), 1.0, 0.5), (3, 3), 1.0),
        (Truth((0.3, 0.3), 1.0, 0.5), (20, 20), 0.95 + MARGIN),
    ],
)
def test_intervals_cover_and_variances_are_right(truth: Truth, runs: tuple[int, int], most: float):
    n = 64
    a, b = draw(np.random.default_rng(7), truth, runs, n, (N_DRAWS,))
    assert 0.95 - MARGIN <= covered(a, b) <= most
    residual = sum(truth.residual**2 / n / count for count in runs)
    seeds = sum(one**2 / count for one, count in zip(truth.seeds, runs, strict=True))
    variance = seeds + residual + truth.recipe_on_question**2 / n
    # A mean of estimates: each has a relative standard deviation below sqrt(2), that of a chi-square of one
    # degree of freedom. What is cut off at 0 adds less than the residual's part once more.
    spread = 4 * math.sqrt(2 / N_DRAWS)
    mean = (noise_of(a, b, np.ones(n)).stderr(runs) ** 2).mean()
    assert variance * (1 - spread) <= mean <= variance * (1 + spread) + residual


def test_intervals_of_right_and_wrong_answers_cover():
    """Answers of 0 and 1, each by its own chance: question, recipe on question and run, in log odds."""
    rng = np.random.default_rng(8)
    odds = draw(rng, Truth((0.3, 0.3), 0.8, 0.0, 1.5), (3, 3), 150, (N_DRAWS,))
    answers = [(rng.random(o.shape) < 1 / (1 + np.exp(0.5 - o))).astype(float) for o in odds]
    assert covered(*answers) >= 0.95 - MARGIN


def test_intervals_of_bits_per_byte_cover():
    """Documents of unlike lengths."""
    rng = np.random.default_rng(9)
    n_bytes = rng.uniform(2000, 8000, 60)
    values = draw(rng, Truth((0.02, 0.02), 0.05, 0.03, 0.3), (3, 3), 60, (N_DRAWS,))
    assert covered(*((1.2 + value) * n_bytes for value in values), n_bytes) >= 0.95 - MARGIN


def test_a_part_that_is_left_out_is_seen():
    """The tests of coverage can fail: without the part of seeds, or without that of questions, they do."""
    rng = np.random.default_rng(11)
    of_seeds = draw(rng, Truth((0.3, 0.3), 0.5, 0.3), (4, 4), 64, (N_DRAWS,))
    of_questions = draw(rng, Truth((0.05, 0.05), 3.0, 0.3), (4, 4), 64, (N_DRAWS,))
    assert covered(*of_seeds, seeds=(0.0, 0.0)) < 0.9
    assert covered(*of_questions, questions=0.0) < 0.9


@pytest.mark.parametrize(
    ("truth", "difference"),
    [
        (Truth((0.1, 0.1), 0.8, 0.5), 0.25),
        # Runs that vary by their answers alone: V is never estimated below that part, nor W below 0.
        (Truth((0.0, 0.0), 0.0, 0.5), 0.07),
        (Truth((0.0, 0.0), 0.5, 0.5), 0.09),
    ],
)
def test_as_many_seeds_as_are_said_to_be_needed_find_the_difference(truth: Truth, difference: float):
    """The chance to find it with that many runs and with one less, by simulation.

    The plan takes the variance of questions as known, which 400 of them make so to 7%: what is needed moves
    by less than that, and the chance to both sides alike. 0.01 are left for it.
    """
    rng = np.random.default_rng(12)
    n, draws = 400, 4000
    least = truth.residual**2 / n
    seeds = truth.seeds[0] ** 2 + least
    noise = Noise((seeds, seeds), truth.recipe_on_question**2 / n, n, (least, least))
    needed = noise.seeds_needed(difference)
    assert needed is not None and needed > 3
    assert noise.power(difference, needed) >= 0.8 > noise.power(difference, needed - 1)
    for runs in (needed, needed - 1):
        a, b = draw(rng, truth, (runs, runs), n, (draws,))
        seen = noise_of(a, b, np.ones(n))
        limit = seen.critical((runs, runs)) * seen.stderr((runs, runs))
        found = ((b - a).mean((-2, -1)) + difference > limit).mean()
        assert noise.power(difference, runs) == pytest.approx(
            found, abs=0.01 + 4 * math.sqrt(0.8 * 0.2 / draws)
        )


def test_no_number_of_seeds_makes_up_for_too_few_questions():
    """With seeds without end, the power of a two-sided z-test: 80% at 1.960 + 0.842 standard errors."""
    noise = Noise((0.1, 0.1), 1.0, 10_000)
    limit = stats.norm.isf(0.025) + stats.norm.isf(0.2)
    # 10,000 questions: the t quantile is 1.9602 instead of 1.95996.
    assert noise.seeds_needed(0.999 * limit) is None
    assert noise.seeds_needed(1.01 * limit) is not None
    assert noise.seeds_needed(0.0) is None


def test_without_noise_two_runs_find_any_difference():
    noise = Noise((0.0, 0.0), 0.0, 100)
    assert [noise.power(difference, 2) for difference in (0.0, 0.1, -0.1)] == [0, 1, 1]
    assert [noise.p(difference, (2, 3)) for difference in (0.0, 0.1, -0.1)] == [1, 0, 0]
    assert noise.seeds_needed(0.1) == 2
