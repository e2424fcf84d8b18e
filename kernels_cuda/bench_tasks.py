"""The tasks of kernels_cuda.bench, each in several ways, and how one is timed.

Each timing is a median, with the L2 cache overwritten before every call.
"""

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch._functorch.config as compiled_gradients
import torch.nn.functional as F
from torch import Tensor

from kernels_cuda.ops.adamw import AdamW
from kernels_cuda.ops.gelu import gelu_mlp
from kernels_cuda.ops.linear_cross_entropy import linear_cross_entropy
from kernels_cuda.ops.rms_norm import add_rms_norm, rms_norm
from kernels_cuda.ops.rotary import rotate, rotated_projections
from kernels_cuda.ops.swiglu import swiglu_mlp
from kernels_cuda.registry import reference

EPS = 1e-6
BF16 = torch.bfloat16
DEVICE = "cuda"
CYCLES = 2_000_000
"""That the GPU sleeps before a call: a millisecond, more than an autograd call takes most hosts."""
MOST_CYCLES = 16 * CYCLES


@dataclass(frozen=True)
class Row:
    """One implementation of one task."""

    task: str
    implementation: str
    milliseconds: float
    rate: float
    """TB/s of the bytes that must move, or TFLOP/s of the operations that must be made."""
    unit: str
    of_ceiling: float
    extra_gib: float | None = None
    """Memory beyond inputs and results at the highest point, where that matters."""
    host: bool = False
    """Whether the time holds some of the host's (see `Timing`)."""


@dataclass(frozen=True)
class Task:
    """Something to do, in several ways; each makes a function to be timed."""

    name: str
    bytes: int = 0
    operations: int = 0
    results: int = 0
    """Bytes of results, where memory is measured."""


class Timing(NamedTuple):
    """The median of some calls."""

    milliseconds: float
    host: bool
    """The GPU began a call before the host had queued it, however long it slept: the call waits for the GPU
    itself, or launching it takes longer than the GPU computes."""


class Clock:
    """Medians of GPU times with a cold L2 cache."""

    def __init__(self, calls: int):
        self.calls = calls
        self.cache = torch.empty(2**28, dtype=torch.uint8, device=DEVICE)

    def __call__(self, function: Callable[[], object]) -> Timing:
        """Times calls. The GPU sleeps before each, until the host has queued it."""
        for _ in range(3):
            function()
        cycles, (milliseconds, late) = CYCLES, self._timed(function, CYCLES)
        while late and cycles < MOST_CYCLES:
            cycles *= 4
            milliseconds, late = self._timed(function, cycles)
        return Timing(milliseconds, late)

    def _timed(self, function: Callable[[], object], cycles: int) -> Timing:
        times, late = [], 0
        for _ in range(self.calls):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self.cache.zero_()
            torch.cuda._sleep(cycles)
            begin.record()
            function()
            late += begin.query()  # the GPU sleeps no longer
            end.record()
            times.append((begin, end))
        torch.cuda.synchronize()
        # The median is of calls in time, where most are.
        return Timing(
            statistics.median(begin.elapsed_time(end) for begin, end in times), late > 0.25 * self.calls
        )


def ceilings(clock: Clock) -> tuple[float, float]:
    """TB/s of a copy, read and written, and TFLOP/s of a bfloat16 product of 8192^3, on random values."""
    x = torch.randn(2**30, device=DEVICE, dtype=BF16)
    y = torch.empty_like(x)
    copy = 2 * x.nbytes / clock(lambda: y.copy_(x)).milliseconds / 1e9
    a, b = (torch.randn(8192, 8192, device=DEVICE, dtype=BF16) for _ in range(2))
    return copy, 2 * 8192**3 / clock(lambda: a @ b).milliseconds / 1e9


Made = Iterator[tuple[Task, str, Callable[[], object]]]


