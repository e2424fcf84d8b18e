"""Figures derived from a log, and the curve of one that has numbers that JSON has not."""

import json
import math

from core.run.curve import plot_curve
from core.run.log import RunLog
from core.run.metrics import bits_per_byte


def test_bits_per_byte_of_a_uniform_guess():
    # A byte model that knows nothing: ln 256 nats a token, a token a byte, 8 bits a byte.
    assert math.isclose(bits_per_byte(math.log(256), tokens=1000, n_bytes=1000), 8.0)
    # Tokens of four bytes, each guessed among 16: 4 bits for 4 bytes.
    assert math.isclose(bits_per_byte(math.log(16), tokens=250, n_bytes=1000), 1.0)


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
