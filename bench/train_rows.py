"""One row of `bench.train`: a way to train, made, warmed up, timed and, where asked for, profiled.

All ways start from the same weights, read the same batches and make the same update: AdamW with the settings
of `port_torch.train`, matrices decayed, the gradient clipped (bench/updates.py).
"""

import itertools
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity

from bench.plain_torch import GPT
from bench.stock import stock_model
from bench.torch_row import compiled_facts, refuse_fallbacks, require_liger
from bench.updates import BATCHES, LR, WARM_UP, token_batches
from core.config import ModelConfig
from core.data.sequences import Rows
from core.errors import UserError
from core.run.metrics import model_flops_utilization
from kernels_cuda import library
from kernels_cuda.bench_tasks import compile_whole
from port_torch.hf_config import stock_type
from port_torch.model import Decoder, parameter_name
from port_torch.names import exported_tensors
from port_torch.training.batches import place
from port_torch.training.distributed import Distributed
from port_torch.training.pretraining import fresh_decoder
from port_torch.training.settings import MirrorOptimizerConfig
from port_torch.training.step import TrainStep

PROFILED = 3

Optimizer = Literal["adamw", "muon"]
Step = Callable[[int], Tensor]
"""Makes an update on batch i; gives the loss before it, on the device."""
Make = Callable[[Decoder, list[Rows], torch.device], Step]


class Variant(NamedTuple):
    """A way to train."""

    title: str
    make: Make | None
    """None: `measure_jax` does it."""
    stock: bool = False
    """Whether it is a class of transformers'."""
    profiled: bool = False

    def serves(self, model: ModelConfig) -> bool:
        """Whether it can train this model."""
        return stock_type(model) is not None or not self.stock


def ours(
    kernels: library.Backend,
    compiled: bool,
    optimizer: Optimizer = "adamw",
    ranks: Distributed | None = None,
) -> Make:
    """The mirror, as port_torch.train runs it: batches come from the host, and on a GPU an update is one CUDA
    graph, compiled or not. Without the kernels AdamW is the plain formula, one operation at a time. ranks:
    this process alone if None."""

    def make(mirror: Decoder, batches: list[Rows], device: torch.device) -> Step:
        if kernels == "cuda" and device.type != "cuda":
            raise UserError("our kernels run on a GPU alone")
        library.load(kernels)
        bf16 = device.type == "cuda"
        among = Distributed(0, 1, device) if ranks is None else ranks
        optim = MirrorOptimizerConfig(optimizer=optimizer)
        train_step = TrainStep(mirror.to(device), optim, among, seed=0, bf16=bf16, compiled=compiled)

        def step(i: int) -> Tensor:
            return train_step.update(batches[i % BATCHES], 1, i, LR)[0]

        return step

    return make


def plain(narrow: bool) -> Make:
    """`bench.plain_torch`, compiled."""

    def make(mirror: Decoder, batches: list[Rows], device: torch.device) -> Step:
        model = GPT(mirror.config, narrow).take_weights(mirror).to(device)
        return peer(model, compile_whole(model), batches, device)

    return make


def hugging_face(compiled: bool, liger: bool) -> Make:
    """Its class, with labels as its users give them: the last place of a row predicts nothing.

    Compiled, transformers hands PyTorch's attention a mask (5.23: wherever it is traced), which causal
    kernels do not take; otherwise it asks for causal attention.
    """

    def make(mirror: Decoder, batches: list[Rows], device: torch.device) -> Step:
        model = stock_mirror(mirror, liger).to(device)
        call = torch.compile(model) if compiled else model
        return peer(model, lambda tokens, _: call(input_ids=tokens, labels=tokens).loss, batches, device)

    return make


def stock_mirror(mirror: Decoder, liger: bool) -> nn.Module:
    """Transformers' class with the mirror's weights, float32; Liger changes it for this process."""
    if liger:
        from liger_kernel import transformers as liger_kernels

        getattr(liger_kernels, f"apply_liger_kernel_to_{stock_type(mirror.config)}")()
    model = stock_model(mirror.config, use_cache=False)
    if liger:
        require_liger(model, loss=True)
    leaves, weights = exported_tensors(mirror.config), mirror.state_dict()
    missing, unexpected = model.load_state_dict(
        {name: weights[parameter_name(leaf)] for name, leaf in leaves.items()}, strict=False
    )
    if unexpected or not set(missing) <= {"lm_head.weight"}:
        raise ValueError(f"weights differ: {missing} are missing, {unexpected} are too many")
    return model.train()


