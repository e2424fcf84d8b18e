"""The optimizer's kernel on a GPU, beside torch.optim.AdamW in float64."""

import pytest
import torch

from kernels_cuda.ops.adamw import AdamW, clip_scale
from tests.kernels_cuda.gpu import Guarded, assert_equal_bits, error

pytestmark = pytest.mark.gpu

# Empty, smaller than a vector, no multiple of 4, a block and one more, and enough for several launches.
SIZES = [0, 1, 3, 5, 4096, 4097, 100_003, *([257] * 130)]


def steps(make, params: list[torch.Tensor], gradients: list[list[torch.Tensor]], scale: float = 1.0):
    """The parameters after an update with each of the gradients."""
    params = [torch.nn.Parameter(p.clone()) for p in params]
    optimizer = make(params)
    for of_step in gradients:
        for p, g in zip(params, of_step, strict=True):
            p.grad = g.to(p.dtype)
        if isinstance(optimizer, AdamW):
            optimizer.step(grad_scale=torch.tensor(scale, device="cuda"))
        else:
            for p in params:
                p.grad.mul_(scale)
            optimizer.step()
    return [p.detach() for p in params], optimizer


def settings() -> dict:
    return {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


def test_equals_torch():
    params = [torch.randn(size, device="cuda") for size in SIZES]
    gradients = [[torch.randn_like(p) * 10 ** (-i) for i, p in enumerate(params[:7])] for _ in range(10)]
    gradients = [[*g, *(torch.randn_like(p) for p in params[7:])] for g in gradients]
    ours, _ = steps(lambda p: AdamW(p, **settings()), params, gradients, scale=0.5)
    again, _ = steps(lambda p: AdamW(p, **settings()), params, gradients, scale=0.5)
    assert_equal_bits(ours, again)
    theirs, _ = steps(lambda p: torch.optim.AdamW(p, fused=True, **settings()), params, gradients, scale=0.5)
    exact, _ = steps(lambda p: torch.optim.AdamW(p, **settings()), [p.double() for p in params],
                     [[g.double() for g in of_step] for of_step in gradients], scale=0.5)  # fmt: skip
    for mine, fused, true in zip(ours, theirs, exact, strict=True):
        if true.numel():  # 10 updates round 10 times: float32's unit is 6e-8
            assert error(mine, true) <= 2 * error(fused, true) + 1e-7


@pytest.mark.parametrize("beta2", [0.95, 0.999, 0.9999])
def test_factors_keep_their_digits(beta2: float):
    """In float32 1 - 0.9999 is off by 1.7e-4 of itself."""
    chosen = settings() | {"betas": (0.9, beta2)}
    params = [torch.randn(100_003, device="cuda")]
    gradients = [[torch.randn_like(params[0])] for _ in range(10)]
    (mine,), _ = steps(lambda p: AdamW(p, **chosen), params, gradients)
    (fused,), _ = steps(lambda p: torch.optim.AdamW(p, fused=True, **chosen), params, gradients)
    doubles = [[g.double() for g in of_step] for of_step in gradients]
    (true,), _ = steps(lambda p: torch.optim.AdamW(p, **chosen), [params[0].double()], doubles)
    assert error(mine, true) <= 2 * error(fused, true) + 1e-7  # as above


def test_bfloat16_parameters_have_float32_masters():
    params = [torch.randn(size, device="cuda") for size in (5, 4097, 333)]
    gradients = [[torch.randn_like(p).bfloat16() for p in params] for _ in range(5)]
    narrow, optimizer = steps(lambda p: AdamW(p, **settings()), [p.bfloat16() for p in params], gradients)
    from_rounded = [p.bfloat16().float() for p in params]
    wide, _ = steps(
        lambda p: AdamW(p, **settings()), from_rounded, [[g.float() for g in s] for s in gradients]
    )
    masters = [state["master"] for state in optimizer.state.values()]
    assert_equal_bits(masters, wide)
    assert_equal_bits(narrow, [p.bfloat16() for p in wide])


def test_skipping_changes_nothing_though_gradients_are_nan():
    p = torch.nn.Parameter(torch.randn(5000, device="cuda"))
    optimizer = AdamW([p], **settings())
    p.grad = torch.randn_like(p)
    optimizer.step()
    state = optimizer.state[p]
    before = [
        t.clone()
        for t in (p.detach(), state["exp_avg"], state["exp_avg_sq"], optimizer.param_groups[0]["step"])
    ]
    p.grad.fill_(torch.nan)
    optimizer.step(skip=torch.tensor(True, device="cuda"))
    assert_equal_bits(
        [p.detach(), state["exp_avg"], state["exp_avg_sq"], optimizer.param_groups[0]["step"]], before
    )


def test_neighbours_are_left_alone_at_odd_addresses():
    guarded = Guarded()
    param = torch.randn(4099, device="cuda")
    tensors = [guarded.like(t, keep=True) for t in (param, param * 0, param * 0)]
    odd = torch.zeros(4100, device="cuda")[1:].copy_(torch.randn(4099, device="cuda"))
    scalars = [torch.tensor(x, device="cuda") for x in (1e-2, 1.0, 1.0, False)]
    for gradient in (odd, odd.clone()):
        torch.ops.mtlm.adamw_(
            [tensors[0]], [gradient], [tensors[1]], [tensors[2]], [], *scalars, 0.9, 0.95, 1e-8, 0.1
        )
    guarded.check()
    again = [param.clone(), param * 0, param * 0]
    for _ in range(2):
        torch.ops.mtlm.adamw_(
            *([t] for t in (again[0], odd.clone(), *again[1:])), [], *scalars, 0.9, 0.95, 1e-8, 0.1
        )
    assert_equal_bits(tensors, again)


def test_in_a_graph_it_goes_on_counting():
    p = torch.nn.Parameter(torch.randn(5000, device="cuda"))
    gradients = [torch.randn(5000, device="cuda") for _ in range(6)]
    expected, _ = steps(lambda p: AdamW(p, **settings()), [p.detach()], [[g] for g in gradients])
    optimizer = AdamW([p], **settings())
    p.grad = gradients[0].clone()
    optimizer.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    for g in gradients[1:]:
        p.grad.copy_(g)
        graph.replay()
    assert_equal_bits([p.detach()], expected)


def test_clipping_is_torchs():
    p = torch.nn.Parameter(torch.randn(5000, device="cuda"))
    for size in (0.001, 10.0):
        p.grad = torch.randn_like(p) * size
        clipped = p.grad.clone()
        scale = clip_scale(torch.linalg.vector_norm(p.grad), 1.0)
        torch.nn.utils.clip_grad_norm_([p], 1.0)
        torch.testing.assert_close(clipped * scale, p.grad, rtol=1e-6, atol=0)


def test_bad_inputs_are_refused_with_the_numbers():
    a, b = torch.zeros(4, device="cuda"), torch.zeros(5, device="cuda")
    scalars = [torch.tensor(x, device="cuda") for x in (1e-2, 1.0, 1.0, False)]
    with pytest.raises(RuntimeError, match="gradient 0 must be contiguous, of 4 elements"):
        torch.ops.mtlm.adamw_([a], [b], [a], [a], [], *scalars, 0.9, 0.95, 1e-8, 0.1)
    with pytest.raises(RuntimeError, match="1 parameters, 0 gradients"):
        torch.ops.mtlm.adamw_([a], [], [a], [a], [], *scalars, 0.9, 0.95, 1e-8, 0.1)
    with pytest.raises(RuntimeError, match="lr must be one float32"):
        torch.ops.mtlm.adamw_([a], [a], [a], [a], [], a, *scalars[1:], 0.9, 0.95, 1e-8, 0.1)
