"""The norm's kernels on a GPU: the proof list, forward and backward."""

import itertools

import pytest
import torch
from torch import Tensor

from kernels_cuda.ops.rms_norm import add_rms_norm
from kernels_cuda.registry import reference
from tests.kernels_cuda.gpu import (
    POISON,
    STRIDES,
    assert_as_good,
    assert_equal_bits,
    run_twice,
    strided,
    wide,
)

pytestmark = pytest.mark.gpu

EPS = 1e-6
BF16, F32 = torch.bfloat16, torch.float32
# Branch and output, residual, weight: bfloat16 training, autocast, float32.
TYPES = {
    "bf16": (BF16, BF16, BF16),
    "master weight": (BF16, BF16, F32),
    "autocast": (BF16, F32, F32),
    "f32": (F32,) * 3,
}
ROWS = (0, 1, 2, 31, 33, 199, 8192)
WIDTHS = (8, 48, 64, 128, 384, 512, 576, 760, 768, 960, 1024, 1128)


def inputs(rows: int, d: int, types: tuple) -> tuple[Tensor, ...]:
    """Residual, branch, weight, d_normed, d_sum; with outliers, as residual streams have them."""
    of_branch, of_residual, of_weight = types
    residual = torch.randn(rows, d, device="cuda") * 3
    residual[:, 0] *= 30
    parts = (residual.to(of_residual), torch.randn(rows, d, device="cuda").to(of_branch))
    weight = (1 + torch.randn(d, device="cuda") / 4).to(of_weight)
    gradients = (
        torch.randn(rows, d, device="cuda").to(of_branch),
        torch.randn(rows, d, device="cuda").to(of_residual),
    )
    return *parts, weight, *gradients


def forward_and_backward(implementation, residual, branch, weight, d_normed, d_sum):
    """Everything that the two passes give, from an implementation's three ops; rstd last."""
    normed, total, rstd = implementation.add_rms_norm(residual, branch, weight, EPS)
    gradients = implementation.rms_norm_backward(d_normed, d_sum, total, rstd, weight, True)
    alone, alone_rstd = implementation.rms_norm(residual, weight, EPS, branch.dtype)
    return [normed, total, *gradients, alone, rstd, alone_rstd]


def exact(residual, branch, weight, d_normed, d_sum, rounded: Tensor):
    """The same in float64, but of the sum as it was rounded: that is what gets normalised and saved."""
    r, b, w, dn, ds = wide(residual, branch, weight, d_normed, d_sum)
    total = r + b
    normed, rstd = reference.rms_norm(rounded.double(), w, EPS, torch.float64)
    d_x, _, d_weight = reference.rms_norm_backward(dn, ds, rounded.double(), rstd, w, False)
    alone, alone_rstd = reference.rms_norm(r, w, EPS, torch.float64)
    d_branch = d_x if branch.dtype != residual.dtype else d_x[:0]
    return [normed, total, d_x, d_branch, d_weight, alone, rstd, alone_rstd]


@pytest.mark.parametrize("types", TYPES)
@pytest.mark.parametrize("d", WIDTHS)
def test_as_exact_as_pytorch_at_every_size(d: int, types: str):
    for rows in ROWS:
        given = inputs(rows, d, TYPES[types])
        got = run_twice(lambda given=given: forward_and_backward(torch.ops.mtlm, *given))
        plain = forward_and_backward(reference, *given)
        assert torch.equal(got[1], plain[1])  # one addition and one rounding
        assert_as_good(got, plain, exact(*given, rounded=plain[1]), f"{rows} rows")


def test_without_a_gradient_of_the_sum():
    for d, types in itertools.product((64, 384, 512, 576, 760, 768, 1024), TYPES):
        given = inputs(199, d, TYPES[types])
        zero = torch.zeros_like(given[0])
        with_zero = forward_and_backward(torch.ops.mtlm, *given[:4], zero)
        assert_equal_bits(with_zero, forward_and_backward(torch.ops.mtlm, *given[:4], None))


