"""An update can be recorded as a CUDA graph, compiled or not: what a CPU can show of it.

test_recorded_gpu.py compares recorded updates with others.
"""

import dataclasses
import gc
from collections import Counter
from typing import Literal, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from core.lora import LoraConfig
from kernels_cuda.ops import gelu, linear_cross_entropy, rms_norm, rotary, swiglu
from port_torch.model import Decoder, _NoInit
from port_torch.training.batches import Inputs
from port_torch.training.distributed import Distributed
from port_torch.training.lora import add_adapters
from port_torch.training.settings import MirrorOptimizerConfig
from port_torch.training.step import TrainStep
from tests.models import GPT, LLAMA
from tests.port_torch.small_training import ALONE, make_train_step

MODELS = {"llama": dataclasses.replace(LLAMA, dropout=0.1), "gpt": dataclasses.replace(GPT, dropout=0.1)}


class Case(NamedTuple):
    """How updates are made; as in bfloat16 on a GPU, in two micro-batches of documents."""

    model: str
    kernels: bool = True
    optimizer: Literal["adamw", "muon"] = "adamw"
    lora: bool = False

    def step(self, monkeypatch: pytest.MonkeyPatch) -> TrainStep:
        """On the CPU. kernels: the functions around the ops, whose plain implementations run there."""
        if self.kernels:
            for module in (rotary, rms_norm, linear_cross_entropy):
                monkeypatch.setattr(module, "on_kernels", lambda *_: True)
            for module in (gelu, rotary, swiglu):
                monkeypatch.setattr(module, "products_run_on", lambda *_, widths: True)
            monkeypatch.setattr(rotary, "HEAD_SIZES", (MODELS[self.model].head_size,))
        decoder = Decoder(MODELS[self.model])
        if self.lora:
            add_adapters(decoder, LoraConfig(lora_rank=2, lora_dropout=0.2), 0)
        return make_train_step(decoder.train(), MirrorOptimizerConfig(optimizer=self.optimizer), bf16=True)

    def inputs(self) -> Inputs:
        """Of an update."""
        config, rng = MODELS[self.model], np.random.default_rng(0)
        tokens = torch.from_numpy(rng.integers(config.vocab_size, size=(2, 2, config.context)))
        documents = torch.from_numpy(np.sort(rng.integers(3, size=tokens.shape)))
        return Inputs(tokens, tokens.roll(-1, -1), documents, None)


CASES = [
    case
    for model in MODELS
    for case in (
        Case(model), Case(model, kernels=False), Case(model, optimizer="muon"), Case(model, lora=True),
    )
]  # fmt: skip
each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))


class Operations(TorchDispatchMode):
    """Counts what runs within it, by its name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[func.__name__.partition(".")[0]] += 1
        return func(*args, **(kwargs or {}))


HOST = {"_local_scalar_dense", "lift_fresh", "is_nonzero", "nonzero", "masked_select", "_unique2", "equal"}
"""Operations that make a tensor of a host's numbers or a host's number of a tensor: a graph would keep the
numbers of the update that is recorded, or could not be recorded."""


@each_case
def test_an_update_reads_nothing_back_and_brings_nothing_along(case: Case, monkeypatch: pytest.MonkeyPatch):
    train_step, inputs = case.step(monkeypatch), case.inputs()
    with Operations() as seen:
        train_step._update(*inputs)
    assert not HOST & set(seen.counts), seen.counts
    # All of it was seen: both passes and the optimizer, on the ops where they are.
    assert ("rms_norm_backward" if case.kernels else "rsqrt") in seen.counts and "adamw_" in seen.counts
    products = {"swiglu_product_backward", "gelu_product_backward"} & set(seen.counts)
    assert bool(products) == (case.kernels and not case.lora)
    assert ("qkv_product" in seen.counts) == (bool(products) and case.model == "llama")
    with Operations() as seen:
        assert torch.tensor(1.0) == 1
    assert {"lift_fresh", "_local_scalar_dense"} <= HOST & set(seen.counts)


@each_case
def test_no_graph_of_autograd_outlives_its_update(case: Case, monkeypatch: pytest.MonkeyPatch):
    """Or the gradients of a recorded update would be added up on the stream of an earlier one.

    Without the garbage collector, which need not run before a recording.
    """
    train_step, inputs = case.step(monkeypatch), case.inputs()
    parameters = train_step.parameters.values()
    kept: list[Tensor] = []

    def mark(norm: nn.Module, given: object, normed_and_sum: tuple[Tensor, Tensor]) -> None:
        for p in parameters:
            accumulator(p).metadata["marked"] = True
        kept.append(normed_and_sum[0])

    def marked() -> int:
        return sum("marked" in accumulator(p).metadata for p in parameters)

    train_step.decoder.norm.register_forward_hook(mark)
    gc.collect()
    gc.disable()
    try:
        train_step._update(*inputs)
        assert marked() > 0  # as long as a tensor of it is kept
        kept.clear()
        assert marked() == 0
        assert all(p.grad is None for p in parameters)
    finally:
        gc.enable()


def accumulator(parameter: Tensor) -> torch.autograd.graph.Node:
    """What adds up the gradient of a parameter in the graphs that there are, or a new one's."""
    return parameter.view_as(parameter).grad_fn.next_functions[0][0]


@pytest.mark.parametrize("compiled", [False, True])
def test_updates_are_recorded_on_a_gpu_alone(compiled: bool):
    optim = MirrorOptimizerConfig()
    assert not TrainStep(Decoder(LLAMA), optim, ALONE, seed=0, compiled=compiled).recorded
    with FakeTensorMode(), torch.device("cuda", 0), _NoInit():  # tensors of a GPU, without one
        ranks = Distributed(0, 1, torch.device("cuda", 0))
        assert TrainStep(Decoder(LLAMA), optim, ranks, seed=0, compiled=compiled).recorded
