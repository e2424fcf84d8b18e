"""What a start leaves that ends before its first update, and whom that binds; no process is started."""

import fcntl
import os
import shutil
from pathlib import Path

import pytest

from core import locks
from core.checkpoint.steps import step_path
from core.data.mixture import Phase
from core.errors import UserError
from core.run import tuning
from core.run.begun import has_begun
from core.run.folder import LOCK, check_run_folder, hold_folder, lock_folder, settings_of_run, write_config
from core.run.log import RunLog
from core.run.steering import Record
from core.run.steering_queue import write_record
from tests.core.run import test_data as mixed
from tests.core.run.test_folder import TOKENIZER, record
from train_tpu import run as command
from train_tpu import setup as preparing
from train_tpu.config import FinetuneConfig, RunConfig


def write_start(out: Path, **changes) -> None:
    """What a start has written before its first update, at the latest moment."""
    out.mkdir(exist_ok=True)
    write_config(out, record(**changes))
    (out / "tokenizer.json").write_text("{}")
    for name in ("checkpoints/.00000003.partial/state", "profile"):
        (out / name).mkdir(parents=True)
    log = RunLog(out, 0)
    log.write(0, "eval", split="valid", tokens=0, nll=5.5, perplexity=244.7, bits_per_byte=8.0)
    log.sample(0, ["a"])
    log.close()


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def log_update(out: Path) -> None:
    log = RunLog(out, 0)
    log.write(0, "train", tokens=0, loss=5.5, nll=5.5)
    log.close()


# Every way in which a run has something that a later start must keep to.
BEGUN = {
    "a checkpoint": lambda out: step_path(out / "checkpoints", 3).mkdir(),
    "one set aside": lambda out: (out / "checkpoints" / "damaged-00000003").mkdir(),
    "an update in the log": log_update,
    "a result": lambda out: (out / "model").mkdir(),
    "steering": lambda out: write_record(out, [Record(step=0, command="lr=0.5x")]),
}


@pytest.mark.parametrize("what", BEGUN)
def test_a_run_that_has_begun_is_kept_whatever_fails(what: str, tmp_path: Path):
    write_start(tmp_path)
    assert not has_begun(tmp_path)
    BEGUN[what](tmp_path)
    assert has_begun(tmp_path)
    before, config = names(tmp_path), (tmp_path / "config.json").read_bytes()
    with pytest.raises(UserError, match="--batch 16, not 8"), hold_folder(tmp_path, pytest.fail):
        check_run_folder(tmp_path, record(batch=8), (), RunConfig())
    assert names(tmp_path) == before | {LOCK} and (tmp_path / "config.json").read_bytes() == config


def test_a_start_that_fails_leaves_nothing(tmp_path: Path):
    for error in (UserError("out of memory"), KeyboardInterrupt(), RuntimeError("a mistake of ours")):
        with pytest.raises(type(error)), hold_folder(tmp_path / "runs" / "base", pytest.fail):
            write_start(tmp_path / "runs" / "base")
            raise error
        assert names(tmp_path) == set()


def test_what_was_there_before_a_start_that_fails_stays(tmp_path: Path):
    """An empty folder of the user, what was put into a new one meanwhile, and files named as ours are."""
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError), hold_folder(tmp_path / "empty", pytest.fail):
        write_start(tmp_path / "empty")
        raise UserError("out of memory")
    assert names(tmp_path / "empty") == set()
    with pytest.raises(UserError), hold_folder(tmp_path / "new", pytest.fail):
        write_start(tmp_path / "new")
        (tmp_path / "new" / "notes.txt").write_text("mine")
        raise UserError("out of memory")
    # The lock says that it is a run's folder, for the next start.
    assert names(tmp_path / "new") == {"notes.txt", LOCK}
    (tmp_path / "new" / "profile").mkdir()
    with pytest.raises(UserError), hold_folder(tmp_path / "new", pytest.fail):
        write_config(tmp_path / "new", record())
        raise UserError("out of memory")
    assert names(tmp_path / "new") == {"notes.txt", LOCK, "profile"}


