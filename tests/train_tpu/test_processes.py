"""One run by several processes: the same losses, one folder, and an end for all when one of them dies."""

import re
import signal
import socket
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest

from core.checkpoint.manifest import load_manifest, verify
from core.checkpoint.steps import find_step, list_steps
from core.errors import UserError
from core.processes import SILENCE, join
from core.run.folder import lock_folder
from core.run.log import read_log
from tests.train_tpu.processes import TINY, finish, losses, refusal, run, start, start_two

pytestmark = pytest.mark.slow
# The words of its only line, without the numbers.
GLOO = set(
    re.findall(r"\S+", "[Gloo] Rank is connected to peer ranks. Expected number of connected peer ranks is :")
)
COMMON = (*TINY, "--batch", "8", "--mesh", "fsdp=2,tensor=2")  # over 2 processes of 2 devices


def wait_for_step(folder: Path, step: int) -> None:
    """Returns when a run has logged an update."""
    for _ in range(1200):
        if (folder / "metrics.jsonl").exists() and any(s >= step for s, _, _ in losses(folder)):
            return
        time.sleep(0.1)
    raise AssertionError(f"{folder} has not come to step {step}")


def test_two_processes_make_the_run_of_one(cache, text):
    folder, alone = cache / "two", cache / "alone"
    ended = finish(start_two(cache, *COMMON, "--data", text, "--out", folder, "--stop-at", "7"))
    assert [code for code, _, _ in ended] == [0, 0], ended
    (_, said, _), (_, other, _) = ended
    assert "devices     4 x cpu (cpu), fsdp=2,tensor=2" in said
    # The first speaks for both; Gloo, which carries what CPUs exchange, speaks for itself, and its threads
    # write into each other's lines.
    assert set(re.sub(r"\d+", " ", other).split()) <= GLOO, other
    # Their checkpoint is one of one process, which goes on with it.
    verify(find_step(folder))
    assert load_manifest(find_step(folder)).data["cursor"] == 7 * 8
    run(cache, *COMMON, "--data", text, "--out", folder, devices=4)
    run(cache, *TINY, "--batch", "8", "--data", text, "--out", alone)
    # As in test_run.py: sums in another order, amplified by 12 updates.
    np.testing.assert_allclose(np.array(losses(folder)), np.array(losses(alone)), rtol=2e-5)
    ours, theirs = (read_log(where, "eval")[0] for where in (folder, alone))
    assert ours["nll"] == pytest.approx(theirs["nll"], rel=1e-6)
    # Samples of the same parameters from the same keys, on a device of the first process.
    assert read_log(folder, "sample")[0]["texts"] == read_log(alone, "sample")[0]["texts"]


def test_a_signal_to_one_stops_both_and_the_same_command_goes_on(cache, text):
    folder, whole = cache / "signalled", cache / "unsignalled"
    command = (*COMMON, "--data", text, "--steps", "60", "--eval-every", "60")
    processes = start_two(cache, *command, "--out", folder)
    wait_for_step(folder, 4)
    processes[1].send_signal(signal.SIGTERM)
    ended = finish(processes)
    assert [code for code, _, _ in ended] == [3, 3], ended
    assert 0 < list_steps(folder / "checkpoints")[-1] < 60
    assert [code for code, _, _ in finish(start_two(cache, *command, "--out", folder))] == [0, 0]
    assert [code for code, _, _ in finish(start_two(cache, *command, "--out", whole))] == [0, 0]
    assert losses(folder) == losses(whole)  # to the bit


@pytest.mark.parametrize("victim", [0, 1])
def test_one_that_dies_ends_the_other_and_the_last_checkpoint_is_kept(cache, text, victim):
    folder = cache / f"died-{victim}"
    processes = start_two(cache, *COMMON, "--data", text, "--steps", "100000", "--out", folder)
    wait_for_step(folder, 8)
    processes[victim].kill()
    begun = time.monotonic()
    _, _, err = finish([processes[1 - victim]], timeout=3 * SILENCE)[0]
    assert time.monotonic() - begun < 2 * SILENCE
    assert processes[1 - victim].returncode not in (0, None)
    # Of its own exchange with the one that died, or from the service that the first runs for all.
    assert "another process of this run has ended" in err or "coordination service" in err, err[-3000:]
    processes[victim].wait()
    verify(find_step(folder))


