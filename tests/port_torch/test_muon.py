"""Muon in PyTorch is Muon in JAX, whatever the number of ranks."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from core.checkpoint.steps import Keep, find_step
from core.config import ModelConfig
from core.data.sequences import Rows
from core.errors import UserError
from core.lora import LoraConfig
from core.model import Params
from port_torch.export import reader
from port_torch.finetune import FinetuneConfig
from port_torch.model import decoder_of, parameter_name
from port_torch.names import exported_tensors
from port_torch.training import checkpoint, muon
from port_torch.training.distributed import Distributed
from port_torch.training.muon import newton_schulz
from port_torch.training.settings import MirrorOptimizerConfig
from port_torch.training.step import TrainStep, make_optimizer
from tests.models import GPT, GROUPED, random_params
from tests.port_torch.folders import manifest_of
from tests.port_torch.small_training import ALONE, make_train_step
from train_tpu.optimizer import apply_gradients
from train_tpu.optimizer import make_optimizer as make_jax_optimizer

OPTIM = MirrorOptimizerConfig(optimizer="muon", adamw_lr_ratio=0.7, weight_decay=0.3, clip=0.5)


def tensors_of(model: ModelConfig, params: Params) -> dict[str, Tensor]:
    """The parameters by the mirror's names."""
    read = reader(params)
    return {
        parameter_name(leaf): read(leaf).clone(memory_format=torch.contiguous_format)
        for leaf in exported_tensors(model).values()
    }


@pytest.mark.parametrize("model", [GPT, GROUPED], ids=["gpt", "grouped"])
def test_equal_to_jax(model: ModelConfig):
    """Six updates of given gradients, of which the guard refuses one, at rates that differ; wide, tall and
    square matrices."""
    parameters = dict(decoder_of(model, tensors_of(model, random_params(model))).named_parameters())
    optimizer = make_optimizer(parameters, OPTIM, ALONE)
    params = random_params(model)
    state = make_jax_optimizer(OPTIM).init(params)
    update = jax.jit(lambda *arguments: apply_gradients(OPTIM, *arguments))
    for step in range(6):
        gradients, norm = random_params(model, seed=100 + step, std=0.1), 2.0 + step  # each clipped otherwise
        lr, ok = 0.01 * (1 + step % 3), step != 2
        for name, gradient in tensors_of(model, gradients).items():
            parameters[name].grad = gradient if ok else torch.full_like(gradient, float("nan"))
        optimizer.set_lr(lr)
        optimizer.step(grad_scale=torch.tensor(OPTIM.clip / norm), skip=torch.tensor(not ok))
        optimizer.zero_grad()
        params, state = update(gradients, jnp.float32(norm), params, state, jnp.float32(lr), jnp.bool_(ok))
    expected = tensors_of(model, params)
    for name, found in parameters.items():
        # As of JAX itself in tests/train_tpu/test_optimizer.py: a rounding of 6e-8 in singular values that
        # the iteration multiplies by up to 3.4^5 = 490, of updates of 0.2 times a rate of up to 0.03.
        np.testing.assert_allclose(
            found.detach().numpy(), expected[name].numpy(), rtol=0, atol=5 * 0.006 * 3e-5, err_msg=name
        )
    assert [float(group["step"]) for group in optimizer.param_groups] == [5.0] * 3
    taken = {"exp_avg"}
    for name, p in parameters.items():
        is_matrix = name.startswith("layers.") and "norm" not in name and name.endswith("weight")
        assert set(optimizer.state[p]) == (taken if is_matrix else taken | {"exp_avg_sq"}), name


@dataclasses.dataclass(frozen=True)
class InTurn(Distributed):
    """A rank that computes after those before it, and finds what they gave; what comes later is zero."""

    given: list[list[Tensor]]

    def gather(self, own: list[Tensor]) -> list[Tensor]:
        self.given.append(own)
        later = [[torch.zeros_like(part) for part in own]] * (self.size - len(self.given))
        return [torch.cat(parts) for parts in zip(*self.given, *later, strict=True)]