@pytest.mark.parametrize("kind", STRIDES)
@pytest.mark.parametrize("d", [384, 512, 768, 1128])
def test_however_the_inputs_lie(d: int, kind: str):
    for types in TYPES:
        given = inputs(199, d, TYPES[types])
        expected = forward_and_backward(torch.ops.mtlm, *given)
        residual, branch, weight, d_normed, d_sum = given
        lying = (
            strided(residual, kind),
            strided(branch, kind),
            weight,
            strided(d_normed, kind),
            strided(d_sum, kind),
        )
        if kind in ("offset", "odd rows"):  # unaligned rows are summed by another kernel in another order
            got = forward_and_backward(torch.ops.mtlm, *lying)
            total = expected[1]
            assert_as_good(got, expected, exact(*given, rounded=total))
        else:
            assert_equal_bits(forward_and_backward(torch.ops.mtlm, *lying), expected)


def test_weight_at_an_odd_address():
    given = list(inputs(33, 768, TYPES["autocast"]))
    expected = forward_and_backward(torch.ops.mtlm, *given)
    given[2] = strided(given[2], "offset")
    assert_as_good(forward_and_backward(torch.ops.mtlm, *given), expected, exact(*given, rounded=expected[1]))


@pytest.mark.parametrize("types", TYPES)
def test_results_at_odd_addresses(types: str):
    """Where accesses of 16 bytes would fault."""
    given = inputs(33, 768, TYPES[types])
    residual, branch, weight, d_normed, d_sum = given
    expected = forward_and_backward(torch.ops.mtlm, *given)
    got = [strided(torch.full_like(t, POISON), "offset") for t in expected]
    normed, total, d_x, d_branch, d_weight, alone, rstd, alone_rstd = got
    partials = torch.empty(5, 768, device="cuda")
    ops = torch.ops.mtlm
    ops.add_rms_norm_into(residual, branch, weight, EPS, normed, total, rstd)
    saved = expected[1], expected[6]
    ops.rms_norm_backward_into(d_normed, d_sum, *saved, weight, d_x, d_branch, d_weight, partials)
    ops.rms_norm_into(residual, weight, EPS, alone, alone_rstd)
    assert_as_good(got, expected, exact(*given, rounded=expected[1]), types)


def test_without_rows_the_weights_gradient_is_zero():
    """Whatever is in the partial sums, of which JAX always gives a row."""
    x, weight = torch.empty(0, 768, device="cuda"), torch.ones(768, device="cuda")
    d_weight, partials = torch.full_like(weight, POISON), torch.full((3, 768), POISON, device="cuda")
    torch.ops.mtlm.rms_norm_backward_into(x, None, x, x[:, 0], weight, x.clone(), x, d_weight, partials)
    assert not d_weight.any()


def test_an_error_is_told_once():
    """A row whose gradient no block has shared memory for is refused; what comes after it is not."""
    x, weight = torch.ones(1, 2**17, device="cuda"), torch.ones(2**17, device="cuda")
    with pytest.raises(RuntimeError, match="rms_norm_backward_into: invalid argument"):
        torch.ops.mtlm.rms_norm_backward(x, None, x, torch.ones(1, device="cuda"), weight, False)
    given = inputs(4, 768, TYPES["bf16"])
    assert torch.isfinite(torch.ops.mtlm.add_rms_norm(*given[:3], EPS)[0]).all()


def test_expanded_gradients():
    residual, branch, weight, d_normed, d_sum = inputs(64, 768, TYPES["bf16"])
    row, one = d_normed[:1].expand(64, 768), d_normed[:1, :1].expand(64, 768)
    for expanded in (row, one):
        expected = forward_and_backward(
            torch.ops.mtlm, residual, branch, weight, expanded.contiguous(), d_sum
        )
        assert_equal_bits(
            forward_and_backward(torch.ops.mtlm, residual, branch, weight, expanded, d_sum), expected
        )


