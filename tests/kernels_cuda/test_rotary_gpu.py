"""The rotary kernels on a GPU, and the product of q, k and v that rotates."""

import pytest
import torch
from torch import Tensor

from kernels_cuda.ops.rotary import RotatedProjections, rotate, rotated_projections
from kernels_cuda.registry import reference
from tests.kernels_cuda.gpu import (
    Guarded,
    assert_as_good,
    assert_equal_bits,
    assert_equal_on_a_stream_and_in_a_graph,
    fresh_leaves,
    is_hopper,
    run_twice,
    wide,
)

MTLM = torch.ops.mtlm
BF16 = torch.bfloat16

pytestmark = pytest.mark.gpu
needs_hopper = pytest.mark.skipif(not is_hopper(), reason="needs compute capability 9.0")

SHAPES = [
    (1, 1, 1, 2),
    (2, 33, 12, 64),
    (3, 7, 6, 64),
    (2, 5, 3, 20),
    (1, 9, 40, 128),
    (2, 31, 300, 16),
    (0, 5, 2, 64),
]


def angles(batch: int, seq: int, half: int) -> tuple[Tensor, Tensor]:
    angle = torch.rand(batch, seq, half, device="cuda") * 1000
    return angle.cos(), angle.sin()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("conjugate", [False, True])
