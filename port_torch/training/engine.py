"""The engine of PyTorch: the mirror and its optimizer, for the loop in core/run/loop.py."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from core.checkpoint.manifest import Manifest
from core.checkpoint.steps import Keep
from core.data.sequences import Batch, HeldOut
from core.run.cadence import NO_FLAGS, Flags
from core.run.engine import Device, Metrics, News, TaskScore
from core.run.guard import GuardConfig
from core.run.metrics import Score
from core.run.profiling import Operation
from core.sampling import Sampling
from kernels_cuda.library import Backend
from port_torch.training import checkpoint
from port_torch.training.distributed import Distributed
from port_torch.training.evaluate import score
from port_torch.training.profile import Trace
from port_torch.training.samples import Sampler
from port_torch.training.step import METRICS, TrainStep
from port_torch.training.watch import Watch


class Pending:
    """What an update reports, on its way to the host."""

    def __init__(self, on_device: Tensor, watched: bool):
        self.watched, self._event = watched, None
        if on_device.is_cuda:
            # A plain copy would wait for whatever was queued behind it as well.
            self._host = torch.empty(on_device.shape, pin_memory=True)
            self._host.copy_(on_device, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()
        else:
            self._host = on_device

    def read(self) -> list[float]:
        """Waits until it is there."""
        if self._event is not None:
            self._event.synchronize()
        return self._host.tolist()


class TorchEngine:
    """A `core.run.engine.Engine` on one device of one or several ranks."""

    def __init__(
        self,
        train_step: TrainStep,
        grad_accum_steps: int,
        rows: int,
        heldout: list[HeldOut],
        tasks: Any,
        checkpoints: Path,
        keep: Keep,
        watch: Watch | None = None,
        kernels: Backend = "auto",
    ):
        """grad_accum_steps: micro-batches of a rank; rows: of one of them.

        tasks: an eval.training.TaskEvaluator; None where no tasks are evaluated. watch: looks at updates.
        kernels: "torch" for samples by plain PyTorch whatever there is.
        """
        self.train_step, self._ranks = train_step, train_step.ranks
        self.alone = self._ranks.size == 1
        self.lag = 1 if self._ranks.device.type == "cuda" else 0
        self.device = Device(device_name(self._ranks), self._ranks.size)
        self.heldout: Sequence[str] = [one.name for one in heldout]
        self._grad_accum_steps, self._rows, self._tasks = grad_accum_steps, rows, tasks
        self._sets = {one.name: one for one in heldout}
        self._checkpoints, self._keep, self._watch = checkpoints, keep, watch
        self._sampler = Sampler(train_step, kernels)
        self._flags = self._heard = NO_FLAGS  # this rank's, and those that any rank had set

    def agree(self, step: int, flags: Flags, now: bool = False) -> Flags:
        """See `Engine`: every update sums up the flags of all ranks, so nothing waits for an exchange."""
        self._flags = flags
        if now:
            return Flags(*(self._ranks.largest(int(flag)) > 0 for flag in flags))
        return flags if self.alone else self._heard

    def share(self, text: str) -> str:
        """See `Engine`."""
        return self._ranks.share(text)

    def dispatch(self, batch: Batch, step: int, lr: float, guard: GuardConfig) -> Pending:
        """See `Engine`."""
        train_step, watch = self.train_step, self._watch
        train_step.guard.set_limits(guard)
        watched = watch is not None and step % watch.every == 0
        if watched:
            with train_step.autocast():
                tokens, _, *of_documents = next(
                    train_step.place(batch.rows.part(slice(self._rows))).micro_batches()
                )
                watch.before(tokens, *of_documents)
        reported = train_step.update(batch.rows, self._grad_accum_steps, step, lr, self._flags)
        return Pending(watch.after(reported) if watched else reported, watched)

    def read(self, pending: Pending) -> Metrics:
        """See `Engine`."""
        values = pending.read()
        found = dict(zip(METRICS, values, strict=False))
        self._heard = Flags(*(found[name] > 0 for name in Flags._fields))
        parameters, values = self.train_step.parameters, values[len(METRICS) :]
        norms, seen = values[: len(parameters)], values[len(parameters) :]
        return Metrics(
            loss=found["loss"],
            nll=found["nll"],
            grad_norm=found["grad_norm"],
            applied=found["applied"] > 0,
            streak=int(found["streak"]),
            skipped=int(found["skipped"]),
            leaf_norms=dict(zip(parameters, norms, strict=True)),
            watched=self._watch.record(seen, norms) if pending.watched else None,
        )

    def news(self) -> Sequence[News]:
        """See `Engine`."""
        return ()

    def score(self, split: str, limit: int | None, stop: Callable[[], bool]) -> Score | None:
        """See `Engine`."""
        return score(self.train_step, self._sets[split], self._rows, limit, stop)

    def evaluate_tasks(
        self, limit: int | None, stop: Callable[[], bool], say: Callable[[str], None]
    ) -> Iterable[TaskScore]:
        """See `Engine`."""
        return self._tasks.evaluate(self.train_step.decoder, limit, stop, say) if self._tasks else ()

    def sample(
        self, prompts: list[list[int]], sampling: Sampling, n: int, eos: int
    ) -> list[list[int]] | None:
        """See `Engine`."""
        if not self._ranks.first:
            return None
        return self._sampler.sample(prompts, sampling, n, eos)

    def start_profile(self, folder: Path) -> None:
        """See `Engine`."""
        self._trace = Trace(folder, self._ranks.device) if self._ranks.first else None

    def stop_profile(self) -> list[Operation]:
        """See `Engine`."""
        return self._trace.stop() if self._trace else []

    def save(self, manifest: Manifest) -> None:
        """See `Engine`: the first rank writes it, and returns when it is on the disk."""
        # The flags from before it that ask for a checkpoint are answered by this one.
        self._flags, self._heard = (flags._replace(late=False) for flags in (self._flags, self._heard))
        if self._ranks.first:
            checkpoint.save(self._checkpoints, self.train_step, manifest, self._keep)

    def wait(self) -> None:
        """See `Engine`."""


def device_name(ranks: Distributed) -> str:
    """What PyTorch calls the device."""
    return torch.cuda.get_device_name(ranks.device) if ranks.device.type == "cuda" else "cpu"
