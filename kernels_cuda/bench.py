"""Every kernel next to PyTorch (eager and compiled) and Liger on this GPU: `python -m kernels_cuda.bench`.

One run, one table. The ceilings, a copy and a matrix product, are measured in the same run, and every row
says what share of its ceiling it reaches: bytes that the task must move, or operations that it must make,
over the time.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from core import checks, cli
from core.errors import UserError, run_command
from core.figures import require_json, require_picture, write_json
from core.folders import write_picture

if TYPE_CHECKING:
    from kernels_cuda.bench_tasks import Row


@dataclass(frozen=True)
class BenchConfig:
    """Time every kernel next to PyTorch (eager and compiled) and Liger on this GPU."""

    tasks: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="[TASK ...]")] = ()
    """Names of tasks; an unknown name lists them. Default: all."""
    calls: int = 30
    """Timed calls of each."""
    json: Path | None = None
    """Write the rows here."""
    plot: Path | None = None
    """Draw them here."""

    def __post_init__(self) -> None:
        checks.counts(calls=self.calls)


def print_table(rows: list["Row"]) -> None:
    """One block per task; "ours" is how many times faster mtlm is."""
    for task in dict.fromkeys(row.task for row in rows):
        print(f"\n{task}")
        of_task = [row for row in rows if row.task == task]
        ours = next((row.milliseconds for row in of_task if row.implementation == "mtlm"), None)
        for row in of_task:
            extra = "" if row.extra_gib is None else f"  extra {row.extra_gib:.2f} GiB"
            times = "" if ours is None else f"  ours {row.milliseconds / ours:5.2f}x"
            print(
                f"  {row.implementation:<26}{row.milliseconds * 1e3:9.1f} us  {row.rate:7.2f} {row.unit:<8}"
                f"{row.of_ceiling:6.1%}{times}{extra}{'  with time of the host' if row.host else ''}"
            )


def plot(rows: list["Row"], path: Path, device: str) -> None:
    """Bars: each implementation's share of the ceiling, one block per task."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    tasks = list(dict.fromkeys(row.task for row in rows))
    colors = {name: f"C{n}" for n, name in enumerate(dict.fromkeys(row.implementation for row in rows))}
    figure, axes = pyplot.subplots(figsize=(9, 0.14 * (len(rows) + len(tasks)) + 1.5), layout="constrained")
    top, middles = 0, []
    for task in tasks:
        of_task = [row for row in rows if row.task == task]
        at = range(top, top + len(of_task))
        shares = [row.of_ceiling * 100 for row in of_task]
        axes.barh(at, shares, 0.9, color=[colors[row.implementation] for row in of_task])
        for y, share in zip(at, shares, strict=True):
            axes.text(share + 0.5, y, f"{share:.0f}", va="center", fontsize=6)
        middles.append(top + (len(of_task) - 1) / 2)
        top += len(of_task) + 1
    axes.set_yticks(middles, tasks, fontsize="small")
    axes.set_ylim(top - 0.5, -1)
    axes.set_xlim(0, 105)
    axes.set_xlabel("% of the copy bandwidth or the matrix limit")
    handles = [pyplot.Rectangle((0, 0), 1, 1, color=color) for color in colors.values()]
    figure.legend(handles, colors, loc="outside upper center", ncols=5, fontsize="small", title=device)
    write_picture(figure, path, dpi=120)


def main() -> None:
    """The command."""
    config = cli.parse(BenchConfig, prog="python -m kernels_cuda.bench")
    require_json(config.json)
    require_picture(config.plot)
    import torch  # slow, as what is timed

    from kernels_cuda import library
    from kernels_cuda.bench_tasks import TASKS, Clock, ceilings, measure

    if unknown := [task for task in config.tasks if task not in TASKS]:
        raise UserError(f"unknown task {unknown[0]!r}: there are {', '.join(TASKS)}")
    library.load("cuda")
    torch._dynamo.config.fail_on_recompile_limit_hit = True  # and not uncompiled without a word
    clock = Clock(config.calls)
    copy, product = ceilings(clock)
    device = torch.cuda.get_device_name()
    print(
        f"{device}, PyTorch {torch.__version__}: copy {copy:.2f} TB/s, bfloat16 product {product:.0f} TFLOP/s"
    )
    rows = []
    for name in config.tasks or TASKS:
        torch.cuda.empty_cache()
        for task, implementation, function in TASKS[name]():
            rows.append(measure(clock, task, implementation, function, copy, product))
        torch._dynamo.reset()
    print_table(rows)
    facts = {"device": device, "torch": torch.__version__, "calls": config.calls}
    facts |= {"copy": copy, "product": product}
    write_json(config.json, {**facts, "rows": [asdict(row) for row in rows]})
    if config.plot:
        plot(rows, config.plot, device)


if __name__ == "__main__":
    run_command(main)
