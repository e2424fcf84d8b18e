"""`python -m bench.step`: the training step compared with plain JAX, each in a process of its own.

One process per row, because the peak of device memory never falls within one.
"""

import dataclasses
import itertools
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from bench import plain_jax
from bench.row_process import Row, exit_code, in_process, print_row, taken_row
from bench.updates import BATCHES, LR, WARM_UP, token_batches
from core import checks, cli
from core.attention import Choice
from core.config import ModelConfig, preset
from core.console import Table
from core.errors import UserError, run_command
from core.figures import require_json, write_json
from core.run.metrics import model_flops_utilization
from core.run.schedule import OptimizerConfig
from core.sharding import MeshShape, batch_sharding, make_mesh, require_deterministic_operations
from core.tokenizer import id_dtype
from train_tpu.backend import choose_kernels, choose_step
from train_tpu.config import KernelsOption, RunConfig
from train_tpu.step import Batch, Controls, compile_step, fresh_state

PLAIN = "plain JAX"
PLATFORM = "platform"
Products = Literal["preset", "triton", "cublas", "cublaslt"]
PRODUCTS: dict[Products, dict[str, bool]] = {
    "triton": {"xla_gpu_enable_cublaslt": False, "xla_gpu_enable_triton_gemm": True},
    "cublas": {"xla_gpu_enable_cublaslt": False, "xla_gpu_enable_triton_gemm": False},
    "cublaslt": {"xla_gpu_enable_cublaslt": True, "xla_gpu_enable_triton_gemm": False},
}


@dataclasses.dataclass(frozen=True)
class StepBenchConfig:
    """Time the compiled training step."""

    preset: Annotated[list[str], tyro.conf.UseAppendAction] = dataclasses.field(default_factory=list)
    """Default: mtlm2-40m at batch 64 and mtlm1-200m at batch 32, as the peers are measured."""
    batch: int | None = None
    steps: int = 20
    """Timed steps, after 5 of warming up; the median counts."""
    kernels: tuple[KernelsOption, ...] = ("auto",)
    """Our rows: with the CUDA kernels, without, or as a run chooses."""
    products: tuple[Products, ...] = ("preset",)
    """Our rows: what makes matrix products on a GPU; preset: as a run chooses."""
    loss_chunk: int | None = None
    """Our rows."""
    unroll: int | None = None
    """Our rows; plain JAX unrolls all layers."""
    remat: Literal["none", "dots", "full"] = "none"
    """Our rows; plain JAX keeps everything."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """Our rows; plain JAX has AdamW."""
    context: int | None = None
    deterministic: bool = False
    """Only operations that give the same bits every time (our rows alone)."""
    json: Path | None = None
    """Write all figures into this file, after every row."""

    def __post_init__(self) -> None:
        checks.lists(**checks.fields(self, "kernels", "products"))
        names = ("batch", "steps", "loss_chunk", "unroll", "context")
        checks.counts(**checks.fields(self, *names))

    def run(self, name: str, batch: int) -> RunConfig:
        """The settings of a run that makes such steps."""
        return RunConfig(
            preset=name, batch=batch, optim=OptimizerConfig(optimizer=self.optimizer),
            loss_chunk=self.loss_chunk, unroll=self.unroll, remat=self.remat,
            deterministic=self.deterministic,
        )  # fmt: skip


BATCH = {"mtlm2-40m": 64, "mtlm1-200m": 32, "mtlm1-88m": 64}


def measure(
    config: StepBenchConfig,
    name: str,
    model: ModelConfig,
    batch: int,
    who: str,
    shape: MeshShape | None = None,
) -> dict[str, Any]:
    """One row: median milliseconds per step, seconds to the first, peak device memory, first and last loss;
    and the device, the attention and the kernels that it ran on.

    Args:
        name: of the preset.
        who: `PLAIN`, or our kernels and products: "cuda/preset".
        shape: of the mesh; the first device alone if None.
    """
    config = dataclasses.replace(config, deterministic=config.deterministic and who != PLAIN)
    if config.deterministic:
        require_deterministic_operations()
    mesh = make_mesh(devices=jax.devices()[:1]) if shape is None else make_mesh(shape)
    kernels, _, products = who.partition("/")
    chosen = choose_kernels("xla" if who == PLAIN else kernels, jax.devices()[0])
    step_config, attention = choose_step(config.run(name, batch), model, mesh, chosen.kernels)
    if products in PRODUCTS:
        if jax.default_backend() != "gpu":
            raise UserError(f"--products {products} is of a GPU, and JAX runs on a {jax.default_backend()}")
        options = tuple(PRODUCTS[products].items())
        step_config = dataclasses.replace(step_config, compiler_options=options)
    tokens = token_batches(model, batch).astype(id_dtype(model.vocab_size))
    started = time.perf_counter()
    if who != PLAIN:
        compiled = compile_step(step_config, batch, 1, mesh)
        state = fresh_state(step_config, mesh, 0)
        controls = Controls(np.float32(LR), np.float32(8), np.int32(10), np.uint32(0))
        index = np.arange(batch, dtype=np.uint32)[None]
        batches = [
            jax.device_put(Batch(t[None], np.zeros((1, batch), bool), index), batch_sharding(mesh))
            for t in tokens
        ]

        def step(i: int) -> jax.Array:
            nonlocal state
            state, metrics = compiled(state, batches[i % BATCHES], controls)
            return metrics.nll
    else:
        init, plain_step = plain_jax.make(model, of_plain(attention), step_config.compute.dtype)
        carry = init(jax.random.key(0))
        batches = [jnp.asarray(t, jnp.int32) for t in tokens]

        def step(i: int) -> jax.Array:
            nonlocal carry
            *carry, loss = plain_step(*carry, batches[i % BATCHES])
            return loss

    first_loss = float(step(0))
    compile_seconds = time.perf_counter() - started
    # As a run makes them: the next step is dispatched before this one has ended.
    ends, loss = [], step(1)
    for i in range(2, WARM_UP + config.steps):
        this, loss = loss, step(i)
        this.block_until_ready()
        ends.append(time.perf_counter())
    loss.block_until_ready()
    ends.append(time.perf_counter())
    median = statistics.median(end - begin for begin, end in itertools.pairwise(ends[-config.steps - 1 :]))
    rate = batch * model.context / median
    stats = jax.devices()[0].memory_stats()  # None of a CPU
    return {
        "rate": rate,
        "ms": median * 1e3,
        "mfu": model_flops_utilization(
            rate, model.flops_per_token(), jax.devices()[0].device_kind, mesh.size
        ),
        "compile": compile_seconds,
        "peak": stats["peak_bytes_in_use"] / 2**30 if stats else None,
        "batch": batch,
        "first_loss": first_loss,
        "loss": float(loss),
        "device": jax.devices()[0].device_kind,
        "attention": f"jax.nn, {of_plain(attention)}" if who == PLAIN else attention.name,
        "kernels": "xla" if who == PLAIN else chosen.describe(model, mesh),
    }


def of_plain(attention: Choice) -> Literal["cudnn", "xla"]:
    """What plain JAX's attention is computed by where ours is."""
    return "cudnn" if attention.name == "cudnn" else "xla"


