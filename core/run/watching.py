"""--watch-every N: what is measured of every layer at every N-th update, in either engine; where it is kept.

A run folder's watch.jsonl has a line for every such update: lists with a number for each row of `row_names`,
the embedding, every layer, and the head with the final norm. Activations are those before the update, of the
first micro-batch without dropout; `weight` is from before the update, too.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from core.errors import UserError
from core.leaves import get_leaf
from core.run.log import WATCH, WATCHED, parse_lines

QUERIES = 16
"""Positions of every sequence whose attention is measured."""
DIGITS = 4  # of a number in the file
OF_ROWS = ("weight", "gradient", "update", "rms", "largest", "not_finite")
"""Fields of a line with a number for every row.

weight, gradient, update: norms of the matrices, of their gradient, and of what the update added to them (0
for one that was not applied); scales and biases, which would hide them, only count where there is no matrix.
rms, largest: of the residual stream after the layer (in the last row after the final norm), of its values
that are finite; not_finite: the share of the others."""
OF_LAYERS = ("added", "entropy", "lowest_entropy")
"""Fields with a number for every layer.

added: rms of what the layer adds to the residual stream. entropy: of the attention of `query_positions`, in
nats, the mean over heads and queries; lowest_entropy: that of the head with the lowest mean."""


@dataclasses.dataclass
class Sizes:
    """How large the values of an array are, part by part of it."""

    squares: float = 0.0
    """Sum of the squares of those that are finite."""
    largest: float = 0.0
    """Absolute value, of those that are finite."""
    bad: int = 0
    """How many are not finite."""
    n: int = 0

    @classmethod
    def of(cls, found: Any, n: int) -> "Sizes":
        """Those of an array of `n` values; see `add`."""
        sizes = cls()
        sizes.add(found, n)
        return sizes

    def add(self, found: Any, n: int) -> None:
        """Takes what an engine's `measure` found of a part of `n` values: the largest, the mean of the
        squares relative to it, and how many are not finite."""
        largest, mean, bad = (float(x) for x in found)
        self.squares += largest**2 * mean * (n - bad)  # in the host's float64, where it does not overflow
        self.largest, self.bad, self.n = max(self.largest, largest), self.bad + int(bad), self.n + n

    @property
    def rms(self) -> float:
        """Of the values that are finite."""
        return (self.squares / max(1, self.n - self.bad)) ** 0.5


def growth(now: float, before: float) -> float:
    """How much larger an rms has become; NaN where there is nothing to compare with."""
    return now / before if before else math.nan


def row_names(n_layers: int) -> list[str]:
    """Of the rows of a line."""
    return ["embed", *(f"layers/{i}" for i in range(n_layers)), "head"]


def query_positions(length: int) -> np.ndarray:
    """The positions whose attention is measured, spread evenly up to the last."""
    n = min(QUERIES, length)
    return (np.arange(1, n + 1) * length) // n - 1


def norms_by_row(leaf_norms: Mapping[str, Any], n_layers: int) -> list[float]:
    """The norm of every row from those of its leaves.

    leaf_norms: a leaf of the layers is one array for all of them, "layers/attn/q/kernel", or a number for
        each, "layers/3/attn/q/kernel".
    """
    matrices, others = np.zeros(n_layers + 2), np.zeros(n_layers + 2)
    for path, norms in leaf_norms.items():
        names = path.split("/")
        leaf = get_leaf(names)
        if not leaf.in_layers:
            rows: Any = 0 if leaf.module in ("embed", "positions") else -1
        else:
            rows = slice(1, -1) if np.ndim(norms) else int(names[1]) + 1
        (matrices if leaf.is_matrix else others)[rows] += np.square(np.asarray(norms, np.float64))
    if not any(get_leaf(path.split("/")).path == "head/kernel" for path in leaf_norms):
        matrices[-1] = others[-1]
    return np.sqrt(matrices).tolist()


def make_record(
    n_layers: int,
    *,
    weights: Mapping[str, Any],
    gradients: Mapping[str, Any],
    updates: Mapping[str, Any],
    stream: Sequence[Sizes],
    added: Sequence[Sizes],
    entropies: Any,
    uniform: float,
) -> dict[str, Any]:
    """The fields of a line.

    Args:
        weights, gradients, updates: norms of the leaves, as `norms_by_row` takes them.
        stream: after the embedding, after every layer, after the final norm. added: of every layer.
        entropies: [L, 2], mean and lowest of every layer. uniform: what they would be if every query attended
            evenly to all it sees.
    """
    mean, lowest = np.asarray(entropies, np.float64).T
    fields = {
        "weight": norms_by_row(weights, n_layers),
        "gradient": norms_by_row(gradients, n_layers),
        "update": norms_by_row(updates, n_layers),
        "rms": [sizes.rms for sizes in stream],
        "largest": [sizes.largest for sizes in stream],
        "not_finite": [sizes.bad / sizes.n for sizes in stream],
        "added": [sizes.rms for sizes in added],
        "entropy": mean.tolist(),
        "lowest_entropy": lowest.tolist(),
    }
    short = {name: [_short(value) for value in values] for name, values in fields.items()}
    return short | {"uniform": _short(uniform)}


def _short(value: float) -> float | str:
    return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else str(value)


@dataclasses.dataclass(frozen=True)
class Watched:
    """What a run folder has of its watched updates: T of them, R rows, L layers."""

    steps: np.ndarray
    """[T]"""
    of_rows: dict[str, np.ndarray]
    """[T, R] for each of `OF_ROWS`."""
    of_layers: dict[str, np.ndarray]
    """[T, L] for each of `OF_LAYERS`."""
    uniform: np.ndarray
    """[T]: what `entropy` would be if every query attended evenly to all it sees, in nats."""

    @property
    def names(self) -> list[str]:
        """Of the rows."""
        return row_names(self.of_layers["added"].shape[1])

    @property
    def update_over_weight(self) -> np.ndarray:
        """[T, R]: the norm of the update over that of the parameters; NaN where these are all 0."""
        return _over(self.of_rows["update"], self.of_rows["weight"])

    @property
    def share_added(self) -> np.ndarray:
        """[T, L]: rms of what a layer adds over that of the stream it is added to."""
        return _over(self.of_layers["added"], self.of_rows["rms"][:, :-2])


def _over(values: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Their ratios; NaN where there are none."""
    with np.errstate(invalid="ignore"):
        return np.divide(values, others, out=np.full(others.shape, np.nan), where=others != 0)


