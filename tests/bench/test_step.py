"""`bench.step`: both its rows train, in the type that the device computes in."""

import math

import pytest

from bench.step import PLAIN, StepBenchConfig, measure
from tests.models import GROUPED
from tests.train_tpu.processes import refusal_here


@pytest.mark.slow
@pytest.mark.parametrize("who", [PLAIN, "auto/preset"])
def test_a_row_trains(who: str):
    """Fresh weights of standard deviation 0.02 tell no token from another: the loss is the logarithm of the
    vocabulary, and after an update lower on a batch that it has seen."""
    row = measure(StepBenchConfig(steps=3), "mtlm1-tiny", GROUPED, 2, who)
    assert row["batch"] == 2 and row["first_loss"] == pytest.approx(math.log(GROUPED.vocab_size), abs=0.3)
    assert row["loss"] < row["first_loss"] and row["ms"] > 0


def test_presets_for_a_gpu_are_not_tried_on_a_cpu(monkeypatch: pytest.MonkeyPatch):
    """The 40M's batch takes 84 GiB there."""
    monkeypatch.setattr("bench.step.in_process", lambda *_: {"platform": "cpu"})
    assert "--preset mtlm1-tiny --batch 4 tries" in refusal_here(module="bench.step")
