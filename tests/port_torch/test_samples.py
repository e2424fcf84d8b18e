"""Samples during training on the decoding kernels: of the weights there are then; updates stay the same."""

import dataclasses
import types

import numpy as np
import pytest
import torch

from core.config import PRESETS
from core.data.sequences import Rows
from core.lora import LoraConfig
from core.sampling import Sampling
from kernels_cuda import library
from port_torch.decode import Generator
from port_torch.model import Decoder, decoder_of
from port_torch.training import samples
from port_torch.training.distributed import Distributed
from port_torch.training.lora import add_adapters, merged
from port_torch.training.pretraining import fresh_decoder
from port_torch.training.samples import Sampler
from port_torch.training.settings import MirrorOptimizerConfig
from port_torch.training.step import TrainStep
from tests.kernels_cuda.decoding import GREEDY, SMALL, random_decoder

PROMPTS = [[1, 5, 9], [1, 2]]


def trained(kind: str, lora: bool) -> Decoder:
    """lora: adapters are, else all parameters."""
    decoder = random_decoder(SMALL[kind], torch.float32)
    if lora:
        add_adapters(decoder, LoraConfig(lora_rank=2), 0)
    return decoder


def anew(decoder: Decoder) -> list[list[int]]:
    """What a generator makes that never had other weights."""
    weights = {name: w.to(torch.bfloat16) for name, w in merged(decoder).items()}
    columns = Generator(decoder_of(decoder.config, weights).eval()).stream(PROMPTS, GREEDY, 12, -1)
    return [list(row) for row in zip(*columns, strict=True)]


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("kind", SMALL)
def test_a_sample_is_of_the_weights_there_are(kind: str, lora: bool, monkeypatch: pytest.MonkeyPatch, capsys):
    """The ops in plain PyTorch stand for the kernels."""
    monkeypatch.setattr(samples, "choose_generator", lambda model, _: Generator(model))
    decoder = trained(kind, lora)
    sampler = Sampler(types.SimpleNamespace(decoder=decoder, bf16=True), kernels="auto")
    made = []
    for _ in range(2):
        with torch.no_grad():
            for p in decoder.parameters():
                if p.requires_grad:
                    p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(len(made))))
        made.append(sampler.sample(PROMPTS, GREEDY, 12, -1))
        assert made[-1] == anew(decoder)
    assert made[0] != made[1] and capsys.readouterr().err == "samples: the decoding kernels\n"


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("preset", ["mtlm1-tiny", "mtlm2-tiny"])
def test_samples_on_the_kernels_change_no_update(preset: str, lora: bool, compiled: bool, capfd):
    """With recorded updates and dropout of adapters, whose masks are functions of the step."""
    gpu = torch.device("cuda", 0)
    library.load("cuda")
    model = dataclasses.replace(PRESETS[preset], vocab_size=300, context=64)
    rng = np.random.default_rng(0)
    batches = [Rows(t, np.roll(t, -1, 1), None) for t in rng.integers(300, size=(6, 4, 64), dtype=np.int32)]

    def losses(sampled: bool, recorded: bool = True) -> list[list[float]]:
        torch._dynamo.reset()
        decoder = fresh_decoder(model, 0)
        if lora:
            add_adapters(decoder, LoraConfig(lora_rank=4, lora_dropout=0.2), 0)
        optim, ranks = MirrorOptimizerConfig(), Distributed(0, 1, gpu)
        step = TrainStep(decoder.to(gpu), optim, ranks, seed=0, bf16=True, compiled=compiled)
        step.recorded = recorded
        sampler, told = Sampler(step, kernels="auto"), []
        for number, rows in enumerate(batches):
            if sampled:
                assert sampler.sample(PROMPTS, GREEDY, 12, -1) == anew(step.decoder)
                assert len(sampler.sample(PROMPTS, Sampling(), 5, -1)[0]) == 5
            told.append(step.update(rows, 1, number, 1e-2)[:2].tolist())
        return told

    plain = losses(sampled=False)
    # Without --deterministic two runs add up in other orders: bfloat16's rounding of one, several times over.
    np.testing.assert_allclose(losses(sampled=True), plain, rtol=2**-8)
    assert capfd.readouterr().err.count("samples: the decoding kernels") == 1
    np.testing.assert_allclose(losses(sampled=False, recorded=False), plain, rtol=2**-8)
