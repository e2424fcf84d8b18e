"""A context of 32,768 on a GPU: what comes after a cache of nearly all of it is what one pass makes."""

import dataclasses
import functools
import os

import numpy as np
import pytest
import torch

from core.config import preset
from core.sampling import Sampling
from kernels_cuda import library
from port_torch.decode import Generator as KernelGenerator
from port_torch.model import Decoder
from tests.kernels_cuda.gpu import error

pytestmark = pytest.mark.gpu
CONTEXT = 32_768
NEW = 8
MODEL = dataclasses.replace(
    preset("smollm2-135m"), context=CONTEXT, n_layers=2, d_model=192, n_heads=3, n_kv_heads=1, head_dim=64
)
"""Of few heads, so that the exact scores of all pairs of places fit into memory."""


def tokens() -> np.ndarray:
    return np.random.default_rng(0).integers(MODEL.vocab_size, size=(1, CONTEXT), dtype=np.int32)


@torch.inference_mode()
def test_pytorch():
    """No further from float32 than twice what a pass without a cache is, and the kernels write its text."""
    torch.manual_seed(0)
    wide = Decoder(MODEL).to("cuda").eval()
    for p in wide.parameters():
        torch.nn.init.normal_(p, 1.0 if p.dim() == 1 else 0.0, 0.05)
    ids = torch.tensor(tokens(), device="cuda", dtype=torch.int64)
    exact = wide.logits(wide(ids)[:, -NEW:])
    library.load("cuda")
    decoder = wide.to(torch.bfloat16)
    whole = decoder.logits(decoder(ids)[:, -NEW:])
    cache = decoder.empty_cache(1, CONTEXT)
    decoder(ids[:, :-NEW], torch.arange(CONTEXT - NEW, device="cuda")[None], cache)
    steps = [
        decoder.logits(decoder(ids[:, i : i + 1], torch.tensor([[i]], device="cuda"), cache))
        for i in range(CONTEXT - NEW, CONTEXT)
    ]
    assert error(torch.cat(steps, 1), exact) <= 2 * error(whole, exact) + 1e-6
    prompt = tokens()[0, :-NEW].tolist()
    generated = KernelGenerator(decoder).stream([prompt], Sampling(temperature=0), NEW)
    text = [row for (row,) in generated]
    scores = decoder.logits(decoder(torch.tensor([[*prompt, *text[:-1]]], device="cuda"))[:, -NEW:])[
        0
    ].float()
    # The likeliest, or one that is as likely but for the error that both ways make.
    short = scores.max(-1).values - scores[torch.arange(NEW), text]
    assert short.max() <= 4 * (whole - exact).abs().max()


@pytest.mark.skipif(os.environ.get("JAX_PLATFORMS") != "cuda", reason="JAX runs on the CPU")
def test_jax():
    """As above; the prompt is read in pieces, as in generation."""
    import jax
    import jax.numpy as jnp

    from core.generation import PREFILL
    from core.model import Compute, empty_cache, forward, forward_cached, logits
    from tests.models import random_params

    params, ids = random_params(MODEL, std=0.05), jnp.asarray(tokens())

    def whole(compute: Compute) -> torch.Tensor:
        call = jax.jit(lambda p, t: logits(MODEL, p, forward(MODEL, p, t, compute)[:, -NEW:]))
        return torch.tensor(np.asarray(call(params, ids), np.float32))

    narrow = Compute("bfloat16", "cudnn")
    exact, plain = whole(Compute("float32", "xla")), whole(narrow)
    step = jax.jit(functools.partial(forward_cached, MODEL, compute=narrow), donate_argnums=3)
    cache, got = empty_cache(MODEL, 1, CONTEXT, "bfloat16"), []
    stops = [*range(PREFILL, CONTEXT, PREFILL), *range(CONTEXT - NEW, CONTEXT + 1)]
    for start, stop in zip([0, *stops], stops, strict=False):
        hidden, cache = step(params, ids[:, start:stop], jnp.arange(start, stop)[None], cache)
        if stop > CONTEXT - NEW:
            got.append(logits(MODEL, params, hidden))
    got = torch.tensor(np.asarray(jnp.concatenate(got, 1), np.float32))
    assert error(got, exact) <= 2 * error(plain, exact) + 1e-6
