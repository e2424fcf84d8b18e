"""GELU inside its products, on a GPU of the architecture that they are for."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels_cuda.ops.gelu import GELU, gelu_mlp
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

# Rows, d_model, hidden width. Tiles are 256 rows of two blocks by 128 columns, stages 64 of d_model.
SHAPES = [
    (1, 8, 8),
    (2, 16, 24),
    (31, 200, 120),
    (33, 64, 64),
    (128, 384, 1024),
    (129, 576, 200),
    (199, 384, 1032),
    (257, 72, 136),
    (8192, 384, 1024),
    (65_536, 384, 1024),
    (40_000, 320, 200),
]


def drawn(rows: int, d: int, f: int) -> tuple[Tensor, ...]:
    """x, weight and bias of up, the gradient of what comes after down, down."""
    shapes = ((rows, d), (f, d), (f,), (rows, d), (d, f))
    scales = (1, d**-0.5, 1, 1, d**-0.5)
    x, weight, bias, d_y, down = (
        torch.randn(s, device="cuda").mul(c) for s, c in zip(shapes, scales, strict=True)
    )
    return x.to(BF16), weight.to(BF16), bias, d_y.to(BF16), down.to(BF16)


@pytest.mark.parametrize("shape", SHAPES)
def test_forward_and_backward(shape: tuple[int, int, int]):
    x, weight, bias, d, down = drawn(*shape)
    rows, _, f = shape
    guarded = Guarded()
    empty = torch.empty(rows, f, device="cuda", dtype=BF16)
    # Each of the eight warps of two blocks leaves sums over its rows of 256.
    partials = torch.empty(8 * -(-rows // 256), f, device="cuda")

    def forward(weight: Tensor, inputs_first: bool) -> list[Tensor]:
        results = [guarded.like(empty), guarded.like(empty)]
        MTLM.gelu_product_into(x, weight, bias, inputs_first, *results)
        guarded.check()
        return results

    def backward(down: Tensor, inputs_first: bool) -> list[Tensor]:
        results = [guarded.like(t) for t in (empty, bias, partials)]
        MTLM.gelu_product_backward_into(d, down, inputs_first, up, *results)
        guarded.check()
        return results[:2]

    up, h = forward(weight, False)
    assert_equal_bits(forward(weight.T.contiguous(), True), [up, h])
    plain, exact = (reference.gelu_product(*inputs) for inputs in ((x, weight, bias), wide(x, weight, bias)))
    assert_as_good([up, h], plain, exact)
    d_up, d_bias = backward(down, False)
    assert_equal_bits(backward(down.T.contiguous(), True), [d_up, d_bias])
    plain, exact = (reference.gelu_product_backward(*inputs) for inputs in ((d, down, up), wide(d, down, up)))
    assert_as_good([d_up, d_bias], plain, exact)


def test_the_same_bits_again_and_in_another_batch():
    x, weight, bias, d, down = drawn(1000, 384, 1024)
    up, h = run_twice(lambda: MTLM.gelu_product(x, weight, bias))
    d_up, _ = run_twice(lambda: MTLM.gelu_product_backward(d, down, up))
    some = slice(300, 617)
    assert_equal_bits(MTLM.gelu_product(x[some].contiguous(), weight, bias), (up[some], h[some]))
    part, _ = MTLM.gelu_product_backward(d[some].contiguous(), down, up[some].contiguous())
    assert_equal_bits([part], [d_up[some]])


def test_every_column_gets_its_own_bias_and_its_gradient():
    """No product: x is zero, and the gradient of h is the row's number in every column."""
    rows, f = 300, 264
    bias = torch.linspace(-6, 6, f, device="cuda")
    x, weight = torch.zeros(rows, 8, device="cuda", dtype=BF16), torch.ones(f, 8, device="cuda", dtype=BF16)
    up, h = MTLM.gelu_product(x, weight, bias)
    assert_equal_bits([up], [bias.to(BF16).expand(rows, f)])
    exact = F.gelu(up.double(), approximate="tanh")
    # Half a unit in the last place, 2^-8 of the value, and a hundredth of that for approximations: 2^-22 for
    # each of two, and what an exponent of 36 is off by in float32. GELU's tail is right: nothing cancels.
    torch.testing.assert_close(h.double(), exact, rtol=2.0**-8 * 1.01, atol=0)
    d = torch.zeros(rows, 8, device="cuda", dtype=BF16)
    d[:, 0] = torch.arange(rows, device="cuda") % 256  # whole numbers that bfloat16 has
    down = torch.zeros(8, f, device="cuda", dtype=BF16)
    down[0] = 1
    d_bias = MTLM.gelu_product_backward(d, down, up)[1]
    y = up[0].double().requires_grad_()
    (slope,) = torch.autograd.grad(F.gelu(y, approximate="tanh").sum(), y)
    total = d[:, 0].double().sum().item()
    # 300 terms of one sign, float32's 2^-24 for every addition at worst; and the slope, of order 1, whose few
    # roundings and approximations are the same in every row.
    torch.testing.assert_close(d_bias.double(), slope * total, rtol=300 * 2.0**-24, atol=total * 2.0**-20)


