"""Steering: what may be typed, what it makes of a run, and that a record of it gives the same run again."""

import contextlib
import dataclasses
import io
import itertools
import json
import threading
import time
from pathlib import Path

import pytest
from rich.console import Console

from core.checkpoint.manifest import MANIFEST, Manifest, load_manifest
from core.checkpoint.steps import step_path
from core.errors import UserError
from core.run.commands import Steering
from core.run.folder import lock_folder, write_config
from core.run.guard import GuardConfig
from core.run.interrupt import EXIT_FINISHED, EXIT_KEPT, EXIT_SAVED
from core.run.log import RunLog, next_step, read_log
from core.run.schedule import OptimizerConfig, learning_rate
from core.run.steering import Record, Steered, parse, resumed, settle, steered, steered_length
from core.run.steering_queue import Inbox, answers, holder, read_record, send
from tests.core.run.test_loop import FakeEngine, batches, events, make_loop
from tests.port_torch.test_ranks import Meeting

OPTIM = OptimizerConfig(lr=0.01, warmup=0, decay=0.2)
RUN = {"steps": 100, **dataclasses.asdict(OPTIM), **dataclasses.asdict(GuardConfig())}
START = Steered(OPTIM, GuardConfig(), 100)


@contextlib.contextmanager
def running(out: Path, steps: int = 100):
    """A folder that a process trains into: its inbox."""
    record = {"run": RUN | {"steps": steps}, "model": {}, "tokenizer": {}, "data": {"fingerprint": "f"}}
    with lock_folder(out):
        write_config(out, record)
        with contextlib.closing(RunLog(out, 0)):
            yield Inbox(out, record)


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("lr=0x", "above 0"), ("lr=-1", "above 0"), ("lr=nan", "above 0"), ("lr=1e999", "above 0"),
        ("lr=101x", "from 0.01x to 100x"), ("lr=0.001x", "from 0.01x"), ("lr=2", "at most 1"),
        ("lr=2xx", "above 0"), ("guard.sigma=-1", "0 or more"), ("guard.halt_after=0", "1 to 2,147,483,647"),
        ("skip=5:5", "the one after the last"), ("skip=7", "the one after the last"), ("steps=+0", r"\+2000"),
        ("guard.halt_after=2147483648", "1 to 2,147,483,647"), ("guard.sigma=1e999", "0 or more"),
        ("skip=5:2147483648", "the one after the last"), ("steps=2147483648", r"\+2000"),
        ("steps=1e3", r"\+2000"), ("sample", "needs a prompt"), ("momentum=1", "not a command"),
        ("lr", "not a command"), ("guard.window=5", "not a command"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_when_it_is_typed_with_its_range(typed: str, said: str):
    with pytest.raises(UserError, match=said):
        parse([typed])


@pytest.mark.parametrize(
    "typed", ["lr=1", "lr=100x", "lr=0.01x", "lr=1e-9", "guard.sigma=0", "guard.halt_after=1",
              "guard.halt_after=2147483647", "skip=0:1", "skip=5:2147483647", "steps=1", "steps=-1",
              "steps=2147483647"],
)  # fmt: skip
def test_the_ends_of_the_ranges_that_a_refusal_names_are_taken(typed: str):
    name, value = typed.split("=")
    assert parse([typed]) == [(name, value)]


def test_a_record_gives_the_settings_of_every_update():
    records = [
        Record(step=3, command="lr=0.5x"), Record(step=5, command="skip=6:8"),
        Record(step=5, command="guard.sigma=2"), Record(step=9, command="lr=0.5x"),
        Record(step=9, command="steps=200"), Record(step=12, command="lr=0.004"),
    ]  # fmt: skip
    rates = [steered(START, records, step).lr(step) for step in (2, 3, 8, 9, 12, 90)]
    assert rates == [0.01, 0.005, 0.005, 0.0025, 0.004, 0.004 * 10 / 20]  # the decay of the run's 100 steps
    assert [step for step in range(20) if steered(START, records, step).leaves_out(step)] == [6, 7]
    assert [steered(START, records, step).guard.sigma for step in (4, 5)] == [8, 2]


def test_the_length_is_the_last_that_was_steered_from_a_step_on():
    records = [
        Record(step=3, command="steps=120"), Record(step=5, command="steps=200"),
        Record(step=5, command="steps=150"), Record(step=9, command="lr=0.5x"),
    ]  # fmt: skip
    assert [steered_length(records, since) for since in (0, 3, 4, 5, 6, 9)] == [150] * 4 + [None] * 2


def test_other_steps_are_taken_if_no_rate_that_was_used_would_have_been_another():
    def rates(steps: int, step: int, optim: OptimizerConfig) -> list[float]:
        return [learning_rate(optim, s, steps) for s in range(step + 1)]

    allowed = 0
    for optim in (OPTIM, dataclasses.replace(OPTIM, schedule="cosine", warmup=10)):
        for step in (5, 60, 79, 80, 81, 99):
            for change in ("steps=+50", "steps=-10", "steps=101", "steps=100"):
                now = Steered(optim, GuardConfig(), 100)
                (command,) = parse([change])
                try:
                    steps = int(settle(command, now, step).value)
                except UserError:
                    continue
                allowed += 1
                assert rates(steps, step, optim) == rates(100, step, optim), (change, step)
    assert allowed > 10
    with pytest.raises(UserError, match=r"would make the learning rate jump at step 90 from .* to 1 of its "
                       r"peak.*--steps 150 --schedule-start 90 --warmup 6 --allow-change steps"):  # fmt: skip
        settle(parse(["steps=+50"])[0], START, 90)
    with pytest.raises(UserError, match="more than the 60"):
        settle(parse(["steps=60"])[0], START, 60)


@pytest.mark.parametrize(("typed", "said"), [("skip=3:6", "at step 4"), ("skip=9:101", "ends at step 100")])
def test_updates_that_are_made_or_beyond_the_end_are_not_left_out(typed: str, said: str):
    with pytest.raises(UserError, match=said):
        settle(parse([typed])[0], START, 4)


@pytest.mark.parametrize("typed", ["skip=4:6", "skip=99:100"])
def test_the_next_update_and_the_last_may_be_left_out(typed: str):
    (command,) = parse([typed])
    assert settle(command, START, 4) == command


def test_a_setting_that_a_resume_changes_by_name_holds_from_there_on():
    saved = [Record(step=3, command="lr=0.5x")]
    kept = [*saved, Record(step=6, command="skip=7:8"), Record(step=6, command="lr=0.5x")]
    assert resumed(saved, kept, RUN, RUN, 5) == kept
    assert resumed(saved, None, RUN, RUN, 5) == saved
    changed = resumed(saved, kept, RUN, RUN | {"lr": 0.002}, 5)
    again = dataclasses.replace(START, optim=dataclasses.replace(OPTIM, lr=0.002))
    assert [steered(again, changed, step).lr(step) for step in (4, 5, 9)] == [0.001, 0.002, 0.002]
    assert steered(again, changed, 7).leaves_out(7)


def test_there_is_nothing_to_steer_where_no_process_trains(tmp_path: Path):
    with pytest.raises(UserError, match="is not a run"):
        send(tmp_path, ["save"])
    with running(tmp_path / "run"):
        pass
    with pytest.raises(UserError, match="no process trains the run"):
        send(tmp_path / "run", ["save"])
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 3, "kind": "event", "what": "end"}\n')
    with pytest.raises(UserError, match="has finished"):
        send(tmp_path / "run", ["save"])
    assert not (tmp_path / "run" / "steer").exists()


