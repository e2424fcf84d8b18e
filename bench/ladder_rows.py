"""What `bench.ladder` times: small pieces of a model's work, each written once in PyTorch and once in JAX.

Every piece maps float32 arrays to one array that can be given to it again, so that calls form a chain, as the
steps of a training loop do: nothing is computed twice, and nothing can be left out.
"""

import math
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

SIZES = (2**10, 2**16, 2**22)
"""Elements of the array that a piece works on."""
WIDTH = 256
"""Of its rows."""
REPEATS = 7
TARGET_SECONDS = 0.05
"""A timing makes as many calls as take about so long."""

Call = Callable[..., Any]


class Piece(NamedTuple):
    """A small operation: the same formula in both libraries."""

    title: str
    torch: Call
    jax: Call


def torch_gelu(x: Any) -> Any:
    """GELU in the tanh form, written out."""
    import torch

    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)))


def jax_gelu(x: Any) -> Any:
    """GELU in the tanh form, written out."""
    import jax.numpy as jnp

    return 0.5 * x * (1 + jnp.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)))


def torch_norm(x: Any) -> Any:
    """x and its RMS norm, added."""
    import torch

    return x + x * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-6)


def jax_norm(x: Any) -> Any:
    """x and its RMS norm, added."""
    from jax import lax

    return x + x * lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-6)


def torch_softmax(x: Any) -> Any:
    """x without its softmax."""
    e = (x - x.amax(-1, keepdim=True)).exp()
    return x - e / e.sum(-1, keepdim=True)


def jax_softmax(x: Any) -> Any:
    """x without its softmax."""
    import jax.numpy as jnp

    e = jnp.exp(x - x.max(-1, keepdims=True))
    return x - e / e.sum(-1, keepdims=True)


def torch_adam(x: Any) -> Any:
    """An update of Adam whose moments were 0."""
    m = 0.1 * x
    v = 0.05 * x * x
    return x * (1 - 1e-4) - 1e-3 * (m / 0.1) / ((v / 0.05).sqrt() + 1e-8)


def jax_adam(x: Any) -> Any:
    """An update of Adam whose moments were 0."""
    import jax.numpy as jnp

    m = 0.1 * x
    v = 0.05 * x * x
    return x * (1 - 1e-4) - 1e-3 * (m / 0.1) / (jnp.sqrt(v / 0.05) + 1e-8)


def twenty(piece: Call) -> Call:
    """A piece twenty times over, as a small model has layers."""

    def run(x: Any) -> Any:
        for _ in range(20):
            x = piece(x)
        return x

    return run


PIECES = {
    "add": Piece("x + 1", lambda x: x + 1, lambda x: x + 1),
    "gelu": Piece("GELU, written out", torch_gelu, jax_gelu),
    "norm": Piece("x + RMSNorm(x)", torch_norm, jax_norm),
    "softmax": Piece("x - softmax(x)", torch_softmax, jax_softmax),
    "adam": Piece("an update of Adam", torch_adam, jax_adam),
    "norm20": Piece("x + RMSNorm(x), 20 times", twenty(torch_norm), twenty(jax_norm)),
}

WAYS = {
    "torch": "PyTorch, eager",
    "compile": "torch.compile",
    "graph": "CUDA graph and a copy",  # of the result, to where the next call reads it
    "jax": "JAX, jit",
    "jax-eager": "JAX, no jit",
}


def example(size: int) -> np.ndarray:
    """The array that the first call is given."""
    return np.random.default_rng(0).standard_normal((size // WIDTH, WIDTH), np.float32)


def measure(way: str, piece: str, size: int, device: str) -> float:
    """Microseconds of a call, the median of `REPEATS`; the host waits only at the end of each."""
    run, x, wait = (jax_way if way.startswith("jax") else torch_way)(way, PIECES[piece], size, device)

    def seconds(calls: int) -> float:
        y = x
        wait(y)
        start = time.perf_counter()
        for _ in range(calls):
            y = run(y)
        wait(y)
        return (time.perf_counter() - start) / calls

    seconds(3)  # compiles
    calls = max(10, min(2000, round(TARGET_SECONDS / seconds(10))))
    return statistics.median(seconds(calls) for _ in range(REPEATS)) * 1e6


def torch_way(way: str, piece: Piece, size: int, device: str) -> tuple[Call, Any, Call]:
    """A call, its first argument, and what waits for its result."""
    import torch

    x = torch.from_numpy(example(size)).to(device)

    def wait(y: Any) -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    function = piece.torch  # nothing requires a gradient; a no_grad around each call would be timed, too
    if way == "compile":
        from kernels_cuda.bench_tasks import compile_whole

        torch.compiler.reset()  # torch.compile keeps eight versions of one code
        function = compile_whole(function)
    if way != "graph":
        return function, x, wait
    held = x.clone()
    for _ in range(2):
        function(held)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        held.copy_(function(held))

    def replay(_: Any) -> Any:
        graph.replay()
        return held

    return replay, x, wait


def jax_way(way: str, piece: Piece, size: int, device: str) -> tuple[Call, Any, Call]:
    """As `torch_way`."""
    import jax

    function = piece.jax if way == "jax-eager" else jax.jit(piece.jax)
    return function, jax.device_put(example(size)), jax.block_until_ready


def ways(device: str) -> tuple[str, ...]:
    """Those that run on a device."""
    return tuple(way for way in WAYS if way != "graph" or device == "cuda")
