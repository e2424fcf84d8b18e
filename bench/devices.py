"""`python -m bench.devices`: training steps on several GPUs of one machine, next to one and to plain PyTorch.

The same global batch on one GPU and on all of them. Ours: JAX with the weights on every GPU (`data`) or cut
over all of them (`fsdp`), and PyTorch's engine under torchrun. The peers: `bench.plain_torch`, compiled, in
DistributedDataParallel and in FSDP2 (`fully_shard` of each block). Every row has processes of its own.
"""

import dataclasses
import os
import statistics
import sys
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from bench.plain_torch import GPT
from bench.row_process import Row, exit_code, in_process, print_row, taken_row
from bench.torch_row import compiled_facts, refuse_fallbacks
from bench.train import BATCH
from bench.train_rows import Make, Step, ours, peer, random_batches, timed
from bench.updates import WARM_UP
from core import checks, cli
from core.config import ModelConfig, preset
from core.console import Table
from core.data.sequences import Rows
from core.errors import UserError, run_command
from core.figures import require_json, write_json
from kernels_cuda.bench_tasks import compile_whole
from port_torch.model import Decoder
from port_torch.training.distributed import Distributed, open_distributed
from port_torch.training.pretraining import fresh_decoder

Way = Literal["jax-data", "jax-fsdp", "torch", "plain-ddp", "plain-fsdp2"]
TITLES: dict[Way, str] = {
    "jax-data": "ours: JAX, data",
    "jax-fsdp": "ours: JAX, fsdp",
    "torch": "ours: PyTorch",
    "plain-ddp": "plain torch, compiled, DDP",
    "plain-fsdp2": "plain torch, compiled, FSDP2",
}
SPLITS_WEIGHTS: tuple[Way, ...] = ("jax-fsdp", "plain-fsdp2")
"""On one GPU these are the rows above them."""


@dataclasses.dataclass(frozen=True)
class DevicesBenchConfig:
    """Time whole training steps on one GPU and on all of this machine, the same global batch.

    bfloat16 with float32 weights, AdamW, random tokens; the median of the steps.
    """

    cases: tuple[str, ...] = ("mtlm1-200m",)
    """Presets."""
    ways: tuple[Way, ...] = tuple(TITLES)
    """Ways to train."""
    gpus: int | None = None
    """How many GPUs. Default: all of the machine."""
    steps: int = 20
    """Timed steps, after 5 of warming up."""
    batch: int | None = None
    """Sequences per step, over all GPUs. Default: twice those of bench.train."""
    json: Path | None = None
    """Write all figures into this file, after every row."""

    def __post_init__(self) -> None:
        checks.lists(**checks.fields(self, "cases", "ways"))
        checks.counts(**checks.fields(self, "gpus", "steps", "batch"))

    def sequences(self, case: str) -> int:
        """Sequences per step, over all GPUs."""
        return 2 * BATCH.get(case, 8) if self.batch is None else self.batch


def plain_ddp(mirror: Decoder, batches: list[Rows], device: torch.device) -> Step:
    """`bench.plain_torch`, compiled; where there are several processes around DDP, which then adds gradients
    during the backward pass."""
    model: nn.Module = GPT(mirror.config).take_weights(mirror).to(device)
    if dist.is_initialized():
        model = DistributedDataParallel(model, device_ids=[device.index], gradient_as_bucket_view=True)
        return peer(model, torch.compile(model), batches, device)
    return peer(model, compile_whole(model), batches, device)


def plain_fsdp2(mirror: Decoder, batches: list[Rows], device: torch.device) -> Step:
    """`bench.plain_torch`, block by block compiled and cut over the processes.

    As is usual, weights are gathered in bfloat16, and gradients are added up in float32. Inputs stay as they
    are: the angles of rotation would lose their last digits.
    """
    model = GPT(mirror.config).take_weights(mirror).to(device)
    gathered = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    for block in model.blocks:
        block.compile(dynamic=False)
        fully_shard(block, mp_policy=gathered)
    fully_shard(model, mp_policy=gathered)
    return peer(model, model, batches, device)


def measure_torch(way: Way, model: ModelConfig, batch: int, steps: int) -> Row | None:
    """A row, measured by rank 0 of its processes; None on the others."""
    refuse_fallbacks(cuda=True)
    with open_distributed("cuda") as ranks:
        made: dict[str, Make] = {
            "torch": ours("cuda", compiled=True, ranks=ranks),
            "plain-ddp": plain_ddp,
            "plain-fsdp2": plain_fsdp2,
        }
        mine = ranks.rows(batch)
        batches = [Rows(rows.tokens[mine], rows.targets[mine], None) for rows in random_batches(model, batch)]
        step = made[way](fresh_decoder(model, 0), batches, ranks.device)
        first = mean_over(step(0), ranks, ours=way == "torch")
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        for i in range(1, WARM_UP):
            step(i)
        torch.cuda.synchronize()
        times, _ = timed(step, steps, cuda=True)
        last = mean_over(step(WARM_UP + steps), ranks, ours=way == "torch")
        if not ranks.first:
            return None
        peak = torch.cuda.max_memory_allocated() / 2**30
        return {
            "milliseconds": statistics.median(times),
            "peak_gib": peak,
            "first_loss": first,
            "loss": last,
            **compiled_facts(),
        }


