"""Checks of numbers that users give. Every command makes them here, so that none forgets nan or infinity.

Values are given by the name of their setting; None, which means "not given", passes.
"""

import math
import numbers
from collections.abc import Callable
from typing import Any

from core.errors import UserError

MAX_SEED = 2**32 - 1  # keys are made of 32 bits
MAX_COUNT = 2**31 - 1  # what a compiled step takes as an int32


def option(name: str) -> str:
    """A setting's name as it is typed: `d_model` is `--d-model`."""
    return f"--{name.replace('_', '-')}"


def fields(config: Any, *names: str, prefix: str = "") -> dict[str, Any]:
    """The values of some fields of a config, to hand to the functions below.

    prefix: where they come from, if not from the command line: "model." for those of a model's description.
    """
    return {f"{prefix}{name}": getattr(config, name) for name in names}


def positive(**values: Any) -> None:
    """A UserError for a value that is not finite and above 0."""
    _require("must be positive and finite", lambda value: 0 < value < math.inf, values)


def not_negative(**values: Any) -> None:
    """A UserError for a value that is not finite and at least 0."""
    _require("must be finite and not negative", lambda value: 0 <= value < math.inf, values)


def fractions(**values: Any) -> None:
    """A UserError for a value outside [0, 1]."""
    _require("must lie in [0, 1]", lambda value: 0 <= value <= 1, values)


def below_one(**values: Any) -> None:
    """A UserError for a value outside [0, 1)."""
    _require("must lie in [0, 1)", lambda value: 0 <= value < 1, values)


def between_zero_and_one(**values: Any) -> None:
    """A UserError for a value outside (0, 1)."""
    _require("must lie in (0, 1)", lambda value: 0 < value < 1, values)


def above_zero_to_one(**values: Any) -> None:
    """A UserError for a value outside (0, 1]."""
    _require("must lie in (0, 1]", lambda value: 0 < value <= 1, values)


def counts(least: int = 1, most: int = MAX_COUNT, **values: Any) -> None:
    """A UserError for a value that is not an integer from `least` to `most`."""
    low = {0: "must not be negative", 1: "must be positive"}.get(least, f"must be at least {least}")
    _require("must be an integer", lambda value: isinstance(value, numbers.Integral), values)
    _require(low, lambda value: value >= least, values)
    _require(f"must be at most {most:,}", lambda value: value <= most, values)


def lists(**values: Any) -> None:
    """A UserError for a list without values."""
    for name, value in values.items():
        if value is not None and not value:
            raise UserError(f"{option(name)} needs at least one value: give some, or leave it out")


def seeds(**values: Any) -> None:
    """A UserError for a value that random keys cannot be made of."""
    _require("must be an integer", lambda value: isinstance(value, numbers.Integral), values)
    _require("must lie in [0, 2^32)", lambda value: 0 <= value <= MAX_SEED, values)


def _require(rule: str, fits: Callable[[Any], bool], values: dict[str, Any]) -> None:
    for name, value in values.items():
        if value is None:
            continue
        number = isinstance(value, numbers.Real) and not isinstance(value, bool)
        if not (number and fits(value)):
            raise UserError(f"{name if '.' in name else option(name)} is {value!r}; it {rule}")
