"""What is fitted to the results of a study, each with its uncertainty."""

import dataclasses
import math
from collections.abc import Mapping

import numpy as np

WITHIN = 2.0  # octaves of the best rate: further off, loss over log rate is no parabola
LEAST_POWER = 0.005  # of the law: it is then a straight line over log tokens, which has no floor


@dataclasses.dataclass(frozen=True)
class Optimum:
    """The minimum of a parabola through losses over log2 of the rate."""

    rate: float
    loss: float
    error: float | None
    """Standard error of the minimum's place, in octaves; None where three points leave no residual."""
    is_minimum: bool
    """False where the parabola opens downwards: then nothing else holds."""

    def is_inside(self, losses: Mapping[float, float]) -> bool:
        """Whether the minimum is bracketed: it lies between the rates that came to a loss, and the best of
        them between worse ones. At an edge nothing shows that the loss rises again.

        losses: by rate.
        """
        low, high = min(losses), max(losses)
        return self.is_minimum and low < self.rate < high and low < min(losses, key=losses.get) < high


def fit_optimum(points: list[tuple[float, float, int]]) -> Optimum | None:
    """The best rate by a parabola in log2 of the rate, by least squares; each seed may lie higher or lower as
    a whole, since not every rate has every seed.

    Args:
        points: (rate, loss, seed); those more than two octaves from the best are left out.

    Returns:
        None for fewer than three rates, or where no seed ties them together.
    """
    points = [(math.log2(rate), loss, seed) for rate, loss, seed in points if math.isfinite(loss)]
    if not points:
        return None
    best = min(points, key=lambda point: point[1])[0]
    x, y, seed = np.array([point for point in points if abs(point[0] - best) <= WITHIN + 1e-9]).T
    x0, seeds = x - best, np.unique(seed)
    design = np.column_stack([x0, x0**2, *(seed == one for one in seeds)]).astype(float)
    if len(np.unique(x)) < 3 or np.linalg.matrix_rank(design) < design.shape[1]:
        return None
    fitted, *_ = np.linalg.lstsq(design, y, rcond=None)
    b, c = fitted[:2]
    if c <= 0:
        return Optimum(2**best, math.nan, None, False)
    place, error = -b / (2 * c), None
    spare = len(x) - design.shape[1]
    if spare:
        variance = float(((design @ fitted - y) ** 2).sum() / spare)
        covariance = variance * np.linalg.inv(design.T @ design)[:2, :2]
        slope = np.array([-1 / (2 * c), b / (2 * c**2)])  # of the place in b and c
        error = math.sqrt(slope @ covariance @ slope)
    level = float(np.mean(fitted[2:]))
    return Optimum(float(2 ** (best + place)), level - float(b**2 / (4 * c)), error, True)


def fit_powers(points: list[tuple[dict[str, float], float]]) -> dict[str, tuple[float, float]] | str:
    """The powers of a product that gives the values of `points`, each with its standard error; what does not
    vary has no power. Or, in words, why the points do not determine them and leave a residual."""
    names = [name for name in points[0][0] if len({at[name] for at, _ in points}) > 1] if points else []
    if not names:
        return "they must differ in size or length"
    design = np.array([[1.0, *(math.log(at[name]) for name in names)] for at, _ in points])
    spare = len(points) - design.shape[1]
    if spare < 1:
        return f"powers of {_all(names)} take {len(names) + 2}"
    together = _together(design[:, 1:] - design[:, 1:].mean(axis=0), names)
    if together:
        return f"{_all(together)} differ together"
    y = np.log([value for _, value in points])
    fitted, *_ = np.linalg.lstsq(design, y, rcond=None)
    variance = float(((design @ fitted - y) ** 2).sum() / spare)
    errors = np.sqrt(np.diag(variance * np.linalg.inv(design.T @ design)))
    return {name: (float(fitted[i + 1]), float(errors[i + 1])) for i, name in enumerate(names)}