def mean_over(loss: Tensor, ranks: Distributed, ours: bool) -> float:
    """The loss of the global batch; ours is that already."""
    return float(loss if ours else ranks.sum(loss.clone()) / ranks.size)


def measure_jax(way: Way, case: str, model: ModelConfig, batch: int, steps: int) -> Row:
    """A row of JAX's step on all devices that the process sees."""
    import jax

    from bench.step import StepBenchConfig
    from bench.step import measure as measure_step
    from core.sharding import MeshShape

    config = StepBenchConfig(steps=steps)
    shape = MeshShape(**{way.removeprefix("jax-"): jax.device_count()})
    row = measure_step(config, case, model, batch, "cuda/preset", shape)
    names = {"milliseconds": "ms", "peak_gib": "peak", "first_loss": "first_loss", "loss": "loss"}
    return {name: row[of_step] for name, of_step in names.items()}


def run_row(config: DevicesBenchConfig, row: str) -> Row | None:
    """What a process does for "CASE/WAY"."""
    case, _, way = row.partition("/")
    model, batch = preset(case), config.sequences(case)
    if way.startswith("jax"):
        return measure_jax(way, case, model, batch, config.steps)
    return measure_torch(way, model, batch, config.steps)


def in_processes(case: str, way: Way, gpus: int, argv: list[str]) -> Row:
    """See `bench.row_process.in_process`."""
    of_jax = way.startswith("jax")
    environment = os.environ | {
        "CUDA_VISIBLE_DEVICES": ",".join(map(str, range(gpus))),
        "JAX_PLATFORMS": "cuda" if of_jax else "cpu",  # in PyTorch's rows it only draws the first weights
    }
    return in_process("bench.devices", f"{case}/{way}", argv, environment, 1 if of_jax else gpus)


def print_table(rows: list[Row]) -> None:
    """One line per row; the last column is its rate over that of the same step on one GPU."""
    table = Table(
        ("model", "step"),
        ("GPUs", "ms", "tokens/s", "peak GiB of one", "loss, first, last", "of one GPU"),
    )
    one = {
        (row["case"], row["way"]): row["milliseconds"]
        for row in rows
        if row["gpus"] == 1 and "failed" not in row
    }
    same = {"jax-fsdp": "jax-data", "plain-fsdp2": "plain-ddp"}
    for row in rows:
        case, way = row["case"], row["way"]
        if "failed" in row:
            table.add_row(case, TITLES[way], str(row["gpus"]), "failed")
            continue
        base = one.get((case, same.get(way, way)))
        table.add_row(
            case, TITLES[way], str(row["gpus"]), f"{row['milliseconds']:.1f}",
            f"{row['tokens_per_second']:,.0f}", f"{row['peak_gib']:.1f}",
            f"{row['first_loss']:.3f} {row['loss']:.3f}",
            f"{base / row['milliseconds']:.2f}" if base else "",
        )  # fmt: skip
    table.print()
    for row in rows:
        if "failed" in row:
            print(f"failed: {row['case']}, {TITLES[row['way']]} on {row['gpus']}: {row['failed']}")


def main() -> int | None:
    """Runs every row in processes of its own and prints the table."""
    row, argv = taken_row(sys.argv[1:])
    config = cli.parse(DevicesBenchConfig, argv, prog="python -m bench.devices")
    if row:
        figures = run_row(config, row)
        if figures is not None:
            print_row(figures)
        return None
    there = torch.cuda.device_count()
    gpus = there if config.gpus is None else config.gpus
    if gpus < 2 or gpus > there:
        raise UserError(
            f"bench.devices compares one GPU with several, at most all of this machine, which has {there}"
        )
    require_json(config.json)
    models = {case: preset(case) for case in config.cases}
    rows = []
    for case in config.cases:
        for way in config.ways:
            for count in (1, gpus):
                if count == 1 and way in SPLITS_WEIGHTS:
                    continue
                print(f"{case}, {TITLES[way]}, {count} of {gpus} GPUs ...", file=sys.stderr, flush=True)
                figures = in_processes(case, way, count, argv)
                facts = {"case": case, "way": way, "gpus": count, "batch": config.sequences(case)}
                if "failed" not in figures:
                    tokens = config.sequences(case) * models[case].context
                    figures["tokens_per_second"] = tokens / figures["milliseconds"] * 1e3
                rows.append({**facts, **figures})
                device = torch.cuda.get_device_name()
                write_json(config.json, {"device": device, "torch": torch.__version__, "rows": rows})
    print_table(rows)
    return exit_code(rows)


if __name__ == "__main__":
    run_command(main)