def main() -> int | None:
    """Runs every row in a process and prints the table."""
    row, argv = taken_row(sys.argv[1:])
    config = cli.parse(StepBenchConfig, argv, prog="python -m bench.step")
    if row == PLATFORM:
        print_row({PLATFORM: jax.default_backend()})  # asked apart: JAX holds a GPU's memory from then on
        return None
    if row:
        name, _, who = row.partition("/")
        model = preset(name)
        if config.context is not None:
            model = dataclasses.replace(model, context=config.context)
        batch = BATCH.get(name, 32) if config.batch is None else config.batch
        print_row(measure(config, name, model, batch, who))
        return None
    require_json(config.json)
    environment = dict(os.environ)
    if not config.preset and in_process("bench.step", PLATFORM, argv, environment).get(PLATFORM) == "cpu":
        raise UserError(
            "bench.step's presets are for a GPU or a TPU, and JAX finds none here: --preset mtlm1-tiny "
            "--batch 4 tries the command out"
        )
    rows: list[Row] = []
    ways = (PLAIN, *map("/".join, itertools.product(config.kernels, config.products)))
    models = {name: preset(name) for name in config.preset or ["mtlm2-40m", "mtlm1-200m"]}
    for name, who in itertools.product(models, ways):
        print(f"{name}, {title(who)} ...", file=sys.stderr, flush=True)
        figures = in_process("bench.step", f"{name}/{who}", argv, environment)
        rows.append({"model": name, "step": who, **figures})
        write_json(config.json, {"jax": jax.__version__, "rows": rows})
    print_table(rows)
    return exit_code(rows)


def title(who: str) -> str:
    """A row's name in the table."""
    return who if who == PLAIN else f"ours: {who}"


def print_table(rows: list[Row]) -> None:
    """One line per row; the last column is its rate over plain JAX's."""
    table = Table(
        ("model", "step"),
        ("batch", "ms", "tokens/s", "MFU", "peak GiB", "first step s", "loss", "ratio"),
    )
    plain = {row["model"]: row.get("rate") for row in rows if row["step"] == PLAIN}
    for row in rows:
        if "failed" in row:
            table.add_row(row["model"], title(row["step"]), "", "failed")
            continue
        base = plain[row["model"]]
        table.add_row(
            row["model"], title(row["step"]), str(row["batch"]), f"{row['ms']:.1f}", f"{row['rate']:,.0f}",
            "" if row["mfu"] is None else f"{row['mfu']:.1%}",
            "" if row["peak"] is None else f"{row['peak']:.1f}", f"{row['compile']:.0f}",
            f"{row['first_loss']:.4f} {row['loss']:.4f}", f"{row['rate'] / base:.2f}" if base else "",
        )  # fmt: skip
    table.print()
    for row in rows:
        if "failed" in row:
            print(f"failed: {row['model']}, {title(row['step'])}: {row['failed']}")
        else:
            ran = f"{row['device']}; attention: {row['attention']}; kernels: {row['kernels']}"
            print(f"{row['model']}, {title(row['step'])}: {ran}")


if __name__ == "__main__":
    run_command(main)
