"""`bench.torch_row`: what a row's name says runs, or the row fails."""

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import nn

from bench.torch_row import refuse_fallbacks, require_liger
from bench.train_rows import stock_mirror
from kernels_cuda.bench_tasks import compile_whole
from port_torch.model import Decoder
from tests.models import LLAMA


@pytest.fixture
def fallbacks_refused():
    """As in a row's process; torch.compile forgets what it was given, before and after."""
    torch.compiler.reset()
    with torch._dynamo.config.patch(
        fail_on_recompile_limit_hit=False
    ):  # and put back: monkeypatch deletes it
        refuse_fallbacks(cuda=False)
        yield
    torch.compiler.reset()


def test_a_ninth_version_is_no_row(fallbacks_refused: None):
    call = torch.compile(lambda x: x + 1, backend="eager", dynamic=False)
    with pytest.raises(Exception, match="recompile_limit"):
        for n in range(1, 12):
            call(torch.zeros(n))


def test_a_graph_that_breaks_is_no_row():
    def breaks(x: torch.Tensor) -> torch.Tensor:
        torch._dynamo.graph_break()
        return x + 1

    assert torch.compile(breaks, backend="eager")(torch.zeros(1)) == 1
    torch.compiler.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported):
        compile_whole(breaks)(torch.zeros(1))


class LigerRMSNorm(nn.RMSNorm):
    """As Liger's class, for `require_liger`."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x)

    forward.__module__ = "liger_kernel.transformers.rms_norm"


class Model(nn.Module):
    """A norm of transformers', and its own call."""

    def __init__(self):
        super().__init__()
        self.norm = nn.RMSNorm(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x)


def lce_forward(self: Model, x: torch.Tensor) -> torch.Tensor:
    """As Liger's call of a model."""
    return self.norm(x)


lce_forward.__module__ = "liger_kernel.transformers.model.llama"


def test_liger_has_changed_the_model_or_there_is_no_row():
    model = Model()
    for loss in (False, True):
        with pytest.raises(ValueError, match="Liger has not changed Model"):
            require_liger(model, loss)
    model.norm = LigerRMSNorm(4)
    require_liger(model, loss=False)
    with pytest.raises(ValueError, match="Liger has not changed Model"):
        require_liger(model, loss=True)
    model.forward = lce_forward.__get__(model)  # as Liger changes a model that there is already
    require_liger(model, loss=True)


def test_a_patch_that_changes_nothing_is_noticed(monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("transformers")
    liger, patches = ModuleType("liger_kernel"), SimpleNamespace(apply_liger_kernel_to_llama=lambda: None)
    liger.transformers = patches
    monkeypatch.setitem(sys.modules, "liger_kernel", liger)
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", patches)
    with pytest.raises(ValueError, match="Liger has not changed LlamaForCausalLM"):
        stock_mirror(Decoder(LLAMA), liger=True)
