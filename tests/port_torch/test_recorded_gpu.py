"""Updates recorded as a CUDA graph are those that run one kernel at a time, to the bit."""

import dataclasses
import gc
from collections.abc import Iterator
from typing import Literal, NamedTuple

import numpy as np
import pytest
import torch

from core.config import PRESETS, ModelConfig
from core.data.sequences import Rows
from core.lora import LoraConfig
from core.run.cadence import Flags
from core.run.guard import GuardConfig
from kernels_cuda import library, registry
from port_torch.model import Decoder
from port_torch.training.distributed import Distributed
from port_torch.training.lora import add_adapters
from port_torch.training.pretraining import fresh_decoder
from port_torch.training.recorded import Recorded
from port_torch.training.settings import MirrorOptimizerConfig
from port_torch.training.setup import require_deterministic_operations
from port_torch.training.step import METRICS, TrainStep

pytestmark = pytest.mark.gpu
GPU = torch.device("cuda", 0)
MODELS = {
    "gpt": dataclasses.replace(PRESETS["mtlm2-tiny"], dropout=0.1),
    "llama": dataclasses.replace(PRESETS["mtlm1-tiny"], dropout=0.1),
}
MODEL = MODELS["gpt"]
UPDATES = 12
REFUSED = 5
"""The update before which a weight becomes NaN."""


class Case(NamedTuple):
    """How updates are made."""

    model: str = "gpt"
    compiled: bool = False
    optimizer: Literal["adamw", "muon"] = "adamw"
    parts: int = 1
    packed: bool = False
    lora: bool = False
    bf16: bool = True
    kernels: bool = True

    def __str__(self) -> str:
        values = self._asdict().items()
        return ",".join(f"{name}={value}" for name, value in values if value != self._field_defaults[name])


CASES = [
    *(Case(compiled=True, parts=parts) for parts in (1, 2)),
    Case(compiled=True, packed=True),
    Case(compiled=True, optimizer="muon"),
    *(
        case._replace(model=model)
        for model in MODELS
        for case in (
            Case(),
            Case(parts=2),
            Case(packed=True),
            Case(packed=True, parts=2),
            Case(packed=True, bf16=False),  # by a mask
            Case(optimizer="muon"),
            Case(lora=True),
            Case(lora=True, packed=True),
            Case(kernels=False),
        )
    ),
]


@pytest.fixture(autouse=True)
def deterministic(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Two runs are equal to the bit."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    library.load("cuda")
    require_deterministic_operations()
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cuda.enable_mem_efficient_sdp(True)


def batches(model: ModelConfig, packed: bool) -> list[Rows]:
    """Of 4 rows. packed: of 3 documents and of 40 in turn, whose starts have two shapes."""
    rng = np.random.default_rng(0)
    made = []
    for i in range(UPDATES):
        tokens = rng.integers(model.vocab_size, size=(4, model.context), dtype=np.int32)
        documents = np.sort(rng.integers((3, 40)[i % 2], size=tokens.shape, dtype=np.int32))
        made.append(Rows(tokens, np.roll(tokens, -1, 1), documents if packed else None))
    return made


def make_decoder(case: Case) -> Decoder:
    decoder = fresh_decoder(MODELS[case.model], 0)
    if case.lora:
        add_adapters(decoder, LoraConfig(lora_rank=4, lora_dropout=0.2), 0)
    return decoder.to(GPU)


def updates(case: Case, recorded: bool) -> tuple[list[list[float]], TrainStep]:
    """What every update reports, and the step with its state after the last."""
    torch._dynamo.reset()
    train_step = TrainStep(
        make_decoder(case), MirrorOptimizerConfig(optimizer=case.optimizer), Distributed(0, 1, GPU), seed=0,
        bf16=case.bf16, compiled=case.compiled,
    )  # fmt: skip
    assert train_step.recorded
    train_step.recorded = recorded
    told = []
    weight = list(train_step.parameters.values())[-1]
    for i, rows in enumerate(batches(MODELS[case.model], case.packed)):
        kept = weight.detach().clone()
        with torch.no_grad():
            weight.mul_(float("nan") if i == REFUSED else 1.0)
        told.append(train_step.update(rows, case.parts, i, 1e-3 * (1 + i), Flags(i == 2, i == 6)))
        if i == REFUSED:
            with torch.no_grad():
                weight.copy_(kept)
    shapes = (2 if case.packed and case.bf16 else 1) if recorded else 0
    assert len(train_step._recording._recordings) == shapes
    return [one.tolist() for one in told], train_step


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_same_updates(case: Case, monkeypatch: pytest.MonkeyPatch):
    """Dropout's masks, the schedule, the flags and an update that the guard refuses included."""
    if not case.kernels:  # AdamW's stays
        monkeypatch.setattr(registry, "_kernels_loaded", False)
    plain, plain_step = updates(case, recorded=False)
    recorded, recorded_step = updates(case, recorded=True)
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


def test_recordings_of_several_shapes_share_their_memory():
    """The second one finds what it needs in the memory of the first."""
    gc.collect()
    torch.cuda.empty_cache()  # or the recordings of other tests would be freed meanwhile
    train_step = TrainStep(
        make_decoder(Case("llama")), MirrorOptimizerConfig(), Distributed(0, 1, GPU), seed=0, bf16=True
    )
    held = {}
    for i, rows in enumerate(batches(MODELS["llama"], packed=True)):
        train_step.update(rows, 1, i, 1e-3)
        recordings = train_step._recording._recordings.values()
        pools = {tuple(recording.graph.pool()) for recording in recordings}
        held[len(recordings)] = sum(
            segment["total_size"]
            for segment in torch.cuda.memory_snapshot()
            if tuple(segment["segment_pool_id"]) in pools
        )
    assert sorted(held) == [0, 1, 2] and len(pools) == 1
    assert held[1] > 62 * 2**20, held  # the logits alone
    # Nothing more where every block finds its place again, another 64 MiB where smaller blocks took that
    # of the logits; twice as much if none is shared.
    assert held[2] < 1.75 * held[1], held


def test_other_limits_of_the_guard_hold_in_a_recorded_update():
    """After one refused update a limit of 1 refuses the next, and another limit lets it through."""
    ranks = Distributed(0, 1, GPU)
    train_step = TrainStep(make_decoder(Case()), MirrorOptimizerConfig(), ranks, seed=0, bf16=True)
    weight, applied = train_step.parameters["norm.weight"], []
    for i, rows in enumerate(batches(MODEL, packed=False)[: REFUSED + 3]):
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
