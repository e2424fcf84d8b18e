"""`TrainStep.fit` where a GPU's memory ends: what was tried is what an update needs."""

import dataclasses
import functools
from collections.abc import Iterator

import pytest
import torch

from core.config import PRESETS, ModelConfig
from core.data.sequences import Rows
from kernels_cuda import library
from port_torch.model import Decoder
from port_torch.training.batches import empty_rows
from port_torch.training.distributed import Distributed
from port_torch.training.settings import MirrorOptimizerConfig
from port_torch.training.step import TrainStep

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def limit() -> Iterator[None]:
    """The kernels run, and no test leaves a limit of memory behind."""
    library.load("cuda")
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)
    torch.cuda.empty_cache()


def make_train_step(config: ModelConfig) -> TrainStep:
    ranks = Distributed(0, 1, torch.device("cuda", 0))
    train_step = TrainStep(Decoder(config).to("cuda"), MirrorOptimizerConfig(), ranks, seed=0, bf16=True)
    assert train_step.recorded
    train_step.recorded = False  # `fit` comes before the first update; a recording keeps what one needs
    return train_step


def peak(function) -> tuple[int, int]:
    """The most bytes at once in a call: allocated, and held by PyTorch for it."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_an_update_needs_what_was_tried(parts: int):
    config = dataclasses.replace(PRESETS["mtlm1-200m"], n_layers=12)
    train_step = make_train_step(config)

    def example(n: int) -> Rows:
        return empty_rows(n, config.context, packed=False)

    train_step.update(example(8), parts, 0, 1e-4)  # cuBLAS's own memory
    tried, _ = peak(lambda: train_step._rehearse(example(8), parts))
    train_step._forget()
    used, _ = peak(lambda: train_step.update(example(8), parts, 1, 1e-4))
    # PyTorch splits no block for less than a mebibyte: which blocks are free decides on a few of them.
    assert used <= 1.01 * tried, f"tried {tried / 2**20:.0f} MiB, used {used / 2**20:.0f}"


@pytest.mark.parametrize("room", [True, False])
def test_an_update_is_recorded_where_there_is_room(room: bool, monkeypatch: pytest.MonkeyPatch):
    config = dataclasses.replace(PRESETS["mtlm1-88m"], n_layers=2, vocab_size=258)
    train_step = make_train_step(config)
    train_step.recorded = True
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (2**40 if room else 0, 2**40))
    assert train_step.fit(4, 1, lambda n: empty_rows(n, config.context, packed=False)) == 1
    assert train_step.recorded is room


def test_room_to_record_is_for_the_update_alone(monkeypatch: pytest.MonkeyPatch):
    """Not for what the process has needed before it."""
    config = dataclasses.replace(PRESETS["mtlm1-88m"], n_layers=2, vocab_size=258)
    train_step = make_train_step(config)
    train_step.recorded = True

    def example(n: int) -> Rows:
        return empty_rows(n, config.context, packed=False)

    train_step._rehearse(example(4), 1)  # cuBLAS's own memory
    train_step._forget()
    need = peak(lambda: train_step._rehearse(example(4), 1))[0]
    train_step._forget()
    free = 2 * (need - torch.cuda.memory_allocated()) + 2**24
    torch.empty(free, dtype=torch.uint8, device="cuda")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free, 2**40))
    assert train_step.fit(4, 1, example) == 1 and train_step.recorded


def test_the_batch_is_split_wherever_memory_ends():
    """No further than it must be: fewer micro-batches hold more memory than there is, then."""
    config = dataclasses.replace(PRESETS["mtlm1-88m"], n_layers=4, vocab_size=258)
    train_step = make_train_step(config)

    def example(n: int) -> Rows:
        return empty_rows(n, config.context, packed=False)

    train_step._rehearse(example(16), 1)
    train_step._forget()
    need = {}
    for parts in (1, 2, 4, 8):
        need[parts] = peak(functools.partial(train_step._rehearse, example(16), parts))
        train_step._forget()
    most, total = need[1][0], torch.cuda.get_device_properties(0).total_memory
    base = torch.cuda.memory_allocated()
    found = set()
    for i in range(40):
        torch.cuda.empty_cache()
        limit = base + int((most - base) * (0.55 + 0.01 * i))
        torch.cuda.set_per_process_memory_fraction(limit / total)
        parts = train_step.fit(16, 1, example)
        found.add(parts)
        assert all(held > limit for fewer, (_, held) in need.items() if fewer < parts)
        assert 0.99 * need[parts][0] <= limit  # see above
        train_step.update(example(16), parts, i, 1e-4)
    assert len(found) > 1
