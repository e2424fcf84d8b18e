"""The guard: which updates are not applied, which states count as good, and what to do after a halt.

Formulas here take arrays of JAX and tensors of PyTorch alike, so that both trainers compute the same rule.
"""

import collections
import dataclasses
from pathlib import Path
from typing import Any

from core import checks
from core.checkpoint.manifest import Manifest, load_manifest
from core.checkpoint.steps import good_steps, step_path
from core.data.mixture import phase_number

EARLY = 16
"""Applied updates from which on the guard judges by what it has seen, before its window is full."""
DOUBLINGS = 9
"""How often the gradient norm's limit is doubled at most. With the default sigma it is then 4096
deviations, 120 times the mean where norms spread by 3%; what is higher is never applied."""
RECENT = 8
"""Applied updates whose mean loss is the level of a checkpoint."""


@dataclasses.dataclass(frozen=True)
class GuardConfig:
    """Loss and gradient spike guard: skips an update whose loss or gradient norm is non-finite or far above
    the recent average."""

    window: int = 128
    """Number of applied updates whose losses and gradient norms form the baseline. It starts empty, and is
    emptied by growth and when batch, data, document mask or z-loss change."""
    sigma: float = 8.0
    """Skip above mean + sigma standard deviations of the window, from 16 updates on; while it fills, sigma is
    larger by sqrt(window / updates), and of two high updates in a row only the first is skipped. Once it is
    full, sigma doubles for the gradient norm, not for the loss, with every update skipped in a row. 0 leaves
    only non-finite values."""
    halt_after: int = 10
    """Stop the run (exit code 5) after this many consecutive skipped updates."""

    def __post_init__(self) -> None:
        checks.counts(2, window=self.window)  # a spread needs two updates
        checks.not_negative(sigma=self.sigma)
        checks.counts(halt_after=self.halt_after)


def spike_limit(window: Any, held: Any, sigma: Any) -> Any:
    """The value above which an update is a spike.

    Early in training the level falls and few values stand in the window, so its deviation says little: the
    limit is wider by sqrt(W / n).

    Args:
        window: [W] losses or gradient norms of applied updates.
        held: [W] 1.0 where the window holds one, n of them; else 0.0.
        sigma: standard deviations above the mean.
    """
    n = held.sum()
    n = n + (n == 0)
    mean = (window * held).sum() / n
    spread = ((((window - mean) * held) ** 2).sum() / n) ** 0.5
    return mean + sigma * (window.shape[0] / n) ** 0.5 * spread


def norm_sigma(sigma: Any, streak: Any) -> Any:
    """Standard deviations above the mean beyond which a gradient norm is a spike: doubled by every update
    skipped in a row.

    A spike belongs to its batch, and the next batch is normal again. Norms that stay high are due to the
    parameters: where a pass over repeated text begins, they jump while losses fall, and one applied update
    brings them back, which skipping would put off for ever (docs/LOG.md, "The guard halted a run at the start
    of a pass"). A loss that stays high means that the run has diverged, so its limit stays.

    Args:
        sigma: of the loss, and of the norm while no update has been skipped.
        streak: updates skipped since the last applied one, an integer array.
    """
    return sigma * (1 << streak.clip(max=DOUBLINGS))


def can_judge(accepted: Any, window: int, streak: Any) -> Any:
    """Whether the next update may be skipped for being high.

    Enough updates must stand in the window. And while it fills, the rate rises and parameters overshoot: then
    all batches are high until an update has mended it, which skipping would put off for ever (docs/LOG.md,
    "The guard halted runs that would have recovered"). So the one after a skipped update is applied.

    Args:
        accepted: updates applied since the window was empty.
        streak: updates skipped since the last applied one.
    """
    return (accepted >= min(EARLY, window)) & ((accepted >= window) | (streak == 0))


def changed_measure(old: Manifest, new: Manifest) -> list[str]:
    """Names of the changed settings that the level or noise of loss and gradient norm depend on: the guard's
    window is then emptied. The learning rate is not one of them: the window protects from one that is too
    high."""
    before, after = _measure(old), _measure(new)
    return [name for name in after if before[name] != after[name]]


def _measure(manifest: Manifest) -> dict[str, Any]:
    run, model = manifest.config.get("run", {}), manifest.config.get("model", {})
    data = (manifest.data or {}).get("fingerprint")
    return {
        "batch": run.get("batch"),
        "z_loss": run.get("z_loss", 0.0),
        "document_mask": run.get("document_mask", False),
        "data": data,
        "layers": model.get("n_layers"),
    }


class Health:
    """What losses and skips say of the state that a run is in."""

    def __init__(self, checkpoints: Path, manifest: Manifest):
        """checkpoints: the run's folder of them, good ones among them with a level to compare with.

        manifest: of the checkpoint that the run resumes from, with its settings now; levels of other data or
            batches do not compare.
        """
        self._checkpoints = checkpoints
        self._recent: collections.deque[float] = collections.deque(maxlen=RECENT)
        self._streak = 0
        self._best: float | None = None
        if manifest.health and manifest.health["loss"] is not None:
            self._recent.append(manifest.health["loss"])
        phase = phase_number(manifest.data, manifest.sequences)
        for step in good_steps(checkpoints):
            old = load_manifest(step_path(checkpoints, step))
            same = old.data is not None and phase_number(old.data, old.sequences) == phase
            if old.health and same and not changed_measure(old, manifest):
                self._note(old.health["loss"])

    def _note(self, loss: float | None) -> None:
        if loss is not None:
            self._best = loss if self._best is None else min(self._best, loss)

    def forget(self) -> None:
        """Levels seen so far compare no longer: the mixture of the data changes."""
        self._recent.clear()
        self._best = None

    def see(self, loss: float, streak: int) -> None:
        """Takes the loss of the newest update, and how many in a row were not applied up to it."""
        self._streak = streak
        if not streak:
            self._recent.append(loss)

    @property
    def loss(self) -> float | None:
        """Mean loss of the newest applied updates; None before the first."""
        return sum(self._recent) / len(self._recent) if self._recent else None

    @property
    def rose(self) -> bool:
        """Whether the loss is above that of the best checkpoint by more than a tenth and 0.1 nats: more than
        the noise of a mean of 8, less than what a ruined model shows."""
        return self._best is not None and self.loss is not None and self.loss > 1.1 * self._best + 0.1

    def record(self) -> dict[str, Any]:
        """What the manifest of a checkpoint says; the level is remembered if the state is good."""
        good = not self._streak and not self.rose
        if good:
            self._note(self.loss)
        return {"good": good, "loss": self.loss, "streak": self._streak}

    def after_halt(self, step: int) -> str:
        """What is saved as `step`, and the ways out."""
        good = [other for other in good_steps(self._checkpoints) if other < step]
        if self.rose:
            said = (
                f"step {step} is saved, but the training loss has risen from {self._best:.4g} to "
                f"{self.loss:.4g}, so the same command is unlikely to recover"
            )
        else:
            said = (
                f"the state before them is saved as step {step}, and the same command resumes after their "
                "batches"
            )
        if good:
            older = f"--from-step {good[-1]} --lr LOWER --allow-change lr resumes from an older checkpoint"
        else:
            older = "there is no older checkpoint: start anew, with a lower --lr or more --warmup"
        return (
            f"{said}; {older}; metrics.jsonl (kind skip) lists the records of these batches; "
            "--sigma 0 --allow-change sigma skips only non-finite values"
        )