@pytest.mark.parametrize("d", [128, 384, 576, 760, 768, 960])
def test_a_row_does_not_depend_on_the_batch(d: int):
    for types in TYPES:
        given = inputs(8192, d, TYPES[types])
        of_all = forward_and_backward(torch.ops.mtlm, *given)
        some = slice(4097, 4100)
        residual, branch, weight, d_normed, d_sum = given
        of_some = forward_and_backward(
            torch.ops.mtlm, residual[some], branch[some], weight, d_normed[some], d_sum[some]
        )
        for number in (0, 1, 2, 5, 6, 7):  # not d_branch, which may be empty, nor d_weight
            assert_equal_bits([of_all[number][some]], [of_some[number]])


def test_nan_and_infinity_stay_in_their_row():
    residual, branch, weight, *_ = inputs(33, 768, TYPES["bf16"])
    residual[5, 7], residual[9, 0] = torch.nan, torch.inf
    normed, _, _ = torch.ops.mtlm.add_rms_norm(residual, branch, weight, EPS)
    finite = torch.isfinite(normed).all(1)
    assert finite.tolist() == [row not in (5, 9) for row in range(33)]


def test_more_than_2_to_the_31_elements():
    rows, d = 2**31 // 768 + 1000, 768
    residual = torch.empty(rows, d, device="cuda", dtype=BF16).normal_()
    branch = torch.empty_like(residual).normal_()
    weight = torch.ones(d, device="cuda", dtype=BF16)
    normed, total, rstd = torch.ops.mtlm.add_rms_norm(residual, branch, weight, EPS)
    end = slice(rows - 64, rows)
    of_end = torch.ops.mtlm.add_rms_norm(residual[end], branch[end], weight, EPS)
    assert_equal_bits([normed[end], total[end], rstd[end]], of_end)
    del normed, residual
    d_x, _, d_weight = torch.ops.mtlm.rms_norm_backward(branch, None, total, rstd, weight, False)
    assert_equal_bits(
        [d_x[end]],
        torch.ops.mtlm.rms_norm_backward(branch[end], None, total[end], rstd[end], weight, False)[:1],
    )
    assert torch.isfinite(d_weight).all()


def test_bad_inputs_are_refused_with_the_numbers():
    residual, branch, weight, *_ = inputs(4, 768, TYPES["bf16"])
    with pytest.raises(RuntimeError, match=r"branch must be \[4, 768\], not \[3, 768\]"):
        torch.ops.mtlm.add_rms_norm(residual, branch[:3], weight, EPS)
    with pytest.raises(RuntimeError, match=r"weight must be \[768\], not \[767\]"):
        torch.ops.mtlm.rms_norm(residual, weight[:767], EPS, BF16)
    with pytest.raises(RuntimeError, match="bfloat16 or float32"):
        torch.ops.mtlm.rms_norm(residual.double(), weight, EPS, BF16)
    with pytest.raises(RuntimeError, match="another device"):
        torch.ops.mtlm.add_rms_norm(residual, branch.cpu(), weight, EPS)


def test_autograd_equals_pytorchs_own():
    for types in ("bf16", "autocast", "f32"):
        residual, branch, weight, d_normed, d_sum = inputs(2 * 96, 384, TYPES[types])
        shape = (2, 96, 384)

        def run(function, *tensors, shape=shape, last=(d_normed, d_sum)):
            leaves = [t.detach().clone().requires_grad_() for t in tensors]
            normed, total = function(leaves[0].view(shape), leaves[1].view(shape), leaves[2], EPS)
            gradients = [g.view(shape).to(out.dtype) for g, out in zip(last, (normed, total), strict=True)]
            return torch.autograd.grad((normed, total), leaves, gradients)

        plain = lambda *args: reference.add_rms_norm(*args)[:2]  # noqa: E731
        got, theirs = run(add_rms_norm, residual, branch, weight), run(plain, residual, branch, weight)
        assert_as_good(got, theirs, run(plain, *wide(residual, branch, weight)), types)