def test_ranks_share_the_matrices():
    """Each product is computed by one rank of three, and together they are those of one."""

    def updated(ranks: Distributed) -> tuple[dict[str, Tensor], int]:
        parameters = dict(decoder_of(GPT, tensors_of(GPT, random_params(GPT))).named_parameters())
        optimizer = make_optimizer(parameters, OPTIM, ranks)
        for name, gradient in tensors_of(GPT, random_params(GPT, seed=1)).items():
            parameters[name].grad = gradient
        with FlopCounterMode(display=False) as counter:
            optimizer.step(grad_scale=torch.tensor(1.0), skip=torch.tensor(False))
        return parameters, counter.get_total_flops()

    def flops(size: int) -> int:
        shares = ((math.ceil(12 / size), 48), (math.ceil(3 / size), 80), (math.ceil(3 / size), 80))
        return sum(n * 5 * (2 * 48**3 + 4 * 48**2 * large) for n, large in shares)

    alone, computed = updated(ALONE)
    assert computed == flops(1)
    given: list[list[Tensor]] = []
    for rank in range(3):
        shared, computed = updated(InTurn(rank, 3, torch.device("cpu"), given))
        assert computed == flops(3)
    for name, p in alone.items():
        torch.testing.assert_close(shared[name], p, rtol=0, atol=3e-5, msg=name)  # see above, rate 1e-3


def test_without_clipping_an_update_is_that_of_a_limit_which_nothing_reaches():
    tokens = np.random.default_rng(0).integers(GPT.vocab_size, size=(2, GPT.context + 1))
    rows, updated = Rows(tokens[:, :-1], tokens[:, 1:], None), []
    for clip in (0.0, 1e9):
        optim = dataclasses.replace(OPTIM, clip=clip)
        train_step = make_train_step(decoder_of(GPT, tensors_of(GPT, random_params(GPT))), optim)
        train_step.update(rows, 1, 0, 0.01)
        updated.append(train_step.parameters)
    start = tensors_of(GPT, random_params(GPT))
    for name, p in updated[0].items():
        assert torch.equal(p, updated[1][name]) and not torch.equal(p, start[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_are_of_the_type_that_the_step_computes_in(dtype: torch.dtype, monkeypatch):
    parameters = dict(decoder_of(GPT, tensors_of(GPT, random_params(GPT))).named_parameters())
    optimizer = make_optimizer(parameters, OPTIM, ALONE, dtype)
    for p in parameters.values():
        p.grad = torch.ones_like(p)
    given: list[torch.dtype] = []
    monkeypatch.setattr(muon, "newton_schulz", lambda x: given.append(x.dtype) or newton_schulz(x))
    optimizer.step(grad_scale=torch.tensor(1.0), skip=torch.tensor(False))
    assert given == [dtype] * 3 and {p.dtype for p in parameters.values()} == {torch.float32}


@pytest.mark.parametrize("shape", [(64, 192), (192, 64), (64, 64)])
def test_orthogonal_in_bfloat16(shape: tuple[int, int]):
    """As the same iteration of the singular values in float64, but for the roundings of 15 products; a CPU
    rounds two coefficients in each iteration, too."""
    noise = torch.tensor(np.random.default_rng(0).standard_normal((2, *shape)))
    u, _, v = torch.linalg.svd(noise, full_matrices=False)
    sizes = torch.linspace(0.5, 1, 64, dtype=torch.float64).expand(
        2, -1
    )  # not so small that rounding is more
    x = (u @ torch.diag_embed(sizes) @ v).bfloat16()
    values = sizes / torch.linalg.vector_norm(sizes, dim=1, keepdim=True)
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    expected = u @ torch.diag_embed(values) @ v
    error = newton_schulz(x).double() - expected
    assert torch.linalg.vector_norm(error) < 25 * 2.0**-9 * torch.linalg.vector_norm(expected)


def test_resumed_to_the_bit(tmp_path):
    def fresh() -> TrainStep:
        return make_train_step(decoder_of(GPT, tensors_of(GPT, random_params(GPT))), OPTIM)

    def train(train_step: TrainStep, steps: range) -> None:
        for step in steps:
            tokens = np.random.default_rng(step).integers(GPT.vocab_size, size=(2, GPT.context + 1))
            rows = Rows(tokens[:, :-1], tokens[:, 1:], None)
            train_step.update(rows, 1, step, 0.01)

    whole, stopped, resumed = fresh(), fresh(), fresh()
    train(whole, range(4))
    train(stopped, range(2))
    manifest = dataclasses.replace(manifest_of(GPT), step=2, code={"torch": torch.__version__})
    checkpoint.save(tmp_path, stopped, manifest, Keep())
    checkpoint.restore(find_step(tmp_path), resumed)
    train(resumed, range(2, 4))
    expected = checkpoint.state_tensors(whole)
    for name, found in checkpoint.state_tensors(resumed).items():
        assert torch.equal(found, expected[name]), name


def test_adapters_are_refused(tmp_path):
    with pytest.raises(UserError, match="--optimizer muon is for the layers' matrices, not for adapters"):
        FinetuneConfig(
            init_from=tmp_path, data=tmp_path, out=tmp_path, lora=LoraConfig(lora_rank=8), optim=OPTIM
        )
