"""Products with GELU in their epilogues, by cuBLASLt, on a GPU."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from core.config import preset
from kernels_cuda.ops import gelu_mlp as mlp
from kernels_cuda.registry import reference
from port_torch.model import MLP
from tests.kernels_cuda.gpu import (
    STRIDES,
    Guarded,
    assert_as_good,
    assert_equal_bits,
    run_twice,
    strided,
    wide,
)

pytestmark = pytest.mark.gpu

BF16 = torch.bfloat16
MTLM = torch.ops.mtlm
WIDTHS = [(384, 1024), (8, 16), (64, 264), (768, 2176)]
needs_fusion = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (9, 0), reason="from Hopper on"
)


def forward_inputs(rows: int, d: int, f: int) -> tuple[Tensor, Tensor, Tensor]:
    """x, weight and bias, such that GELU sees both of its ends."""
    x, weight, bias = (torch.randn(*shape, device="cuda") for shape in ((rows, d), (f, d), (f,)))
    return x.to(BF16), (2 * weight / d**0.5).to(BF16), bias.to(BF16)


def backward_inputs(rows: int, d: int, f: int) -> tuple[Tensor, Tensor, Tensor]:
    """d, weight and pre."""
    gradient, weight, pre = (torch.randn(*shape, device="cuda") for shape in ((rows, d), (d, f), (rows, f)))
    return gradient.to(BF16), (weight / d**0.5).to(BF16), (2 * pre).to(BF16)


PASSES = {"gelu_product": forward_inputs, "gelu_product_backward": backward_inputs}


@pytest.mark.parametrize("rows", [0, 1, 31, 199, 8192])
@pytest.mark.parametrize("widths", WIDTHS)
@pytest.mark.parametrize("name", PASSES)
def test_as_good_as_plain_pytorch_and_equal_from_call_to_call(name: str, widths: tuple[int, int], rows: int):
    inputs = PASSES[name](rows, *widths)
    got = run_twice(lambda: getattr(MTLM, name)(*inputs))
    plain, exact = (getattr(reference, name)(*given) for given in (inputs, wide(*inputs)))
    assert_as_good(got, plain, exact, f"{name} {rows} {widths}")


@pytest.mark.parametrize("name", PASSES)
def test_every_proposal_is_as_good_and_stays_inside(name: str):
    inputs = PASSES[name](1000, 384, 1024)
    plain, exact = (getattr(reference, name)(*given) for given in (inputs, wide(*inputs)))
    for choice in range(mlp.CHOICES):
        guarded = Guarded()
        outputs = [guarded.like(t) for t in plain]
        workspace = guarded.like(torch.empty(mlp.WORKSPACE_BYTES // 4, device="cuda"))
        getattr(MTLM, f"{name}_into")(*inputs, *outputs, workspace, choice)
        guarded.check()
        assert_as_good(outputs, plain, exact, f"{name}, proposal {choice}")
        again = [torch.empty_like(t) for t in plain]
        mlp.multiply(getattr(MTLM, f"{name}_into"), (*inputs, *again), choice)
        assert_equal_bits(again, outputs)


@pytest.mark.parametrize("kind", STRIDES)
@pytest.mark.parametrize("name", PASSES)
def test_however_the_inputs_lie(name: str, kind: str):
    inputs = PASSES[name](96, 64, 128)
    got = getattr(MTLM, name)(*(strided(t, kind) for t in inputs))
    plain, exact = (getattr(reference, name)(*given) for given in (inputs, wide(*inputs)))
    assert_as_good(got, plain, exact, kind)


def test_products_with_an_addition_or_sums_of_rows():
    a, b, c = (torch.randn(96, 96, device="cuda").to(BF16) for _ in range(3))
    for x in (a, a.T):
        for y in (b, b.T):
            exact = x.double() @ y.double()
            for added in (None, c):
                out = torch.empty_like(a)
                mlp.multiply(MTLM.product_into, (x, y, added, out, None))
                plain = x @ y if added is None else torch.addmm(added, x, y)
                assert_as_good([out], [plain], [exact if added is None else exact + added.double()])
    out, sums = torch.empty_like(a), torch.empty_like(a[0])
    mlp.multiply(MTLM.product_into, (a.T, b, None, out, sums))
    assert_as_good([out, sums], [a.T @ b, a.sum(0)], [a.double().T @ b.double(), a.double().sum(0)])


def test_what_cublaslt_does_not_take_is_refused_by_name():
    x, weight, bias = forward_inputs(4, 16, 12)
    with pytest.raises(RuntimeError, match="widths must be multiples of 8, not 16 and 12"):
        MTLM.gelu_product(x, weight, bias)
    x, weight, bias = forward_inputs(4, 16, 16)
    with pytest.raises(RuntimeError, match="weight must be bfloat16, not float32"):
        MTLM.gelu_product(x, weight.float(), bias)
    with pytest.raises(RuntimeError, match=r"bias must be \[16\], not \[8\]"):
        MTLM.gelu_product(x, weight, bias[:8])
    with pytest.raises(RuntimeError, match="choice must not be negative, but is -1"):
        mlp.multiply(MTLM.gelu_product_into, (x, weight, bias, x.clone(), x.clone()), -1)


def test_nothing_is_timed_where_runs_shall_repeat_or_are_recorded(monkeypatch: pytest.MonkeyPatch):
    inputs = forward_inputs(104, 64, 128)
    first, _ = given = [torch.empty(104, 128, device="cuda", dtype=BF16) for _ in range(2)]
    mlp.multiply(MTLM.gelu_product_into, (*inputs, *given), 0)  # loads what a recording cannot load
    monkeypatch.setattr(mlp, "_fastest", {})
    monkeypatch.setattr(mlp, "_time", lambda run: pytest.fail("timed"))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = MTLM.gelu_product(*inputs)
    graph.replay()
    assert_equal_bits(recorded[:1], [first])
    torch.use_deterministic_algorithms(True)
    try:
        assert_equal_bits(MTLM.gelu_product(*inputs), recorded)
    finally:
        torch.use_deterministic_algorithms(False)


def test_what_is_fastest_is_kept(monkeypatch: pytest.MonkeyPatch):
    timed = []
    monkeypatch.setattr(mlp, "_fastest", {})
    monkeypatch.setattr(mlp, "_time", lambda run: timed.append(run) or 1)
    for rows in (8, 16, 8, 16):
        MTLM.gelu_product(*forward_inputs(rows, 64, 128))
    assert len(timed) == 2 and list(mlp._fastest.values()) == [1, 1]


def trained(
    module: MLP, x: Tensor, gradient: Tensor, call: Callable[[Tensor], Tensor] | None = None
) -> list[Tensor]:
    """The output and all gradients."""
    x = x.detach().requires_grad_()
    y = (module if call is None else call)(x)
    return [y, *torch.autograd.grad(y, (x, *module.parameters()), gradient.to(y.dtype))]


@needs_fusion
@pytest.mark.parametrize("mode", ["bf16", "autocast"])
@pytest.mark.parametrize("compiled", [False, True])
def test_an_mlp_and_its_gradients(mode: str, compiled: bool, monkeypatch: pytest.MonkeyPatch):
    dtype = BF16 if mode == "bf16" else torch.float32
    module = MLP(preset("mtlm2-40m")).to("cuda", dtype)
    x, gradient = (torch.randn(2, 512, 384, device="cuda").to(BF16) for _ in range(2))
    ran = []
    multiply = mlp.multiply
    monkeypatch.setattr(mlp, "multiply", lambda op, *given: ran.append(str(op)) or multiply(op, *given))
    torch._dynamo.reset()
    call = torch.compile(module, fullgraph=True) if compiled else module
    with torch.autocast("cuda", BF16, enabled=mode == "autocast"):
        ours = trained(module, x, gradient, call)
        assert ran == ["mtlm.gelu_product_into", "mtlm.gelu_product_backward_into"]
        monkeypatch.setattr(mlp, "on_kernels", lambda *tensors: False)
        plain = trained(module, x, gradient)
    exact = trained(module.double(), x.double(), gradient)
    assert_as_good(ours, plain, exact, mode)


@needs_fusion
def test_no_more_is_kept_for_the_backward_pass_than_without_kernels(monkeypatch: pytest.MonkeyPatch):
    module = MLP(preset("mtlm2-40m")).to("cuda")
    x = torch.randn(16, 1024, 384, device="cuda").to(BF16).requires_grad_()

    def kept() -> int:
        torch._dynamo.reset()
        call = torch.compile(module, fullgraph=True)
        with torch.autocast("cuda", BF16):
            call(x)
            before = torch.cuda.memory_allocated()
            y = call(x)
        held = torch.cuda.memory_allocated() - before
        y.sum().backward()
        return held

    ours = kept()
    monkeypatch.setattr(mlp, "on_kernels", lambda *tensors: False)
    assert ours <= kept()
