"""Models and texts of the tests of decoding."""

import dataclasses
from collections.abc import Iterable
from typing import Any

import hypothesis.strategies as st
import torch
from torch import Tensor

from core.config import ModelConfig
from core.sampling import Sampling
from port_torch import decode
from port_torch.model import Decoder
from tests.models import GPT, GROUPED, LLAMA

GREEDY = Sampling(temperature=0)
# Heads of 64, as the kernels take them.
FIT = {"context": 48, "d_model": 64, "n_heads": 1, "d_mlp": 80, "n_layers": 2}
SMALL = {name: dataclasses.replace(base, **FIT) for name, base in (("llama", LLAMA), ("gpt", GPT))}
# All that Qwen2, Qwen3 and Llama 3 have beyond these: 6 heads on 2 of keys and values, wider than the model.
SMALL["grouped"] = dataclasses.replace(
    GROUPED, context=48, d_model=72, n_layers=2, head_dim=64, rope_scaling="yarn,factor=4,original_context=16"
)


def random_decoder(config: ModelConfig, dtype: torch.dtype, device: str = "cpu", std: float = 0.2) -> Decoder:
    """A model whose every parameter matters: norms are not all 1, nor biases 0."""
    generator = torch.Generator(device).manual_seed(1)
    with torch.device(device):
        model = Decoder(config)
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            p.data = 1 + 0.3 * noise if "norm" in name else std * noise
    return model.to(dtype).eval()


@st.composite
def config_fields(draw: st.DrawFn, head_sizes: tuple[int, ...]) -> dict[str, Any]:
    """Of configs of every kind of part together, of widths that the kernels take and that they refuse.

    The config itself is made in the test: checks of its types use `random`, which a strategy may not.
    """
    kv_heads, positions = draw(st.integers(1, 3)), draw(st.sampled_from(["rope", "learned"]))
    n_heads, head_size = kv_heads * draw(st.integers(1, 4)), draw(st.sampled_from(head_sizes))
    scalings = (None, "linear,factor=2", "yarn,factor=4,original_context=16")
    biases = draw(st.booleans())
    return {
        "vocab_size": draw(st.integers(40, 300)),
        "context": draw(st.integers(24, 150)),
        "d_model": draw(st.one_of(st.just(n_heads * head_size), st.integers(1, 40).map(lambda n: 8 * n))),
        "n_layers": draw(st.integers(1, 3)),
        "n_heads": n_heads,
        "n_kv_heads": kv_heads,
        "head_dim": head_size,
        "d_mlp": draw(st.one_of(st.integers(1, 20).map(lambda eighths: 8 * eighths), st.integers(1, 99))),
        "positions": positions,
        "rope_scaling": draw(st.sampled_from(scalings)) if positions == "rope" else None,
        "mlp": draw(st.sampled_from(["swiglu", "gelu"])),
        "biases": biases,
        "qkv_biases": draw(st.booleans()) and not biases,
        "qk_norm": draw(st.booleans()),
        "tied": draw(st.booleans()),
        "rope_theta": draw(st.sampled_from([100.0, 10_000.0, 500_000.0])),
        "norm_eps": draw(st.sampled_from([1e-6, 1e-5, 0.1])),
        "dropout": draw(st.sampled_from([0.0, 0.2])),
    }


@st.composite
def texts(draw: st.DrawFn) -> tuple[list[list[int]], list[list[int]]]:
    """Prompts of one to 18 tokens, and as many more tokens for each."""
    lengths = draw(st.lists(st.integers(1, 18), min_size=1, max_size=20))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    n_more = draw(st.integers(1, 6))

    def tokens(n: int) -> list[int]:
        return torch.randint(40, (n,), generator=generator).tolist()

    return [tokens(n) for n in lengths], [tokens(n_more) for _ in lengths]


@torch.inference_mode()
def decoded_scores(generator: decode.Generator, prompts: list[list[int]], more: list[list[int]]) -> Tensor:
    """Scores [B, 1 + n, V] behind prompts and behind each of n given tokens, as a stream makes them."""
    step = generator._step(0, len(prompts), generator.model.config.context)
    generator.read_prompts(prompts, step)
    scores = [step.scores.clone()]
    step.position += 1
    for token in torch.tensor(more, device=step.token.device).T:
        step.token.copy_(token)
        step.run()
        scores.append(step.scores.clone())
    return torch.stack(scores, 1)


@torch.inference_mode()
def mirror_scores(model: Decoder, prompts: list[list[int]], more: list[list[int]]) -> Tensor:
    """The same by the mirror's pass over each whole text."""
    device = model.embed.weight.device
    rows = []
    for prompt, after in zip(prompts, more, strict=True):
        hidden = model(torch.tensor([prompt + after], device=device))[0, len(prompt) - 1 :]
        rows.append(torch.nn.functional.linear(hidden, model.table))
    return torch.stack(rows)


def complete(steps: Iterable[list[int | None]]) -> list[list[int]]:
    """All tokens of every row."""
    return [[token for token in row if token is not None] for row in zip(*steps, strict=True)]