def test_a_command_is_checked_against_where_the_run_is_and_one_for_an_earlier_process_is_dropped(
    tmp_path: Path,
):
    with running(tmp_path) as inbox:
        (tmp_path / "metrics.jsonl").write_text(
            '{"step": 90, "kind": "train", "tokens": 1, "loss": 1, "nll": 1}\n'
        )
        assert next_step(tmp_path) == 91
        for typed in (["steps=+50"], ["save", "skip=80:95"], []):
            with pytest.raises(UserError):
                send(tmp_path, typed)
        assert not inbox.waiting()
        send(tmp_path, ["lr=0.5x", "sample", "a b"])
        assert inbox.waiting()
    with running(tmp_path) as inbox:
        send(tmp_path, ["save"])
        (tmp_path / "steer" / "notes.json").write_text("{")
        assert [typed.words for typed in inbox.take()] == [["save"], ["notes.json"]]
        assert not inbox.waiting()
    assert holder(tmp_path) is None


def test_a_second_start_that_is_refused_leaves_the_first_its_name(tmp_path: Path):
    with running(tmp_path) as inbox:
        with pytest.raises(UserError, match="another process"):
            lock_folder(tmp_path)
        send(tmp_path, ["save"])
        assert len(inbox.take()) == 1


def steer_at(engine: FakeEngine, out: Path, at: dict[int, list[str]]) -> None:
    """Has commands typed while updates are dispatched: they are taken before the next."""
    for step, words in at.items():
        engine.before[step] = lambda words=words: send(out, words)