def _all(names: list[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _together(design: np.ndarray, names: list[str]) -> list[str]:
    """The variables, centred columns of `design`, whose powers cannot be told from each other's."""
    _, values, directions = np.linalg.svd(design)
    moved = np.abs(directions[values <= 1e-9 * values[0]]).max(axis=0, initial=0.0)
    return [name for name, part in zip(names, moved, strict=True) if part > 1e-6]


@dataclasses.dataclass(frozen=True)
class Law:
    """Loss = floor + scale / (effective tokens)^power, the tokens in units of the shortest run's.

    Tokens D of which U are distinct count as U + U r (1 - exp(-(D / U - 1) / r)): each repetition is worth
    less than the one before, and all together at most r passes (Muennighoff et al. 2023)."""

    floor: float
    scale: float
    power: float
    passes: float
    """r; infinite where nothing was repeated."""
    unit: float
    """Tokens."""
    covariance: np.ndarray | None = None
    """Of floor, scale, power and, where tokens were repeated, the natural logarithm of `passes`. None: as
    many points as parameters."""

    def loss(self, tokens: np.ndarray | float, distinct: np.ndarray | float) -> np.ndarray:
        """What it predicts for runs over so many tokens, of which so many are distinct."""
        return self.floor + self.scale * (effective(tokens, distinct, self.passes) / self.unit) ** -self.power

    @property
    def errors(self) -> list[float] | None:
        """Standard errors of what `covariance` is of."""
        return None if self.covariance is None else [math.sqrt(max(0.0, v)) for v in np.diag(self.covariance)]

    def error(self, tokens: float, distinct: float) -> float | None:
        """Standard error of what it predicts for a run; the scatter of runs comes on top."""
        if self.covariance is None:
            return None
        (slopes,) = self.slopes(np.array([tokens]), np.array([distinct]))
        return math.sqrt(slopes @ self.covariance @ slopes)

    def slopes(self, tokens: np.ndarray, distinct: np.ndarray) -> np.ndarray:
        """[runs, parameters]: derivatives of its losses in what `covariance` is of."""
        columns = []
        for name in ("floor", "scale", "power", *(["passes"] if math.isfinite(self.passes) else [])):
            value, step = getattr(self, name), 1e-4
            moved = [value * math.exp(s) if name == "passes" else value + s for s in (-step, step)]
            below, above = (dataclasses.replace(self, **{name: v}).loss(tokens, distinct) for v in moved)
            columns.append((above - below) / (2 * step))
        return np.stack(columns, axis=1)


def effective(
    tokens: np.ndarray | float, distinct: np.ndarray | float, passes: float | np.ndarray
) -> np.ndarray:
    """Tokens of one pass that are worth as much as `tokens` of which `distinct` are distinct."""
    repeated = np.maximum(tokens / distinct - 1, 0)
    with np.errstate(invalid="ignore"):  # 0 x inf; not used
        worth = np.where(np.isinf(passes), repeated, passes * -np.expm1(-repeated / passes))
    return np.minimum(tokens, distinct) + distinct * worth


def fit_law(tokens: np.ndarray, distinct: np.ndarray, losses: np.ndarray) -> Law | None:
    """The law by least squares: every power and number of passes on a grid that narrows, floor and scale for
    each in closed form. None where the points determine none: fewer than its parameters, or than three
    lengths, or losses that do not fall, or that fall by no less with every doubling of the tokens.

    The number of passes is fitted only where some tokens are repeated.
    """
    repeats = bool((tokens > distinct).any())
    different = len(np.unique(np.stack([tokens, np.maximum(tokens / distinct, 1)]), axis=1).T)
    if different < 3 + repeats or len(np.unique(tokens)) < 3:
        return None
    unit = float(tokens.min())
    low, high = np.array([0.02, math.log(0.5)]), np.array([2.0, math.log(1000.0)])
    for _ in range(12):
        powers = np.linspace(low[0], high[0], 25)[:, None, None]
        passes = np.exp(np.linspace(low[1], high[1], 25))[:, None] if repeats else np.array([[math.inf]])
        x = (effective(tokens, distinct, passes) / unit) ** -powers  # [powers, passes, points]
        x0, y0 = x - x.mean(-1, keepdims=True), losses - losses.mean()
        scales = (x0 * y0).sum(-1) / (x0**2).sum(-1)
        squares = ((y0 - scales[..., None] * x0) ** 2).sum(-1)
        i, j = np.unravel_index(np.argmin(squares), squares.shape)
        power, best = float(powers[i, 0, 0]), float(passes[j, 0])
        center, width = np.array([power, math.log(best) if repeats else 0.0]), (high - low) / 6
        low, high = np.maximum(center - width, [LEAST_POWER, -3.0]), center + width
    scale = float(scales[i, j])
    if scale <= 0 or power <= LEAST_POWER:
        return None
    floor = float(losses.mean() - scale * x[i, j].mean())
    law = Law(floor, scale, power, best, unit)
    spare = len(losses) - 3 - repeats
    if spare == 0:
        return law
    slopes = law.slopes(tokens, distinct)
    covariance = float(squares[i, j]) / spare * np.linalg.pinv(slopes.T @ slopes)
    return dataclasses.replace(law, covariance=covariance)