def test_a_start_that_was_killed_is_replaced_and_its_settings_bind_nobody(tmp_path: Path):
    write_start(tmp_path / "run", grad_accum_steps=1)
    (tmp_path / "run" / "notes.txt").write_text("mine")
    shutil.move(tmp_path / "run" / "checkpoints", tmp_path / "disk")
    (tmp_path / "run" / "checkpoints").symlink_to(tmp_path / "disk")
    said = []
    with hold_folder(tmp_path / "run", said.append):
        assert names(tmp_path / "run") == {LOCK, "notes.txt", "checkpoints"} and (tmp_path / "disk").is_dir()
        check_run_folder(tmp_path / "run", record(grad_accum_steps=4), (), RunConfig())
    assert said == [f"the last start in {tmp_path}/run ended before its first update: this one replaces it"]
    with hold_folder(tmp_path / "run", pytest.fail):  # once
        pass


def test_a_config_json_that_is_no_runs_is_refused_and_left(tmp_path: Path):
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_text("{}")
    with pytest.raises(UserError, match=r"config.json is damaged"), hold_folder(tmp_path, pytest.fail):
        pass
    assert {"config.json", "tokenizer.json"} <= names(tmp_path)


def test_a_lock_that_a_failing_start_removes_meanwhile_is_taken_anew(tmp_path: Path, monkeypatch):
    """Else this process would hold a file that nobody else sees, and another one train into the folder."""
    flock, calls = fcntl.flock, []

    def late(*arguments):
        if not calls:
            (tmp_path / LOCK).unlink()
        calls.append(arguments)
        flock(*arguments)

    monkeypatch.setattr(locks.fcntl, "flock", late)
    with lock_folder(tmp_path) as lock:
        assert len(calls) == 2
        assert os.path.samestat(os.fstat(lock.fileno()), (tmp_path / LOCK).stat())
        with pytest.raises(UserError, match="another process"):
            lock_folder(tmp_path)


def test_its_settings_are_those_of_the_folder_alone(tmp_path: Path):
    """--out alone starts once more what was asked for; a command that says what to train stands as it is."""
    out = tmp_path / "run"
    write_start(out, batch=8, steps=77)
    given = ["--out", str(out)]

    def parsed(*more: str) -> tuple[int, int | None]:
        config = command.parse([*given, *more])
        return config.batch, config.steps

    assert parsed() == (8, 77) and parsed("--steps", "9") == (8, 9)
    for source in (("--preset", "mtlm1-tiny"), ("--data=text",), ("--init-from", "run")):
        assert parsed(*source) == (16, None)
    log_update(out)
    assert parsed("--preset", "mtlm1-tiny") == (8, 77)


def test_neither_a_mesh_nor_a_command_nor_a_mixture_binds_before_the_first_update(tmp_path: Path):
    run = tmp_path / "run"
    write_start(run, mesh="data=8")
    config = command.parse(["--out", str(run)])
    with pytest.raises(UserError, match=r"^--mesh data=8 needs 8 devices"):
        preparing.mesh_shape(config, run)

    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "a"}\n')
    tuned = FinetuneConfig(init_from=tmp_path, data=rows, out=tmp_path / "tuned")
    settings = {"compile": None, "lr": 1.0}
    theirs = {"run": settings, "model": {}, "tokenizer": TOKENIZER, "data": {"fingerprint": "f"}}
    tuned.out.mkdir()
    write_config(tuned.out, theirs)
    assert tuning.open_rows(tuned).rows
    assert settings_of_run(tuned.out, RunConfig(), []) == RunConfig()
    log_update(tuned.out)
    with pytest.raises(UserError, match=r"is of port_torch.finetune: resume it"):
        tuning.open_rows(tuned)
    with pytest.raises(UserError, match=r"is of port_torch.finetune: resume it"):
        settings_of_run(tuned.out, RunConfig(), [])
    write_config(tuned.out, theirs | {"run": settings | {"preset": "mtlm1-tiny"}})
    with pytest.raises(UserError, match=r"is of port_torch.train: resume it"):
        tuning.open_rows(tuned)

    assert mixed.start(tmp_path / "mixed") == mixed.FIRST
    longer = mixed.start(tmp_path / "mixed", steps=5000, allow_change=("steps", "mixture"))
    assert longer == (mixed.FIRST[0], Phase(4000 * mixed.BATCH, mixed.BOOKS))
