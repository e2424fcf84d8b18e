"""The run's log: what a resume drops, what a killed process left, numbers that JSON has not."""

import json
import math

from train_tpu.metrics import RunLog, bits_per_byte, plot_curve, read_log


def test_bits_per_byte_of_a_uniform_guess():
    # A byte model that knows nothing: ln 256 nats a token, a token a byte, 8 bits a byte.
    assert math.isclose(bits_per_byte(math.log(256), tokens=1000, n_bytes=1000), 8.0)
    # Tokens of four bytes, each guessed among 16: 4 bits for 4 bytes.
    assert math.isclose(bits_per_byte(math.log(16), tokens=250, n_bytes=1000), 1.0)


def write_steps(folder, steps, resume_step):
    log = RunLog(folder, resume_step)
    for step in steps:
        log.write(step, "train", tokens=step * 10, loss=5.0 - step / 10, nll=5.0 - step / 10)
        log.sample(step, [f"text {step}"])
    log.close()


def test_a_resume_drops_what_comes_again(tmp_path):
    write_steps(tmp_path, range(6), resume_step=0)
    write_steps(tmp_path, range(4, 8), resume_step=4)
    assert [row["step"] for row in read_log(tmp_path, "train")] == list(range(8))
    assert (tmp_path / "samples.txt").read_text().count("text 4") == 1


def test_a_line_cut_short_by_a_kill_is_dropped(tmp_path):
    write_steps(tmp_path, range(3), resume_step=0)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "kind": "tra')
    write_steps(tmp_path, range(3, 5), resume_step=3)
    assert [row["step"] for row in read_log(tmp_path, "train")] == list(range(5))


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


def test_a_line_that_a_killed_process_left_incomplete_is_not_read(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 1, "kind": "event", "what": "a"}\n{"step": 2, "kind": "ev'
    )
    assert [row["step"] for row in read_log(tmp_path, "event")] == [1]
