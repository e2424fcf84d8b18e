"""`bench.step`: both its rows train, in the type that the device computes in."""

import math

import pytest

from bench.step import PLAIN, StepBenchConfig, measure
from tests.models import GROUPED


@pytest.mark.slow
@pytest.mark.parametrize("who", [PLAIN, "auto/preset"])
def test_a_row_trains(who: str):
    """Fresh weights of standard deviation 0.02 tell no token from another: the loss is the logarithm of the
    vocabulary, and after an update lower on a batch that it has seen."""
    row = measure(StepBenchConfig(steps=3), "mtlm1-tiny", GROUPED, 2, who)
    assert row["batch"] == 2 and row["first_loss"] == pytest.approx(math.log(GROUPED.vocab_size), abs=0.3)
    assert row["loss"] < row["first_loss"] and row["ms"] > 0
