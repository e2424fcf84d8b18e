"""The matrix products of a training step, by PyTorch's choice of algorithm and by cuBLASLt's proposals.

And what an addition, a bias's gradient and GELU cost in their epilogues. Milliseconds are medians with a cold
second-level cache; the best proposal is timed once more, in turn with PyTorch's choice, so that it is not
merely the luckiest of sixteen.
"""

import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor

from core import checks, cli
from core.config import ModelConfig, preset
from core.errors import run_command
from kernels_cuda import library
from kernels_cuda.bench_tasks import EPS, Clock
from kernels_cuda.ops import gelu_mlp as mlp
from kernels_cuda.ops.linear_cross_entropy import rows_at_once
from kernels_cuda.ops.rms_norm import add_rms_norm, rms_norm

PROPOSALS = 16
BF16 = torch.bfloat16
MTLM = torch.ops.mtlm


@dataclass(frozen=True)
class ProductsConfig:
    """Time the matrix products of training steps by PyTorch and by every proposal of cuBLASLt."""

    models: tyro.conf.Positional[tuple[str, ...]] = ("mtlm2-40m", "mtlm1-200m")
    """Presets; tokens per step are 65,536 for mtlm2-40m and 32,768 for others."""
    calls: int = 20
    """Timed calls of each."""
    json: Path | None = None
    """Write all figures here."""

    def __post_init__(self) -> None:
        checks.counts(calls=self.calls)


