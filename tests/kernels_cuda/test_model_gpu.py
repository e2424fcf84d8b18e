"""The mirror on the kernels: the same training as without; compiled, captured, on other streams, in DDP."""

import copy
import dataclasses

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from core.config import ModelConfig
from kernels_cuda import registry
from port_torch.model import Decoder
from tests.kernels_cuda.decoding import config_fields, random_decoder
from tests.kernels_cuda.gpu import assert_as_good, assert_equal_bits, error
from tests.models import GPT, LLAMA

pytestmark = pytest.mark.gpu

# Wide enough for the kernels' fast paths.
WIDE = {"vocab_size": 1000, "context": 256, "d_model": 384, "n_heads": 6, "d_mlp": 1024}
CONFIGS = {"llama": dataclasses.replace(LLAMA, **WIDE), "gpt": dataclasses.replace(GPT, **WIDE)}
CONFIGS["normed queries"] = dataclasses.replace(CONFIGS["llama"], n_kv_heads=2, qk_norm=True)


def model_and_tokens(kind: str, dtype: torch.dtype) -> tuple[Decoder, torch.Tensor]:
    torch.manual_seed(1)
    config = CONFIGS[kind]
    model = Decoder(config).to("cuda", dtype)
    for p in model.parameters():
        torch.nn.init.normal_(p, 1.0 if p.dim() == 1 else 0.0, 0.05)
    return model, torch.randint(config.vocab_size, (4, config.context + 1), device="cuda")


def loss_of(model: Decoder, tokens: torch.Tensor) -> torch.Tensor:
    hidden = model(tokens[:, :-1])
    return model.loss(hidden, tokens[:, 1:]).total / tokens[:, 1:].numel()


def gradients(model: Decoder, tokens: torch.Tensor, step=loss_of) -> list[torch.Tensor]:
    loss = step(model, tokens)
    return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]


