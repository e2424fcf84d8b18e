"""A mistake in a model change or a checkpoint ends in one sentence with path, axes and shapes."""

import dataclasses
import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
import pytest

from core import model
from core.attention import causal_attention
from core.checkpoint.checkpointer import restore_params
from core.errors import UserError
from core.model import Linear, abstract_params, forward, require_fit, scoped
from core.shapes import ShapeError
from tests.models import GPT, LLAMA, random_params, random_tokens
from tests.port_torch.folders import write_checkpoint
from tests.train_tpu.processes import TINY, refusal_here

MLP, ATTENTION = model.MLP.__init__, model.Attention.__init__


@pytest.fixture(autouse=True)
def no_kept_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model made before a mistake was planted would hide it."""
    monkeypatch.setattr(model, "_modules", model._modules.__wrapped__)


def transposed(self, config, std, rngs):
    MLP(self, config, std, rngs)
    self.down = Linear(config.d_model, config.d_mlp, bias=False, std=std, rngs=rngs)


def wide(self, config, std, rngs):
    MLP(self, dataclasses.replace(config, d_mlp=2 * config.d_mlp), std, rngs)


def more_heads(self, config, std, rngs):
    wider = dataclasses.replace(config, n_heads=2 * config.n_heads, n_kv_heads=config.kv_heads)
    ATTENTION(self, dataclasses.replace(wider, head_dim=config.head_size), std, rngs)


def cut(self, x, ctx):
    q, k, v = self.projections(x, ctx.rotation, ctx.compute)
    y = causal_attention(q, k, v, "xla").reshape(*x.shape[:2], -1)
    return scoped("o", self.o, y[..., :-4]), None


def turned(self, x, compute):
    return scoped("down", lambda y: y @ self.down.kernel[...].T, jax.nn.relu(scoped("up", self.up, x)))


def no_down(self, x, compute):
    return scoped("up", self.up, x)


@pytest.mark.parametrize(
    ("where", "planted", "said"),
    [
        ("MLP.__init__", transposed,
         r"layers/mlp/down/kernel \[layers, mlp, width\]: expected \[3, 80, 48\], found \[3, 48, 80\], tran"),
        ("MLP.__init__", wide,
         r"layers/mlp/down/kernel \[layers, mlp, width\]: expected \[3, 80, 48\], found \[3, 160, 48\];"),
        ("Attention.__init__", more_heads,
         r"layers/attn/o/kernel \[layers, heads, width\]: expected \[3, 48, 48\], found \[3, 96, 48\];"),
        ("Attention.__call__", cut,
         r"layers/attn/o kernel \[heads, width\] of \[48, 48\] does not fit what it is given, \[1, 96, 44\]: "
         r"dot_general .* got \(44,\) and \(48,\) \(model.py:\d+\)"),
        ("MLP.__call__", turned,
         r"layers/mlp/down does not fit what it is given, \[1, 96, 80\]: .* \(test_shapes.py:\d+\)"),
        ("MLP.__call__", no_down,
         r"the decoder does not fit what it is given, \[1, 96\]: .* \(model.py:\d+\)"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)  # fmt: skip
def test_a_mistake_in_the_model_is_one_sentence(where: str, planted: Callable, said: str, monkeypatch):
    monkeypatch.setattr(f"core.model.{where}", planted)
    with pytest.raises(UserError) as found:
        require_fit(LLAMA)
    assert re.match(said, str(found.value)), str(found.value)
    assert "\n" not in str(found.value)


def test_parameters_that_do_not_fit_are_named():
    params, tokens = random_params(GPT), random_tokens(GPT, 1, 8)
    head, norm = params["head"], params.pop("norm")
    with pytest.raises(UserError, match=r"norm/scale \[width\] of shape \[48\] is missing in the model"):
        forward(GPT, params, tokens)
    params |= {"norm": norm, "head": {"kernel": head["kernel"].T}}
    with pytest.raises(
        UserError, match=r"head/kernel \[width, vocab\]: expected \[48, 97\], found \[97, 48\], tr"
    ):
        forward(GPT, params, tokens)
    with pytest.raises(
        UserError, match=r"more/scale of shape \[2\] is a parameter without a line in core/leav"
    ):
        forward(GPT, params | {"head": head, "more": {"scale": jnp.ones(2)}}, tokens)


def test_other_errors_stay_what_they_are():
    def fails(x):
        raise ValueError("no such thing")

    with pytest.raises(ValueError, match="no such thing") as found:
        scoped("mlp", fails, jnp.ones(2))
    assert not isinstance(found.value, ShapeError)


@pytest.mark.slow
def test_a_checkpoint_with_a_transposed_matrix_is_refused_by_name(tmp_path):
    params = random_params(LLAMA)
    params["layers"]["mlp"]["up"]["kernel"] = params["layers"]["mlp"]["up"]["kernel"].swapaxes(1, 2)
    folder = write_checkpoint(tmp_path / "turned", LLAMA, params)
    said = (
        r"params/layers/mlp/up/kernel \[layers, width, mlp\] is float32\[3, 80, 48\] in the checkpoint and "
        r"float32\[3, 48, 80\] here"
    )
    with pytest.raises(UserError, match=said):
        restore_params(folder, abstract_params(LLAMA))


@pytest.mark.slow
def test_a_run_of_such_a_model_leaves_nothing_behind(tmp_path, text, monkeypatch):
    monkeypatch.setattr("core.model.MLP.__init__", transposed)
    said = refusal_here(*TINY, "--data", text, "--out", tmp_path / "run", compile_anew=True)
    assert said.startswith(
        "error: layers/mlp/down/kernel [layers, mlp, width]: expected [2, 64, 32], found [2, 32"
    )
    assert not (tmp_path / "run").exists()