def test_large_inputs_saturate():
    """The exponential overflows on one side and vanishes on the other."""
    x = torch.tensor([[300.0, 0, 0, 0, 0, 0, 0, 0], [-300, 0, 0, 0, 0, 0, 0, 0]], device="cuda", dtype=BF16)
    weight = torch.zeros(8, 8, device="cuda", dtype=BF16)
    weight[:, 0] = 1
    up, h = MTLM.gelu_product(x, weight, torch.zeros(8, device="cuda"))
    assert h.tolist() == [[300.0] * 8, [0.0] * 8]
    identity = torch.eye(8, device="cuda", dtype=BF16)
    d_up, d_bias = MTLM.gelu_product_backward(torch.ones_like(x), identity, up)
    assert d_up.tolist() == [[1.0] * 8, [0.0] * 8] and d_bias.tolist() == [1.0] * 8


def test_no_rows():
    x, weight, bias, d, down = drawn(0, 64, 64)
    up, h = MTLM.gelu_product(x, weight, bias)
    assert up.shape == h.shape == (0, 64)
    d_up, d_bias = MTLM.gelu_product_backward(d, down, up)
    assert d_up.shape == (0, 64) and d_bias.tolist() == [0.0] * 64


def test_the_mlp_and_its_gradients():
    b, s, d, f = 2, 96, 384, 1024
    shapes = ((b, s, d), (f, d), (f,), (d, f), (d,))
    leaves = [torch.randn(shape, device="cuda") for shape in shapes]
    for weight in leaves[1::2]:
        weight /= d**0.5
    gradient = torch.randn(b, s, d, device="cuda")

    def run(function, values: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
        inputs = [t.to(dtype).requires_grad_() for t in values]
        out = function(*inputs)
        return [out, *torch.autograd.grad(out, inputs, gradient.to(dtype))]

    def plain(x: Tensor, up: Tensor, up_bias: Tensor, down: Tensor, down_bias: Tensor) -> Tensor:
        return F.linear(F.gelu(F.linear(x, up, up_bias), approximate="tanh"), down, down_bias)

    rounded = [t.to(BF16) for t in leaves]
    values = [t.float() for t in rounded]  # the same in every type
    exact = run(plain, values, torch.float64)
    assert_as_good(run(gelu_mlp, values, BF16), run(plain, values, BF16), exact)
    with torch.autocast("cuda", BF16):
        ours, theirs = (run(function, values, torch.float32) for function in (gelu_mlp, plain))
    assert_as_good(ours, theirs, exact, "autocast")
    with torch.no_grad():
        assert_equal_bits([gelu_mlp(*rounded)], [plain(*rounded)])


def test_on_another_stream_in_a_graph_and_compiled():
    x, weight, bias, _, down = drawn(512, 384, 1024)
    inputs = (x, weight, bias, down, torch.randn(384, device="cuda").to(BF16))

    def step() -> list[Tensor]:
        leaves = fresh_leaves(inputs)
        out = GELU.apply(*leaves)
        return [out.detach(), *torch.autograd.grad(out.float().square().sum(), leaves)]

    expected = assert_equal_on_a_stream_and_in_a_graph(step)
    compiled = torch.compile(GELU.apply, fullgraph=True)(*fresh_leaves(inputs))
    assert error(compiled, expected[0]) < 1e-6


def test_bad_inputs_are_refused_with_the_numbers():
    x, weight, bias, d, down = drawn(16, 64, 64)
    with pytest.raises(RuntimeError, match=r"weight must be \[64, 64\], not \[64, 56\]"):
        MTLM.gelu_product(x, weight[:, :56].contiguous(), bias)
    with pytest.raises(RuntimeError, match="multiples of 8, not 60 and 64"):
        MTLM.gelu_product(x[:, :60].contiguous(), weight[:, :60].contiguous(), bias)
    with pytest.raises(RuntimeError, match="x must be bfloat16"):
        MTLM.gelu_product(x.float(), weight, bias)
    with pytest.raises(RuntimeError, match="x must be contiguous"):
        MTLM.gelu_product(x.T.contiguous().T, weight, bias)
    with pytest.raises(RuntimeError, match="bias must be float32"):
        MTLM.gelu_product(x, weight, bias.to(BF16))
    with pytest.raises(RuntimeError, match="up must be"):
        MTLM.gelu_product_backward(d, down, x[:, :56].contiguous())
