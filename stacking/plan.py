"""Growth plans as data: for every new layer, which old layer it comes from, and how.

A plan is (sigma, how): new layer l is old layer sigma(l), taken over as a

    copy       unchanged
    identity   with its projections into the residual stream (o, down) zeroed, so that the block passes its
               input on: the function of the whole model stays what it was
    fresh      with newly drawn parameters; sigma(l) lends the scale of its second moments only

Operators that the literature has names for build such plans; any other one can be written as ranges.
"""

import dataclasses
import re
from typing import Literal, get_args

from core.errors import UserError

How = Literal["copy", "identity", "fresh"]
Operator = Literal["stack", "interleave", "overlap", "middle", "identity", "random"]
HOWS: tuple[How, ...] = get_args(How)
DEFAULT_FACTOR: dict[Operator, float] = {
    "stack": 2, "interleave": 2, "overlap": 1.5, "middle": 1.5, "identity": 2, "random": 2,
}  # fmt: skip
RANGE = re.compile(r"\s*(\d+)(?:-(\d+))?(?::(\w+))?\s*")
BARS = "▁▂▃▄▅▆▇█"
ROW = 24  # new layers a line of the picture holds


@dataclasses.dataclass(frozen=True)
class Plan:
    """Where the layers of a deeper (or shallower) model come from."""

    name: str
    """The operator, or "custom"."""
    n_source: int
    """Layers of the model that is grown."""
    sources: tuple[int, ...]
    """sigma: the old layer of every new one."""
    how: tuple[How, ...]
    """What becomes of it, layer by layer."""

    def __post_init__(self) -> None:
        if not self.sources:
            raise UserError("a plan needs at least one layer")
        if len(self.how) != len(self.sources):
            raise ValueError(f"{len(self.sources)} layers and {len(self.how)} ways to make them")
        for layer in self.sources:
            if not 0 <= layer < self.n_source:
                raise UserError(
                    f"there is no layer {layer}: the model has {self.n_source}, 0 to {self.n_source - 1}"
                )

    @property
    def n_layers(self) -> int:
        """Layers of the grown model."""
        return len(self.sources)

    @property
    def is_noop(self) -> bool:
        """Whether the grown model is the old one."""
        return self.sources == tuple(range(self.n_source)) and set(self.how) == {"copy"}

    @property
    def preserves(self) -> bool:
        """Whether the grown model computes what the old one did: every old layer once and in order, and
        between them blocks that pass their input on."""
        live = tuple(s for s, how in zip(self.sources, self.how, strict=True) if how != "identity")
        return live == tuple(range(self.n_source)) and "fresh" not in self.how

    def ranges(self) -> str:
        """The plan as `custom_plan` reads it: "0-11,0-11:identity"."""
        parts: list[tuple[int, int, How]] = []
        for source, how in zip(self.sources, self.how, strict=True):
            if parts and parts[-1][1:] == (source - 1, how):
                parts[-1] = (parts[-1][0], source, how)
            else:
                parts.append((source, source, how))
        return ",".join(
            (f"{a}-{b}" if a != b else f"{a}") + (f":{how}" if how != "copy" else "") for a, b, how in parts
        )

    def picture(self) -> str:
        """A few lines that show which new layer comes from which: numbers, and source depth as bars."""
        marks = {"copy": " ", "identity": "0", "fresh": "*"}
        width = max(3, len(str(max(self.n_layers, self.n_source) - 1)) + 1)

        def line(label: str, cells: list[str]) -> str:
            return (label.ljust(6) + "".join(cell.rjust(width) for cell in cells)).rstrip()

        top = max(1, self.n_source - 1)
        bars = [BARS[source * (len(BARS) - 1) // top] for source in self.sources]
        lines = [f"{self.name}: {self.n_source} -> {self.n_layers} layers ({self.ranges()})"]
        for start in range(0, self.n_layers, ROW):
            part = range(start, min(start + ROW, self.n_layers))
            lines.append(line("new", [str(i) for i in part]))
            lines.append(line("", [bars[i] for i in part]))
            lines.append(line("old", [str(self.sources[i]) for i in part]))
            if set(self.how[start : part.stop]) != {"copy"}:
                lines.append(line("", [marks[self.how[i]] for i in part]))
        legend = {"identity": "0: an identity block, its o and down zeroed", "fresh": "*: newly drawn"}
        lines += [f"      {legend[how]}" for how in ("identity", "fresh") if how in self.how]
        return "\n".join(lines)


def choose_plan(operator: Operator, factor: float | None, layers: str | None, n_source: int) -> Plan:
    """The plan that a command line asks for: its --layers, else its --op and --factor.

    Raises:
        UserError: it does not fit a model of `n_source` layers.
    """
    if layers is None:
        return make_plan(operator, n_source, factor)
    if factor is not None:
        raise UserError("--layers is the whole plan: leave --factor out")
    return custom_plan(layers, n_source)


def make_plan(operator: Operator, n_source: int, factor: float | None = None) -> Plan:
    """The plan of a named operator for a model of `n_source` layers.

    stack       0 1 2 0 1 2     copies of the whole, on top of each other (G_stack: Du et al. 2024)
    interleave  0 0 1 1 2 2     every layer next to its copy
    overlap     0 1 2 1 2 3     two copies without the layers at the seam (SOLAR: Kim et al. 2023)
    middle      0 1 2 1 2 3     the middle block twice (MIDAS: Saunshi et al. 2024)
    identity    0 1 2 0 1 2     as stack, every added layer an identity block
    random      0 1 2 * * *     the old layers below newly drawn ones: the control

    Args:
        factor: new layers / old layers; default 2, for overlap and middle 1.5.

    Raises:
        UserError: the factor does not fit the operator or the number of layers.
    """
    factor = DEFAULT_FACTOR[operator] if factor is None else factor
    n = round(factor * n_source) if 1 <= factor <= 64 else 0
    if abs(n - factor * n_source) > 1e-6 or n == 0:
        raise UserError(
            f"a factor of {factor:g} does not fit {n_source} layers: it must be at least 1 (and at most 64) "
            f"and give a whole number of layers, as {_fitting(n_source, factor)} does"
        )
    copies: tuple[How, ...] = ("copy",) * n
    if operator == "interleave":
        return Plan(operator, n_source, tuple(layer * n_source // n for layer in range(n)), copies)
    if operator in ("overlap", "middle"):
        if not n_source <= n <= 2 * n_source or (operator == "overlap" and n % 2):
            even = " and an even number" if operator == "overlap" else ""
            raise UserError(
                f"{operator} makes at most twice the layers{even}, not {n} out of {n_source}: choose another "
                "factor, or stack"
            )
        if operator == "overlap" and n > n_source:
            half = n // 2
            return Plan(operator, n_source, (*range(half), *range(n_source - half, n_source)), copies)
        start = (2 * n_source - n) // 2
        end = start + n - n_source
        return Plan(operator, n_source, (*range(end), *range(start, n_source)), copies)
    added: How = {"stack": "copy", "identity": "identity", "random": "fresh"}[operator]
    how = tuple("copy" if layer < n_source else added for layer in range(n))
    return Plan(operator, n_source, tuple(layer % n_source for layer in range(n)), how)


def custom_plan(layers: str, n_source: int) -> Plan:
    """A plan from ranges of old layers, both ends included: "0-11,4-11" or "0-11,0-11:identity".

    Raises:
        UserError: it cannot be read, or names a layer that is not there.
    """
    sources: list[int] = []
    how: list[How] = []
    for part in layers.split(","):
        match = RANGE.fullmatch(part)
        if not match or (match[3] or "copy") not in HOWS:
            raise UserError(
                f"--layers: {part!r} is not a range of layers: write FIRST-LAST, both included, or one "
                "layer, followed by :identity or :fresh if meant, as in 0-11,0-11:identity"
            )
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise UserError(f"--layers: the range {part.strip()!r} runs backwards: write {last}-{first}")
        if last >= n_source:
            raise UserError(
                f"--layers: {part.strip()!r} names layer {last}, but the model has {n_source} layers, 0 to "
                f"{n_source - 1} (both ends of a range are included)"
            )
        sources += range(first, last + 1)
        how += [match[3] or "copy"] * (last + 1 - first)
    return Plan("custom", n_source, tuple(sources), tuple(how))


def _fitting(n_source: int, factor: float) -> str:
    """The factor nearest to the one asked for that gives a whole number of layers."""
    nearest = round(factor * n_source) if 1 <= factor <= 64 else 2 * n_source
    return f"{max(n_source, nearest) / n_source:g}"
