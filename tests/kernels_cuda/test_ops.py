"""The ops on a CPU, against formulas written another way, in float64."""

import math
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kernels_cuda.ops import linear_cross_entropy as loss
from kernels_cuda.ops.adamw import AdamW, clip_scale
from kernels_cuda.ops.gelu import GELU, gelu_mlp
from kernels_cuda.ops.rms_norm import AddRMSNorm, RMSNorm
from kernels_cuda.ops.rotary import RotatedHeads, RotatedProjections, rotated_heads
from kernels_cuda.ops.swiglu import SwiGLU, swiglu_mlp
from kernels_cuda.registry import reference

EPS = 1e-6
MTLM = torch.ops.mtlm
F64 = torch.float64


def random(*shape: int, grad: bool = False) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, dtype=F64, generator=generator).requires_grad_(grad)


def angles(seq: int, half: int) -> tuple[Tensor, Tensor]:
    angle = torch.arange(seq, dtype=F64)[:, None] * 10000 ** -(torch.arange(half, dtype=F64) / half)
    return angle.cos()[None], angle.sin()[None]


def test_norm_is_torchs():
    x, branch, weight = random(7, 12), random(7, 12) + 1, random(12)
    expected = F.rms_norm(x + branch, (12,), weight, EPS)
    normed, total, rstd = MTLM.add_rms_norm(x, branch, weight, EPS)
    torch.testing.assert_close(normed, expected)
    torch.testing.assert_close(total, x + branch)
    torch.testing.assert_close(MTLM.rms_norm(total, weight, EPS, F64), (normed, rstd))
    assert MTLM.rms_norm(total.float(), weight.float(), EPS, torch.bfloat16)[0].dtype == torch.bfloat16


def test_rotation_is_multiplication_by_a_complex_number():
    q, k, v = (random(2, 5, 3, 8) + i for i in range(3))
    cos, sin = angles(5, 4)
    turn = torch.polar(torch.ones_like(cos), torch.atan2(sin, cos))[:, :, None]

    def turned(x: Tensor, by: Tensor) -> Tensor:
        y = torch.complex(x[..., :4], x[..., 4:]) * by
        return torch.cat([y.real, y.imag], -1)

    packed = torch.stack([q, k, v], 2)
    MTLM.rotary_(packed[:, :, 0], packed[:, :, 1], cos, sin, False)
    torch.testing.assert_close(packed, torch.stack([turned(q, turn), turned(k, turn), v], 2))
    back = MTLM.rotary_pack(*packed.unbind(2), cos, sin, True)
    torch.testing.assert_close(back, torch.cat([q, k, v], 2))
    fewer = MTLM.rotary_pack(q, k[:, :, :1], v[:, :, :1], cos, sin, False)
    torch.testing.assert_close(fewer, torch.cat([turned(q, turn), turned(k[:, :, :1], turn), v[:, :, :1]], 2))
    for way in (rotated_heads, RotatedHeads.apply):
        apart = way(q, k[:, :, :1], v[:, :, :1], cos, sin)
        torch.testing.assert_close(torch.cat(apart, 2), fewer)


