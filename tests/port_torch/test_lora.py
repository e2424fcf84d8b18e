"""LoRA in the mirror, against `peft` and against its formula."""

import peft
import pytest
import torch

from core.lora import LoraConfig
from port_torch.model import Decoder, decoder_of, parameter_name
from port_torch.names import exported_tensors
from port_torch.training.lora import add_adapters, merged
from tests.models import BOTH, GROUPED, random_params
from tests.port_torch.folders import tensors_of

MODELS = {**BOTH, "grouped": GROUPED}


def decoder(kind: str) -> Decoder:
    config = MODELS[kind]
    tensors = tensors_of(config, random_params(config, std=0.1))
    return decoder_of(config, {parameter_name(p): tensors[n] for n, p in exported_tensors(config).items()})


def adapters_of(model: Decoder) -> dict[str, torch.Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("kind", MODELS)
def test_adapters_are_those_of_peft(kind: str):
    """Names, first values, outputs and gradients under dropout: equal to the bit."""
    config = LoraConfig(
        lora_rank=3,
        lora_alpha=5.0,
        lora_dropout=0.3,
        lora_targets=("attention", "down"),
    )
    ours, theirs = decoder(kind), decoder(kind)
    add_adapters(ours, config, seed=7)
    torch.manual_seed(7)
    targets = ["q", "k", "v", "o", "down"]
    settings = peft.LoraConfig(r=3, lora_alpha=5.0, lora_dropout=0.3, target_modules=targets)
    peft.inject_adapter_in_model(settings, theirs)
    assert list(adapters_of(ours)) == list(adapters_of(theirs))
    tokens = torch.arange(60)[None] % 97
    for model in (ours, theirs):
        torch.manual_seed(8)
        with torch.no_grad():
            for name, p in adapters_of(model).items():
                if ".lora_B." in name:
                    p.normal_(0, 0.1)
        model.train().logits(model(tokens)).square().sum().backward()
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(p, q) and p.requires_grad is q.requires_grad, name
        assert p.grad is None or torch.equal(p.grad, q.grad), name


@pytest.mark.parametrize("kind", MODELS)
def test_adapters_merge_to_what_their_formula_says(kind: str):
    plain, adapted = decoder(kind), decoder(kind)
    add_adapters(adapted, LoraConfig(lora_rank=4, lora_alpha=12.0, lora_dropout=0.5), seed=1)
    tokens = torch.arange(64)[None] % 97
    adapted.eval()
    assert torch.allclose(adapted(tokens), plain(tokens), atol=1e-5)  # at first they add nothing
    trained = adapters_of(adapted)
    maps = 6 if kind == "gpt" else 7
    assert len(trained) == 2 * maps * 3 and all(".lora_" in name for name in trained)
    with torch.no_grad():
        for p in trained.values():
            p.normal_(0, 0.05)
    expected = {name: weight.clone() for name, weight in plain.state_dict().items()}
    for name, a in trained.items():
        if ".lora_A." in name:
            b = trained[name.replace("lora_A", "lora_B")]
            expected[name.replace(".lora_A.default", "")] += 12.0 / 4 * b.detach() @ a.detach()
    found = merged(adapted)
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        assert torch.allclose(found[name], weight, atol=1e-6), name
    whole = decoder_of(MODELS[kind], found)
    ours, theirs = whole.logits(whole(tokens)), adapted.logits(adapted(tokens))
    assert (theirs - plain.logits(plain(tokens))).abs().max() > 0.5
    assert torch.allclose(ours, theirs, atol=1e-4)