SLOW = "tests.train_tpu.slow_commit"


def sentence(err: str) -> str:
    """The one sentence of a process that ended; nothing else is on stderr."""
    lines = [line for line in err.splitlines() if line.strip()]
    assert len(lines) == 1 and lines[0].startswith("error: "), err
    return lines[0]


def test_nobody_leaves_before_a_slow_commit_is_done(cache, text):
    """Committing takes three times as long as JAX waits for the last process to leave."""
    folder, environ = cache / "slow-disk", {"SEAL_SECONDS": "15"}
    command = (*COMMON, "--data", text, "--out", folder, "--save-every", "100", "--stop-at", "2")
    ended = finish(start_two(cache, *command, environs=(environ, environ), module=SLOW))
    assert [code for code, _, _ in ended] == [0, 0], ended
    assert list_steps(folder / "checkpoints") == [2]
    verify(find_step(folder))


def test_one_that_dies_does_not_take_the_commit_of_the_first_with_it(cache, text):
    """The first notices the death within 6 seconds, and needs 12 to commit."""
    folder, environ = cache / "died-in-commit", {"SEAL_SECONDS": "12", "SILENCE": "5"}
    command = (*COMMON, "--data", text, "--out", folder, "--save-every", "100", "--stop-at", "2")
    first, second = start_two(cache, *command, environs=(environ, environ), module=SLOW)
    assert any("committing" in line for line in first.stdout)
    second.kill()
    ((code, _, err),) = finish([first])
    assert code == 1 and "process 1 has not responded" in sentence(err)
    second.communicate()
    assert list_steps(folder / "checkpoints") == [2]
    verify(find_step(folder))


def test_a_damaged_checkpoint_is_passed_over_by_naming_an_older_one(cache, text):
    """--fallback, which the refusal of it names, is not for several processes: it says what is."""
    folder = cache / "damaged"
    command = (*COMMON, "--data", text, "--out", folder, "--stop-at", "6")
    assert [code for code, _, _ in finish(start_two(cache, *command))] == [0, 0]
    damaged = max(find_step(folder).rglob("*"), key=lambda path: path.is_file() and path.stat().st_size)
    damaged.write_bytes(b"X" + damaged.read_bytes()[1:])
    for code, _, err in finish(start_two(cache, *command, "--fallback")):
        assert code == 2 and "give --from-step N" in sentence(err)
    assert [code for code, _, _ in finish(start_two(cache, *command, "--from-step", "3"))] == [0, 0]
    assert [step for step, _, _ in losses(folder)] == [*range(6)]
    verify(find_step(folder))


def test_processes_that_would_resume_from_other_checkpoints_are_refused(cache, text):
    """They would train on from different states, or wait for each other for ever."""
    folder = cache / "shown-late"
    command = (*COMMON, "--data", text, "--out", folder)
    run(cache, *command, "--stop-at", "6", devices=4)
    steps, before = list_steps(folder / "checkpoints"), losses(folder)
    assert steps[-1] == 6 and len(steps) > 1
    first, second = finish(start_two(cache, *command, environs=({}, {"HIDDEN": "6"}), module=SLOW))
    assert (first[0], second[0]) == (2, 2)
    assert "processes [1] have different checkpoints in" in sentence(first[2])
    assert list_steps(folder / "checkpoints") == steps and losses(folder) == before


def test_folders_that_are_not_the_same_are_refused_at_once(cache, text, tmp_path):
    """As from two machines that share no disk: the same relative path in different places."""
    environs = [{"SEAL_SECONDS": "0", "WORK": str(tmp_path / name)} for name in ("one", "two")]
    for environ in environs:
        Path(environ["WORK"]).mkdir()
    ended = finish(start_two(cache, *COMMON, "--data", text, "--out", "run", environs=environs, module=SLOW))
    for code, _, err in ended:
        assert code == 2 and "not every process sees the folder" in sentence(err)
    assert not (tmp_path / "two" / "run").exists()