def maps(c: ModelConfig, tokens: int) -> list[tuple[str, int, int, int, int]]:
    """Name, how often in a step, tokens, width out and width in of every linear map."""
    qkv = c.q_width + 2 * c.kv_width
    found = [
        ("qkv", c.n_layers, tokens, qkv, c.d_model),
        ("o", c.n_layers, tokens, c.d_model, c.q_width),
        ("up, gate", c.n_layers * (1 + (c.mlp == "swiglu")), tokens, c.d_mlp, c.d_model),
        ("down", c.n_layers, tokens, c.d_model, c.d_mlp),
    ]
    rows = rows_at_once(tokens, c.vocab_size * 2)
    return [*found, ("head", -(-tokens // rows), rows, c.vocab_size, c.d_model)]


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, device="cuda").to(BF16)


def in_turn(clock: Clock, *ways: Callable[[], object]) -> list[float]:
    """Medians of three timings of each, taken in turn."""
    return [
        statistics.median(times) for times in zip(*([clock(w) for w in ways] for _ in range(3)), strict=True)
    ]


def fastest(clock: Clock, call: Callable[[int], object]) -> tuple[int, list[float]]:
    """The number of the best proposal, and the milliseconds of all."""
    times = [clock(lambda n=n: call(n)) for n in range(PROPOSALS)]
    return min(range(PROPOSALS), key=times.__getitem__), times


def products(clock: Clock, c: ModelConfig, tokens: int) -> list[dict[str, Any]]:
    """Every product of a step: forward, gradients by the input and by the weight."""
    found = []
    sums = [0.0] * 4
    for name, count, rows, wide, narrow in maps(c, tokens):
        x, w, d = random(rows, narrow), random(wide, narrow), random(rows, wide)
        for kind, a, b in (("forward", x, w.T), ("d_input", d, w), ("d_weight", d.T, x)):
            out = torch.empty(a.shape[0], b.shape[1], device="cuda", dtype=BF16)

            def by_torch(a=a, b=b, out=out):
                torch.mm(a, b, out=out)

            def by_lt(choice, a=a, b=b, out=out):
                mlp.multiply(MTLM.product_into, (a, b, None, out, None), choice)

            def by_torchs_lt(by_torch=by_torch):
                default = torch.backends.cuda.preferred_blas_library()
                torch.backends.cuda.preferred_blas_library("cublaslt")
                by_torch()
                torch.backends.cuda.preferred_blas_library(default)

            best, _ = fastest(clock, by_lt)
            ways = (
                by_torch,
                by_torchs_lt,
                lambda by_lt=by_lt: by_lt(0),
                lambda by_lt=by_lt, best=best: by_lt(best),
            )
            times = in_turn(clock, *ways)
            sums = [total + count * ms for total, ms in zip(sums, times, strict=True)]
            tflops = 2 * rows * wide * narrow / times[3] / 1e9
            print(
                f"  {name:<9}{kind:<9}{count:>3} x [{a.shape[0]}, {b.shape[1]}] over {a.shape[1]:<6}"
                f" torch {times[0]:.4f}  torch, cublaslt {times[1]:.4f}  proposal 0 {times[2]:.4f}"
                f"  proposal {best:<2} {times[3]:.4f} ms  {tflops:4.0f} TFLOP/s  {times[0] / times[3]:.3f}x"
            )
            found.append({"map": name, "pass": kind, "count": count, "proposal": best, "ms": times})
    print(
        f"  a step: torch {sums[0]:.2f}  torch, cublaslt {sums[1]:.2f}  proposal 0 {sums[2]:.2f}"
        f"  best {sums[3]:.2f} ms; the best saves {sums[0] - sums[3]:.2f}"
    )
    return found


def residuals(clock: Clock, c: ModelConfig, tokens: int) -> list[dict[str, Any]]:
    """o and down: the residual added in the product, then a norm; or a product, then addition and norm."""
    found = []
    weight = torch.ones(c.d_model, device="cuda")
    for name, inner in (("o", c.q_width), ("down", c.d_mlp)):
        x, w, residual = random(tokens, inner), random(c.d_model, inner).T, random(tokens, c.d_model)
        out = torch.empty_like(residual)

        def with_c(choice, x=x, w=w, residual=residual, out=out):
            mlp.multiply(MTLM.product_into, (x, w, residual, out, None), choice)
            rms_norm(out, weight, EPS)

        def without(x=x, w=w, residual=residual, out=out):
            torch.mm(x, w, out=out)
            add_rms_norm(residual, out, weight, EPS)

        with torch.no_grad():
            best, _ = fastest(clock, with_c)
            times = in_turn(clock, without, lambda with_c=with_c, best=best: with_c(best))
        saved = c.n_layers * (times[0] - times[1])
        print(
            f"  {name:<5} then norm: {times[0]:.4f}, residual in the product {times[1]:.4f} ms;"
            f" a step {saved:+.2f}"
        )
        found.append({"map": name, "ms": times, "proposal": best})
    return found


def gelus(clock: Clock, c: ModelConfig, tokens: int) -> dict[str, Any]:
    """GELU in epilogues, and as torch.compile fuses it behind and before products."""
    x, w, bias = random(tokens, c.d_model), random(c.d_mlp, c.d_model) / 20, random(c.d_mlp)
    d, down, pre = random(tokens, c.d_model), random(c.d_model, c.d_mlp) / 20, random(tokens, c.d_mlp)
    out, d_pre, d_bias, d_down, d_down_bias = map(torch.empty_like, (pre, pre, bias, down, d[0]))

    @torch.compile(dynamic=False)
    def forward(x, w, bias):
        pre = F.linear(x, w, bias)
        return mlp.gelu(pre), pre

    @torch.compile(dynamic=False)
    def backward(d, down, pre):
        d_pre = torch.ops.aten.gelu_backward(d @ down, pre, approximate="tanh")
        return d_pre, d_pre.sum(0), mlp.gelu(pre)

    activate = torch.compile(mlp.gelu, dynamic=False)
    column_sums = torch.compile(lambda d: d.sum(0), dynamic=False)

    def forward_lt(choice: int) -> None:
        mlp.multiply(MTLM.gelu_product_into, (x, w, bias, out, d_pre), choice)

    def backward_lt(choice: int) -> None:
        mlp.multiply(MTLM.gelu_product_backward_into, (d, down, pre, d_pre, d_bias), choice)

    def weight_lt(choice: int) -> None:
        mlp.multiply(MTLM.product_into, (d.T, out, None, d_down, d_down_bias), choice)

    def weight() -> None:
        torch.mm(d.T, out, out=d_down)
        column_sums(d)

    found: dict[str, Any] = {}
    for name, today, call in (
        ("up and GELU", lambda: forward(x, w, bias), forward_lt),
        (
            "backward of both, GELU again",
            lambda: backward(d, down, pre),
            lambda n: (backward_lt(n), activate(pre)),
        ),
        ("down's weight and bias gradients", weight, weight_lt),
    ):
        try:
            best, times = fastest(clock, call)
        except RuntimeError as refused:
            print(f"  {name}: {refused}")
            continue
        plain, ours = in_turn(clock, today, lambda call=call, best=best: call(best))
        found[name] = {"compiled": plain, "epilogue": ours, "proposal": best, "proposals": times}
        print(
            f"  {name:<34} compiled {plain:.4f}, epilogue {ours:.4f} ms (proposal {best}, first"
            f" {times[0]:.4f}); a step {c.n_layers * (plain - ours):+.2f}"
        )
    alone = {
        "up": lambda: torch.mm(x, w.T, out=out),
        "down's gradient by its input": lambda: torch.mm(d, down, out=d_pre),
        "GELU again": lambda: activate(pre),
    }
    for name, call in alone.items():
        found[name] = clock(call)
        print(f"  {name:<34} alone {found[name]:.4f} ms")
    found["mlp"] = whole_mlp(clock, x, w, bias, down, d)
    plain, ours = found["mlp"]
    print(
        f"  whole MLP, forward and backward: compiled {plain:.4f}, on the op {ours:.4f} ms;"
        f" a step {c.n_layers * (plain - ours):+.2f}"
    )
    return found


def whole_mlp(
    clock: Clock, x: Tensor, w: Tensor, bias: Tensor, down: Tensor, gradient: Tensor
) -> list[float]:
    """Forward and backward, compiled: plain and by `gelu_mlp`, with float32 parameters under autocast."""
    x = x.clone().requires_grad_()
    parameters = [t.float().requires_grad_() for t in (w, bias, down, x[0].detach())]

    def plain(x, up, up_bias, down, down_bias):
        return F.linear(mlp.gelu(F.linear(x, up, up_bias)), down, down_bias)

    def both(way) -> Callable[[], object]:
        call = torch.compile(way, dynamic=False, fullgraph=True)

        def run():
            with torch.autocast("cuda", BF16):
                y = call(x, *parameters)
            return torch.autograd.grad(y, (x, *parameters), gradient)

        return run

    return in_turn(clock, both(plain), both(mlp.gelu_mlp))


def main() -> None:
    """The command."""
    config = cli.parse(ProductsConfig, prog="python -m kernels_cuda.bench_products")
    library.load("cuda")
    clock = Clock(config.calls)
    print(f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}, {mlp.cublaslt()}")
    figures = {}
    for model in config.models:
        c = preset(model)
        tokens = 65536 if model == "mtlm2-40m" else 32768
        print(f"{model}, {tokens} tokens")
        figures[model] = found = {}
        if c.mlp == "gelu" and c.biases:
            found["gelu"] = gelus(clock, c, tokens)
        found["residuals"] = residuals(clock, c, tokens)
        found["products"] = products(clock, c, tokens)
        if config.json:
            config.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    run_command(main)
