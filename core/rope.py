"""Scaled rotary positions: how a model trained on short sequences is made to read longer ones.

Every kind multiplies the frequencies theta^(-2i/K) of rotary embedding by constants, so that a model computes
its own frequencies as before and multiplies them by `Scaling.multipliers`. The formulas are those of their
papers, as `transformers` has them; kinds that change with the length read (dynamic, longrope) are not here.
"""

import dataclasses
import math
import reprlib
from typing import Any

import numpy as np
from jaxtyping import Float

from core.errors import UserError

# What each kind is made of, and the defaults; None: must be given.
KINDS: dict[str, dict[str, float | None]] = {
    "linear": {"factor": None},
    "llama3": {"factor": None, "low_freq_factor": None, "high_freq_factor": None, "original_context": None},
    "yarn": {
        "factor": None, "original_context": None, "beta_fast": 32, "beta_slow": 1, "attention_factor": 0,
        "truncate": 1,
    },
}  # fmt: skip

EXAMPLES = {
    "linear": "linear,factor=2",
    "llama3": "llama3,factor=32,low_freq_factor=1,high_freq_factor=4,original_context=8192",
    "yarn": "yarn,factor=4,original_context=2048",
}


@dataclasses.dataclass(frozen=True)
class Scaling:
    """One way to scale, written like `yarn,factor=4,original_context=2048`; defaults may be left out.

    linear   every frequency is divided by `factor` (Chen et al. 2023, position interpolation)
    llama3   low frequencies are divided by `factor`, high ones kept, with a ramp between (Llama 3.1)
    yarn     a ramp over the elements of a head; cos and sin are multiplied by `attention_factor`, by default
             0.1 ln(factor) + 1 (Peng et al. 2023); `truncate` rounds the ends of the ramp
    """

    kind: str
    values: tuple[tuple[str, float], ...]
    """Of every name in `KINDS[kind]`, in that order."""

    def __getitem__(self, name: str) -> float:
        return dict(self.values)[name]

    def __str__(self) -> str:
        given = (f"{name}={value:.17g}" for name, value in self.values if value != KINDS[self.kind][name])
        return ",".join([self.kind, *given])

    def multipliers(self, head_size: int, theta: float) -> Float[np.ndarray, " half"]:
        """What the frequencies are multiplied by, float32; computed in float64."""
        half = head_size // 2
        factor = self["factor"]
        if self.kind == "linear":
            return np.full(half, 1 / factor, np.float32)
        if self.kind == "llama3":
            turns = self["original_context"] * theta ** (-np.arange(half) / half) / (2 * math.pi)
            low, high = self["low_freq_factor"], self["high_freq_factor"]
            kept = np.clip((turns - low) / (high - low), 0, 1)
        else:
            kept = 1 - self._ramp(head_size, theta)
        return (kept + (1 - kept) / factor).astype(np.float32)

    def _ramp(self, head_size: int, theta: float) -> Float[np.ndarray, " half"]:
        """yarn: from 0 where an element turns `beta_fast` times in the original context to 1 at the end."""

        def element(turns: float) -> float:
            return (
                head_size * math.log(self["original_context"] / (turns * 2 * math.pi)) / (2 * math.log(theta))
            )

        low, high = element(self["beta_fast"]), element(self["beta_slow"])
        if self["truncate"]:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, head_size - 1)
        return np.clip((np.arange(head_size // 2) - low) / (max(high - low, 0) or 0.001), 0, 1)

    @property
    def amplitude(self) -> float:
        """What cos and sin are multiplied by."""
        if self.kind != "yarn":
            return 1.0
        return self["attention_factor"] or (0.1 * math.log(self["factor"]) + 1 if self["factor"] > 1 else 1.0)


def make_scaling(kind: str, given: dict[str, Any]) -> Scaling:
    """The scaling of a kind with the values given.

    Raises:
        UserError: there is no such kind, a value is missing, unknown or out of range.
    """
    if kind not in KINDS:
        raise UserError(
            f"rope scaling {reprlib.repr(kind)} is not computed here: there are {', '.join(KINDS)}"
        )
    known = KINDS[kind]
    for name, value in given.items():
        if name not in known:
            raise UserError(f"rope scaling {kind} has no {reprlib.repr(name)}: it has {', '.join(known)}")
        if not (isinstance(value, int | float) and 0 <= value <= 1e9):
            raise UserError(f"{name} of rope scaling {kind} is {reprlib.repr(value)}, not a number up to 1e9")
    values = known | {name: float(value) for name, value in given.items()}
    for name, value in values.items():
        if value is None:
            raise UserError(f"rope scaling {kind} needs {name}=NUMBER: write it like {EXAMPLES[kind]}")
        if value == 0 and known[name] is None:
            raise UserError(f"{name} of rope scaling {kind} is 0, but must be positive")
    for low, high in (("low_freq_factor", "high_freq_factor"), ("beta_slow", "beta_fast")):
        if low in values and not values[low] < values[high]:
            raise UserError(
                f"rope scaling {kind}: {low} {values[low]:g} is not below {high} {values[high]:g}"
            )
    return Scaling(kind, tuple((name, float(value)) for name, value in values.items()))


def parse_scaling(text: str) -> Scaling:
    """`Scaling` as it is written in settings.

    Raises:
        UserError: it cannot be read, or `make_scaling` refuses it.
    """
    kind, *parts = (part.strip() for part in text.split(","))
    given: dict[str, float] = {}
    for part in parts:
        name, _, value = part.partition("=")
        name = name.strip()
        if name in given:
            raise UserError(f"rope scaling {reprlib.repr(text)} gives {name} twice: give each value once")
        try:
            given[name] = float(value)
        except ValueError:
            raise UserError(
                f"rope scaling {reprlib.repr(text)} cannot be read at {reprlib.repr(part)}: write it like "
                f"{EXAMPLES['linear']}"
            ) from None
    return make_scaling(kind, given)
