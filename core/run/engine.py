"""What the training loop asks of whatever computes: train_tpu/engine.py and port_torch/training/engine.py."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from core.checkpoint.manifest import Manifest
from core.run.cadence import Flags
from core.run.guard import GuardConfig
from core.run.metrics import Score
from core.run.profiling import Operation
from core.sampling import Sampling


@runtime_checkable
class LoadedBatch(Protocol):
    """One global batch as its reader gives it; the engine knows what else is in it."""

    first: int
    """Index of its first sequence in the endless order."""
    records: np.ndarray
    """[rows]: which training record each row of this process is."""
    bad: np.ndarray
    """[rows]: whether that record could not be used; such a row predicts nothing."""


class Metrics(NamedTuple):
    """What one update reports, on the host."""

    loss: float
    """What was minimised, per target (with z-loss)."""
    nll: float
    """Cross-entropy in nats per token."""
    grad_norm: float
    """Global norm before clipping."""
    applied: bool
    """Whether the guard let the update through."""
    streak: int
    """Updates not applied since the last applied one. From `halt_after` on none is applied any more."""
    skipped: int
    """Updates not applied in the whole run."""
    leaf_norms: Mapping[str, Any]
    """Gradient norm of every leaf: a number, or one for each layer of it."""
    watched: dict[str, Any] | None = None
    """Of an update that --watch-every asks for: `core.run.watching.make_record`."""


class Device(NamedTuple):
    """The devices of a run."""

    kind: str
    """The vendor's name, as `core.run.metrics.PEAK_FLOPS` has it."""
    n: int
    """How many take part in the run."""


class InFlight(NamedTuple):
    """A dispatched update whose metrics have not been read."""

    step: int
    batch: LoadedBatch
    lr: float
    guard: GuardConfig
    pending: Any


class TaskScore(NamedTuple):
    """One task of lm-evaluation-harness."""

    task: str
    questions: int
    metrics: list[tuple[str, float, str]]
    """Name, value, and what is said of it."""


class News(NamedTuple):
    """A compilation after the first update."""

    text: str
    unexpected: bool
    """Whether an update needed it; the first evaluation or sample of its shape may need one."""


@runtime_checkable
class Engine(Protocol):
    """A model with its optimizer, and how one update of it is computed.

    Of several processes each has an engine, and all make the same calls in the same order.
    """

    alone: bool
    """Whether this process is the only one of the run."""
    lag: int
    """Updates that may be under way while the metrics of the one before are read; 0 where `dispatch` returns
    only when an update is made: read later, it would seem to take no time."""
    device: Device
    heldout: Sequence[str]
    """Names of the held-out sets."""

    def agree(self, step: int, flags: Flags, now: bool = False) -> Flags:
        """Which flags are set in any process, as far as all of them know before update `step`.

        Every process gets the same answer; where there are several, it may come some updates late, unless
        `now` is asked for, for which they wait for each other.
        """

    def share(self, text: str) -> str:
        """The first process's text, in every process."""

    def dispatch(self, batch: LoadedBatch, step: int, lr: float, guard: GuardConfig) -> Any:
        """Starts update `step` (0-based) and returns, without waiting, what `read` takes.

        guard: its limits for this update; its window is the run's.
        """

    def read(self, pending: Any) -> Metrics:
        """Waits for an update and gives its metrics."""

    def news(self) -> Sequence[News]:
        """What was compiled since the last call, to be called after every update."""

    def score(self, split: str, limit: int | None, stop: Callable[[], bool]) -> Score | None:
        """The loss on a held-out set, or on about `limit` windows spread over it; None if stopped."""

    def evaluate_tasks(
        self, limit: int | None, stop: Callable[[], bool], say: Callable[[str], None]
    ) -> Iterable[TaskScore]:
        """The tasks of --eval-tasks, `limit` questions of each; fewer tasks if stopped, none without."""

    def sample(
        self, prompts: list[list[int]], sampling: Sampling, n: int, eos: int
    ) -> list[list[int]] | None:
        """At most `n` new ids for each prompt; None in a process that is not the first."""

    def start_profile(self, folder: Path) -> None:
        """Begins a trace of what the first process computes, to be written into `folder`."""

    def stop_profile(self) -> list[Operation]:
        """Ends the trace; gives the operations in it, none in a process that is not the first."""

    def save(self, manifest: Manifest) -> None:
        """Saves the newest state as checkpoint `manifest.step`, and deletes those no longer kept.

        May return before the checkpoint is on the disk, but not before the next update may be dispatched.

        Raises:
            UserError: the disk refuses, now or at an earlier save; the checkpoints that are there stay.
        """

    def wait(self) -> None:
        """Returns when the newest checkpoint is on the disk; raises what went wrong with it."""
