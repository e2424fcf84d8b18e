"""Updates recorded as a CUDA graph are those that run one kernel at a time, to the bit."""

import dataclasses
from collections.abc import Iterator
from typing import Literal

import numpy as np
import pytest
import torch

from core.config import PRESETS
from core.data.sequences import Rows
from core.run.cadence import Flags
from core.run.guard import GuardConfig
from kernels_cuda import library
from port_torch.training.distributed import Distributed
from port_torch.training.pretraining import fresh_decoder
from port_torch.training.recorded import Recorded
from port_torch.training.settings import MirrorOptimizerConfig
from port_torch.training.step import METRICS, TrainStep

pytestmark = pytest.mark.gpu
GPU = torch.device("cuda", 0)
MODEL = dataclasses.replace(PRESETS["mtlm2-tiny"], dropout=0.1)
UPDATES = 8
REFUSED = 5
"""The update before which a weight becomes NaN."""


@pytest.fixture(autouse=True)
def deterministic(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Two runs are equal to the bit."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    library.load("cuda")
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def batches(packed: bool) -> list[Rows]:
    rng = np.random.default_rng(0)
    shape = UPDATES, 4, MODEL.context
    tokens = rng.integers(MODEL.vocab_size, size=shape, dtype=np.int32)
    documents = np.sort(rng.integers(3, size=shape, dtype=np.int32)) if packed else None
    return [
        Rows(tokens[i], np.roll(tokens[i], -1, 1), None if documents is None else documents[i])
        for i in range(UPDATES)
    ]


def updates(
    recorded: bool, parts: int, packed: bool, optimizer: Literal["adamw", "muon"] = "adamw"
) -> tuple[list[list[float]], TrainStep]:
    """What every update reports, and the step with its state after the last."""
    torch._dynamo.reset()
    decoder = fresh_decoder(MODEL, 0).to(GPU)
    optim = MirrorOptimizerConfig(optimizer=optimizer)
    train_step = TrainStep(decoder, optim, Distributed(0, 1, GPU), seed=0, bf16=True, compiled=True)
    assert train_step.recorded
    train_step.recorded = recorded
    told = []
    weight = train_step.parameters["norm.weight"]
    for i, rows in enumerate(batches(packed)):
        kept = weight.detach().clone()
        with torch.no_grad():
            weight.mul_(float("nan") if i == REFUSED else 1.0)
        told.append(train_step.update(rows, parts, i, 1e-3 * (1 + i), Flags(i == 2, i == 6)))
        if i == REFUSED:
            with torch.no_grad():
                weight.copy_(kept)
    return [one.tolist() for one in told], train_step


@pytest.mark.parametrize(
    ("parts", "packed", "optimizer"),
    [(1, False, "adamw"), (2, False, "adamw"), (1, True, "adamw"), (1, False, "muon")],
)
def test_the_same_updates(parts: int, packed: bool, optimizer: Literal["adamw", "muon"]):
    """Dropout's masks, the schedule, the flags and an update that the guard refuses included."""
    plain, plain_step = updates(False, parts, packed, optimizer)
    recorded, recorded_step = updates(True, parts, packed, optimizer)
    np.testing.assert_array_equal(recorded, plain)
    applied = METRICS.index("applied")
    assert [row[applied] for row in recorded] == [float(i != REFUSED) for i in range(UPDATES)]
    for (name, ours), theirs in zip(
        recorded_step.parameters.items(), plain_step.parameters.values(), strict=True
    ):
        assert torch.equal(ours, theirs), name
        states = (step.optimizer.state[p] for step, p in ((recorded_step, ours), (plain_step, theirs)))
        assert all(torch.equal(*pair) for pair in zip(*(state.values() for state in states), strict=True)), (
            name
        )
    for name, ours in recorded_step.guard.tensors().items():
        assert torch.equal(ours, plain_step.guard.tensors()[name]), name


def test_other_limits_of_the_guard_hold_in_a_recorded_update():
    """After one refused update a limit of 1 refuses the next, and another limit lets it through."""
    decoder = fresh_decoder(MODEL, 0).to(GPU)
    ranks = Distributed(0, 1, GPU)
    train_step = TrainStep(decoder, MirrorOptimizerConfig(), ranks, seed=0, bf16=True, compiled=True)
    weight, applied = train_step.parameters["norm.weight"], []
    for i, rows in enumerate(batches(False)):
        kept = weight.detach().clone()
        with torch.no_grad():
            weight.mul_(float("nan") if i == REFUSED else 1.0)
        train_step.guard.set_limits(GuardConfig(halt_after=1 if i == REFUSED + 1 else 10))
        applied.append(float(train_step.update(rows, 1, i, 1e-3)[METRICS.index("applied")]))
        if i == REFUSED:
            with torch.no_grad():
                weight.copy_(kept)
    assert applied == [1.0] * REFUSED + [0.0, 0.0, 1.0]


def test_other_shapes_run_as_they_are():
    calls = []

    def double(x: torch.Tensor, y: torch.Tensor | None) -> torch.Tensor:
        calls.append(x.shape)
        return 2 * x if y is None else 2 * x + y

    recorded = Recorded(double)
    for i in range(6):
        x = torch.full((4,), float(i), device=GPU)
        assert recorded(x, None).tolist() == [2 * i] * 4
    assert len(calls) == 3  # two to warm up, and the recording
    assert recorded(torch.ones(3, device=GPU), None).tolist() == [2.0] * 3
    assert recorded(torch.ones(4, device=GPU), torch.ones(4, device=GPU)).tolist() == [3.0] * 4
    first, second = (recorded(torch.full((4,), x, device=GPU), None) for x in (1.0, 5.0))
    assert first.tolist() == [2.0] * 4 and second.tolist() == [10.0] * 4 and len(calls) == 5