def passes(
    name: str,
    ways: dict[str, Callable[[], tuple[Tensor, ...]]],
    inputs: list[Tensor],
    forward: int,
    backward: int,
) -> Made:
    """Forward and backward of each way; the gradients of its outputs are random.

    One forward pass has many backward passes, so while these are timed, compiled ones may not overwrite what
    they were given, as they otherwise do.
    """
    with compiled_gradients.patch(donated_buffer=False):
        for implementation, way in ways.items():
            yield Task(f"{name} forward", bytes=forward), implementation, way
            outputs = way()
            gradients = [torch.randn_like(out) for out in outputs]

            def back(outputs=outputs, gradients=gradients):
                return torch.autograd.grad(outputs, inputs, gradients, retain_graph=True)

            yield Task(f"{name} backward", bytes=backward), implementation, back


def norms(rows: int, d: int, residual_type: torch.dtype) -> Made:
    """Residual addition and norm; a float32 residual with a bfloat16 branch is what autocast makes."""
    residual = torch.randn(rows, d, device=DEVICE, dtype=residual_type, requires_grad=True)
    branch = torch.randn(rows, d, device=DEVICE, dtype=BF16, requires_grad=True)
    weight = torch.ones(d, device=DEVICE, dtype=residual_type, requires_grad=True)

    def plain(residual, branch, weight):
        return reference.add_rms_norm(residual, branch, weight, EPS)[:2]

    def fused(residual, branch, weight):
        total = residual + branch
        return F.rms_norm(total, (d,), weight, EPS).to(BF16), total

    ways = {
        "mtlm": lambda: add_rms_norm(residual, branch, weight, EPS),
        "torch formula": lambda: plain(residual, branch, weight),
        "torch F.rms_norm": lambda: fused(residual, branch, weight),
        "torch.compile": bind(compile_whole(plain), residual, branch, weight),
        "torch.compile F.rms_norm": bind(compile_whole(fused), residual, branch, weight),
    }
    if residual_type == BF16 and (liger := liger_norm()) is not None:
        ways["liger"] = lambda: liger.apply(branch, residual, weight, EPS, 0.0, "llama", False)
    size = residual.element_size()
    n = rows * d
    kind = "" if residual_type == BF16 else ", float32 residual"
    forward, backward = n * (2 * size + 4), n * (3 * size + 2 + (2 if size == 4 else 0))
    yield from passes(f"add + RMSNorm {rows}x{d}{kind}", ways, [residual, branch, weight], forward, backward)


def norm_alone(rows: int, d: int) -> Made:
    """The norm without an addition, as peers are usually compared."""
    x = torch.randn(rows, d, device=DEVICE, dtype=BF16, requires_grad=True)
    weight = torch.ones(d, device=DEVICE, dtype=BF16, requires_grad=True)

    def plain(x, weight):
        return (F.rms_norm(x, (d,), weight, EPS),)

    ways = {
        "mtlm": lambda: (rms_norm(x, weight, EPS),),
        "torch F.rms_norm": lambda: plain(x, weight),
        "torch.compile": bind(compile_whole(plain), x, weight),
    }
    try:
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction as Liger
    except ImportError:
        pass
    else:
        ways["liger"] = lambda: (Liger.apply(x, weight, EPS, 0.0, "llama", False),)
    yield from passes(f"RMSNorm {rows}x{d}", ways, [x, weight], 4 * rows * d, 6 * rows * d)


