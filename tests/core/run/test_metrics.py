"""Figures derived from a log, and the curve of one that has numbers that JSON has not."""

import json
import math

import pytest

from core.run.curve import plot_curve
from core.run.log import RunLog
from core.run.metrics import bits_per_byte, make_score, model_flops_utilization


def test_bits_per_byte_of_a_uniform_guess():
    # A byte model that knows nothing: ln 256 nats a token, a token a byte, 8 bits a byte.
    assert math.isclose(bits_per_byte(math.log(256), tokens=1000, n_bytes=1000), 8.0)
    # Tokens of four bytes, each guessed among 16: 4 bits for 4 bytes.
    assert math.isclose(bits_per_byte(math.log(16), tokens=250, n_bytes=1000), 1.0)


def test_a_score_is_the_mean_of_what_was_scored():
    """100 of the text's 1,000 predictions, each among 16: 4 bits for 4 bytes."""
    score = make_score(100 * math.log(16), scored=100, tokens=1000, n_bytes=4000)
    assert score == pytest.approx((math.log(16), 16, 1.0, 100))
    assert make_score(800.0, 1, 1, 1).perplexity == math.inf  # e^800 is beyond float64


def test_flops_are_a_part_of_all_devices_peak():
    """A million tokens per second of 6 x 659 MFLOPs, on eight H200 of 989 TFLOP/s."""
    assert model_flops_utilization(1e6, 3_956_000_000, "NVIDIA H200", 8) == pytest.approx(0.5)
    assert model_flops_utilization(1e6, 3_956_000_000, "cpu", 8) is None


def test_numbers_that_are_not_finite_stay_readable(tmp_path):
    log = RunLog(tmp_path, 0)
    log.write(0, "train", loss=float("nan"), nll=1.0, tokens=0)
    log.write(1, "train", loss=float("inf"), nll=float("inf"), tokens=10)
    log.write(2, "train", loss=1.0, nll=1.0, tokens=20)
    log.write(2, "eval", split="valid", tokens=20, bits_per_byte=1.5)
    log.close()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line, parse_constant=lambda name: 1 / 0) for line in lines]
    assert [row.get("loss") for row in rows[:2]] == ["nan", "inf"]
    assert plot_curve(tmp_path).stat().st_size > 1000