def test_processes_that_were_given_different_things_are_refused(cache, text):
    command = (*COMMON, "--data", text, "--out", cache / "different")
    ended = finish(start_two(cache, *command, second=("--lr", "0.02")))
    assert ended[0][0] == 2
    assert "processes [1] have different settings or data from process 0" in ended[0][2]
    assert not (cache / "different").exists()


def test_a_mistake_of_the_first_ends_both(cache, text):
    """It alone locks the run folder."""
    folder = cache / "taken"
    folder.mkdir()
    with lock_folder(folder):
        ended = finish(start_two(cache, *COMMON, "--data", text, "--out", folder))
    assert ended[0][0] == 2 and "another process" in sentence(ended[0][2])
    assert ended[1][0] == 2 and "process 0 of this run has ended: another process" in sentence(ended[1][2])


@pytest.mark.parametrize(
    "given, says",
    [
        ((None, 2, 0), "need --coordinator"),
        (("auto", 2, None), "from the environment"),
        (("localhost", 2, 0), "the form HOST:PORT"),
        (("localhost:1", 2, None), "a --process-id from 0 to N - 1"),
        (("localhost:1", 2, 2), "a --process-id from 0 to N - 1"),
        (("localhost:99999", 2, 0), "the form HOST:PORT"),
        (("localhost:0", 2, 0), "the form HOST:PORT"),
        (("localhost:http", 2, 0), "the form HOST:PORT"),
        (("localhost:", 2, 0), "the form HOST:PORT"),
        ((":1234", 2, 0), "the form HOST:PORT"),
        (("::1", 2, 0), "the form HOST:PORT"),
    ],
)
def test_what_does_not_belong_together(given, says):
    with pytest.raises(UserError, match=says):
        join(*given)


def test_a_port_that_another_run_listens_on_is_refused():
    """gRPC, whose listeners share a port, would let two runs have one, and connect processes to either."""
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        with pytest.raises(UserError, match=r"cannot listen on port [0-9]+ of --coordinator"):
            join(f"localhost:{taken.getsockname()[1]}", 2, 0)


def alone(cache: Path, text: Path, process: int, **environ: str) -> subprocess.Popen:
    """One process of two, whose other never comes."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    several = ("--coordinator", address, "--num-processes", "2", "--process-id", str(process))
    command = (*COMMON, "--data", text, "--out", cache / "alone-of-two", *several)
    return start(cache, *command, environ={"SEAL_SECONDS": "0"} | environ, module=SLOW)


@pytest.mark.parametrize("process", [0, 1])
def test_one_whose_others_do_not_come_says_so(cache, text, process):
    """JAX by itself aborts it with a stack of C++."""
    ((code, _, err),) = finish([alone(cache, text, process, ARRIVAL="3")])
    (line,) = [line for line in err.splitlines() if not line.startswith("waiting for the other processes")]
    assert code == 2 and re.match("error: not all processes of --coordinator .* came within 3 s: ", line), err
    assert not (cache / "alone-of-two").exists()


def test_ctrl_c_ends_the_wait_for_others(cache, text):
    process = alone(cache, text, 0)
    assert "waiting for the other processes" in process.stderr.readline()
    begun = time.monotonic()
    process.send_signal(signal.SIGINT)
    ((code, _, err),) = finish([process])
    assert (code, err) == (130, "interrupted\n") and time.monotonic() - begun < 10


def test_another_number_of_processes_is_refused(cache, text):
    """JAX takes that of the first, and the second would end for want of a third."""
    folder = cache / "two-or-three"
    command = (*COMMON, "--data", text, "--out", folder)
    first, second = finish(start_two(cache, *command, second=("--num-processes", "3")))
    assert second[0] == 2 and "--num-processes is 3 here and 2 in process 0" in sentence(second[2])
    assert first[0] == 2 and "process 1 of this run has ended: --num-processes is 3" in sentence(first[2])
    assert not folder.exists()


def test_no_environment_says_who_the_others_are(cache, text):
    assert "could not connect to each other" in refusal(cache, *TINY, "--data", text, "--coordinator", "auto")