def rotations(tokens: int, heads: int, k: int) -> Made:
    """Rotary embedding of q and k, in place on packed qkv; backward also packs the three gradients."""
    b, s = tokens // 1024, 1024
    qkv = torch.randn(b, s, 3, heads, k, device=DEVICE, dtype=BF16)
    cos, sin = angles(s, k // 2)
    gradients = [torch.randn(b, heads, s, k, device=DEVICE, dtype=BF16).transpose(1, 2) for _ in range(3)]

    def forward(qkv):
        return rotate(qkv[:, :, 0], cos, sin), rotate(qkv[:, :, 1], cos, sin)

    def backward(q, k, v):
        return reference.rotary_pack(q, k, v, cos, sin, True)

    task = Task(f"rotary {tokens}x{heads}x{k} forward", bytes=8 * tokens * heads * k)
    yield task, "mtlm", lambda: torch.ops.mtlm.rotary_(qkv[:, :, 0], qkv[:, :, 1], cos, sin, False)
    yield task, "torch", lambda: forward(qkv)
    yield task, "torch.compile", bind(compile_whole(forward), qkv)
    task = Task(f"rotary {tokens}x{heads}x{k} backward, packed", bytes=12 * tokens * heads * k)
    yield task, "mtlm", lambda: torch.ops.mtlm.rotary_pack(*gradients, cos, sin, True)
    yield task, "torch", lambda: backward(*gradients)
    yield task, "torch.compile", bind(compile_whole(backward), *gradients)


def angles(s: int, half: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines of random ones."""
    angle = torch.rand(1, s, half, device=DEVICE)
    return angle.cos(), angle.sin()


def projections(b: int, s: int, d: int, heads: tuple[int, int, int], k: int) -> Made:
    """q, k and v of a layer's input, of so many heads each, the first two with rotary embedding; forward."""
    x = torch.randn(b, s, d, device=DEVICE, dtype=BF16)
    weights = tuple(torch.randn(n * k, d, device=DEVICE, dtype=BF16) / d**0.5 for n in heads)
    cos, sin = angles(s, k // 2)

    def product(x, *weights):
        return F.linear(x, torch.cat(weights)).view(b, s, sum(heads), k).split(heads, dim=2)

    def plain(x, *weights):
        q, key, v = product(x, *weights)
        return rotate(q, cos, sin), rotate(key, cos, sin), v

    def in_place(x, *weights):
        q, key, v = product(x, *weights)
        torch.ops.mtlm.rotary_(q, key, cos, sin, False)
        return q, key, v

    width = sum(heads) * k
    task = Task(f"q, k, v {b * s}x{d}x{width}, heads of {k}", operations=2 * b * s * d * width)
    yield task, "mtlm", lambda: rotated_projections(x, weights, (None, None, None), cos, sin, heads)
    yield task, "mtlm, rotated in place", bind(in_place, x, *weights)
    yield task, "torch", bind(plain, x, *weights)
    yield task, "torch.compile", bind(compile_whole(plain), x, *weights)


def swiglu_mlps(n: int, d: int, f: int) -> Made:
    """An MLP with SwiGLU."""

    def plain(x, gate, up, down):
        return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)

    yield from mlps(f"MLP {n}x{d}x{f}", swiglu_mlp, plain, n, d, ((f, d), (f, d), (d, f)))


def gelu_mlps(n: int, d: int, f: int) -> Made:
    """An MLP with GELU and biases."""

    def plain(x, up, up_bias, down, down_bias):
        return F.linear(F.gelu(F.linear(x, up, up_bias), approximate="tanh"), down, down_bias)

    yield from mlps(f"MLP with GELU {n}x{d}x{f}", gelu_mlp, plain, n, d, ((f, d), (f,), (d, f), (d,)))


def mlps(
    name: str, ours: Callable, plain: Callable, n: int, d: int, shapes: tuple[tuple[int, ...], ...]
) -> Made:
    """An MLP forward and backward, of n rows and parameters of these shapes."""
    x = torch.randn(n, d, device=DEVICE, dtype=BF16, requires_grad=True)
    weights = [torch.randn(shape, device=DEVICE, dtype=BF16) / d**0.5 for shape in shapes]
    inputs = (x, *(w.requires_grad_() for w in weights))
    gradient = torch.randn_like(x)
    task = Task(name, operations=6 * n * sum(w.numel() for w in weights if w.dim() == 2))

    def both(way):
        return lambda: torch.autograd.grad(way(*inputs), inputs, gradient)

    yield task, "mtlm", both(ours)
    yield task, "torch", both(plain)
    yield task, "torch.compile", both(compile_whole(plain))


def losses(n: int, d: int, vocab: int) -> Made:
    """Head and cross-entropy, forward and backward, mean loss."""
    hidden = torch.randn(n, d, device=DEVICE, dtype=BF16, requires_grad=True)
    table = (torch.randn(vocab, d, device=DEVICE, dtype=BF16) * 0.02).requires_grad_()
    targets = torch.randint(vocab, (n,), device=DEVICE)
    task = Task(
        f"linear + cross-entropy {n}x{d}x{vocab}",
        operations=6 * n * d * vocab,
        results=hidden.nbytes + table.nbytes,
    )

    def plain(hidden, table):
        return F.cross_entropy((hidden @ table.T).float(), targets)

    def both(way):
        return lambda: torch.autograd.grad(way(hidden, table), (hidden, table))

    yield task, "mtlm", both(lambda h, t: linear_cross_entropy(h, t, targets).total / n)
    yield task, "torch", both(plain)
    yield task, "torch.compile", both(compile_whole(plain))
    try:
        from liger_kernel.transformers.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyLoss
    except ImportError:
        return
    liger = LigerFusedLinearCrossEntropyLoss()
    yield task, "liger", both(lambda h, t: liger(t, h, targets))


def softmax_pass(rows: int, vocab: int) -> Made:
    """The loss's own pass over a chunk of logits."""
    logits = torch.randn(rows, vocab, device=DEVICE, dtype=BF16)
    targets = torch.randint(vocab, (rows,), device=DEVICE)
    total, nll = torch.empty(2, rows, device=DEVICE)
    task = Task(f"softmax loss in place {rows}x{vocab}", bytes=4 * rows * vocab)
    yield task, "mtlm", lambda: torch.ops.mtlm.softmax_loss_(logits, targets, total, nll, 0.0, True)


def updates(parameters: int) -> Made:
    """AdamW on the tensors of a decoder of 24 layers, float32 gradients."""
    of_layer = [(768, 768)] * 4 + [(768, 2176)] * 3 + [(768,)] * 2
    shapes = [(parameters // 2**20 * 2**20 // 8 // 768, 768), *(of_layer * 24)]

    def made(make):
        params = [torch.nn.Parameter(torch.randn(shape, device=DEVICE)) for shape in shapes]
        for p in params:
            p.grad = torch.randn_like(p)
        return make(params).step

    size = sum(torch.Size(shape).numel() for shape in shapes)
    task = Task(f"AdamW {size / 1e6:.0f}M", bytes=28 * size)
    yield task, "mtlm", made(lambda p: AdamW(p, lr=1e-3))
    yield task, "torch foreach", made(lambda p: torch.optim.AdamW(p, lr=1e-3, foreach=True))
    yield task, "torch fused", made(lambda p: torch.optim.AdamW(p, lr=1e-3, fused=True))


def compile_whole(function: Callable) -> Callable:
    """torch.compile for one shape; what it cannot compile as one graph is an error."""
    return torch.compile(function, dynamic=False, fullgraph=True)


def bind(function: Callable, *arguments: Tensor) -> Callable[[], object]:
    """A call of the function on these arguments, whatever the names mean later."""
    return lambda: function(*arguments)


def liger_norm():
    """Liger's fused addition and norm, where it is installed."""
    try:
        from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction
    except ImportError:
        return None
    return LigerFusedAddRMSNormFunction


TASKS: dict[str, Callable[[], Made]] = {
    "norm 768": lambda: norms(262144, 768, BF16),
    "norm 384": lambda: norms(262144, 384, BF16),
    "norm 768 float32": lambda: norms(262144, 768, torch.float32),
    "norm 384 float32": lambda: norms(262144, 384, torch.float32),
    "norm alone 768": lambda: norm_alone(262144, 768),
    "norm alone 384": lambda: norm_alone(262144, 384),
    "rotary": lambda: rotations(131072, 12, 64),
    "q, k, v": lambda: projections(32, 1024, 768, (12, 12, 12), 64),
    "mlp": lambda: swiglu_mlps(32768, 768, 2176),
    "mlp gelu": lambda: gelu_mlps(65536, 384, 1024),
    "softmax": lambda: softmax_pass(16384, 32000),
    "loss 768": lambda: losses(32768, 768, 32000),
    "loss 384": lambda: losses(32768, 384, 32000),
    "adamw": lambda: updates(200_000_000),
}


def measure(clock: Clock, task: Task, implementation: str, function, copy: float, product: float) -> Row:
    """Times one way; memory where the task names its results."""
    extra = None
    milliseconds, host = clock(function)
    if task.results:
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        torch.cuda.synchronize()
        extra = (torch.cuda.max_memory_allocated() - before - task.results) / 2**30
    work, ceiling, unit = (task.bytes, copy, "TB/s") if task.bytes else (task.operations, product, "TFLOP/s")
    rate = work / milliseconds / 1e9
    return Row(task.name, implementation, milliseconds, rate, unit, rate / ceiling, extra, host)
