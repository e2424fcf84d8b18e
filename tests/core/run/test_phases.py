"""What changes where the mixture of a run's data does: the guard's limits, and which losses are compared."""

import numpy as np

from core.checkpoint.manifest import Manifest
from core.checkpoint.steps import step_path
from core.run.guard import EARLY, GuardConfig, Health, can_judge, spike_limit
from core.run.phases import phase_limits

BATCH = 4
DATA = {
    "fingerprint": "f",
    "mixture": {"sources": {}, "phases": [{"first": n * BATCH, "windows": {"a": 1}} for n in (0, 200)]},
}


def test_the_first_updates_of_a_phase_are_no_spikes():
    """The rule of both engines, over a run whose losses rise from 2 to 3 where the second phase begins."""
    rng, config = np.random.default_rng(0), GuardConfig()
    losses = np.r_[rng.normal(2, 0.02, 200), rng.normal(3, 0.02, 200)]

    def refused(data: dict) -> list[int]:
        window: list[float] = []
        found, streak = [], 0
        for step, loss in enumerate(losses):
            limits = phase_limits(config, data, step * BATCH, BATCH)
            assert limits.window == config.window and limits.halt_after == config.halt_after
            kept = np.array(window[-config.window :])
            padded = np.r_[kept, np.zeros(config.window - len(kept))]
            held = (np.arange(config.window) < len(kept)).astype(float)
            judged = can_judge(len(window), config.window, streak) and limits.sigma > 0
            if judged and loss > spike_limit(padded, held, limits.sigma):
                found.append(step)
                streak += 1
            else:
                window.append(loss)
                streak = 0
        return found

    assert refused({"fingerprint": "f"})[:10] == list(range(200, 210))  # which would halt the run
    assert refused(DATA) == []


def test_limits_are_those_of_the_run_but_for_a_phase_that_begins():
    config = GuardConfig(sigma=5)
    lenient = [n for n in range(400) if phase_limits(config, DATA, n * BATCH, BATCH).sigma == 0]
    assert lenient == list(range(200, 200 + EARLY))
    # Of another batch size, which does not begin where the phase does.
    other = [first for first in range(1, 1600, 7) if phase_limits(config, DATA, first, 7).sigma == 0]
    assert len(other) == EARLY and other[0] <= 800 < other[0] + 7


def test_a_checkpoint_is_good_by_the_losses_of_its_own_phase(tmp_path):
    def manifest(step: int, loss: float | None) -> Manifest:
        health = None if loss is None else {"good": True, "loss": loss, "streak": 0}
        return Manifest(
            kind="train", step=step, sequences=step * BATCH, tokens=0, config={"model": {}, "run": {}},
            tokenizer={}, data={**DATA, "cursor": step * BATCH}, health=health,
        )  # fmt: skip

    for step, loss in ((100, 2.0), (200, 1.9), (300, 3.0)):
        where = step_path(tmp_path, step)
        where.mkdir(parents=True)
        (where / "manifest.json").write_text(manifest(step, loss).to_json())
    first, second = Health(tmp_path, manifest(199, None)), Health(tmp_path, manifest(300, 3.0))
    for health in (first, second):
        health.see(3.05, 0)
    assert first.rose and not second.rose
    first.forget()
    first.see(3.05, 0)
    assert not first.rose and first.record() == {"good": True, "loss": 3.05, "streak": 0}