OPTIONS = {"optim": OPTIM, "steps": 100, "end": 20, "stop_at": 20, "eval_every": 0, "sample_every": 0}


def test_a_live_run_obeys_at_a_step_boundary_and_records_it(tmp_path: Path):
    engine = FakeEngine()
    with running(tmp_path) as inbox:
        loop = make_loop(tmp_path, engine, **OPTIONS)
        loop = dataclasses.replace(loop, inbox=inbox)
        steer_at(engine, tmp_path, {
            2: ["lr=0.5x", "guard.sigma=3"], 5: ["skip=8:10", "evaluate", "save"], 6: ["sample", "be"],
            11: ["steps=+100", "skip=9:20"], 15: ["stop"],
        })  # fmt: skip
        assert loop.run() == EXIT_SAVED
    assert sorted(engine.controls) == [0, 1, 2, 3, 4, 5, 6, 7, *range(10, 16)]
    assert [engine.controls[step][0] for step in (2, 3, 15)] == [0.01, 0.005, 0.005]
    assert [engine.controls[step][1].sigma for step in (2, 3)] == [8, 3]
    assert [call for call in engine.calls if call[0] in ("score", "save", "sample")] == [
        ("score", 512), ("save", 6), ("sample", 96), ("save", 16)
    ]  # fmt: skip
    saved = engine.saved[-1]
    assert (saved.sequences, saved.config["run"]["steps"]) == (64, 200)
    assert saved.steering == read_record(tmp_path) == [
        {"step": 3, "command": "lr=0.5x"}, {"step": 3, "command": "guard.sigma=3"},
        {"step": 6, "command": "skip=8:10"}, {"step": 12, "command": "steps=200"},
    ]  # fmt: skip
    assert Manifest.from_json(saved.to_json()).steering == saved.steering
    assert json.loads((tmp_path / "config.json").read_text())["run"]["steps"] == 200
    refused = [row["why"] for row in read_log(tmp_path, "event") if row["what"] == "not steered"]
    assert len(refused) == 1 and "at step 12 already" in refused[0]
    assert events(tmp_path)[-1] == "interrupted by the command stop"


def test_what_is_answered_is_recorded(tmp_path: Path, monkeypatch):
    """A process that is killed right after its answer has the command at its next start."""
    with running(tmp_path) as inbox:
        log = RunLog(tmp_path, 0)
        found = []
        monkeypatch.setattr(log, "write", lambda *_, **row: found.append((row, read_record(tmp_path))))
        send(tmp_path, ["lr=0.5x", "steps=+50"])
        steering = Steering(START, [], 3, inbox, log, lambda _: None)
        steering.obey(3, lambda text: text, lambda _: None, lambda _: None)
        log.close()
    assert [(row["command"], records[-1]["command"]) for row, records in found] == [
        ("lr=0.5x", "lr=0.5x"), ("steps=150", "steps=150")
    ]  # fmt: skip


def test_an_evaluation_on_command_is_not_made_twice_where_one_is_due(tmp_path: Path):
    engine = FakeEngine()
    with running(tmp_path) as inbox:
        loop = make_loop(tmp_path, engine, **OPTIONS | {"eval_every": 5, "eval_windows": 4})
        steer_at(engine, tmp_path, {4: ["evaluate"], 6: ["evaluate"]})
        assert dataclasses.replace(loop, inbox=inbox).run() == EXIT_FINISHED
    assert [row["step"] for row in read_log(tmp_path, "eval")] == [0, 5, 7, 10, 15, 20]


