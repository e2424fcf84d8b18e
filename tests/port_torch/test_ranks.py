"""What several ranks agree on, with two threads that stand for two of them."""

import dataclasses
import io
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from core.checkpoint.manifest import load_manifest
from core.checkpoint.steps import find_step
from core.errors import UserError
from core.run.training_run import TrainingRun
from port_torch.model import Decoder
from port_torch.training.batches import empty_rows
from port_torch.training.distributed import Distributed
from port_torch.training.settings import MirrorOptimizerConfig
from port_torch.training.step import TrainStep
from port_torch.training.trainer import starting_state
from tests.models import LLAMA

RUN = Path(__file__).parents[1] / "fixtures" / "7b5e0bc" / "torch"


class Meeting:
    """Where both put a value, and get both."""

    def __init__(self) -> None:
        self._values: list[Any] = [None, None]
        self._barrier = threading.Barrier(2, timeout=60)

    def all(self, rank: int, value: Any) -> list[Any]:
        self._values[rank] = value
        self._barrier.wait()
        values = list(self._values)
        self._barrier.wait()
        return values


@dataclasses.dataclass(frozen=True)
class Paired(Distributed):
    """A rank whose exchanges are those of a meeting, not of torch.distributed."""

    meeting: Meeting

    def copy_from_first(self, tensors: list[Tensor]) -> None:
        """Theirs are equal."""

    def largest(self, value: int) -> int:
        return max(self.meeting.all(self.rank, value))

    def share(self, value: str) -> str:
        return self.meeting.all(self.rank, value)[0]


def both(action: Callable[[Distributed], Any]) -> list[Any]:
    """What `action` gives each of two ranks that do it at once, or raises there."""
    meeting, outcomes = Meeting(), [None, None]

    def do(rank: int) -> None:
        try:
            outcomes[rank] = action(Paired(rank, 2, torch.device("cpu"), meeting))
        except BaseException as error:
            outcomes[rank] = error

    threads = [threading.Thread(target=do, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert not any(thread.is_alive() for thread in threads)
    return outcomes


def test_ranks_that_would_resume_from_other_states_are_refused(tmp_path: Path):
    """The first sees a run's checkpoint, the second an empty folder, as without a shared disk."""
    saved = load_manifest(find_step(RUN))
    record = {**saved.config, "tokenizer": saved.tokenizer, "data": saved.data}

    def resume(ranks: Distributed) -> Any:
        job = TrainingRun()
        config = SimpleNamespace(from_step=None, fallback=False, seed=0)
        vars(job).update(out=RUN if ranks.first else tmp_path, record=record, lineage=[], config=config)
        return starting_state(job, SimpleNamespace(ranks=ranks), Console(file=io.StringIO()))

    first, second = both(resume)
    assert isinstance(first, UserError) and "do not have the same checkpoint" in str(first)
    assert isinstance(second, SystemExit) and second.code == 2


@pytest.mark.parametrize("error", [UserError("no"), PermissionError(13, "Permission denied", "run")])
def test_an_error_of_the_first_ends_both_and_the_first_says_it(error: Exception):
    def fail() -> None:
        raise error

    first, second = both(lambda ranks: ranks.first_does(fail))
    assert first is error
    assert isinstance(second, SystemExit) and second.code == 2


def test_what_the_first_makes_the_others_find(tmp_path: Path):
    file = tmp_path / "made"

    def make() -> bool:
        there = file.exists()
        file.touch()
        return there

    assert both(lambda ranks: ranks.in_turn(make)) == [False, True]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_memory_that_ends_on_one_rank_splits_the_batch_of_both(optimizer: str):
    """The other one, which has enough, waits in no exchange of the update that both try: there the first will
    not come."""

    def fit(ranks: Distributed) -> int:
        optim = MirrorOptimizerConfig(optimizer=optimizer)
        train_step = TrainStep(Decoder(LLAMA), optim, ranks, seed=0)
        losses = train_step.losses

        def limited(tokens: Tensor, *rest: Tensor | None) -> tuple[Tensor, Tensor]:
            if len(tokens) > (2 if ranks.first else 4):
                raise torch.OutOfMemoryError("CUDA out of memory")
            return losses(tokens, *rest)

        train_step.losses = limited
        before = [p.clone() for p in train_step.parameters.values()]
        parts = train_step.fit(8, 1, lambda n: empty_rows(n, LLAMA.context, packed=False))
        assert all(map(torch.equal, train_step.parameters.values(), before))
        return parts

    assert both(fit) == [4, 4]
