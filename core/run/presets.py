"""The training defaults of each preset, and the number of steps of a run."""

import dataclasses
from typing import Any

from core import checks
from core.data.batches import Data
from core.errors import UserError

# What a preset is trained with if nothing else is said; docs/RESULTS.md has the measurements. lr is Muon's,
# tuned over so many tokens (rates.py leads to other lengths); adamw_lr is that of AdamW alone (docs/LOG.md).
_TINY = {
    "steps": 350, "batch": 16, "tokenizer": "bytes", "lr": 1e-2, "adamw_lr": 3e-3, "warmup": 50, "decay": 0.2,
}  # fmt: skip
_LARGE = {"epochs": 1.0, "batch": 64, "tokenizer": "mistral", "adamw_lr": 1e-3, "warmup": 200, "decay": 0.4}
TRAINING_DEFAULTS: dict[str, dict[str, Any]] = {
    "mtlm1-tiny": _TINY,
    "mtlm2-tiny": _TINY,
    "mtlm1-88m": _LARGE | {"lr": 1.7e-3, "tokens": 130.5e6},
    "mtlm1-200m": _LARGE | {"lr": 1.7e-3, "tokens": 130.5e6},
    "mtlm2-40m": _LARGE
    | {"epochs": 2.0, "batch": 128, "lr": 5.6e-3, "adamw_lr": 1.5e-3, "warmup": 100, "tokens": 261e6},
    # Not measured.
    "smollm2-135m": _LARGE | {"lr": 1e-3},
    "smollm2-360m": _LARGE | {"lr": 1e-3},
    "qwen3-0.6b": _LARGE | {"lr": 1e-3},
}


@dataclasses.dataclass(frozen=True)
class Trained:
    """What a run has been trained on where it continues, maybe with another batch than from there on."""

    step: int = 0
    sequences: int = 0

    def sequences_at(self, step: int, batch: int) -> int:
        """Sequences read by a later step."""
        return self.sequences + (step - self.step) * batch

    def describe(self, steps: int, batch: int, context: int) -> str:
        """All steps of the run, and how many tokens those are."""
        total = f"{self.sequences_at(steps, batch) * context:,}"
        if self.sequences == self.step * batch:
            return f"{steps:,} steps of {batch} x {context} = {total}"
        return f"{steps:,} steps, from {self.step:,} on of {batch} x {context}, in all {total}"


def count_steps(config: Any, dataset: Data, before: Trained) -> int:
    """Updates of the whole run: --steps, or as many whole batches as --epochs holds, or the preset's. The
    sequences that were read `before` count towards the epochs."""
    windows = dataset.splits["train"].windows
    given = TRAINING_DEFAULTS[config.preset]
    steps, epochs = config.steps, config.epochs
    if steps is None and epochs is None:
        steps, epochs = given.get("steps"), given.get("epochs")
    if steps is None:
        steps = before.step + int((epochs * windows - before.sequences) // config.batch)
        checks.counts(0, epochs=steps)
    if steps < 1:
        raise UserError(
            f"the training data holds {windows} windows of {dataset.context} tokens, fewer than one batch of "
            f"{config.batch}: give more text, a smaller --batch or a smaller --context"
        )
    return steps
