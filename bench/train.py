"""`python -m bench.train`: whole training steps of the mirror on one GPU, next to those of its peers.

Every way to train (bench/train_rows.py) runs in a process of its own, one after the other: a fresh allocator,
fresh compilations, and what Liger changes in transformers is changed for it alone.
"""

import dataclasses
import os
import sys
from pathlib import Path
from typing import Any, Literal

import torch

from bench import row_process
from bench.bars import draw_rates
from bench.gpu import require_gpu
from bench.row_process import Row, exit_code, print_row, taken_row
from bench.train_rows import JAX, VARIANTS, measure, measure_jax
from core import checks, cli
from core.config import ModelConfig, preset
from core.console import Table
from core.errors import UserError, run_command
from core.figures import require_json, require_picture, write_json
from core.folders import require_place, write_picture
from kernels_cuda.bench_tasks import Clock, ceilings
from port_torch.hf_config import stock_type

CASES = ("mtlm1-200m", "mtlm2-40m")
BATCH = {
    "mtlm1-200m": 32, "mtlm2-40m": 64, "smollm2-135m": 16, "smollm2-360m": 8, "qwen3-0.6b": 2,
}  # fmt: skip
GOALS = {"mtlm1-200m": {"plain": 1.22, "hf-liger": 1.6}, "mtlm2-40m": {"plain": 1.35}}
"""How many times the peer's tokens/s ours shall have."""


@dataclasses.dataclass(frozen=True)
class TrainBenchConfig:
    """Time whole training steps of both engines next to plain PyTorch, Hugging Face and Liger.

    bfloat16 under autocast with float32 weights; the same first weights, update and random tokens for all. A
    row is the median of the steps; MFU is the model's own operations over the GPU's dense bfloat16 peak.
    """

    cases: tuple[str, ...] = CASES
    """Presets. Hugging Face's class is timed next to those that have one there."""
    variants: tuple[Literal[*VARIANTS], ...] = tuple(VARIANTS)
    """Ways to train; the ratios need plain and hf-liger."""
    steps: int = 20
    """Timed steps, after 5 of warming up."""
    batch: int | None = None
    """Sequences per step. Default: 32 for mtlm1-200m, 64 for mtlm2-40m, about 32,000 tokens for other large
    ones, 8 for the rest."""
    context: int | None = None
    """Tokens per sequence. Default: the preset's."""
    device: Literal["cuda", "cpu"] = "cuda"
    """cpu tries the command out, in float32; its times say nothing, and our kernels cannot run."""
    json: Path | None = None
    """Write all figures into this file, after every row."""
    plot: Path | None = None
    """Draw them into this file."""
    profile: Path | None = None
    """Write where the time of our steps and of plain PyTorch's goes into this folder, one line per kernel."""

    def __post_init__(self) -> None:
        checks.lists(**checks.fields(self, "cases", "variants"))
        checks.counts(**checks.fields(self, "steps", "batch", "context"))

    def model(self, case: str) -> ModelConfig:
        """The model of a case."""
        model = preset(case)
        return dataclasses.replace(model, context=self.context) if self.context is not None else model

    def sequences(self, case: str) -> int:
        """Sequences per step."""
        return BATCH.get(case, 8) if self.batch is None else self.batch


def run_row(config: TrainBenchConfig, row: str) -> Row:
    """What a row's process does: "CASE/VARIANT", or "ceilings", the facts of the GPU."""
    if row == "ceilings":
        copy, product = ceilings(Clock(20))
        return {
            "device": torch.cuda.get_device_name(),
            "copy_tb_per_second": copy,
            "product_tflop_per_second": product,
        }
    case, variant = row.split("/")
    if variant in JAX:
        return measure_jax(variant, case, config.model(case), config.sequences(case), config.steps)
    profiled = config.profile is not None and VARIANTS[variant].profiled
    return measure(
        config.model(case),
        config.sequences(case),
        variant,
        config.steps,
        torch.device(config.device),
        config.profile / f"{case}-{variant}.txt" if profiled else None,
    )


def in_process(row: str, argv: list[str], device: str) -> Row:
    """See `bench.row_process.in_process`."""
    # JAX's rows fail where JAX cannot have that device; elsewhere it only draws the first weights.
    platform = device if row.partition("/")[2] in JAX else "cpu"
    environment = os.environ | {"JAX_PLATFORMS": platform}
    return row_process.in_process("bench.train", row, argv, environment)


def goals(rows: list[Row]) -> list[dict[str, Any]]:
    """Each goal of the cases that are there, with what was reached (None: not measured)."""
    measured = {(row["case"], row["variant"]): row for row in rows if "failed" not in row}
    found = []

    def add(case: str, goal: str, field: str, peer: str, met: Any) -> None:
        both = [measured.get((case, variant)) for variant in ("ours", peer)]
        value = both[0][field] / both[1][field] if all(both) else None
        found.append({"case": case, "goal": goal, "value": value, "met": value and met(value)})

    for case in dict.fromkeys(row["case"] for row in rows):
        for peer, least in GOALS.get(case, {}).items():
            goal = f"{least} times the tokens/s of {VARIANTS[peer].title}"
            add(case, goal, "tokens_per_second", peer, lambda value, least=least: value >= least)
        if "hf-liger" in GOALS.get(case, {}):
            goal = f"no more memory than {VARIANTS['hf-liger'].title}"
            add(case, goal, "peak_gib", "hf-liger", lambda value: value <= 1)
    return found


