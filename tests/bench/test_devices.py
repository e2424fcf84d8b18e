"""`bench.devices`: FSDP2 as its users set it up."""

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule

from bench.devices import plain_fsdp2
from bench.plain_torch import Block
from bench.train_rows import plain, random_batches
from port_torch.training.pretraining import fresh_decoder
from tests.models import LLAMA


@pytest.fixture
def one_process() -> Iterator[None]:
    """A group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="FSDP2 would take the GPU")
def test_fsdp2_gathers_weights_in_bfloat16(one_process: None, monkeypatch: pytest.MonkeyPatch):
    """Gathered in float32, as without a policy, they are twice the bytes; angles stay float32."""
    seen, forward = [], Block.forward

    def seeing(block: Block, x: torch.Tensor, rotation: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        seen.append((isinstance(block, FSDPModule), block.qkv.weight.dtype, rotation[0].dtype))
        return forward(block, x, rotation)

    monkeypatch.setattr(Block, "forward", seeing)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, **options: None)
    monkeypatch.setattr(torch, "compile", lambda model, **options: model)
    cpu = torch.device("cpu")
    step = plain_fsdp2(fresh_decoder(LLAMA, 0), random_batches(LLAMA, 2), cpu)
    losses = [float(step(i)) for i in range(3)]
    assert {*seen} == {(True, torch.bfloat16, torch.float32)}
    alone = plain(narrow=False)(fresh_decoder(LLAMA, 0), random_batches(LLAMA, 2), cpu)
    # bfloat16's rounding, 2^-9 of numbers of about 1, of logits of a mean over 64 targets.
    assert losses == pytest.approx([float(alone(i)) for i in range(3)], rel=2e-3)