def plainly(model: Decoder, tokens: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    with monkeypatch.context() as patch:
        patch.setattr(registry, "_kernels_loaded", False)
        assert not registry.kernels_loaded()
        return gradients(model, tokens)


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("mode", ["f32", "bf16", "autocast"])
def test_loss_and_gradients(kind: str, mode: str, monkeypatch: pytest.MonkeyPatch):
    model, tokens = model_and_tokens(kind, torch.bfloat16 if mode == "bf16" else torch.float32)
    exact = plainly(copy.deepcopy(model).double(), tokens, monkeypatch)
    with torch.autocast("cuda", torch.bfloat16, enabled=mode == "autocast"):
        plain = plainly(model, tokens, monkeypatch)
        ours = gradients(model, tokens)
        assert_equal_bits(ours[:1], gradients(model, tokens)[:1])
    # Rounding is carried on through layers and attention: at most twice PyTorch's error over all gradients.
    flat = [torch.cat([g.double().flatten() for g in all_of[1:]]) for all_of in (ours, plain, exact)]
    assert_as_good(flat[:1], flat[1:2], flat[2:], mode)
    # The loss is one number: its error may by chance be nothing. bfloat16's unit is 4e-3.
    assert abs(ours[0] - exact[0]) <= (1e-6 if mode == "f32" else 2e-3) * exact[0]


@settings(max_examples=25, deadline=None, derandomize=True)
@given(fields=config_fields((2, 6, 16, 32, 64)), mode=st.sampled_from(["f32", "bf16", "autocast", "float16"]))
def test_drawn_models_have_the_loss_and_gradients_of_plain_pytorch(fields: dict, mode: str):
    config = ModelConfig(**fields)
    model = random_decoder(config, torch.bfloat16 if mode == "bf16" else torch.float32, "cuda").eval()
    tokens = torch.randint(config.vocab_size, (3, 24), device="cuda")
    narrow = torch.float16 if mode == "float16" else torch.bfloat16
    with torch.autocast("cuda", narrow, enabled=mode in ("autocast", "float16")):
        ours = gradients(model, tokens)
        with pytest.MonkeyPatch.context() as patch:
            plain = plainly(model, tokens, patch)
    with pytest.MonkeyPatch.context() as patch:
        exact = plainly(copy.deepcopy(model).double(), tokens, patch)
    flat = [torch.cat([g.double().flatten() for g in all_of[1:]]) for all_of in (ours, plain, exact)]
    # As below, with a factor of two more for models of a few hundred numbers.
    assert error(flat[0], flat[2]) <= 4 * error(flat[1], flat[2]) + 2e-6
    assert abs(ours[0] - exact[0]) <= (2e-6 if mode == "f32" else 5e-3) * exact[0]


@pytest.mark.parametrize("kind", CONFIGS)
def test_compiled_whole(kind: str):
    model, tokens = model_and_tokens(kind, torch.bfloat16)
    eager = gradients(model, tokens)
    torch._dynamo.reset()
    ours = gradients(model, tokens, torch.compile(loss_of, fullgraph=True))
    assert abs(ours[0] - eager[0]) <= 2e-3 * eager[0]
    flat = [torch.cat([g.double().flatten() for g in all_of[1:]]) for all_of in (ours, eager)]
    assert error(*flat) <= 2e-2  # Inductor keeps float32 where eager rounds to bfloat16, 4e-3 a rounding
    with torch.autocast("cuda", torch.bfloat16):
        wide = model.float()
        torch._dynamo.reset()
        assert torch.isfinite(gradients(wide, tokens, torch.compile(loss_of, fullgraph=True))[0])


def test_the_loss_is_compiled_behind_many_layers(monkeypatch: pytest.MonkeyPatch):
    """Inductor prints no argument of its op: behind many layers that would take for ever."""
    from torch._inductor.exc import OperatorIssue

    printed = []
    monkeypatch.setattr(OperatorIssue, "operator_str", staticmethod(lambda op, *_: printed.append(op) or ""))
    model, tokens = model_and_tokens("gpt", torch.bfloat16)
    torch._dynamo.reset()
    gradients(model, tokens, torch.compile(loss_of, fullgraph=True))
    assert torch.ops.mtlm.linear_cross_entropy.default not in printed


def test_in_a_graph_and_on_another_stream():
    model, tokens = model_and_tokens("llama", torch.bfloat16)
    expected = gradients(model, tokens)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            on_stream = gradients(model, tokens)
    stream.synchronize()
    assert_equal_bits(on_stream[:1], expected[:1])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = gradients(model, tokens)
    for t in captured:
        t.fill_(torch.nan)
    graph.replay()
    torch.cuda.synchronize()
    assert_equal_bits(captured[:1], expected[:1])
    flat = [torch.cat([g.double().flatten() for g in all_of[1:]]) for all_of in (captured, expected)]
    assert error(*flat) <= 1e-2  # cuDNN's and Flash's attention gradients add in no fixed order


def test_a_kernel_waits_for_its_stream():
    """Behind a long computation on another stream, a kernel on the default stream would read too early."""
    x = torch.zeros(1024, 768, device="cuda", dtype=torch.bfloat16)
    weight = torch.ones(768, device="cuda", dtype=torch.bfloat16)
    big = torch.randn(8192, 8192, device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(5):
            big = big @ big / 8192
        x.fill_(1)
        normed, _ = torch.ops.mtlm.rms_norm(x, weight, 0.0, torch.bfloat16)
    stream.synchronize()
    assert (normed == 1).all()


@pytest.mark.two_gpus
def test_on_a_device_that_is_not_the_current_one():
    x = torch.randn(64, 768, device="cuda:1", dtype=torch.bfloat16)
    weight = torch.ones(768, device="cuda:1", dtype=torch.bfloat16)
    here = torch.ops.mtlm.rms_norm(x.to("cuda:0"), weight.to("cuda:0"), 1e-6, torch.bfloat16)
    there = torch.ops.mtlm.rms_norm(x, weight, 1e-6, torch.bfloat16)
    assert_equal_bits([t.cpu() for t in there], [t.cpu() for t in here])
    assert torch.cuda.current_device() == 0


def test_under_ddp(tmp_path):
    model, tokens = model_and_tokens("llama", torch.float32)
    with torch.autocast("cuda", torch.bfloat16):
        expected = gradients(model, tokens)
    torch.distributed.init_process_group("nccl", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:

        class Loss(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.model = model

            def forward(self, tokens):
                return loss_of(self.model, tokens)

        wrapped = torch.nn.parallel.DistributedDataParallel(Loss(), device_ids=[0])
        with torch.autocast("cuda", torch.bfloat16):
            loss = wrapped(tokens)
        loss.backward()
        assert_equal_bits([loss.detach()], expected[:1])
        flat = [torch.cat([p.grad.double().flatten() for p in model.parameters()]),
                torch.cat([g.double().flatten() for g in expected[1:]])]  # fmt: skip
        assert error(*flat) <= 1e-2  # as above
    finally:
        torch.distributed.destroy_process_group()
