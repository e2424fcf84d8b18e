"""A live run is steered, in JAX and in PyTorch: by this process and by a second one."""

import shutil
import time
from collections.abc import Sequence

import pytest

import port_torch.training.trainer
from core.checkpoint.manifest import load_manifest
from core.checkpoint.steps import find_step
from core.run.log import read_log
from core.run.steering_queue import read_record, send
from tests.train_tpu.processes import (
    TINY,
    finish,
    losses,
    refusal_here,
    run,
    run_here,
    start,
    start_two,
    without,
)

MODULES = {"JAX": "train_tpu.run", "PyTorch": "port_torch.train"}


def settings_of(engine: str) -> Sequence[str]:
    """PyTorch has one optimizer."""
    return TINY if engine == "JAX" else without(TINY, "--optimizer")


# Until it is stopped; the guard of a window of 4 would halt it.
LONG = ("--steps", "100000", "--save-every", "100000", "--eval-every", "0", "--sigma", "0")
REPLAY = "train_tpu.replay.__main__"
STEERING = ("lr=0.5x", "guard.sigma=4", "skip=6:8")


@pytest.fixture
def no_result(monkeypatch: pytest.MonkeyPatch) -> None:
    """The run ends without the folder for transformers, which takes seconds."""
    monkeypatch.setattr(port_torch.training.trainer, "report_end", lambda *_: None)


@pytest.mark.parametrize(
    "engine", [pytest.param("JAX", marks=pytest.mark.slow), pytest.param("PyTorch", marks=pytest.mark.slow)]
)
def test_a_steered_run_is_the_same_to_the_bit_when_its_record_is_resumed(engine, cache, text, no_result):
    """From its own checkpoint, and from one of a run that was killed before it saved what was steered."""
    module, whole, killed = MODULES[engine], cache / f"steered-{engine}", cache / f"killed-{engine}"
    command = (*settings_of(engine), "--data", text, "--out")
    moment = "step 2/12" if engine == "JAX" else "step 3/12"  # in JAX another update is under way then
    run_here(*command, whole, module=module, moment=moment, then=lambda: send(whole, STEERING))
    assert read_record(whole) == [{"step": 4, "command": text} for text in STEERING]
    assert [step for step, _, _ in losses(whole)] == [0, 1, 2, 3, 4, 5, 8, 9, 10, 11]
    rates = {row["step"]: row["lr"] for row in read_log(whole, "train")}
    assert rates[4] == rates[3] / 2

    if engine == "JAX":  # from the start of the run, past the updates that were left out
        assert "equal to the log to the bit" in run_here(whole, "--step", "8", module=REPLAY)[0]
        assert "was left out" in refusal_here(whole, "--step", "7", module=REPLAY)

    plain = cache / f"plain-{engine}"
    run_here(*command, plain, "--stop-at", "3", module=module)
    assert losses(plain) == losses(whole)[:3]
    shutil.copytree(plain, killed)
    shutil.copy(whole / "steering.json", killed)
    run_here(*command, killed, module=module)
    assert losses(killed) == losses(whole)
    assert load_manifest(find_step(killed)).steering == load_manifest(find_step(whole)).steering

    out, _ = run_here(*command, whole, "--from-step", "9", module=module)
    assert losses(whole) == losses(killed)
    assert f"; steered: {', '.join(f'{text} at step 4' for text in STEERING)}" in " ".join(out.split())


@pytest.mark.slow
@pytest.mark.parametrize("engine", MODULES)
def test_a_second_process_pauses_changes_and_stops_a_run(engine, cache, text):
    folder = cache / f"live-{engine}"
    training = start(
        cache, *settings_of(engine), *LONG, "--data", text, "--out", folder, module=MODULES[engine],
    )  # fmt: skip
    while not (folder / "metrics.jsonl").exists() or len(losses(folder)) < 3:
        assert training.poll() is None, training.communicate()
        time.sleep(0.1)

    def steer(*words: str, expect: int = 0) -> str:
        assert training.poll() is None, training.communicate()
        out, err = run(cache, folder, *words, module="train_tpu.steer", expect=expect)
        return out + err

    assert "lr=0.5x" in steer("lr=0.5x", "save")
    assert "paused" not in steer("pause")
    before = len(losses(folder))
    assert "the run is paused already" in steer("pause", expect=2)
    assert "sample" in steer("sample", "The square")
    assert len(losses(folder)) == before
    steer("steps=+50", "continue")
    assert "stop" in steer("stop")
    ((code, out, err),) = finish([training])
    assert code == 3 and "paused at step" in out, err
    assert load_manifest(find_step(folder)).config["run"]["steps"] == 100050
    assert [entry["command"] for entry in read_record(folder)] == ["lr=0.5x", "steps=100050"]
    assert "no process trains the run" in refusal_here(folder, "save", module="train_tpu.steer")
    assert "0 or more" in refusal_here(folder, "guard.sigma=-2", module="train_tpu.steer")


@pytest.mark.slow
def test_two_processes_of_one_run_are_steered_at_the_same_step(cache, text):
    folder = cache / "steered-two"
    command = (*TINY, *LONG, "--batch", "8", "--mesh", "data=4")
    processes = start_two(cache, *command, "--data", text, "--out", folder)
    while not (folder / "metrics.jsonl").exists() or len(losses(folder)) < 3:
        assert all(process.poll() is None for process in processes), finish(processes)
        time.sleep(0.1)
    for words in (("lr=0.5x",), ("pause",), ("guard.halt_after=50", "continue"), ("stop",)):
        run(cache, folder, *words, module="train_tpu.steer")
    ended = finish(processes)
    assert [code for code, _, _ in ended] == [3, 3], ended
    assert [entry["command"] for entry in load_manifest(find_step(folder)).steering] == [
        "lr=0.5x", "guard.halt_after=50"
    ]  # fmt: skip