def print_table(rows: list[Row]) -> None:
    """One line per row; the last two columns are its tokens/s over a peer's."""
    table = Table(
        ("model", "step"),
        ("ms", "tokens/s", "MFU", "peak GiB", "loss, first, last", "first step s", "of plain", "of Liger"),
    )
    rates = {(row["case"], row["variant"]): row.get("tokens_per_second") for row in rows}
    for row in rows:
        case, title = row["case"], VARIANTS[row["variant"]].title
        if "failed" in row:
            table.add_row(case, title, "failed")
            continue
        bases = (rates.get((case, peer)) for peer in ("plain", "hf-liger"))
        table.add_row(
            case,
            title,
            f"{row['milliseconds']:.1f}",
            f"{row['tokens_per_second']:,.0f}",
            "" if row["mfu"] is None else f"{row['mfu']:.1%}",
            "" if row["peak_gib"] is None else f"{row['peak_gib']:.1f}",
            f"{row['first_loss']:.3f} {row['loss']:.3f}",
            f"{row['first_step_seconds']:.0f}",
            *(f"{row['tokens_per_second'] / base:.2f}" if base else "" for base in bases),
        )
    table.print()
    for row in rows:
        if "failed" in row:
            print(f"failed: {row['case']}, {VARIANTS[row['variant']].title}: {row['failed']}")


def plot(rows: list[Row], path: Path, device: str) -> None:
    """Bars: tokens/s of each way, one panel per case."""
    from matplotlib.figure import Figure

    measured = [row for row in rows if "failed" not in row]
    cases = list(dict.fromkeys(row["case"] for row in measured))
    if not cases:
        raise UserError(f"nothing was measured, so there is nothing to draw into {path}")
    figure = Figure(figsize=(9, 3 * len(cases)), layout="constrained")
    axes = figure.subplots(len(cases), 1, squeeze=False)
    for axis, case in zip(axes[:, 0], cases, strict=True):
        of_case = [row for row in measured if row["case"] == case]
        colors = ["C1" if row["variant"].startswith("ours") else "C0" for row in of_case]
        titles = [VARIANTS[row["variant"]].title for row in of_case]
        rates = [row["tokens_per_second"] for row in of_case]
        shape = f"{of_case[0]['batch']} x {of_case[0]['context']}"
        draw_rates(axis, titles, rates, f"{case}, {shape}: tokens/s, {device}", colors)
    write_picture(figure, path, dpi=120)


def main() -> int | None:
    """Runs every row in a process and prints the table."""
    row, argv = taken_row(sys.argv[1:])
    config = cli.parse(TrainBenchConfig, argv, prog="python -m bench.train")
    if row:
        print_row(run_row(config, row))
        return None
    require_json(config.json)
    require_picture(config.plot)
    if config.profile is not None:
        require_place(config.profile)
    cuda = config.device == "cuda"
    if cuda:
        require_gpu("bench.train", "--device cpu --cases mtlm1-tiny")
    models = {case: config.model(case) for case in config.cases}
    todo = [
        (case, variant)
        for case in config.cases
        for variant in config.variants
        if VARIANTS[variant].serves(models[case])
    ]
    report: dict[str, Any] = {"torch": torch.__version__, "device": "cpu", "rows": []}
    if cuda:
        facts = in_process("ceilings", argv, config.device)
        if "failed" in facts:
            raise UserError(f"the GPU does not run the simplest products: {facts['failed']}")
        report |= facts
        print(
            f"{facts['device']}, PyTorch {torch.__version__}: copy {facts['copy_tb_per_second']:.2f} TB/s, "
            f"bfloat16 product {facts['product_tflop_per_second']:.0f} TFLOP/s",
            flush=True,
        )
    rows = report["rows"]
    for number, (case, variant) in enumerate(todo, 1):
        named = f"[{number}/{len(todo)}] {case}, {VARIANTS[variant].title}"
        print(f"{named} ...", flush=True)
        figures = in_process(f"{case}/{variant}", argv, config.device)
        shape = {"batch": config.sequences(case), "context": models[case].context}
        rows.append({"case": case, "variant": variant, **shape, **figures})
        if "failed" not in figures:
            print(f"    {figures['milliseconds']:.1f} ms, {figures['tokens_per_second']:,.0f} tokens/s")
        at_full_size = cuda and config.batch is None and config.context is None
        report["goals"] = goals(rows) if at_full_size else []
        write_json(config.json, report)
    print_table(rows)
    if "plain-bf16" in config.variants:
        print("narrow: the residual stream in bfloat16, as ours is; autocast alone leaves it in float32")
    for case, model in models.items():
        if stock_type(model) is None:
            print(f"{case}: Hugging Face has no model like it, so its rows are ours and plain PyTorch's")
    for goal in report.get("goals", []):
        value = "not measured" if goal["value"] is None else f"{goal['value']:.2f} times"
        verdict = {True: "reached: ", False: "missed: ", None: ""}[goal["met"]]
        print(f"goal, {goal['case']}: {goal['goal']}: {verdict}{value}")
    if config.plot:
        plot(rows, config.plot, report["device"])
    return exit_code(rows)


if __name__ == "__main__":
    run_command(main)
