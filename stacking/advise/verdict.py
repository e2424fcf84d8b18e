"""From the losses of held-out windows to an answer, and where it is kept."""

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from core.checkpoint.manifest import Json, recorded_hash
from core.errors import UserError
from core.folders import write_atomically

ADVICE = "advice.json"  # in the run folder, and next to the arms
GROW_NOW, TRAIN_ON, NO_DIFFERENCE = "grow now", "train on", "no difference measured"
BOUND = 2.0  # standard errors beyond which a difference counts
COVERS = (
    "the standard error is over the held-out windows, paired: how far other text like this would move the "
    "difference; not what another seed, another order of the data or another budget would, and it is too "
    "small where documents are longer than a window"
)


class WindowLosses(NamedTuple):
    """A held-out set, window by window."""

    nats: np.ndarray
    """float64 [windows]: cross-entropy summed over the targets of each."""
    tokens: np.ndarray
    """int64 [windows]: how many targets those are."""


class Estimate(NamedTuple):
    """A mean over held-out text."""

    mean: float
    """Nats per token."""
    error: float
    """Its standard error over windows."""

    def __str__(self) -> str:
        return f"{self.mean:.4f} ± {self.error:.4f}"


def estimate(nats: np.ndarray, tokens: np.ndarray) -> Estimate:
    """Nats per token and the standard error, of windows drawn at random.

    Windows have unequal numbers of tokens, so that the mean is a ratio of two sums; its error is that of the
    residuals (Cochran 1977, Sampling Techniques, section 6.4).

    Args:
        nats, tokens: [windows], at least two: sums over each window, or differences of two models' sums.
    """
    n, total = len(nats), float(tokens.sum())
    mean = float(nats.sum()) / total
    residuals = nats - mean * tokens
    return Estimate(mean, math.sqrt(n / (n - 1) * float((residuals**2).sum())) / total)


def decide(difference: Estimate) -> str:
    """The answer to a difference, of the grown model less the other."""
    if abs(difference.mean) <= BOUND * difference.error:
        return NO_DIFFERENCE
    return GROW_NOW if difference.mean < 0 else TRAIN_ON


def read_advice(run: Path) -> list[Json]:
    """The answers that a run folder keeps, oldest first.

    Raises:
        UserError: the file is damaged.
    """
    path = run / ADVICE
    if not path.is_file():
        return []
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        for entry in entries:
            entry["checkpoint"], entry["advice"], entry["layers"]  # what others read of it
    except (ValueError, TypeError, KeyError):
        raise UserError(f"{path} is damaged: remove it, and ask stacking.advise again") from None
    return entries


def keep_advice(run: Path, entry: Json) -> None:
    """Adds an answer to those in a run folder, in place of an earlier one to the same question."""
    same = ("checkpoint", "layers", "sources", "how", "budget", "heldout")
    others = [old for old in read_advice(run) if any(old.get(name) != entry[name] for name in same)]
    write_atomically(run / ADVICE, json.dumps([*others, entry], indent=1) + "\n")


def advice_at(run: Path, step_dir: Path) -> list[dict[str, Any]]:
    """The answers for a checkpoint of a run, for the lineage of what is grown from it."""
    entries = read_advice(run)
    checkpoint = recorded_hash(step_dir) if entries else None
    return [entry for entry in entries if entry["checkpoint"] == checkpoint]