def read_watched(folder: Path) -> Watched:
    """The watched updates of a run.

    Raises:
        UserError: there are none, or the file is damaged.
    """
    path = folder / WATCHED
    lines = list(parse_lines(path.read_bytes())) if path.is_file() else []
    if not lines:
        raise UserError(
            f"the run in {folder} has no watched updates: train with --watch-every 50, say, also when it is "
            "resumed"
        )
    rows = [row if row and _is_record(row) else None for _, row in lines]
    layers = {len(row["added"]) for row in rows if row}
    damaged = [number for number, row in enumerate(rows, 1) if row is None]
    if damaged or len(layers) > 1:
        which = f"line {damaged[0]} cannot be read" if damaged else "its lines are of different models"
        more = f", nor can {len(damaged) - 1} more" if len(damaged) > 1 else ""
        raise UserError(f"{path} is damaged ({which}{more}): remove such lines, or the file, and try again")
    arrays = {name: np.array([row[name] for row in rows], np.float64) for name in (*OF_ROWS, *OF_LAYERS)}
    return Watched(
        np.array([row["step"] for row in rows]),
        {name: arrays[name] for name in OF_ROWS},
        {name: arrays[name] for name in OF_LAYERS},
        np.array([row["uniform"] for row in rows], np.float64),
    )


def _is_record(row: dict[str, Any]) -> bool:
    def fits(name: str, n: int) -> bool:
        values = row.get(name)
        return isinstance(values, list) and len(values) == n and all(map(_is_number, values))

    added = row.get("added")
    n_layers = len(added) if isinstance(added, list) else 0
    sizes = dict.fromkeys(OF_ROWS, n_layers + 2) | dict.fromkeys(OF_LAYERS, n_layers)
    whole = row["kind"] == WATCH and all(fits(name, n) for name, n in sizes.items())
    return whole and n_layers > 0 and _is_number(row.get("uniform"))


def _is_number(value: Any) -> bool:
    return (isinstance(value, int | float) and not isinstance(value, bool)) or value in ("nan", "inf", "-inf")
