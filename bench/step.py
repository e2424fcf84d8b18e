"""`python -m bench.step`: the training step compared with plain JAX, each in a process of its own.

One process per row, because the peak of device memory never falls within one.
"""

import dataclasses
import json
import statistics
import subprocess
import sys
import time
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from bench import plain_jax
from core import checks, cli
from core.attention import choose
from core.config import ModelConfig, preset
from core.errors import run_command
from core.model import Compute, compute_dtype
from core.run.metrics import model_flops_utilization
from core.run.schedule import OptimizerConfig
from core.sharding import batch_sharding, make_mesh, require_deterministic_operations
from core.tokenizer import id_dtype
from train_tpu.step import Batch, Controls, GuardConfig, StepConfig, compile_step, fresh_state


@dataclasses.dataclass(frozen=True)
class StepBenchConfig:
    """Time the compiled training step."""

    preset: Annotated[list[str], tyro.conf.UseAppendAction] = dataclasses.field(default_factory=list)
    """Default: mtlm2-40m at batch 64 and mtlm1-200m at batch 32, as the peers are measured."""
    batch: int | None = None
    steps: int = 20
    """Timed steps, after 3 of warming up; the median counts."""
    loss_chunk: int = 8192
    unroll: int | None = None
    remat: Literal["none", "dots", "full"] = "none"
    optimizer: Literal["adamw", "muon"] = "adamw"
    context: int | None = None
    deterministic: bool = False
    """Only operations that give the same bits every time (our row alone)."""

    def __post_init__(self) -> None:
        names = ("batch", "steps", "loss_chunk", "unroll", "context")
        checks.counts(**checks.fields(self, *names))


BATCH = {"mtlm2-40m": 64, "mtlm1-200m": 32, "mtlm1-88m": 64}


def measure(config: StepBenchConfig, model: ModelConfig, batch: int, ours: bool) -> dict[str, Any]:
    """One row: median seconds per step, compile seconds, peak device memory, first and last loss."""
    if ours and config.deterministic:
        require_deterministic_operations()
    mesh = make_mesh(devices=jax.devices()[:1])
    platform = jax.default_backend()
    dtype = compute_dtype("auto", platform)
    attention = choose(
        "auto",
        platform=platform,
        dtype=dtype,
        head_dim=model.head_size,
        context=model.context,
        deterministic=ours and config.deterministic,
    ).name
    rng = np.random.default_rng(0)
    shape, ids = (batch, model.context + 1), id_dtype(model.vocab_size)
    tokens = [rng.integers(0, model.vocab_size, shape, ids) for _ in range(4)]
    started = time.perf_counter()
    if ours:
        unroll = model.n_layers if config.unroll is None else config.unroll
        compute = Compute(dtype, attention, unroll, config.remat, mesh)
        optim = OptimizerConfig(optimizer=config.optimizer)
        step_config = StepConfig(model, optim, GuardConfig(), compute, 0.0, config.loss_chunk)
        compiled = compile_step(step_config, batch, 1, mesh)
        state = fresh_state(step_config, mesh, 0)
        controls = Controls(np.float32(3e-4), np.float32(8), np.int32(10), np.uint32(0))
        index = np.arange(batch, dtype=np.uint32)[None]
        batches = [
            jax.device_put(Batch(t[None], np.zeros((1, batch), bool), index), batch_sharding(mesh))
            for t in tokens
        ]

        def step(i: int) -> jax.Array:
            nonlocal state
            state, metrics = compiled(state, batches[i % 4], controls)
            return metrics.nll
    else:
        init, plain_step = plain_jax.make(model, "xla" if attention == "splash" else attention, dtype)
        carry = init(jax.random.key(0))
        batches = [jnp.asarray(t, jnp.int32) for t in tokens]

        def step(i: int) -> jax.Array:
            nonlocal carry
            *carry, loss = plain_step(*carry, batches[i % 4])
            return loss

    first_loss = float(step(0))
    compile_seconds = time.perf_counter() - started
    for i in range(2):
        step(i).block_until_ready()
    seconds = []
    for i in range(config.steps):
        start = time.perf_counter()
        loss = step(i)
        loss.block_until_ready()
        seconds.append(time.perf_counter() - start)
    median = statistics.median(seconds)
    rate = batch * model.context / median
    stats = jax.devices()[0].memory_stats() or {}
    return {
        "rate": rate,
        "ms": median * 1e3,
        "mfu": model_flops_utilization(rate, model.flops_per_token(), jax.devices()[0].device_kind, 1),
        "compile": compile_seconds,
        "peak": stats.get("peak_bytes_in_use", 0) / 2**30,
        "batch": batch,
        "first_loss": first_loss,
        "loss": float(loss),
    }


def main() -> None:
    """Runs every row in a process and prints the table."""
    argv, row = sys.argv[1:], None
    if argv[:1] == ["--row"]:  # this is a row's process
        row, argv = argv[1], argv[2:]
    config = cli.parse(StepBenchConfig, argv, prog="python -m bench.step")
    if row:
        name, who = row.split("/")
        model = preset(name)
        if config.context is not None:
            model = dataclasses.replace(model, context=config.context)
        batch = BATCH.get(name, 32) if config.batch is None else config.batch
        print("ROW " + json.dumps(measure(config, model, batch, who == "ours")))
        return
    table = Table("model", "step", "batch", "ms", "tokens/s", "MFU", "peak GiB", "first step s", "ratio")
    for name in config.preset or ["mtlm2-40m", "mtlm1-200m"]:
        rows = {}
        for who in ("plain JAX", "ours"):
            command = [sys.executable, "-m", "bench.step", "--row", f"{name}/{who}", *argv]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            rows[who] = row = json.loads(output.split("ROW ", 1)[1])
            mfu = "" if row["mfu"] is None else f"{row['mfu']:.1%}"
            table.add_row(
                name, who, str(row["batch"]), f"{row['ms']:.1f}", f"{row['rate']:,.0f}", mfu,
                f"{row['peak']:.1f}", f"{row['compile']:.0f}",
                f"{row['rate'] / rows['plain JAX']['rate']:.2f}",
            )  # fmt: skip
    Console(width=130).print(table)


if __name__ == "__main__":
    run_command(main)
