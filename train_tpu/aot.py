"""`python -m train_tpu.aot`: compile the training step for a TPU slice, without one, and say what it needs.

Whether it fits, what a token costs in FLOPs and bytes of memory, what the chips send each other, and how
many tokens a second these allow at most: bounds from a compiled program and a data sheet, not measurements.
"""

import contextlib
import dataclasses
import json
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any, Literal

import jax
from jax.sharding import Mesh
from rich.console import Console
from rich.table import Table

from core import cli
from core.config import PRESETS, preset
from core.errors import UserError, run_command
from core.run.schedule import OptimizerConfig
from core.sharding import check_mesh, make_mesh, parse_mesh
from train_tpu import config as settings
from train_tpu.backend import choose_step, split_batch
from train_tpu.config import ModelOverrides, RunConfig, model_config
from train_tpu.hlo import Collective, Module
from train_tpu.memory_advice import advice
from train_tpu.splash_cost import splash_cost
from train_tpu.step import StepConfig, compile_step
from train_tpu.topology import GIB, Chip, open_slice

EXIT_DOES_NOT_FIT = 1
TABLE_TOPOLOGIES = ("v5e:2x4", "v5e:4x4", "v6e:2x4")


@dataclasses.dataclass(frozen=True)
class AotConfig:
    """Compile the training step for a TPU slice, without one, and say what it needs.

    Settings have the names and defaults that train_tpu.run gives them on a TPU; the vocabulary is the
    preset's 32,000. Exit code 0: it fits; 1: it does not; 2: a mistake in the settings.
    """

    preset: str = "mtlm2-40m"
    """mtlm1-88m, mtlm1-200m, mtlm2-40m, mtlm1-tiny or mtlm2-tiny."""
    topology: str = "v5e:2x4"
    """The slice: GENERATION:XxY, of v5e or v6e."""
    batch: int = 256
    """Sequences an update, over all chips."""
    accumulate: int | None = None
    """Parts that a batch is computed in, one after the other. Default: as many as leave a chip 8,192
    tokens."""
    mesh: str | None = None
    """How the chips are arranged, as in train_tpu.run. Default: all along data."""
    model: ModelOverrides = ModelOverrides()
    optim: OptimizerConfig = OptimizerConfig()
    z_loss: float = 0.0
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    attention: Literal["auto", "xla", "splash"] = "auto"
    unroll: int | None = None
    """Layers a step of the layer loop holds. Default: 1."""
    remat: Literal["none", "dots", "full"] | None = None
    """What the backward pass computes again. Default: dots."""
    loss_chunk: int | None = None
    """Tokens whose logits are held at once on a chip."""
    json: bool = False
    """Print all figures as one JSON object."""
    table: bool = False
    """Instead: every preset on v5e:2x4, v5e:4x4 and v6e:2x4 under the other settings given, as a Markdown
    table; minutes each."""
    out: Path | None = None
    """With --table: the file to write; it grows row by row."""

    def __post_init__(self) -> None:
        self.run_config()

    def run_config(self) -> RunConfig:
        """The same settings as a run has them; RunConfig refuses what is wrong."""
        names = {field.name for field in dataclasses.fields(RunConfig)}
        shared = {
            f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name in names - {"out"}
        }
        return RunConfig(**shared)


def main() -> int:
    """Runs the command; returns its exit code."""
    config = cli.parse(AotConfig, prog="python -m train_tpu.aot", description=AotConfig.__doc__)
    if config.table:
        for flag in ("--preset", "--topology", "--json"):
            if any(text.partition("=")[0] == flag for text in sys.argv[1:]):
                raise UserError(f"--table is of all presets and slices, in Markdown: leave {flag} out")
        return make_table(config)
    if config.out:
        raise UserError("--out is the file of --table; without it the report goes to the terminal")
    report = compile_and_read(config)
    if config.json:
        print(json.dumps(report, indent=1))
    else:
        print_report(report)
    return 0 if report["fits"] else EXIT_DOES_NOT_FIT


