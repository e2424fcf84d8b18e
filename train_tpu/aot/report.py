"""What the TPU's compiler says of the training step: what `python -m train_tpu.aot` does.

Nothing here is a measurement and nothing a model of one: the report gives what the compiled program holds and
exchanges, and no time or rate, which only a TPU could tell.
"""

import dataclasses
import functools
import re
import time
from collections import Counter
from typing import Any

import jax
from rich.console import Console

from core.config import ModelConfig
from core.console import Table, make_console
from core.progress import Activity
from core.sharding import check_mesh, make_mesh, parse_mesh
from train_tpu.aot.hlo import Module
from train_tpu.aot.topology import GIB, HBM, open_slice, parse_topology
from train_tpu.backend import choose_step, split_batch
from train_tpu.config import RunConfig
from train_tpu.oom_hints import advice
from train_tpu.step import StepConfig, abstract_state, compile_step


def compile_and_report(run: RunConfig, model: ModelConfig, topology: str) -> dict[str, Any]:
    """Compiles the step for the slice `topology`.

    Returns:
        JSON values; bytes and FLOPs are those of one chip and one step.

    Raises:
        UserError: there is no such slice, or mesh and batch do not fit it.
    """
    jax.config.update("jax_platforms", "cpu")  # a TPU or GPU of this machine is left to others
    devices = open_slice(topology)
    shape = parse_mesh(run.mesh, len(devices))
    mesh = make_mesh(shape, devices)
    grad_accum_steps = split_batch(run, model, mesh)
    check_mesh(model, shape, run.batch, grad_accum_steps)
    step, attention = choose_step(run, model, mesh)
    report: dict[str, Any] = {
        "preset": run.preset,
        "model": dataclasses.asdict(model),
        "parameters": model.n_params,
        "topology": topology,
        "mesh": str(shape),
        "chips": mesh.size,
        "batch": run.batch,
        "grad_accum_steps": grad_accum_steps,
        "tokens_per_step": run.batch * model.context,
        "settings": {
            "optimizer": run.optim.optimizer,
            "dtype": step.compute.dtype,
            "attention": attention.name,
            "unroll": step.compute.unroll,
            "remat": step.compute.remat,
            "loss_chunk": step.loss_chunk,
        },
    }
    started = time.monotonic()
    try:
        with Activity(f"compiling for {topology}"):
            compiled = compile_step(step, run.batch, grad_accum_steps, mesh)
        found = facts(compiled, step, topology, run.batch)
    except jax.errors.JaxRuntimeError as error:
        rows = run.batch // (shape.data * shape.fsdp)
        found = does_not_fit(error, step, rows, grad_accum_steps)
    return report | {"compile_seconds": time.monotonic() - started} | found


def does_not_fit(
    error: jax.errors.JaxRuntimeError, step: StepConfig, rows: int, grad_accum_steps: int
) -> dict[str, Any]:
    """The compiler's own sentence, and what would help; `rows` are the sequences of a chip.

    Raises:
        JaxRuntimeError: `error` itself, where it is about something else than HBM.
    """
    found = _OUT_OF_HBM.search(str(error))
    if not found:
        raise error
    needed, available = (
        float(size) * (GIB if unit == "G" else 2**20)
        for size, unit in (found.groups()[:2], found.groups()[2:])
    )
    return {
        "fits": False,
        "compiler_says": found[0],
        "advice": advice(step, rows, grad_accum_steps, needed - available),
    }


# "... on HBM, the total memory required for HLO temporaries (34.01G) exceeds available HBM (15.75G)", or
# "... in memory space hbm. Used 17.20G of 15.75G hbm": needed, then available.
_OUT_OF_HBM = re.compile(r"Ran out of memory[^.]*?hbm\D*([\d.]+)([GM])\D*([\d.]+)([GM])\b\)?", re.IGNORECASE)


def facts(compiled: jax.stages.Compiled, step: StepConfig, topology: str, batch: int) -> dict[str, Any]:
    """What is known of a step that fits."""
    mesh = step.compute.mesh
    module = Module(compiled.as_text())
    return {
        "fits": True,
        "memory": memory(compiled) | {"available": HBM[parse_topology(topology)[0]]},
        "flops": {
            "compiler": compiled.cost_analysis()["flops"],
            "loops": module.n_loops,
            "model": step.model.flops_per_token() * batch * step.model.context / mesh.size,
        },
        "collectives": [collective._asdict() for collective in module.collectives(mesh.size)],
        "kernels": [{"name": name, "loops": loops} for name, loops in module.kernels()],
        "host_transfers": module.host_transfers(),
        "state_arrays": len(jax.tree.leaves(abstract_state(step, mesh))),
        "donated_arrays": module.n_donated,
    }