@pytest.mark.parametrize(("epochs", "instead"), [(None, ""), (2.0, " instead of --epochs")])
def test_the_way_to_resume_a_run_of_another_length_names_it(epochs, instead, tmp_path: Path):
    """The same command says the length that the run began with, and would be refused."""
    told = io.StringIO()
    engine = FakeEngine()
    with running(tmp_path) as inbox:
        options = OPTIONS | {"epochs": epochs}
        loop = make_loop(tmp_path, engine, console=Console(file=told, width=200), **options)
        steer_at(engine, tmp_path, {2: ["steps=+50"], 4: ["stop"]})
        assert dataclasses.replace(loop, inbox=inbox).run() == EXIT_SAVED
    assert f"saved step 5; run the same command with --steps 150{instead} to resume" in told.getvalue()


def test_a_recorded_steering_is_applied_again_at_the_same_steps(tmp_path: Path):
    """As after a kill between two checkpoints: the record is ahead of the state."""
    records = [Record(step=3, command="lr=0.5x"), Record(step=6, command="skip=8:10")]
    whole = FakeEngine()
    make_loop(tmp_path / "whole", whole, **OPTIONS).run()
    for start in (0, 3, 5):
        engine = FakeEngine()
        loop = make_loop(tmp_path / str(start), engine, start=start, **OPTIONS)
        reader = itertools.islice(batches(), start, None)
        loop = dataclasses.replace(loop, batches=reader, steering=records)
        assert loop.run() == EXIT_FINISHED
        used = {step: lr for step, (lr, _) in engine.controls.items()}
        assert used == {s: 0.01 if s < 3 else 0.005 for s in range(start, 20) if s not in (8, 9)}
        assert engine.saved[-1].steering == records
    assert 8 in whole.controls and whole.saved[-1].steering is None


def test_a_new_command_comes_before_what_is_recorded_for_later_steps(tmp_path: Path):
    """The record stays in the order of its steps, and the later command holds from its step on, as logged."""
    later = Record(step=50, command="lr=0.5x")
    with running(tmp_path) as inbox:
        log = RunLog(tmp_path, 0)
        steering = Steering(START, [later], 30, inbox, log, lambda _: None)
        send(tmp_path, ["lr=0.02"])
        steering.obey(40, lambda text: text, lambda _: None, lambda _: None)
        assert steering.records == read_record(tmp_path) == [Record(step=40, command="lr=0.02"), later]
        assert steering.now.lr(40) == 0.02
        steering.repeat(50)
        log.close()
    assert steering.now.lr(50) == 0.01
    told = [row["command"] for row in read_log(tmp_path, "event")]
    assert told == ["lr=0.02", "lr=0.5x"]
    assert [steered(START, steering.records, step).lr(step) for step in (39, 40, 50)] == [0.01, 0.02, 0.01]


def test_a_paused_run_is_saved_and_waits_for_continue_or_an_interrupt(tmp_path: Path, monkeypatch):
    monkeypatch.setattr("core.run.loop.LISTEN", 0.01)
    engine = FakeEngine()
    with running(tmp_path) as inbox:
        loop = make_loop(tmp_path, engine, **OPTIONS)
        loop = dataclasses.replace(loop, inbox=inbox)
        steer_at(engine, tmp_path, {3: ["pause"], 8: ["pause"]})
        codes: list[int] = []
        thread = threading.Thread(target=lambda: codes.append(loop.run()))
        thread.start()

        def wait_for(step: int) -> None:
            deadline = time.monotonic() + 30
            while not (loop._paused and loop.step == step) and time.monotonic() < deadline:
                time.sleep(0.01)
            assert loop.step == step

        wait_for(4)
        sent = send(tmp_path, ["lr=0.5x", "pause", "continue", "continue"])
        rows = answers(tmp_path, sent, 30)
        assert [(row["step"], row["what"]) for row in rows] == [
            (4, "steered"), (4, "not steered"), (4, "steered"), (4, "not steered")
        ]  # fmt: skip
        wait_for(9)
        loop.interrupt.requested = "Ctrl-C"
        thread.join(30)
    assert codes == [EXIT_SAVED] and engine.controls[4][0] == 0.005
    assert [m.step for m in engine.saved] == [4, 9]