@pytest.mark.parametrize(
    ("heads", "size"), [((2, 2, 2), 64), ((3, 1, 1), 64), ((5, 3, 3), 64), ((3, 1, 1), 128)]
)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("of_all", [False, True])
def test_the_product_of_q_k_and_v_rotates(heads: tuple[int, int, int], size: int, biased: bool, of_all: bool):
    """Each head on its own: elements i and i + K/2 as a complex number, times that of the angle."""
    b, s, d, width = 3, 5, 16, sum(heads) * size
    x, weight, bias = random(b, s, d), random(width, d), random(width) if biased else None
    angle = 6 * random(1 if of_all else b, s, size // 2)
    got = MTLM.qkv_product(x, weight, bias, angle.cos(), angle.sin(), heads)
    assert got.shape == (b, s, sum(heads), size)
    turn = torch.polar(torch.ones_like(angle), angle)
    for head in range(sum(heads)):
        own = slice(head * size, (head + 1) * size)
        y = torch.einsum("bsd,kd->bsk", x, weight[own]) + (0 if bias is None else bias[own])
        if head < heads[0] + heads[1]:
            z = torch.complex(*y.chunk(2, dim=-1)) * turn
            y = torch.cat([z.real, z.imag], dim=-1)
        torch.testing.assert_close(got[:, :, head], y)


def test_swiglu_is_torchs():
    x, gate, up, down = (random(*shape, grad=True) for shape in ((2, 5, 8), (16, 8), (16, 8), (8, 16)))
    expected = (F.silu(x @ gate.T) * (x @ up.T)) @ down.T
    d = random(2, 5, 8)
    gradients = torch.autograd.grad(expected, (x, gate, up, down), d)
    for got in (
        swiglu_mlp(x, gate, up, down),
        SwiGLU.apply(x.reshape(10, 8), gate, up, down).view(2, 5, 8),
    ):
        torch.testing.assert_close(got, expected)
        torch.testing.assert_close(torch.autograd.grad(got, (x, gate, up, down), d), gradients)


def test_gelu_is_torchs():
    shapes = ((2, 5, 8), (16, 8), (16,), (8, 16), (8,))
    x, up, up_bias, down, down_bias = leaves = [random(*shape, grad=True) for shape in shapes]
    y = x @ up.T + up_bias
    tanh = torch.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3))
    expected = (y / 2 * (1 + tanh)) @ down.T + down_bias
    d = random(2, 5, 8)
    gradients = torch.autograd.grad(expected, leaves, d)
    for got in (gelu_mlp(*leaves), GELU.apply(x.reshape(10, 8), *leaves[1:]).view(2, 5, 8)):
        torch.testing.assert_close(got, expected)
        torch.testing.assert_close(torch.autograd.grad(got, leaves, d), gradients)


def test_loss_is_torchs_with_ignored_targets_and_z_loss():
    hidden, table = random(9, 6, grad=True), random(11, 6, grad=True)
    targets = torch.tensor([0, 10, -1, 3, 3, -1, 7, 2, 1])
    logits = hidden @ table.T
    nll = F.cross_entropy(logits, targets, ignore_index=-1, reduction="sum")
    lse = torch.logsumexp(logits, 1)
    total = nll + 0.01 * (lse[targets != -1] ** 2).sum()
    expected = torch.autograd.grad(total / 7, (hidden, table))
    for way in (loss.linear_cross_entropy, loss.LinearCrossEntropy.apply):
        sums = way(hidden, table, targets, 0.01)
        torch.testing.assert_close(torch.stack(tuple(sums)), torch.stack([total, nll]))
        torch.testing.assert_close(torch.autograd.grad(sums[0] / 7, (hidden, table)), expected)


def test_the_loss_inside_its_product_is_the_loss(monkeypatch: pytest.MonkeyPatch):
    """Whole, in chunks, and with targets so far below the largest logit that exp would overflow."""
    hidden, table, targets = random(600, 8), random(16, 8), torch.arange(600) % 17 - 1
    hidden[::50] *= 100
    expected = MTLM.linear_cross_entropy(hidden, table, targets, 0.01, True)
    monkeypatch.setattr(loss, "products_run_on", lambda *tensors, widths: widths == (16, 8))
    for fewest in (8192, 256):
        monkeypatch.setattr(loss, "FEWEST_ROWS", fewest)
        monkeypatch.setattr(loss, "LOGITS_BYTES", 0)
        torch.testing.assert_close(MTLM.linear_cross_entropy(hidden, table, targets, 0.01, True), expected)


def test_the_loss_inside_its_product_knows_what_does_not_count():
    hidden, table = random(4, 8), random(16, 8)
    exps, (total, nll, scale) = torch.zeros(4, 16, dtype=F64), torch.zeros(3, 4, dtype=F64)
    MTLM.loss_product_(hidden, table, torch.tensor([0, 16, -2, -1]), exps, total, nll, scale, 0.1)
    for of_rows in (total, nll, scale):
        assert of_rows.isnan().tolist() == [False, True, True, False] and of_rows[3] == 0
    assert not exps[1:].any()


def test_the_compiler_takes_introducing_the_op_for_a_constant():
    marked = torch.compiler.assume_constant_result(lambda: True)
    assert vars(loss.introduce_to_inductor) == vars(marked) != {}


