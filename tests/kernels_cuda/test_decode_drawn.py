"""Models that nobody chose: the decode kernels compute what the mirror computes, or they refuse it."""

import copy
import dataclasses

import pytest
import torch
from hypothesis import given, settings

from core.config import ModelConfig
from core.errors import UserError
from port_torch import decode
from port_torch.decode_rules import RULES, not_computed, why_not
from port_torch.sampling import choose_generator
from tests.kernels_cuda.decoding import (
    SMALL,
    config_fields,
    decoded_scores,
    mirror_scores,
    random_decoder,
    texts,
)
from tests.kernels_cuda.gpu import error

torch.set_num_threads(1)  # small products: threads only wait for each other


@settings(max_examples=25, deadline=None)
@given(fields=config_fields((2, 6, 16, 32)), given=texts())
def test_references_are_the_mirror(fields: dict, given: tuple):
    model = random_decoder(ModelConfig(**fields), torch.float64)
    scores = decoded_scores(decode.Generator(model), *given)
    # The one difference is that scores are kept in float32, whose half unit in the last place is 6e-8.
    exact = mirror_scores(model, *given)
    torch.testing.assert_close(scores.double(), exact, rtol=1e-7, atol=1e-7 * exact.abs().max().item())


@pytest.mark.gpu
@settings(max_examples=40, deadline=None, derandomize=True)
@given(fields=config_fields((16, 32, 64, 128)), given=texts())
def test_kernels_are_the_mirror_or_refuse(fields: dict, given: tuple):
    model = random_decoder(ModelConfig(**fields), torch.bfloat16, "cuda")
    if why_not(model) is not None:
        assert choose_generator(model, "auto") is None
        with pytest.raises(UserError, match="cannot use --backend cuda"):
            choose_generator(model, "cuda")
        return
    exact = mirror_scores(copy.deepcopy(model).double(), *given)
    plain = mirror_scores(model, *given)
    scores = decoded_scores(choose_generator(model, "cuda"), *given)
    # Both round the residual stream to bfloat16 after every branch, the mirror more in between. Of few
    # numbers the ratio of two errors scatters: twice the factor that the ops are held to one by one.
    assert error(scores, exact) <= 4 * error(plain, exact) + 1e-6


def test_every_field_has_a_rule_and_a_new_one_is_refused():
    config = SMALL["llama"]
    assert set(RULES) == set(config.function())

    @dataclasses.dataclass(frozen=True)
    class NewConfig(ModelConfig):
        window: int | None = None

    newer = NewConfig(**dataclasses.asdict(config))
    assert not_computed(newer) is None
    said = not_computed(dataclasses.replace(newer, window=512))
    assert said == "window is 512, of which they know nothing"
    squared = dataclasses.replace(config, mlp="relu2")
    assert not_computed(squared) == "mlp is relu2, not one of swiglu, gelu"


def test_an_adapted_or_training_model_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    model = random_decoder(dataclasses.replace(SMALL["llama"], dropout=0.1), torch.bfloat16)
    assert why_not(model) is None
    assert why_not(model.train()) == "the model is being trained, with dropout"
    model.eval().layers[1].attn.q.float()
    assert why_not(model) == "the weights are float32, not bfloat16 (layers.1.attn.q.weight)"
    model = model.bfloat16()
    model.layers[0].mlp.up = torch.nn.Sequential(model.layers[0].mlp.up)
    assert why_not(model) == "layers.0.mlp.up is a Sequential, of which they know nothing"