def test_what_is_steered_at_a_saved_step_is_in_its_checkpoint(tmp_path: Path, monkeypatch):
    """Else growing it would go on at the old rate, and resuming it at the new one."""
    engine, checkpoints = FakeEngine(), tmp_path / "checkpoints"

    def write_saved() -> None:
        for manifest in engine.saved:
            folder = step_path(checkpoints, manifest.step)
            folder.mkdir(parents=True, exist_ok=True)
            if not (folder / MANIFEST).exists():
                (folder / MANIFEST).write_text(manifest.to_json())

    monkeypatch.setattr(engine, "wait", write_saved)  # until then it is under way
    with running(tmp_path) as inbox:
        loop = make_loop(tmp_path, engine, **OPTIONS)
        steer_at(engine, tmp_path, {3: ["save", "lr=0.5x", "steps=+50"], 4: ["lr=0.1x"], 6: ["stop"]})
        assert dataclasses.replace(loop, inbox=inbox).run() == EXIT_SAVED
    found = load_manifest(step_path(checkpoints, 4))
    assert found.steering == [Record(step=4, command="lr=0.5x"), Record(step=4, command="steps=150")]
    assert found.config["run"]["steps"] == 150
    assert dataclasses.replace(found, steering=None, config=engine.saved[0].config) == engine.saved[0]
    assert len(load_manifest(step_path(checkpoints, 7)).steering) == 3


def test_of_two_processes_the_second_follows_the_first_at_the_same_step(tmp_path: Path, monkeypatch):
    """Only the first has an inbox."""
    monkeypatch.setattr("core.run.loop.LISTEN", 0.01)
    meeting, engines, codes = Meeting(), [FakeEngine(alone=False) for _ in range(2)], {}
    folders = [tmp_path / str(rank) for rank in (0, 1)]
    with running(folders[0]) as inbox:
        loops = [
            make_loop(folder, engine, **OPTIONS) for folder, engine in zip(folders, engines, strict=True)
        ]
        loops[0] = dataclasses.replace(loops[0], inbox=inbox)
        for rank, engine in enumerate(engines):
            engine.exchange = lambda flags, rank=rank: tuple(
                map(any, zip(*meeting.all(rank, flags), strict=True))
            )
            engine.share = lambda text, rank=rank: meeting.all(rank, text)[0]
        steer_at(engines[0], folders[0], {2: ["lr=0.5x", "skip=6:8"], 9: ["pause"]})
        threads = [
            threading.Thread(target=lambda rank=rank: codes.update({rank: loops[rank].run()}))
            for rank in (0, 1)
        ]
        for thread in threads:
            thread.start()
        deadline = time.monotonic() + 30
        while not loops[1]._paused and time.monotonic() < deadline:
            time.sleep(0.01)
        send(folders[0], ["stop"])
        for thread in threads:
            thread.join(60)
    assert codes == {0: EXIT_SAVED, 1: EXIT_SAVED}
    assert engines[0].controls == engines[1].controls and [*engines[0].controls] == [0, 1, 2, 3, 4, 5, 8, 9]
    records = [[(m.step, m.steering) for m in engine.saved] for engine in engines]
    assert records[0] == records[1] == [(10, loops[0]._steering.records)]
    assert len(loops[1]._steering.records) == 2


def test_a_run_that_is_told_to_stop_before_its_first_update_keeps_nothing(tmp_path: Path):
    with running(tmp_path) as inbox:
        loop = make_loop(tmp_path, FakeEngine(), **OPTIONS)
        loop = dataclasses.replace(loop, inbox=inbox)
        send(tmp_path, ["save", "stop"])
        assert loop.run() == EXIT_KEPT
    (row,) = (row for row in read_log(tmp_path, "event") if row["what"] == "not steered")
    assert "nothing to save" in row["why"]