def test_packed_and_separate(shape: tuple[int, ...], dtype: torch.dtype, conjugate: bool):
    b, s, h, k = shape
    for of_all in (True, False):
        cos, sin = angles(1 if of_all or b == 0 else b, s, k // 2)
        guarded = Guarded()
        given = torch.randn(b, s, 3, h, k, device="cuda", dtype=dtype)
        packed = guarded.like(given, keep=True)
        torch.ops.mtlm.rotary_(packed[:, :, 0], packed[:, :, 1], cos, sin, conjugate)
        assert_equal_bits([packed[:, :, 2].contiguous()], [given[:, :, 2].contiguous()])
        guarded.check()
        parts = [t.contiguous() for t in given.unbind(2)]
        pack = run_twice(lambda given=(*parts, cos, sin): [torch.ops.mtlm.rotary_pack(*given, conjugate)])[0]
        assert_equal_bits([pack], [packed.flatten(2, 3)])
        plain = reference.rotary_pack(*parts, cos, sin, conjugate)
        exact = reference.rotary_pack(*wide(*parts, cos, sin), conjugate)
        assert_as_good([pack], [plain], [exact])


@pytest.mark.parametrize("heads", [(9, 3), (15, 5), (16, 8), (4, 1)])
def test_fewer_heads_of_keys(heads: tuple[int, int]):
    """Packed as each would be on its own."""
    b, s, k = 2, 33, 64
    cos, sin = angles(1, s, k // 2)
    q, key, v = (
        torch.randn(b, s, n, k, device="cuda", dtype=torch.bfloat16) for n in (heads[0], heads[1], heads[1])
    )
    pack = run_twice(lambda: [torch.ops.mtlm.rotary_pack(q, key, v, cos, sin, True)])[0]
    plain = reference.rotary_pack(q, key, v, cos, sin, True)
    assert_as_good([pack], [plain], [reference.rotary_pack(*wide(q, key, v, cos, sin), True)])
    assert_equal_bits([pack[:, :, sum(heads) :].contiguous()], [v])


def test_heads_first_and_transposed_gradients():
    b, s, h, k = 2, 48, 12, 64
    cos, sin = angles(1, s, k // 2)
    parts = [torch.randn(b, s, h, k, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
    expected = torch.ops.mtlm.rotary_pack(*parts, cos, sin, True)
    heads_first = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in parts]
    assert_equal_bits([torch.ops.mtlm.rotary_pack(*heads_first, cos, sin, True)], [expected])
    inside_out = [t.transpose(1, 3).contiguous().transpose(1, 3) for t in parts]
    assert_equal_bits([torch.ops.mtlm.rotary_pack(*inside_out, cos, sin, True)], [expected])
    expanded = [t[:, :, :1, :1].expand(b, s, h, k) for t in parts]
    again = torch.ops.mtlm.rotary_pack(*(t.contiguous() for t in expanded), cos, sin, True)
    assert_equal_bits([torch.ops.mtlm.rotary_pack(*expanded, cos, sin, True)], [again])


def test_odd_addresses():
    b, s, h, k = 2, 5, 4, 64
    cos, sin = angles(1, s, k // 2)
    given = torch.randn(b, s, h, k, device="cuda", dtype=torch.bfloat16)
    expected = [given.clone(), given.clone()]
    torch.ops.mtlm.rotary_(*expected, cos, sin, False)
    flat = torch.zeros(given.numel() + 3, device="cuda", dtype=torch.bfloat16)
    odd = flat[3:].view(given.shape).copy_(given)
    even = given.clone()
    torch.ops.mtlm.rotary_(odd, even, cos, sin, False)
    assert_equal_bits([odd.contiguous(), even], expected)
    assert (flat[:3] == 0).all()


def test_more_than_2_to_the_31_elements():
    b, s, h, k = 2800, 1024, 4, 64
    cos, sin = angles(1, s, k // 2)
    packed = torch.empty(b, s, 3, h, k, device="cuda", dtype=torch.bfloat16).normal_()
    last = packed[-1:].clone()
    torch.ops.mtlm.rotary_(packed[:, :, 0], packed[:, :, 1], cos, sin, False)
    torch.ops.mtlm.rotary_(last[:, :, 0], last[:, :, 1], cos, sin, False)
    assert_equal_bits([packed[-1:]], [last])


def test_bad_inputs_are_refused_with_the_numbers():
    cos, sin = angles(1, 5, 32)
    q = torch.randn(2, 5, 4, 64, device="cuda")
    with pytest.raises(RuntimeError, match=r"cos must be \[1, 6, 32\], not \[1, 5, 32\]"):
        q6 = torch.randn(2, 6, 4, 64, device="cuda")
        torch.ops.mtlm.rotary_(q6, q6.clone(), *angles(1, 5, 32), False)
    with pytest.raises(RuntimeError, match=r"k must be \[2, 5, 4, 64\], not \[2, 5, 4, 32\]"):
        torch.ops.mtlm.rotary_(q, q[..., :32], cos, sin, False)
    with pytest.raises(RuntimeError, match="even, not 63"):
        torch.ops.mtlm.rotary_(q[..., :63], q[..., :63], cos, sin, False)


@pytest.mark.parametrize(("kv_heads", "k"), [(6, 64), (2, 64), (1, 64), (2, 128), (2, 32)])
def test_projections_and_their_gradients(kv_heads: int, k: int):
    """On Hopper in one product, but for heads of 32."""
    b, s, h = 2, 96, 6
    d, heads = h * k, (h, kv_heads, kv_heads)
    cos, sin = angles(1, s, k // 2)
    x = torch.randn(b, s, d, device="cuda", dtype=torch.bfloat16)
    weights = [torch.randn(n * k, d, device="cuda", dtype=torch.bfloat16) / d**0.5 for n in heads]
    biases = [torch.randn(n * k, device="cuda", dtype=torch.bfloat16) for n in heads]
    gradients = [torch.randn(b, n, s, k, device="cuda", dtype=torch.bfloat16).transpose(1, 2) for n in heads]

    def run(function, *tensors):
        leaves = [t.detach().clone().requires_grad_() for t in tensors]
        out = function(leaves[0], tuple(leaves[1:4]), tuple(leaves[4:]), cos.to(x.device), sin, heads)
        return [*out, *torch.autograd.grad(out, leaves, [g.to(out[0].dtype) for g in gradients])]

    def plain(x, weights, biases, cos, sin, heads):
        parts = [
            torch.nn.functional.linear(x, w, bias).view(b, s, n, k)
            for w, bias, n in zip(weights, biases, heads, strict=True)
        ]
        return rotate(parts[0], cos, sin), rotate(parts[1], cos, sin), parts[2]

    tensors = (x, *weights, *biases)
    assert_as_good(run(rotated_projections, *tensors), run(plain, *tensors), run(plain, *wide(*tensors)))


# --- the product that rotates ---

# Batch, positions, d_model, heads of q, k and v, head size. Tiles are 256 rows of two blocks by 128 columns:
# two heads of 64, which may be of q and of k, or of v and nothing; or one of 128. Stages are 64 of d_model.
PRODUCTS = [
    (1, 1, 8, (1, 1, 1), 64),
    (2, 17, 72, (3, 1, 1), 64),
    (3, 43, 576, (9, 3, 3), 64),
    (1, 257, 384, (6, 6, 6), 64),
    (2, 100, 200, (2, 2, 2), 128),
    (3, 86, 1000, (5, 1, 1), 128),
    (64, 1024, 384, (6, 6, 6), 64),
    (32, 1024, 768, (12, 12, 12), 64),
    (4, 1024, 1024, (16, 8, 8), 128),
]


def drawn(b: int, s: int, d: int, heads: tuple[int, int, int], k: int) -> tuple[Tensor, Tensor, Tensor]:
    """x, the weight of q, k and v, and its bias."""
    width = sum(heads) * k
    x, weight = torch.randn(b, s, d, device="cuda"), torch.randn(width, d, device="cuda") / d**0.5
    return x.to(BF16), weight.to(BF16), torch.randn(width, device="cuda")


@needs_hopper
@pytest.mark.parametrize("shape", PRODUCTS)
@pytest.mark.parametrize("of_all", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_the_product_rotates(shape: tuple, of_all: bool, biased: bool):
    """Into a packed tensor; and into three, with weights as PyTorch and as JAX keep them."""
    b, s, _, heads, k = shape
    x, weight, bias = drawn(*shape)
    bias = bias if biased else None
    turns = angles(1 if of_all else b, s, k // 2)
    packed = run_twice(lambda: [MTLM.qkv_product(x, weight, bias, *turns, heads)])[0]
    inputs = (x, weight, bias, *turns)
    plain, exact = (reference.qkv_product(*given, heads) for given in (inputs, wide(*inputs)))
    assert_as_good([packed], [plain], [exact])
    whole = torch.ones_like(turns[0]), torch.zeros_like(turns[1])
    unturned = MTLM.qkv_product(x, weight, bias, *whole, heads)
    for cos_sin, expected in ((turns, packed), ((None, None), unturned)):
        for inputs_first in (False, True):
            guarded = Guarded()
            parts = [guarded.like(part) for part in expected.split(heads, dim=2)]
            own = weight.T.contiguous() if inputs_first else weight
            MTLM.qkv_product_into(x.flatten(0, 1), own, bias, *cos_sin, inputs_first, *parts)
            guarded.check()
            assert_equal_bits(parts, expected.split(heads, dim=2))


@needs_hopper
def test_what_a_head_gets_is_its_own():
    """No product: x is zero, and the bias tells each column, in whole numbers that bfloat16 has."""
    heads, k, d = (3, 2, 2), 64, 8
    width = sum(heads) * k
    x = torch.zeros(1, 5, d, device="cuda", dtype=BF16)
    weight = torch.ones(width, d, device="cuda", dtype=BF16)
    bias = torch.arange(width, device="cuda") % 255 + 1.0
    cos, sin = torch.zeros(1, 5, k // 2, device="cuda"), torch.ones(1, 5, k // 2, device="cuda")
    got = MTLM.qkv_product(x, weight, bias, cos, sin, heads)
    a, c = bias.view(sum(heads), k).chunk(2, dim=1)
    quarter = torch.cat([-c, a], dim=1)  # a turn by a quarter, of queries and keys
    quarter[sum(heads[:2]) :] = bias.view(sum(heads), k)[sum(heads[:2]) :]
    assert_equal_bits([got], [quarter.to(BF16).expand(1, 5, -1, -1)])


@needs_hopper
@pytest.mark.parametrize("k", [64, 128])
def test_a_row_of_the_product_depends_on_itself_alone(k: int):
    heads = (3, 1, 1)
    x, weight, bias = drawn(1, 600, 384, heads, k)
    cos, sin = angles(1, 600, k // 2)
    x[:, 77, 5] = torch.nan
    whole = MTLM.qkv_product(x, weight, bias, cos, sin, heads)
    for at in (0, 76, 299, 599):
        own = slice(at, at + 1)
        given = x[:, own].clone(), weight, bias, cos[:, own].clone(), sin[:, own].clone()
        alone = MTLM.qkv_product(*given, heads)
        assert_equal_bits([whole[:, own]], [alone])
    assert whole.isnan().flatten(2).all(2).nonzero().tolist() == [[0, 77]]
    assert not whole[:, torch.arange(600, device="cuda") != 77].isnan().any()


@needs_hopper
def test_the_product_in_a_graph_and_compiled():
    b, s, d, heads, k = 2, 256, 384, (6, 2, 2), 64
    x, weight, bias = drawn(b, s, d, heads, k)
    turns = angles(1, s, k // 2)

    def step() -> list[Tensor]:
        leaves = fresh_leaves((x, weight, bias))
        out = RotatedProjections.apply(*leaves, *turns, heads, True)
        loss = sum(part.float().square().sum() for part in out)
        return [*(part.detach().clone() for part in out), *torch.autograd.grad(loss, leaves)]

    expected = assert_equal_on_a_stream_and_in_a_graph(step)
    compiled = torch.compile(RotatedProjections.apply, fullgraph=True)
    parts = compiled(*fresh_leaves((x, weight, bias)), *turns, heads, True)
    assert_equal_bits(parts, expected[:3])


@needs_hopper
def test_a_product_of_more_than_2_to_the_31_elements():
    b, s, d, heads, k = 2800, 1024, 64, (4, 4, 4), 64
    _, weight, bias = drawn(1, 1, d, heads, k)
    x = torch.empty(b, s, d, device="cuda", dtype=BF16).normal_()
    turns = angles(1, s, k // 2)
    last = MTLM.qkv_product(x[-1:].clone(), weight, bias, *turns, heads)
    assert_equal_bits([MTLM.qkv_product(x, weight, bias, *turns, heads)[-1:]], [last])


@needs_hopper
def test_no_tokens():
    x, weight, bias = drawn(0, 5, 64, (2, 1, 1), 64)
    assert MTLM.qkv_product(x, weight, bias, *angles(1, 5, 32), (2, 1, 1)).shape == (0, 5, 4, 64)


@needs_hopper
def test_a_product_of_bad_inputs_is_refused_with_the_numbers():
    heads = (2, 1, 1)
    x, weight, bias = drawn(2, 5, 64, heads, 64)
    turns = angles(1, 5, 32)
    with pytest.raises(RuntimeError, match=r"weight must be \[256, 64\], not \[256, 56\]"):
        MTLM.qkv_product(x, weight[:, :56].contiguous(), bias, *turns, heads)
    with pytest.raises(RuntimeError, match=r"cos must be \[1, 5, 32\], not \[1, 6, 32\]"):
        MTLM.qkv_product(x, weight, bias, *angles(1, 6, 32), heads)
    with pytest.raises(RuntimeError, match="heads must have 64 or 128 elements, not 32"):
        MTLM.qkv_product(x, weight, bias, *angles(1, 5, 16), (4, 2, 2))
    with pytest.raises(RuntimeError, match="bias must be float32"):
        MTLM.qkv_product(x, weight, bias.to(BF16), *turns, heads)
    parts = torch.empty(2, 5, 4, 64, device="cuda", dtype=BF16).split(heads, dim=2)
    with pytest.raises(RuntimeError, match="q must have its heads side by side"):
        rows = torch.empty(2, 5, 2, 72, device="cuda", dtype=BF16)[..., :64]
        MTLM.qkv_product_into(x.flatten(0, 1), weight, bias, *turns, False, rows, *parts[1:])
    with pytest.raises(RuntimeError, match="cos and sin must be given both"):
        MTLM.qkv_product_into(x.flatten(0, 1), weight, bias, turns[0], None, False, *parts)
