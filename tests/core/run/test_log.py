"""The run's log: what a resume drops, what a killed process left, lines that cannot be read."""

from pathlib import Path

import pytest

from core.run.curve import plot_curve
from core.run.log import METRICS, RunLog, read_log


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


def test_a_line_that_a_killed_process_left_incomplete_is_not_read(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 1, "kind": "event", "what": "a"}\n{"step": 2, "kind": "ev'
    )
    assert [row["step"] for row in read_log(tmp_path, "event")] == [1]


DAMAGES = {
    "not JSON": b'{"step": 2, "ki\n',
    "not UTF-8": b'{"step": 2, "kind": "event", "what": "\xff"}\n',
    "a hole of zeros": b"\0" * 4096 + b"\n",
    "no object": b"[1, 2]\n",
    "another key": b'{"step": 2, "kinc": "train", "loss": 1.0}\n',
    "no number": b'{"step": 2, "kind": "train", "tokens": 20, "loss": [], "nll": 1.0}\n',
    "nested without end": b"[" * 100_000 + b"\n",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_line_is_set_aside_once_and_stops_nothing(tmp_path: Path, damage: str):
    write_steps(tmp_path, range(5), resume_step=0)
    path = tmp_path / METRICS
    lines = path.read_bytes().splitlines(keepends=True)
    lines.insert(4, DAMAGES[damage])
    path.write_bytes(b"".join(lines))
    assert [row["step"] for row in read_log(tmp_path, "train")] == list(range(5))
    if damage == "no number":  # the curve is drawn of what is read
        assert plot_curve(tmp_path).stat().st_size > 1000

    log = RunLog(tmp_path, 4)
    assert "1 lines of" in log.notice and "metrics.damaged.jsonl" in log.notice
    log.sample(4, ["text 4"])
    log.close()
    assert (tmp_path / "metrics.damaged.jsonl").read_bytes() == DAMAGES[damage]
    assert [row["step"] for row in read_log(tmp_path, "train")] == list(range(4))
    again = RunLog(tmp_path, 5)
    assert again.notice is None  # named once
    again.close()


def test_a_log_that_is_gone_is_begun_again(tmp_path: Path):
    write_steps(tmp_path, range(3), resume_step=0)
    (tmp_path / METRICS).unlink()
    assert read_log(tmp_path, "event") == []
    log = RunLog(tmp_path, 3)
    assert "begins at step 3" in log.notice
    log.write(3, "train", tokens=30, loss=1.0, nll=1.0)
    log.close()
    assert [row["step"] for row in read_log(tmp_path, "train")] == [3]
    assert plot_curve(tmp_path).stat().st_size > 1000
