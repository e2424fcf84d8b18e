"""The table of exported names: every parameter is in it once, and transformers' Llama has the same."""

import dataclasses
import math

import transformers

from core.config import ModelConfig
from port_torch.names import exported_tensors
from tests.models import BOTH, GPT, LLAMA


def count(config: ModelConfig) -> int:
    return sum(math.prod(leaf.shape) for leaf in exported_tensors(config).values())


def test_every_parameter_has_one_place():
    for config in BOTH.values():
        tensors = exported_tensors(config)
        assert count(config) == config.n_params
        assert len({(leaf.path, leaf.layer) for leaf in tensors.values()}) == len(tensors)


def test_names_and_shapes_are_those_of_transformers():
    for config in (LLAMA, dataclasses.replace(LLAMA, tied=False, biases=True)):
        theirs = transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                vocab_size=config.vocab_size, hidden_size=config.d_model, intermediate_size=config.d_mlp,
                num_hidden_layers=config.n_layers, num_attention_heads=config.n_heads,
                tie_word_embeddings=config.tied, attention_bias=config.biases, mlp_bias=config.biases,
            )
        )  # fmt: skip
        shapes = {name: tuple(tensor.shape) for name, tensor in theirs.named_parameters()}
        assert {name: leaf.shape for name, leaf in exported_tensors(config).items()} == shapes


def test_mtlm2_has_its_table_of_positions():
    assert exported_tensors(GPT)["model.embed_positions.weight"].shape == (GPT.context, GPT.d_model)
