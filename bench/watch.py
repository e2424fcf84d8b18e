"""`python -m bench.watch`: what --watch-every costs, by stretches of updates in turn in one process.

A step that watches is another program than one that does not. So there are three kinds of updates: of the
plain step, of the watching step when it does not watch, and when it does.
"""

import dataclasses
import statistics
import sys
import time

import jax
import numpy as np

from bench.step import BATCH
from core import checks, cli
from core.config import preset
from core.errors import run_command
from core.run.schedule import OptimizerConfig
from core.sharding import batch_sharding, make_mesh
from core.tokenizer import id_dtype
from train_tpu.backend import choose_kernels, choose_step
from train_tpu.config import RunConfig
from train_tpu.step import Batch, Controls, compile_step, fresh_state

KINDS = {"plain": None, "watching, not now": False, "watched": True}


@dataclasses.dataclass(frozen=True)
class WatchBenchConfig:
    """Time updates that are watched, and others."""

    preset: str = "mtlm1-tiny"
    batch: int | None = None
    """Default: 16, or as bench.step has it."""
    every: int = 50
    """Of --watch-every."""
    stretches: int = 10
    """Of every kind, in turn; the medians count."""
    updates: int = 4
    """In a stretch."""

    def __post_init__(self) -> None:
        checks.counts(**checks.fields(self, "batch", "every", "stretches", "updates"))


def main() -> None:
    """Prints the medians and the overhead."""
    config = cli.parse(WatchBenchConfig, prog="python -m bench.watch")
    model, mesh = preset(config.preset), make_mesh(devices=jax.devices()[:1])
    rows = BATCH.get(config.preset, 16) if config.batch is None else config.batch
    run = RunConfig(preset=config.preset, batch=rows, optim=OptimizerConfig())
    plain, _ = choose_step(run, model, mesh, choose_kernels("auto", jax.devices()[0]).kernels)
    tokens = np.random.default_rng(0).integers(0, model.vocab_size, (1, rows, model.context + 1))
    index = np.arange(rows, dtype=np.uint32)[None]
    batch = Batch(tokens.astype(id_dtype(model.vocab_size)), np.zeros((1, rows), bool), index)
    batch = jax.device_put(batch, batch_sharding(mesh))
    steps = {}
    for watches in (False, True):
        begun = time.perf_counter()
        steps[watches] = compile_step(dataclasses.replace(plain, watches=watches), rows, 1, mesh)
        print(f"compiled in {time.perf_counter() - begun:.1f} s{', watching' * watches}", flush=True)
    state = fresh_state(plain, mesh, 0)
    # A CPU is often shared: the time that this process had of it says more than a clock on the wall.
    now = time.process_time if jax.default_backend() == "cpu" else time.perf_counter
    seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for stretch in range(config.stretches + 1):
        what = f"stretch {stretch} of {config.stretches}" if stretch else "warming up"
        print(f"{what} ...", file=sys.stderr, flush=True)
        for kind, flag in KINDS.items():
            watch = None if flag is None else np.bool_(flag)
            controls = Controls(np.float32(1e-4), np.float32(0), np.int32(10), np.uint32(0), watch)
            begun = now()
            for _ in range(config.updates):
                state, metrics = steps[flag is not None](state, batch, controls)
            jax.block_until_ready((state, metrics))
            if stretch:
                seconds[kind].append((now() - begun) / config.updates)
    plain_s, other, watched = (statistics.median(times) for times in seconds.values())
    for kind, times in seconds.items():
        print(f"{kind:18} {statistics.median(times) * 1e3:9.2f} ms (from {min(times) * 1e3:.2f})")
    mean = other + (watched - other) / config.every
    print(f"--watch-every {config.every}: {mean / plain_s - 1:+.2%} of an update's time")


if __name__ == "__main__":
    run_command(main)