def compile_and_read(config: AotConfig) -> dict[str, Any]:
    """Everything the report says, as JSON values; sizes in bytes, of one chip where nothing else is said."""
    jax.config.update("jax_platforms", "cpu")  # a TPU or GPU that is here is left to others
    run = config.run_config()
    model = model_config(run, preset(config.preset).vocab_size)
    where = open_slice(config.topology)
    shape = parse_mesh(config.mesh, len(where.devices))
    mesh = make_mesh(shape, where.devices)
    accumulate = split_batch(run, model, mesh)
    check_mesh(model, shape, config.batch, accumulate)
    step, attention = choose_step(run, model, mesh)
    report: dict[str, Any] = {
        "preset": config.preset,
        "model": dataclasses.asdict(model),
        "parameters": model.n_params,
        "topology": config.topology,
        "chips": mesh.size,
        "batch": config.batch,
        "accumulate": accumulate,
        "tokens_per_step": config.batch * model.context,
        "settings": {
            "optimizer": config.optim.optimizer,
            "dtype": step.compute.dtype,
            "attention": attention.name,
            "unroll": step.compute.unroll,
            "remat": step.compute.remat,
            "loss_chunk": step.loss_chunk,
        },
    }
    started = time.monotonic()
    rows = config.batch // (shape.data * shape.fsdp)
    try:
        compiled = compile_step(step, config.batch, accumulate, mesh)
    except jax.errors.JaxRuntimeError as error:
        needed = _memory_needed(str(error))
        if needed is None:
            raise
        missing = needed - where.chip.hbm
        return report | {
            "fits": False,
            "memory": {"total": needed, "limit": where.chip.hbm},
            "advice": advice(step, rows, accumulate, missing),
            "compile_seconds": time.monotonic() - started,
        }
    report["compile_seconds"] = time.monotonic() - started
    report["memory"] = memory = _memory(compiled) | {"limit": where.chip.hbm}
    report["fits"] = memory["total"] <= where.chip.hbm
    report["advice"] = ""
    if not report["fits"]:
        report["advice"] = advice(step, rows, accumulate, memory["total"] - where.chip.hbm)
    return report | read_module(Module(compiled.as_text()), step, config.batch, mesh, where.chip)


def _memory(compiled: jax.stages.Compiled) -> dict[str, int]:
    """What a chip must hold at once: the state and batch, results in new memory, temporaries, the program."""
    sizes = compiled.memory_analysis()
    return {
        "arguments": sizes.argument_size_in_bytes,
        "outputs": sizes.output_size_in_bytes,
        "aliased": sizes.alias_size_in_bytes,
        "temporaries": sizes.temp_size_in_bytes,
        "program": sizes.generated_code_size_in_bytes,
        "total": sizes.argument_size_in_bytes
        + sizes.output_size_in_bytes
        - sizes.alias_size_in_bytes
        + sizes.temp_size_in_bytes
        + sizes.generated_code_size_in_bytes,
    }


def _memory_needed(message: str) -> float | None:
    """Bytes of HBM that the compiler says it would have needed; None if it failed for another reason."""
    found = re.search(r"(?:HLO temporaries \(|Used )([\d.]+)([GM])", message)
    if "RESOURCE_EXHAUSTED" not in message or not found:
        return None
    return float(found.group(1)) * (GIB if found.group(2) == "G" else 2**20)


def read_module(module: Module, step: StepConfig, batch: int, mesh: Mesh, chip: Chip) -> dict[str, Any]:
    """FLOPs, bytes, collectives and the bounds that follow from them."""
    tokens = batch * step.model.context
    chip_tokens = tokens / mesh.size
    flops, n_bytes, cycles = Counter(), Counter(), 0
    for instruction, computation, times in module.executed():
        part = part_of(instruction.op_name)
        flops[part] += times * module.matrix_flops(instruction, computation)
        n_bytes[part] += times * module.hbm_bytes(instruction, computation)
        cycles += times * int(instruction.attribute_of_backend("estimated_cycles") or 0)
    kernels = 0
    for kernel in module.kernels():
        kernel_flops, again = splash_cost(kernel)
        kernels += kernel.times * kernel_flops
        flops["attention kernels"] += kernel.times * kernel_flops
        n_bytes["attention kernels"] += kernel.times * again
    collectives = module.collectives(mesh.size)
    sent = sum(_sent(c) * c.times for c in collectives)
    times = {
        "arithmetic": sum(flops.values()) / chip.peak_flops,
        "memory": sum(n_bytes.values()) / chip.hbm_bandwidth,
        "links": sent / (chip.links * chip.link_bandwidth),
    }
    return {
        "flops_per_token": {
            "model": step.model.flops_per_token(),
            "compiled": sum(flops.values()) / chip_tokens,
            "kernels": kernels / chip_tokens,
            "parts": {part: n / chip_tokens for part, n in flops.items() if n},
        },
        "bytes_per_token": {
            "compiled": sum(n_bytes.values()) / chip_tokens,
            "parts": {part: n / chip_tokens for part, n in n_bytes.items() if n},
        },
        "collectives": [c._asdict() | {"axes": _axes(c, mesh)} for c in collectives],
        "sent_bytes": sent,
        "bound_tokens_per_second": {name: tokens / t if t else None for name, t in times.items()},
        "compiler_estimate": tokens / (cycles / chip.clock) if chip.clock is not None else None,
        "custom_kernels": sum(kernel.times for kernel in module.kernels()),
        "host_transfers": module.host_transfers(),
        "aliased_buffers": module.n_aliased,
    }


