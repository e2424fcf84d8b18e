"""The settings of LoRA: which maps get adapters, and what is refused."""

import pytest

from core.errors import UserError
from core.lora import LoraConfig
from tests.models import GPT, LLAMA


def test_names_and_groups_of_maps():
    def targets(*names: str, model=LLAMA) -> list[str]:
        return LoraConfig(lora_rank=4, lora_targets=names).targets(model)

    assert LoraConfig(lora_rank=4).targets(LLAMA) == ["q", "k", "v", "o", "gate", "up", "down"]
    assert targets("all", model=GPT) == ["q", "k", "v", "o", "up", "down"]
    assert targets("down", "attention") == ["q", "k", "v", "o", "down"]
    assert targets("mlp") == ["gate", "up", "down"] and targets("mlp", model=GPT) == ["up", "down"]
    with pytest.raises(UserError, match="'gate', which this model does not have: its MLP is gelu"):
        targets("gate", model=GPT)


def test_defaults():
    config = LoraConfig(lora_rank=4)
    assert (config.rank, config.alpha, config.dropout) == (4, 8, 0)
    assert LoraConfig(lora_rank=4, lora_alpha=3.0).alpha == 3 and LoraConfig().lora_rank is None


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"lora_rank": 0}, "--lora-rank is 0; it must be positive"),
        ({"lora_rank": 4, "lora_alpha": 0.0}, "--lora-alpha is 0.0; it must be positive"),
        ({"lora_alpha": 1.0}, "--lora-alpha is a setting of adapters: give --lora-rank with it"),
        ({"lora_dropout": 0.0}, "--lora-dropout is a setting of adapters: give --lora-rank with it"),
        ({"lora_targets": ("q",)}, "--lora-targets is a setting of adapters: give --lora-rank with it"),
        ({"lora_rank": 4, "lora_dropout": 1.0}, r"--lora-dropout is 1.0; it must lie in \[0, 1\)"),
        ({"lora_rank": 4, "lora_dropout": -0.1}, r"--lora-dropout is -0.1; it must lie in \[0, 1\)"),
        ({"lora_rank": 4, "lora_targets": ()}, "--lora-targets names no linear map: give q, k, v, o, gate"),
        (
            {"lora_rank": 4, "lora_targets": ("q", "q_proj")},
            "names 'q_proj', .* give q, k, v, o, gate, up, down, or attention, mlp, all$",
        ),
    ],
)
def test_refusals(given: dict, message: str):
    with pytest.raises(UserError, match=message):
        LoraConfig(**given)