def peer(
    model: nn.Module, loss_of: Callable[[Tensor, Tensor], Tensor], batches: list[Rows], device: torch.device
) -> Step:
    """The update as PyTorch's own parts make it; the batches lie on the device."""
    optim = MirrorOptimizerConfig()
    groups = [
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": optim.weight_decay},
        {"params": [p for p in model.parameters() if p.dim() <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, LR, (optim.beta1, optim.beta2), optim.eps, fused=True)
    on_device = [next(place(rows, device).micro_batches())[:2] for rows in batches]

    def step(i: int) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = loss_of(*on_device[i % BATCHES])
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), optim.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


JAX: dict[str, tuple[str, Optimizer]] = {
    "ours-jax": ("cuda", "adamw"),
    "ours-jax-xla": ("xla", "adamw"),
    "ours-jax-muon": ("cuda", "muon"),
}
"""The rows of JAX's step, and which kernels and optimizer each has."""
VARIANTS = {
    "ours": Variant("ours: kernels, compiled", ours("cuda", compiled=True), profiled=True),
    "ours-muon": Variant(
        "ours: kernels, compiled, Muon", ours("cuda", compiled=True, optimizer="muon"), profiled=True
    ),
    "ours-eager": Variant(
        "ours: kernels, CUDA graph, not compiled", ours("cuda", compiled=False), profiled=True
    ),
    "ours-no-kernels": Variant("ours: no kernels, compiled", ours("torch", compiled=True), profiled=True),
    "ours-jax": Variant("ours: JAX", None),
    "ours-jax-xla": Variant("ours: JAX, no kernels", None),
    "ours-jax-muon": Variant("ours: JAX, Muon", None),
    "plain": Variant("plain torch, compiled", plain(narrow=False), profiled=True),
    "plain-bf16": Variant("plain torch, narrow, compiled", plain(narrow=True)),
    "hf": Variant("HF", hugging_face(compiled=False, liger=False), stock=True),
    "hf-compile": Variant("HF, compiled", hugging_face(compiled=True, liger=False), stock=True),
    "hf-liger": Variant("HF + Liger", hugging_face(compiled=False, liger=True), stock=True),
}


def measure(
    model: ModelConfig, batch: int, variant: str, steps: int, device: torch.device, profile: Path | None
) -> dict[str, Any]:
    """A row's figures; `profile` is a file to write the kernels' times into."""
    cuda = device.type == "cuda"
    refuse_fallbacks(cuda)
    step = VARIANTS[variant].make(fresh_decoder(model, 0), random_batches(model, batch), device)
    started = time.perf_counter()
    first_loss = float(step(0))
    first_step = time.perf_counter() - started
    if cuda:  # what compiling needed is not counted; what recording needs as a CUDA graph is
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    for i in range(1, WARM_UP):
        step(i)
    if cuda:
        torch.cuda.synchronize()
    times, loss = timed(step, steps, cuda)
    median = statistics.median(times)
    rate = batch * model.context / median * 1e3
    kind = torch.cuda.get_device_name() if cuda else "cpu"
    row = {
        "milliseconds": median,
        "fastest": min(times),
        "slowest": max(times),
        "tokens_per_second": rate,
        "mfu": model_flops_utilization(rate, model.flops_per_token(), kind, 1),
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if cuda else None,
        "first_step_seconds": first_step,
        "first_loss": first_loss,
        "loss": loss,
        **compiled_facts(),
    }
    if profile is not None:
        write_profile(step, median, cuda, profile)
    return row


def measure_jax(variant: str, case: str, model: ModelConfig, batch: int, steps: int) -> dict[str, Any]:
    """A row of JAX's step, as `bench.step` times it."""
    from bench.step import StepBenchConfig
    from bench.step import measure as measure_step

    kernels, optimizer = JAX[variant]
    config = StepBenchConfig(steps=steps, optimizer=optimizer)
    row = measure_step(config, case, model, batch, f"{kernels}/preset")
    return {
        "milliseconds": row["ms"], "tokens_per_second": row["rate"], "mfu": row["mfu"],
        "peak_gib": row["peak"], "first_step_seconds": row["compile"], "first_loss": row["first_loss"],
        "loss": row["loss"], **{name: row[name] for name in ("device", "attention", "kernels")},
    }  # fmt: skip


def random_batches(model: ModelConfig, batch: int) -> list[Rows]:
    """The tokens of bench/updates.py as the mirror's loader has them."""
    return [Rows(rows[:, :-1], rows[:, 1:], None) for rows in token_batches(model, batch)]


def timed(step: Step, steps: int, cuda: bool) -> tuple[list[float], float]:
    """Milliseconds of each step and the last one's loss. Nothing waits for the device in between."""

    def mark() -> Any:
        if not cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    marks = [mark()]
    for i in range(WARM_UP, WARM_UP + steps):
        loss = step(i)
        marks.append(mark())
    last = float(loss)
    if not cuda:
        return [(b - a) * 1e3 for a, b in itertools.pairwise(marks)], last
    torch.cuda.synchronize()
    return [a.elapsed_time(b) for a, b in itertools.pairwise(marks)], last


def write_profile(step: Step, milliseconds: float, cuda: bool, path: Path) -> None:
    """A line per kernel (on a CPU, per operation): microseconds and calls per step, share of all, name."""
    activity = ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity]) as profiler:
        for i in range(PROFILED):
            step(i)
        if cuda:
            torch.cuda.synchronize()
    lines = []
    for event in profiler.key_averages():
        on_device = event.device_type != DeviceType.CPU
        if on_device == cuda and not event.is_user_annotation:
            total = event.self_device_time_total if cuda else event.self_cpu_time_total
            lines.append((total / PROFILED, event.count / PROFILED, event.key))
    lines.sort(reverse=True)
    whole = sum(microseconds for microseconds, _, _ in lines)
    text = [f"one step: {milliseconds:.2f} ms; what runs in it: {whole / 1e3:.2f} ms, mean of {PROFILED}"]
    text += [
        f"{microseconds:10.1f} us {microseconds / whole:6.1%} {calls:7.1f} calls  {name}"
        for microseconds, calls, name in lines
        if microseconds
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(text) + "\n", encoding="utf-8")