def part_of(op_name: str) -> str:
    """The part of the step that an instruction comes from, told from JAX's name for it."""
    if "splash" in op_name and "pallas_call" in op_name:
        return "attention kernels"
    if re.search(r"\bloss\b", op_name):  # a scope that core.loss opens
        return "head and loss"
    if "rematted_computation" in op_name:
        return "layers, computed again"
    if "transpose(jvp" in op_name:
        return "backward"
    if "jvp(" in op_name:
        return "forward"
    return "update and moves between memories"


def _sent(collective: Collective) -> float:
    """Bytes that a chip must send at least, whatever the algorithm: of a sum, all but its share, twice."""
    n = collective.group_size
    share = collective.bytes * (n - 1) / n
    of_kind = {"all-reduce": 2 * share, "reduce-scatter": share * n, "collective-permute": collective.bytes}
    return of_kind.get(collective.kind, share)


def _axes(collective: Collective, mesh: Mesh) -> str:
    """The axes of the mesh that a collective goes over, told from the size of its groups."""
    sizes = {name: size for name, size in mesh.shape.items() if size > 1}
    if collective.group_size == mesh.size:
        return "+".join(sizes)
    named = [name for name, size in sizes.items() if size == collective.group_size]
    return " or ".join(named) if named else f"groups of {collective.group_size}"


# --- printing ---


def print_report(report: dict[str, Any]) -> None:
    """The report for people."""
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)

    def show(title: str, rows: list[tuple[str, ...]], *headers: str) -> None:
        table = Table(*headers, title=title, title_justify="left", show_header=bool(headers), box=None,
                      padding=(0, 2, 0, 0), title_style="bold")  # fmt: skip
        if not headers:
            for n in range(len(rows[0])):
                table.add_column(justify="left" if n == 0 else "right")
        for row in rows:
            table.add_row(*row)
        console.print(table)
        console.print()

    settings, parts = report["settings"], report["accumulate"]
    console.print(
        f"{report['preset']} ({report['parameters']:,} parameters) on {report['chips']} chips of "
        f"{report['topology']}: batch {report['batch']} = {report['tokens_per_step']:,} tokens in "
        f"{parts} part{'s' if parts > 1 else ''}; {settings['optimizer']}, {settings['dtype']}, attention "
        f"{settings['attention']}, unroll {settings['unroll']}, remat {settings['remat']}, loss chunk "
        f"{settings['loss_chunk']}; compiled in {report['compile_seconds']:.0f} s\n"
    )
    memory = report["memory"]
    total, limit = memory["total"], memory["limit"]
    rows = [(words, f"{memory[name] / GIB:.2f}") for name, words in _MEMORY_WORDS.items() if name in memory]
    show(
        "HBM a chip, GiB",
        [*rows, ("needed in all", f"{total / GIB:.2f}"), ("there is", f"{limit / GIB:.2f}")],
    )
    if not report["fits"]:
        console.print(
            f"does not fit: {(total - limit) / GIB:.2f} GiB too much a chip; {report['advice']}", style="bold"
        )
    if "flops_per_token" not in report:
        return
    flops, n_bytes = report["flops_per_token"], report["bytes_per_token"]
    parts = sorted(set(flops["parts"]) | set(n_bytes["parts"]), key=lambda p: -n_bytes["parts"].get(p, 0))
    show(
        "a token",
        [
            *((part, f"{flops['parts'].get(part, 0) / 1e6:.1f}", f"{n_bytes['parts'].get(part, 0) / 1e3:.1f}")
              for part in parts),
            ("in all", f"{flops['compiled'] / 1e6:.1f}", f"{n_bytes['compiled'] / 1e3:.1f}"),
            ("the model's own (config.flops_per_token)", f"{flops['model'] / 1e6:.1f}", ""),
        ],
        "", "MFLOPs", "KB of HBM",
    )  # fmt: skip
    alike: Counter[tuple[str, str, str, int]] = Counter()
    for c in report["collectives"]:
        alike[c["kind"], c["axes"], "+".join(c["dtypes"]), c["bytes"]] += c["times"]
    show(
        "collectives a step, those alike together",
        [
            (kind, axes, dtypes, f"{times:,}", f"{size:,}", f"{times * size / 1e6:,.1f}")
            for (kind, axes, dtypes, size), times in sorted(alike.items(), key=lambda c: -c[0][-1] * c[1])
        ] or [("none", "", "", "", "", "")],
        "kind", "axes", "types", "times", "bytes each", "MB in all",
    )  # fmt: skip
    bounds = report["bound_tokens_per_second"]
    rows = [(f"by {name}", "none" if rate is None else f"{rate:,.0f}") for name, rate in bounds.items()]
    if report["compiler_estimate"]:
        rows.append(
            ("by the compiler's own estimate of its instructions", f"{report['compiler_estimate']:,.0f}")
        )
    show("tokens a second of the whole slice, at most", rows)
    console.print(
        "These are bounds, not measurements: the compiled program's matrix FLOPs, HBM bytes and bytes sent "
        "over the data sheet's peaks, each as if the others cost nothing. Loops count as often as they run. "
        "The attention kernels are opaque to the compiler; their FLOPs and rereading are counted from their "
        "tiles. The compiler's estimate is of what it schedules, kernels and collectives left out."
    )


