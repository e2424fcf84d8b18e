"""The command train_tpu.replay: updates made again equal the log, planted faults are found by name."""

import hashlib
import json
import re
import shlex
import shutil
from pathlib import Path

import pytest

from core.checkpoint.steps import list_steps
from core.run.log import read_log
from tests.train_tpu.processes import TINY, losses, make_text, refusal_here, run, run_here

REPLAY = "train_tpu.replay.__main__"
RUN = (*TINY, "--sample-every", "0", "--grad-accum-steps", "2")
EQUAL = "equal to the log to the bit"


@pytest.fixture(scope="module")
def made(cache, text):
    """A run with dropout and two micro-batches, stopped and resumed, whose guard refused updates; and what it
    said."""
    folder = cache / "replayed"
    # At such a rate losses jump, and a limit of 0.01 standard deviations refuses many updates.
    arguments = (
        *RUN,
        "--data",
        text,
        "--out",
        folder,
        "--lr",
        "0.5",
        "--sigma",
        "0.01",
        "--halt-after",
        "99",
    )
    first, _ = run_here(*arguments, "--stop-at", "7")
    second, _ = run_here(*arguments)
    return folder, first + second


def contents(folder: Path) -> dict[str, str]:
    """The sha256 of every file."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_the_command_that_the_guard_prints_makes_a_refused_update_again(made):
    folder, said = made
    before = contents(folder)
    commands = re.findall(r"to look into it: python -m train_tpu\.replay (.*)", said)
    refused = [row["step"] for row in read_log(folder, "skip") if row["streak"] == 1]
    assert [shlex.split(typed) for typed in commands] == [
        [str(folder), "--step", str(step)] for step in refused
    ]
    out, _ = run_here(*shlex.split(commands[-1]), module=REPLAY)
    step, loss, norm = losses(folder)[refused[-1]]
    assert f"update {step}: loss {loss!r}, gradient norm {norm!r}" in out
    assert EQUAL in out and "the guard refused it" in out
    assert contents(folder) == before


def test_an_update_is_equal_from_a_checkpoint_and_from_the_start(made):
    """Across the resume, too: it was at step 7, from which no checkpoint is left any more."""
    folder, _ = made
    assert list_steps(folder / "checkpoints") == [3, 6, 9, 12]
    out, _ = run_here(folder, "--step", "8", module=REPLAY)
    assert "from checkpoint 6: 3 updates to make again" in out and f"{EQUAL}, and so are the 2 before" in out
    out, _ = run_here(folder, "--step", "2", module=REPLAY)
    assert "from the start of the run: 3 updates to make again" in out
    assert f"{EQUAL}, and so are the 2 before it" in out


def test_a_log_that_says_something_else_is_compared(made, tmp_path):
    folder = shutil.copytree(made[0], tmp_path / "run")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        if row["kind"] == "train" and row["step"] == 11:
            row["loss"] *= 1.001
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out, _ = run_here(folder, "--step", "11", module=REPLAY)
    assert EQUAL not in out and "differ by 1.0e-03" in out and "beyond the 2e-05" in out
    assert "equality was to be expected" in out


def test_what_cannot_be_replayed_is_refused(made, text, tmp_path):
    folder, _ = made
    assert "has made updates 0 to 11: --step 12 is not" in refusal_here(folder, "--step", "12", module=REPLAY)
    assert "--step is -1; it must not be" in refusal_here(folder, "--step", "-1", module=REPLAY)
    assert "is not the folder of a run" in refusal_here(tmp_path / "no", "--step", "1", module=REPLAY)
    other = make_text(tmp_path, repeats=59)
    said = refusal_here(folder, "--step", "1", "--data", other, module=REPLAY)
    fingerprint = json.loads((folder / "config.json").read_text())["data"]["fingerprint"]
    assert "has changed" in said and str(other) in said and fingerprint[:12] in said
    said = refusal_here(folder, "--step", "1", "--data", tmp_path / "gone.jsonl", module=REPLAY)
    assert "cannot be opened" in said and "gone.jsonl" in said and fingerprint[:12] in said


@pytest.mark.slow
def test_eight_devices_repeat_themselves_and_one_is_within_the_spread(cache, text):
    folder = cache / "replayed-on-eight"
    run(cache, *RUN, "--batch", "16", "--data", text, "--out", folder, devices=8)
    out, _ = run(cache, folder, "--step", "11", module="train_tpu.replay", devices=8)
    assert EQUAL in out
    out, _ = run(cache, folder, "--step", "11", module="train_tpu.replay", devices=1)
    assert EQUAL in out or "within the 2e-05" in out
    assert EQUAL in out or "8 x cpu made the update, and here are 1 x cpu" in out
