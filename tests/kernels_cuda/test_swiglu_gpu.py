"""SwiGLU inside its products, on a GPU of the architecture that they are for."""

import threading

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels_cuda.ops.swiglu import SwiGLU, swiglu_mlp
from kernels_cuda.registry import reference
from tests.kernels_cuda.gpu import (
    ON_HOPPER,
    Guarded,
    assert_as_good,
    assert_equal_bits,
    assert_equal_on_a_stream_and_in_a_graph,
    error,
    fresh_leaves,
    run_twice,
    wide,
)

MTLM = torch.ops.mtlm
BF16 = torch.bfloat16


pytestmark = ON_HOPPER

# Rows, d_model, hidden width. Tiles are 256 rows of two blocks by 64 or 128 columns, stages 64 of d_model.
SHAPES = [
    (1, 8, 8),
    (2, 16, 24),
    (31, 200, 120),
    (33, 64, 64),
    (128, 576, 1536),
    (199, 768, 2176),
    (257, 72, 136),
    (8192, 768, 2176),
    (40_000, 320, 200),
]


def drawn(rows: int, d: int, f: int) -> tuple[Tensor, ...]:
    """x, weight of gate and up, the gradient of what comes after down, down."""
    shapes = ((rows, d), (2 * f, d), (rows, d), (d, f))
    scales = (1, d**-0.5, 1, d**-0.5)
    return tuple(torch.randn(s, device="cuda").mul(c).to(BF16) for s, c in zip(shapes, scales, strict=True))


@pytest.mark.parametrize("shape", SHAPES)
def test_forward_and_backward(shape: tuple[int, int, int]):
    x, weight, d, down = drawn(*shape)
    guarded = Guarded()
    empty = [torch.empty(shape[0], width, device="cuda", dtype=BF16) for width in (2 * shape[2], shape[2])]

    def forward(weight: Tensor, inputs_first: bool) -> list[Tensor]:
        results = [guarded.like(t) for t in empty]
        MTLM.swiglu_product_into(x, weight, inputs_first, *results)
        guarded.check()
        return results

    def backward(down: Tensor, inputs_first: bool) -> list[Tensor]:
        results = [guarded.like(t) for t in empty]
        MTLM.swiglu_product_backward_into(d, down, inputs_first, gate_up, *results)
        guarded.check()
        return results

    gate_up, h = forward(weight, False)
    assert_equal_bits(forward(weight.T.contiguous(), True), [gate_up, h])
    assert_as_good(
        [gate_up, h], reference.swiglu_product(x, weight), reference.swiglu_product(*wide(x, weight))
    )
    d_gate_up, again = backward(down, False)
    assert_equal_bits(backward(down.T.contiguous(), True), [d_gate_up, again])
    plain = reference.swiglu_product_backward(d, down, gate_up)
    exact = reference.swiglu_product_backward(*wide(d, down, gate_up))
    assert_as_good([d_gate_up, again], plain, exact)
    assert_equal_bits([again], [h])


def test_the_same_bits_again_and_in_another_batch():
    x, weight, d, down = drawn(1000, 768, 2176)
    gate_up, h = run_twice(lambda: MTLM.swiglu_product(x, weight))
    d_gate_up = run_twice(lambda: MTLM.swiglu_product_backward(d, down, gate_up))[0]
    some = slice(300, 617)
    assert_equal_bits(
        MTLM.swiglu_product(x[some].contiguous(), weight), (gate_up[some].contiguous(), h[some])
    )
    part = MTLM.swiglu_product_backward(d[some].contiguous(), down, gate_up[some].contiguous())
    assert_equal_bits(part, (d_gate_up[some].contiguous(), h[some]))