def test_loss_in_chunks_is_the_loss(monkeypatch: pytest.MonkeyPatch):
    hidden, table, targets = random(600, 4), random(10, 4), torch.arange(600) % 11 - 1
    whole = MTLM.linear_cross_entropy(hidden, table, targets, 0.01, True)
    monkeypatch.setattr(loss, "FEWEST_ROWS", 256)
    monkeypatch.setattr(loss, "LOGITS_BYTES", 0)
    torch.testing.assert_close(MTLM.linear_cross_entropy(hidden, table, targets, 0.01, True), whole)
    without = MTLM.linear_cross_entropy(hidden, table, targets, 0.01, False)
    torch.testing.assert_close(without[0], whole[0])
    assert without[1].numel() == without[2].numel() == 0


def test_without_gradients_none_are_made(monkeypatch: pytest.MonkeyPatch):
    """Also of a parameter, which under no_grad still says that it wants one."""
    hidden, table, targets = random(60, 4), torch.nn.Parameter(random(10, 4)), torch.arange(60) % 11 - 1
    expected = loss.linear_cross_entropy(hidden, table, targets, 0.01)
    monkeypatch.setattr(loss, "on_kernels", lambda *tensors: True)

    class Calls(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is MTLM.linear_cross_entropy.default:
                wanted.append(args[-1])
            return function(*args, **(kwargs or {}))

    for context, gradients in (
        (torch.no_grad, False),
        (torch.inference_mode, False),
        (torch.enable_grad, True),
    ):
        wanted: list[bool] = []
        with context(), Calls():
            sums = loss.linear_cross_entropy(hidden, table, targets, 0.01)
        torch.testing.assert_close(tuple(sums), tuple(expected))
        assert wanted == [gradients] and sums.total.requires_grad == gradients


def test_chunks_are_even_and_wide():
    assert loss.rows_at_once(32768, 64000) == 11008
    assert loss.rows_at_once(40000, 64000) == 10240  # a quarter, up to the next 256
    assert loss.rows_at_once(100, 64000) == 100
    assert loss.rows_at_once(32768, 262144) == 8192  # a large vocabulary still gets the fewest rows
    assert loss.rows_at_once(0, 64000) == 0


def test_a_target_that_is_none_makes_its_row_nan():
    logits = random(4, 6)
    total, nll = torch.zeros(2, 4, dtype=F64)
    MTLM.softmax_loss_(logits, torch.tensor([0, 6, -2, -1]), total, nll, 0.0, True)
    assert total.isnan().tolist() == nll.isnan().tolist() == [False, True, True, False]
    assert logits.isnan().all(1).tolist() == [False, True, True, False]


def test_gradients_are_those_of_differences():
    x, branch, weight = random(2, 3, 8, grad=True), random(2, 3, 8, grad=True), random(8, grad=True)
    check = torch.autograd.gradcheck
    assert check(lambda *a: AddRMSNorm.apply(*a, EPS), (x, branch, weight))
    assert check(lambda *a: AddRMSNorm.apply(*a, EPS)[1], (x, branch, weight.detach()))  # the sum alone
    assert check(lambda *a: RMSNorm.apply(*a, EPS, F64), (x, weight))
    cos, sin = angles(3, 2)
    for in_product in (False, True):

        def projected(x, weight, bias, *heads, in_product=in_product):
            return RotatedProjections.apply(x, weight, bias, cos, sin, heads, in_product)

        packed, bias = random(24, 8, grad=True), random(24, grad=True)
        assert check(lambda *a: projected(*a, 2, 2, 2), (x, packed, bias))
        packed, bias = random(20, 8, grad=True), random(20, grad=True)  # the first heads: an odd number
        assert check(lambda *a: projected(*a, 2, 1, 1), (x, packed[:16], bias[:16]))
        assert check(lambda *a: projected(*a, 3, 1, 1), (x, packed, bias))
    heads = [random(2, 3, n, 4, grad=True) for n in (3, 1, 1)]
    assert check(lambda *a: RotatedHeads.apply(*a, cos, sin), heads)
    hidden, table = random(5, 4, grad=True), random(7, 4, grad=True)
    targets = torch.tensor([0, 6, -1, 3, 3])
    assert check(lambda *a: loss.LinearCrossEntropy.apply(*a, targets, 0.1)[0], (hidden, table))


def test_ops_keep_pytorchs_contracts():
    x, weight, rstd = random(3, 8).float(), random(8).float(), torch.rand(3)
    q, k, v = (random(1, 3, 2, 4).float() for _ in range(3))
    cos, sin = (t.float() for t in angles(3, 2))
    targets = torch.tensor([0, 4, -1])
    scalars = [torch.tensor(value) for value in (1e-2, 1.0, 1.0, False)]
    cases = {
        "rms_norm": (x, weight, EPS, torch.bfloat16),
        "add_rms_norm": (x, x.bfloat16(), weight, EPS),
        "rms_norm_backward": (x.bfloat16(), x, x, rstd, weight, True),
        "rotary_": (q.clone(), k.clone(), cos, sin, True),
        "rotary_pack": (q, k, v, cos, sin, False),
        "qkv_product": (x[None], random(16, 8).float(), random(16).float(), cos, sin, (2, 1, 1)),
        "swiglu_product": (x, random(6, 8).float()),
        "swiglu_product_backward": (x, random(8, 3).float(), random(3, 6).float()),
        "gelu_product": (x, random(6, 8).float(), random(6).float()),
        "gelu_product_backward": (x, random(8, 3).float(), random(3, 3).float()),
        "loss_product_": (x, random(5, 8).float(), targets, torch.zeros(3, 5), *torch.zeros(3, 3), 0.1),
        "softmax_loss_": (random(3, 5).float(), targets, torch.zeros(3), torch.zeros(3), 0.1, True),
        "linear_cross_entropy": (x, random(5, 8).float(), targets, 0.1, True),
        "adamw_": ([x.clone()], [x], [x * 0], [x * 0], [x.bfloat16()], *scalars, 0.9, 0.95, 1e-8, 0.1),
    }
    assert set(cases) == {name for name in vars(reference) if not name.startswith("decode_")}
    for name, arguments in cases.items():
        torch.library.opcheck(getattr(MTLM, name).default, arguments)


def a_layer(
    x: Tensor,
    branch: Tensor,
    weight: Tensor,
    packed: Tensor,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
    fc: Tensor,
    bias: Tensor,
    table: Tensor,
) -> Tensor:
    """Every autograd function, as a model chains them."""
    b, s, d = x.shape
    cos, sin = (t.float() for t in angles(s, d // 4))
    normed, x = AddRMSNorm.apply(x, branch, weight, EPS)
    heads = RotatedProjections.apply(normed, packed, None, cos, sin, (2, 2, 2), True)
    q, k, v = (t.transpose(1, 2) for t in RotatedHeads.apply(*heads, cos, sin))
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(b, s, d)
    normed, _ = AddRMSNorm.apply(x, y, weight, EPS)
    normed = SwiGLU.apply(normed.reshape(b * s, d), gate, up, down)
    normed = GELU.apply(normed, fc, bias, down, weight)
    targets = torch.arange(b * s) % table.shape[0]
    return loss.LinearCrossEntropy.apply(normed, table, targets, 1e-3)[0] / (b * s)


@pytest.mark.skipif(sys.flags.optimize > 0, reason="PyTorch's compiler fails under -O")
@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_whole(backend: str):
    mlps = ((12, 16), (12, 16), (16, 12), (12, 16), (12,))
    shapes = ((2, 5, 16), (2, 5, 16), (16,), (48, 16), *mlps, (11, 16))
    leaves = [random(*shape).float().requires_grad_() for shape in shapes]
    expected = torch.autograd.grad(a_layer(*leaves), leaves)
    got = torch.autograd.grad(torch.compile(a_layer, backend=backend, fullgraph=True)(*leaves), leaves)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("narrow", [False, True])
def test_adamw_is_torchs(narrow: bool):
    """20 updates with two groups, a schedule, clipping and a skipped step; the state saved and loaded."""
    start = [random(5, 3), random(7) * 10, random(1)]
    settings = {"betas": (0.9, 0.95), "eps": 1e-8}

    def groups(params):
        return [{"params": params[:1], "weight_decay": 0.1}, {"params": params[1:], "weight_decay": 0.0}]

    ours = [torch.nn.Parameter(p.bfloat16() if narrow else p.clone()) for p in start]
    theirs = [torch.nn.Parameter(p.detach().double()) for p in ours]
    optimizer = AdamW(groups(ours), lr=1.0, **settings)
    peer = torch.optim.AdamW(groups(theirs), lr=1.0, **settings)
    for step in range(20):
        lr = 0.1 * math.cos(step / 15)
        optimizer.set_lr(lr)
        for group in peer.param_groups:
            group["lr"] = lr
        for p, q in zip(ours, theirs, strict=True):
            p.grad = (random(*p.shape) * (step + 1)).to(p.dtype)
            q.grad = p.grad.double()
        norm = torch.linalg.vector_norm(torch.cat([q.grad.flatten() for q in theirs])).float()
        skip = step == 3
        optimizer.step(grad_scale=clip_scale(norm, 1.0), skip=torch.tensor(skip))
        if not skip:
            torch.nn.utils.clip_grad_norm_(theirs, 1.0)
            peer.step()
        if step == 10:
            saved = optimizer.state_dict()
            optimizer = AdamW(groups(ours), lr=0.5, **settings)
            optimizer.load_state_dict(saved)
    for p, q in zip(ours, theirs, strict=True):
        exact = optimizer.state[p]["master"].double() if narrow else p.detach()
        # 20 updates in float32 (a master's, or the scalars'), each rounding by 6e-8 of values up to 30.
        torch.testing.assert_close(exact, q.detach(), rtol=0, atol=2e-5)
        if narrow:
            assert torch.equal(p, optimizer.state[p]["master"].bfloat16())


def test_adamw_refuses_what_is_none():
    with pytest.raises(ValueError, match=r"betas \(0.9, 1.0\)"):
        AdamW([torch.nn.Parameter(torch.zeros(1))], betas=(0.9, 1.0))
    optimizer = AdamW([torch.nn.Parameter(torch.zeros(1))])
    with pytest.raises(ValueError, match="lr -1"):
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(1))], "lr": -1.0})
    assert len(optimizer.param_groups) == 1