def memory(compiled: jax.stages.Compiled) -> dict[str, int]:
    """Bytes of HBM: state and batch, results in new memory, temporaries, the program."""
    sizes = compiled.memory_analysis()
    parts = {
        "arguments": sizes.argument_size_in_bytes,
        "outputs": sizes.output_size_in_bytes - sizes.alias_size_in_bytes,
        "temporaries": sizes.temp_size_in_bytes,
        "program": sizes.generated_code_size_in_bytes,
    }
    return parts | {"total": sum(parts.values())}


# --- printing ---


def print_report(report: dict[str, Any]) -> None:
    """The report for people."""
    console = make_console()
    say = functools.partial(console.print, highlight=False)
    settings, parts = report["settings"], report["grad_accum_steps"]
    say(
        f"{report['preset']} ({report['parameters']:,} parameters) on {report['chips']} chips of "
        f"{report['topology']}, mesh {report['mesh']}: batch {report['batch']} = "
        f"{report['tokens_per_step']:,} tokens in {parts} micro-batch{'es' if parts > 1 else ''}; "
        f"{settings['optimizer']}, {settings['dtype']}, attention {settings['attention']}, unroll "
        f"{settings['unroll']}, remat {settings['remat']}, loss chunk {settings['loss_chunk']}; compiled in "
        f"{report['compile_seconds']:.0f} s\n"
    )
    if not report["fits"]:
        say(f"does not fit: {report['compiler_says']}; {report['advice']}", style="bold")
        return
    sizes = report["memory"]
    _show(
        console,
        "HBM per chip, GiB",
        [(words, f"{sizes[name] / GIB:.2f}") for name, words in _MEMORY_WORDS.items()],
        Table(("",), ("",), ruled=False),
    )
    flops, loops = report["flops"], report["flops"]["loops"]
    counted = "the body of each of its loops counted once, " if loops else ""
    _show(
        console,
        "TFLOPs per chip and step",
        [
            ("the model's arithmetic (config.flops_per_token)", f"{flops['model'] / 1e12:.3f}"),
            (f"the compiler's count, {counted}custom kernels not at all", f"{flops['compiler'] / 1e12:.3f}"),
        ],
        Table(("",), ("",), ruled=False),
    )
    _show(
        console,
        "collectives, those alike together; bytes are those of the result on one chip",
        _collective_rows(report["collectives"]) or [("none",)],
        Table(("kind", "group", "types", "runs"), ("count", "bytes each"), ruled=False),
    )
    kernels = Counter((kernel["name"], kernel["loops"]) for kernel in report["kernels"])
    _show(
        console,
        "custom kernels",
        [(name, _times(loops), f"{count:,}") for (name, loops), count in kernels.items()] or [("none",)],
        Table(("name", "runs"), ("count",), ruled=False),
    )
    say(
        f"state updated in place (donated): {report['donated_arrays']} of {report['state_arrays']} arrays\n"
        f"host transfers: {', '.join(report['host_transfers']) or 'none'}\n\n"
        "This is what the compiler made of the step, not a measurement: it gives no time and no tokens/s."
    )


_MEMORY_WORDS = {
    "arguments": "state and batch",
    "outputs": "outputs in memory of their own",
    "temporaries": "temporaries",
    "program": "program",
    "total": "total",
    "available": "available",
}


def _collective_rows(collectives: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    """A row for those that are alike; in the deepest loops first, then by their bytes in all."""
    alike = Counter(
        (c["kind"], c["group"], "+".join(c["dtypes"]), c["loops"], c["bytes"]) for c in collectives
    )
    ranked = sorted(alike.items(), key=lambda entry: (-entry[0][3], -entry[0][4] * entry[1]))
    return [
        (kind, str(group or "pairs"), dtypes, _times(loops), f"{count:,}", f"{size:,}")
        for (kind, group, dtypes, loops, size), count in ranked
    ]


def _times(loops: int) -> str:
    return ("once per step", "in a loop")[loops] if loops < 2 else f"in {loops} nested loops"


def _show(console: Console, title: str, rows: list[tuple[str, ...]], table: Table) -> None:
    """Fills the table with the rows and prints it below its title."""
    console.print(title, style="bold", highlight=False)
    for row in rows:
        table.add_row(*row)
    table.print(console)
    console.print()