def test_large_gates_saturate():
    """silu's exponential overflows on one side and vanishes on the other."""
    x = torch.tensor([[300.0, 1, 0, 0, 0, 0, 0, 0], [-300, 1, 0, 0, 0, 0, 0, 0]], device="cuda", dtype=BF16)
    weight = torch.zeros(16, 8, device="cuda", dtype=BF16)
    weight[:8, 0] = weight[8:, 1] = 1
    gate_up, h = MTLM.swiglu_product(x, weight)
    assert h.tolist() == [[300.0] * 8, [0.0] * 8]
    down = torch.eye(8, device="cuda", dtype=BF16)
    d_gate_up, _ = MTLM.swiglu_product_backward(torch.ones_like(x), down, gate_up)
    assert d_gate_up.tolist() == [[1.0] * 8 + [300.0] * 8, [0.0] * 16]


def test_no_rows():
    x, weight, d, down = drawn(0, 64, 64)
    gate_up, h = MTLM.swiglu_product(x, weight)
    assert gate_up.shape == (0, 128) and h.shape == (0, 64)
    assert MTLM.swiglu_product_backward(d, down, gate_up)[0].shape == (0, 128)


def test_the_mlp_and_its_gradients():
    b, s, d, f = 2, 96, 384, 1024
    x = torch.randn(b, s, d, device="cuda")
    weights = [torch.randn(shape, device="cuda") / d**0.5 for shape in ((f, d), (f, d), (d, f))]
    gradient = torch.randn(b, s, d, device="cuda")

    def run(function, dtype: torch.dtype) -> list[Tensor]:
        leaves = [t.to(dtype).requires_grad_() for t in (x, *weights)]
        out = function(*leaves)
        return [out, *torch.autograd.grad(out, leaves, gradient.to(dtype))]

    def plain(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)

    rounded = [t.to(BF16) for t in (x, *weights)]
    x, *weights = (t.float() for t in rounded)  # the same values in every type
    assert_as_good(run(swiglu_mlp, BF16), run(plain, BF16), run(plain, torch.float64))
    with torch.autocast("cuda", BF16):
        ours, theirs = (run(function, torch.float32) for function in (swiglu_mlp, plain))
    assert_as_good(ours, theirs, run(plain, torch.float64), "autocast")
    with torch.no_grad():
        assert_equal_bits([swiglu_mlp(*rounded)], [plain(*rounded)])


def test_in_a_graph_on_another_stream_and_compiled():
    x, weight, _, down = drawn(512, 768, 2176)
    inputs = (x, *weight.chunk(2), down)

    def step() -> list[Tensor]:
        leaves = fresh_leaves(inputs)
        out = SwiGLU.apply(*leaves)
        return [out.detach(), *torch.autograd.grad(out.float().square().sum(), leaves)]

    expected = assert_equal_on_a_stream_and_in_a_graph(step)
    compiled = torch.compile(SwiGLU.apply, fullgraph=True)(*fresh_leaves(inputs))
    assert error(compiled, expected[0]) < 1e-6


def test_bad_inputs_are_refused_with_the_numbers():
    x, weight, d, down = drawn(16, 64, 64)
    with pytest.raises(RuntimeError, match=r"weight must be \[128, 64\], not \[128, 56\]"):
        MTLM.swiglu_product(x, weight[:, :56].contiguous())
    with pytest.raises(RuntimeError, match="multiples of 8, not 60 and 64"):
        MTLM.swiglu_product(x[:, :60].contiguous(), weight[:, :60].contiguous())
    with pytest.raises(RuntimeError, match="x must be bfloat16"):
        MTLM.swiglu_product(x.float(), weight)
    with pytest.raises(RuntimeError, match="x must be contiguous"):
        MTLM.swiglu_product(x.T.contiguous().T, weight)
    with pytest.raises(RuntimeError, match="gate_up must be"):
        MTLM.swiglu_product_backward(d, down, x)


def test_in_a_thread_that_has_called_nothing_of_cuda_yet():
    """As a thread of autograd is that begins with this op, on memory that another thread has left."""
    x, weight, *_ = drawn(33, 64, 64)
    results = [torch.zeros(33, width, device="cuda", dtype=BF16) for width in (128, 64)]
    thread = threading.Thread(target=MTLM.swiglu_product_into, args=(x, weight, False, *results))
    thread.start()
    thread.join()
    assert_equal_bits(results, MTLM.swiglu_product(x, weight))