def test_adamw_as_others_call_it():
    """A closure, an empty group, a group that comes later, and the state of all saved and loaded."""
    start = [random(5, 3), random(7)]

    def run(make):
        params = [torch.nn.Parameter(p.clone()) for p in start]
        optimizer = make([{"params": params[:1]}, {"params": []}], lr=0.1, betas=(0.9, 0.99))
        sums = []
        for step in range(6):
            if step == 2:
                optimizer.add_param_group({"params": params[1:], "weight_decay": 0.1, "lr": 0.05})
            if step == 4:
                optimizer.load_state_dict(optimizer.state_dict())

            def closure(step=step, optimizer=optimizer, params=params):
                optimizer.zero_grad()
                loss = sum(((p - step) ** 2).sum() for p in params)
                loss.backward()
                return loss

            sums.append(optimizer.step(closure).item())
        return sums, [p.detach() for p in params]

    (sums, ours), (their_sums, theirs) = run(AdamW), run(torch.optim.AdamW)
    # Six updates whose learning rate is held in float32: off by 6e-8 of itself.
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)
    assert sums == pytest.approx(their_sums, rel=1e-6)


@pytest.mark.parametrize("beta2", [0.95, 0.999, 0.9999])
def test_adamws_factors_keep_their_digits(beta2: float):
    """In float32 1 - 0.9999 is off by 1.7e-4, and the first updates by half of that."""
    start, grads = random(50), [random(50) * (1 + i) for i in range(3)]

    def run(make):
        p = torch.nn.Parameter(start.clone())
        optimizer = make([p], lr=0.01, betas=(0.9, beta2), weight_decay=0.0)
        for grad in grads:
            p.grad = grad.clone()
            optimizer.step()
        return p.detach() - start

    # Three updates with a learning rate in float32, off by 6e-8 of itself.
    torch.testing.assert_close(run(AdamW), run(torch.optim.AdamW), rtol=1e-6, atol=0)