_MEMORY_WORDS = {
    "arguments": "arguments: state and batch",
    "outputs": "outputs",
    "aliased": "of these in the arguments' memory (donated)",
    "temporaries": "temporaries",
    "program": "program",
}

# --- the table of all presets ---

_COLUMNS = ("preset", "slice", "batch", "fits", "HBM a chip, GiB", "MFLOPs a token (model's)",
            "KB of HBM a token", "MB sent a chip", "tokens/s at most by arithmetic", "by memory", "by links",
            "compile, s")  # fmt: skip


def make_table(config: AotConfig) -> int:
    """Compiles every preset for every slice, a process each; returns the exit code."""
    given, default = settings.flatten(config), settings.flatten(AotConfig())
    flags = [
        word
        for name, value in given.items()
        if value != default[name] and name not in ("table", "out")
        for word in (f"--{name.replace('_', '-')}", str(value))
    ]
    lines = ["| " + " | ".join(_COLUMNS) + " |", "|" + "---|" * len(_COLUMNS)]
    out = config.out.open("w") if config.out else contextlib.nullcontext(sys.stdout)
    with out as file:
        print("\n".join(lines), file=file, flush=True)
        for topology in TABLE_TOPOLOGIES:
            for name in PRESETS:
                command = [sys.executable, "-m", "train_tpu.aot", "--json", "--preset", name,
                           "--topology", topology, *flags]  # fmt: skip
                done = subprocess.run(command, capture_output=True, text=True)
                if done.returncode not in (0, EXIT_DOES_NOT_FIT):
                    raise UserError(f"{' '.join(command[1:])} failed: {done.stderr.strip()[-500:]}")
                print(_table_row(json.loads(done.stdout)), file=file, flush=True)
    return 0


def _table_row(report: dict[str, Any]) -> str:
    memory = report["memory"]
    cells = [report["preset"], report["topology"], str(report["batch"]), "yes" if report["fits"] else "no",
             f"{memory['total'] / GIB:.1f} of {memory['limit'] / GIB:.2f}"]  # fmt: skip
    if "flops_per_token" in report:
        flops, bounds = report["flops_per_token"], report["bound_tokens_per_second"]
        cells += [
            f"{flops['compiled'] / 1e6:.0f} ({flops['model'] / 1e6:.0f})",
            f"{report['bytes_per_token']['compiled'] / 1e3:.0f}",
            f"{report['sent_bytes'] / 1e6:.0f}",
            *(f"{rate / 1e6:.2f}M" if rate else "none" for rate in bounds.values()),
        ]
    else:
        cells += [report["advice"], *[""] * 5]
    return "| " + " | ".join([*cells, f"{report['compile_seconds']:.0f}"]) + " |"


if __name__ == "__main__":
    run_command(main)
