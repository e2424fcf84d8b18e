"""`python -m bench.ladder`: what a call of a small operation costs, in PyTorch and in JAX, compiled or not.

The original of these models said that JAX is 10 to 50 times faster than eager PyTorch in small operations.
Here is where that holds: a ladder of operations (bench/ladder_rows.py) and sizes, each library in a process
of its own.
"""

import dataclasses
import os
import sys
from pathlib import Path
from typing import Any, Literal

from bench.gpu import require_gpu
from bench.ladder_rows import PIECES, SIZES, WAYS, WIDTH, measure, ways
from bench.row_process import in_process, print_row, taken_row
from core import checks, cli
from core.console import Table
from core.errors import UserError, run_command
from core.figures import require_json, require_picture, write_json
from core.folders import write_picture


@dataclasses.dataclass(frozen=True)
class LadderConfig:
    """Time small operations, call by call, in PyTorch and JAX."""

    device: Literal["cuda", "cpu"] = "cuda"
    sizes: tuple[int, ...] = SIZES
    """Elements of the array, multiples of 256."""
    pieces: tuple[Literal[*PIECES], ...] = tuple(PIECES)
    """The operations."""
    json: Path | None = None
    """Write all figures into this file."""
    plot: Path | None = None
    """Draw them into this file."""

    def __post_init__(self) -> None:
        checks.lists(**checks.fields(self, "sizes", "pieces"))
        for size in self.sizes:
            if size < WIDTH or size % WIDTH:
                raise UserError(f"--sizes must be multiples of {WIDTH}, not {size}")


def facts_of(library: str, device: str) -> dict[str, str]:
    """The library's version; of PyTorch's process also the device."""
    if library == "jax":
        import jax

        return {"jax": jax.__version__}
    import torch

    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    return {"torch": torch.__version__, "device": name}


def rows_of(library: str, config: LadderConfig) -> list[dict[str, Any]]:
    """All figures of one library, which this process then holds the device with."""
    return [
        {"piece": piece, "size": size, "way": way, "microseconds": measure(way, piece, size, config.device)}
        for piece in config.pieces
        for size in config.sizes
        for way in ways(config.device)
        if way.startswith("jax") is (library == "jax")
    ]


def print_table(rows: list[dict[str, Any]], config: LadderConfig) -> None:
    """One line per operation and size: microseconds of a call, and how many times as long as JAX's jit."""
    columns = ways(config.device)
    table = Table(("operation",), ("elements", *(f"{WAYS[way]}, us" for way in columns), "eager over jit"))
    found = {(row["piece"], row["size"], row["way"]): row["microseconds"] for row in rows}
    for piece in config.pieces:
        for size in config.sizes:
            times = {way: found[piece, size, way] for way in columns}
            table.add_row(
                PIECES[piece].title,
                f"{size:,}",
                *(f"{times[way]:.1f}" for way in columns),
                f"{times['torch'] / times['jax']:.1f}",
            )
    table.print()


def plot(rows: list[dict[str, Any]], path: Path, config: LadderConfig) -> None:
    """A panel per size: microseconds of a call, logarithmic, one group of bars per operation."""
    from matplotlib.figure import Figure

    columns = ways(config.device)
    figure = Figure(figsize=(4.5 * len(config.sizes), 4.5), layout="constrained")
    axes = figure.subplots(1, len(config.sizes), sharey=True, squeeze=False)
    for axis, size in zip(axes[0], config.sizes, strict=True):
        for number, way in enumerate(columns):
            times = [row["microseconds"] for row in rows if row["size"] == size and row["way"] == way]
            places = [i + (number - (len(columns) - 1) / 2) * 0.8 / len(columns) for i in range(len(times))]
            axis.bar(places, times, width=0.8 / len(columns), label=WAYS[way])
        axis.set_yscale("log")
        axis.set_xticks(range(len(config.pieces)), config.pieces, rotation=30)
        axis.set_title(f"{size:,} elements", fontsize="medium")
    axes[0][0].set_ylabel("microseconds per call")
    axes[0][0].legend(fontsize="small")
    write_picture(figure, path, dpi=120)


def main() -> None:
    """Measures each library in its process and prints the table."""
    library, argv = taken_row(sys.argv[1:])  # "torch" or "jax"
    config = cli.parse(LadderConfig, argv, prog="python -m bench.ladder")
    if library:
        print_row({"facts": facts_of(library, config.device), "rows": rows_of(library, config)})
        return
    require_json(config.json)
    require_picture(config.plot)
    if config.device == "cuda":
        require_gpu("bench.ladder", "--device cpu")
    report: dict[str, Any] = {"rows": []}
    for name in ("torch", "jax"):
        print(f"measuring {name} ...", file=sys.stderr, flush=True)
        measured = in_process("bench.ladder", name, argv, os.environ | {"JAX_PLATFORMS": config.device})
        if "failed" in measured:
            raise UserError(f"the process that measures {name} failed: {measured['failed']}")
        report |= measured["facts"]
        report["rows"] += measured["rows"]
    print_table(report["rows"], config)
    write_json(config.json, report)
    if config.plot:
        plot(report["rows"], config.plot, config)


if __name__ == "__main__":
    run_command(main)
