"""--profile A:B: a trace of some updates, and the operations that took most of their time."""

import re
from collections.abc import Iterable
from typing import NamedTuple

from core.errors import UserError

FOLDER = "profile"  # in the run folder
COSTLIEST = 10


class Operation(NamedTuple):
    """An operation in a trace, all its calls together."""

    name: str
    calls: int
    seconds: float


def parse_updates(text: str) -> tuple[int, int]:
    """`100:105` as (100, 105): updates 100 to 104.

    Raises:
        UserError: it is no such range.
    """
    found = re.fullmatch(r"(\d+):(\d+)", text)
    if not found or not int(found[1]) < int(found[2]):
        raise UserError(f"--profile {text}: give the first update and the one after the last, as in 100:105")
    return int(found[1]), int(found[2])


def require_among(text: str, first: int, end: int) -> None:
    """Refuses to profile updates that this start does not make: it makes `first` to `end` - 1."""
    begin, after = parse_updates(text)
    if begin < first or after > end:
        raise UserError(
            f"--profile {text}: this start makes updates {first} to {end - 1}; give a range of them"
        )


def add_up(calls: Iterable[tuple[str, float]]) -> list[Operation]:
    """(name, seconds) of single calls as operations."""
    found: dict[str, tuple[int, float]] = {}
    for name, seconds in calls:
        n, total = found.get(name, (0, 0.0))
        found[name] = n + 1, total + seconds
    return [Operation(name, *sums) for name, sums in found.items()]


def describe(operations: list[Operation], updates: int) -> str:
    """The costliest, with the share of each in the time of all operations."""
    total = sum(operation.seconds for operation in operations)
    if not total:
        return "the trace has no operations of the device"
    ranked = sorted(operations, key=lambda operation: -operation.seconds)[:COSTLIEST]
    lines = [f"the {len(ranked)} costliest of {len(operations)} operations, per update:"]
    for name, calls, seconds in ranked:
        each = f"{1000 * seconds / updates:9.3f} ms  {calls / updates:5.0f} calls"
        lines.append(f"  {seconds / total:6.1%}  {each}  {name}")
    return "\n".join(lines)
