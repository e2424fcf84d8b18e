"""Attention of packed documents by their lengths: what a mask of documents computes, in half precision."""

import dataclasses

import numpy as np
import pytest
import torch

from core.config import ModelConfig
from core.data.sequences import Rows
from kernels_cuda import library, registry
from port_torch.model import Decoder, attends_by_lengths
from port_torch.training.batches import Inputs, place
from port_torch.training.step import Losses
from tests.kernels_cuda.gpu import assert_as_good
from tests.models import GPT, GROUPED, LLAMA

pytestmark = pytest.mark.gpu
GPU = torch.device("cuda", 0)
WIDE = {"vocab_size": 1000, "context": 256, "d_model": 384, "n_heads": 6, "d_mlp": 512}
MODELS = {
    "llama": dataclasses.replace(LLAMA, **WIDE),
    "gpt": dataclasses.replace(GPT, **WIDE),
    "grouped": dataclasses.replace(GROUPED, **WIDE | {"n_kv_heads": 2, "head_dim": 64}),
}


def packed_rows(model: ModelConfig, n_documents: int) -> Rows:
    rng = np.random.default_rng(n_documents)
    tokens = rng.integers(model.vocab_size, size=(4, model.context + 1), dtype=np.int32)
    documents = np.sort(rng.integers(n_documents, size=(4, model.context), dtype=np.int32))
    return Rows(tokens[:, :-1], tokens[:, 1:], documents)


def decoder_of(model: ModelConfig) -> Decoder:
    torch.manual_seed(0)
    decoder = Decoder(model).to(GPU)
    for p in decoder.parameters():
        torch.nn.init.normal_(p, 1.0 if p.dim() == 1 else 0.0, 0.05)
    return decoder


def gradients(decoder: Decoder, inputs: Inputs, losses=None) -> list[torch.Tensor]:
    """The loss, and the gradient of every parameter in one."""
    loss, _ = (losses or Losses(decoder, 0.0))(*inputs)
    grads = torch.autograd.grad(loss, list(decoder.parameters()))
    return [loss.detach(), torch.cat([grad.flatten() for grad in grads])]


@pytest.mark.parametrize("kind", MODELS)
def test_as_exact_as_a_mask(kind: str, monkeypatch: pytest.MonkeyPatch):
    model = MODELS[kind]
    assert attends_by_lengths(model, GPU, bf16=True)
    library.load("cuda")
    decoder, rows = decoder_of(model), packed_rows(model, 5)
    masked, by_lengths = (next(place(rows, GPU, 1, given).micro_batches()) for given in (False, True))
    assert masked.starts is None and by_lengths.starts is not None
    with torch.autocast("cuda", torch.bfloat16):
        plain, ours = gradients(decoder, masked), gradients(decoder, by_lengths)
    monkeypatch.setattr(registry, "_kernels_loaded", False)
    exact = gradients(decoder.double(), masked)
    assert_as_good(ours[1:], plain[1:], exact[1:], kind)
    assert abs(ours[0] - exact[0]) <= 2e-3 * exact[0]


def test_any_number_of_documents_is_compiled_once():
    model = MODELS["llama"]
    library.load("cuda")
    decoder = decoder_of(model)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled, seen = Losses(decoder, 0.0, compiled=True), []
    with torch.autocast("cuda", torch.bfloat16):
        for n_documents in (1, 2, 5, 40, 200):
            inputs = next(place(packed_rows(model, n_documents), GPU, 1, True).micro_batches())
            ours, eager = gradients(decoder, inputs, compiled), gradients(decoder, inputs)
            assert abs(ours[0] - eager[0]) <= 2e-3 * eager[0], n_documents
            seen.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    # What layers begin with, the first layer, which has no branch to add, the others, the loss.
    assert seen == [4] * len(seen)
