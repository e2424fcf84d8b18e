"""The rotary kernels on a GPU."""

import pytest
import torch
from torch import Tensor

from kernels_cuda.ops.rotary import rotate, rotated_projections
from kernels_cuda.registry import reference
from tests.kernels_cuda.gpu import Guarded, assert_as_good, assert_equal_bits, run_twice, wide

pytestmark = pytest.mark.gpu

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


@pytest.mark.parametrize("kv_heads", [6, 2, 1])
def test_projections_and_their_gradients(kv_heads: int):
    b, s, h, k = 2, 96, 6, 64
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
