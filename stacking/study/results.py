"""What a study measured: the losses of its arms."""

import dataclasses
from typing import NamedTuple


class Point(NamedTuple):
    """A held-out loss somewhere in an arm."""

    steps: int
    tokens: int
    flops: float
    """Of all training until there, the base's included."""
    losses: dict[str, float]
    """Nats per token, by held-out set."""


@dataclasses.dataclass(frozen=True)
class Arm:
    """One arm's losses: along its trunk, and at the ends of its decayed runs."""

    op: str
    grown_at: int
    seed: int
    lr: float
    trunk: tuple[Point, ...]
    decayed: tuple[Point, ...]
    halted: bool = False
    """The guard ended it before its decayed run at equal tokens was done: it has no losses."""

    @property
    def name(self) -> str:
        """As it stands in the table."""
        return self.op if self.op == "scratch" else f"{self.op} at {self.grown_at}"

    def at(self, steps: int) -> Point:
        """The decayed run of so many steps."""
        return next(point for point in self.decayed if point.steps == steps)
