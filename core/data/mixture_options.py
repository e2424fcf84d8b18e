"""The mixture that --data, --weights and --phases ask for: named sources, and their shares in each phase."""

import glob
import math
import re
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

from core import checks
from core.data.mixture import BLOCK, Counts
from core.errors import UserError

NAME = r"[A-Za-z0-9][A-Za-z0-9_-]*"
"""Of a source."""


class Asked(NamedTuple):
    """A mixture as it is asked for."""

    sources: dict[str, str]
    """Name -> what `--data` may name."""
    shares: tuple[tuple[float, Counts], ...]
    """Which part of the run has gone when a phase begins, and the mixture from there on."""


def parse_data(data: str | Sequence[str]) -> str | dict[str, str]:
    """What --data names: one source without a name, or sources by name, in the order of their names.

    Raises:
        UserError: of several, one has no name, or two have the same.
    """
    given = [data] if isinstance(data, str) else list(data)
    if not given:
        raise UserError("--data needs a value: the text or prepared data to train on")
    named = [re.fullmatch(rf"({NAME})=(.+)", text) for text in given]
    if len(given) == 1 and (not named[0] or _is_there(given[0])):
        return given[0]
    sources: dict[str, str] = {}
    for text, match in zip(given, named, strict=True):
        if not match:
            raise UserError(
                f"--data {text}: of several sources each needs a name, as in wiki={text} (letters, digits, _ "
                "and -); quote a pattern, so that the shell does not expand it"
            )
        name, source = match.groups()
        if name in sources:
            raise UserError(f"--data names two sources {name!r}: give each a name of its own")
        sources[name] = source
    return dict(sorted(sources.items()))


def _is_there(text: str) -> bool:
    """Whether a text that could be NAME=SOURCE is a file, or a pattern of files."""
    return Path(text).exists() or bool(glob.glob(text))  # noqa: PTH207


def data_paths(data: str | Sequence[str]) -> list[str]:
    """The sources that --data names, without their names."""
    parsed = parse_data(data)
    return [parsed] if isinstance(parsed, str) else list(parsed.values())


def parse_mixture(data: str | Sequence[str], weights: Sequence[str], phases: Sequence[str]) -> Asked | None:
    """The mixture that --data, --weights and --phases ask for; None for one source without a name.

    Raises:
        UserError: a weight or phase is out of range, or they do not fit the sources.
    """
    sources = parse_data(data)
    if isinstance(sources, str):
        for name, given in (("weights", weights), ("phases", phases)):
            if given:
                raise UserError(
                    f"--{name} is for several sources, each with a name: --data wiki={sources} books=..."
                )
        return None
    if len(sources) == 1 and not weights:
        weights = tuple(f"{name}=1" for name in sources)
    if not weights:
        example = " ".join(f"{name}=1" for name in sources)
        raise UserError(f"--data names {len(sources)} sources: give their shares, as in --weights {example}")
    shares = [(0.0, _counts("--weights", weights, sources))]
    for share, given in _split_phases(phases):
        if share <= shares[-1][0]:
            raise UserError(f"--phases: {share:g} comes after {shares[-1][0]:g}; give phases in their order")
        shares.append((share, _counts(f"--phases {share:g}", given, sources)))
    read = {name for _, counts in shares for name, _ in counts}
    for name in sources:
        if name not in read:
            raise UserError(f"--data names {name}, but neither --weights nor --phases gives it a share")
    return Asked(sources, tuple(shares))


def _split_phases(phases: Sequence[str]) -> list[tuple[float, list[str]]]:
    """Words such as 0.8 wiki=0.3 books=0.7 0.9 books=1, phase by phase."""
    found: list[tuple[float, list[str]]] = []
    for word in phases:
        if "=" in word:
            if not found:
                raise UserError(
                    f"--phases begins with {word}: give first which part of the run has gone, as in "
                    f"--phases 0.8 {word}"
                )
            found[-1][1].append(word)
            continue
        share = _number("--phases", word)
        checks.between_zero_and_one(phases=share)
        found.append((share, []))
    return found


def _counts(option: str, words: Sequence[str], sources: dict[str, str]) -> Counts:
    """Windows of each source in a block, in shares such as wiki=0.7."""
    weights: dict[str, float] = {}
    for word in words:
        name, _, value = word.partition("=")
        if name not in sources:
            # A resumed run has its own where none are given, even with another --data.
            raise UserError(
                f"{option} {word}: --data has no source {name!r}, but {', '.join(sources)}; give {option} "
                "for these (a resumed run has its own, until others are given)"
            )
        if name in weights:
            raise UserError(f"{option} gives {name} twice: give each source one weight")
        weights[name] = _number(f"{option} {name}", value)
        if not 0 < weights[name] < math.inf:
            raise UserError(
                f"{option} {word}: a weight must be positive and finite; leave out what is not read"
            )
    if not weights:
        raise UserError(f"{option} needs weights, as in {' '.join(f'{name}=1' for name in sources)}")
    whole = sum(map(Fraction, weights.values()))
    exact = {name: BLOCK * Fraction(weights[name]) / whole for name in sorted(weights)}
    counts = {name: math.floor(share) for name, share in exact.items()}
    by_rest = sorted(exact, key=lambda name: counts[name] - exact[name])
    for name in by_rest[: BLOCK - sum(counts.values())]:
        counts[name] += 1
    for name, n in counts.items():
        if n == 0:
            share = float(exact[name] / BLOCK)
            raise UserError(
                f"{option} {name}={weights[name]:g} is a share of {share:.2g}, less than one window in the "
                f"{BLOCK:,} among which shares hold: give it more, or leave it out"
            )
    return tuple(counts.items())


def _number(what: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise UserError(f"{what}: {text!r} is not a number") from None
