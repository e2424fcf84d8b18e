"""The rules of the training loop, with an engine that computes nothing and with both real ones."""

import dataclasses
import io
import itertools
import json
import math
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from rich.console import Console

from core.checkpoint.manifest import Manifest
from core.checkpoint.steps import Keep, list_steps
from core.config import ModelConfig
from core.console import make_console
from core.errors import UserError
from core.progress import Activity
from core.run.cadence import Flags
from core.run.engine import Device, Metrics, TaskScore
from core.run.guard import EARLY, GuardConfig
from core.run.interrupt import EXIT_FINISHED, EXIT_HALTED, EXIT_KEPT, EXIT_SAVED, Interrupt
from core.run.log import NoLog, RunLog, read_log
from core.run.loop import Loop
from core.run.metrics import Score
from core.run.reports import blame_leaves
from core.run.schedule import OptimizerConfig
from core.run.settings import TrainingSettings
from core.tokenizer import load_tokenizer
from tests.port_torch.test_ranks import Meeting
from tests.several_devices import ROOT

MODEL = ModelConfig(
    vocab_size=258, context=8, d_model=16, n_layers=1, n_heads=1, d_mlp=16, positions="rope", mlp="swiglu",
    biases=False, tied=True,
)  # fmt: skip
BATCH = 4


class Batch(SimpleNamespace):
    """Records of the same numbers as the sequences."""


def batches(broken_at: int | None = None, bad: tuple[int, ...] = ()) -> Iterator[Batch]:
    step = 0
    while step != broken_at:
        records = np.arange(BATCH) + step * BATCH
        yield Batch(first=step * BATCH, records=records, bad=np.isin(records, bad))
        step += 1
    raise UserError("record 9 is damaged")


class FakeEngine:
    """Notes what it is asked. `refused`: the first update from which on none is applied."""

    heldout = ("valid",)
    device = Device("cpu", 1)

    def __init__(self, refused: int | None = None, alone: bool = True, lag: int = 1):
        self.alone, self.refused, self.lag = alone, refused, lag
        self.calls: list[tuple] = []
        self.saved: list[Manifest] = []
        self.before: dict[int, Callable[[], None]] = {}  # what happens while an update is dispatched
        self.exchange: Callable[[Flags], tuple[bool, ...]] = lambda flags: flags
        self.share: Callable[[str], str] = lambda text: text
        self.controls: dict[int, tuple[float, GuardConfig]] = {}

    def agree(self, step, flags, now=False):
        return self.exchange(flags)

    def dispatch(self, batch, step, lr, guard):
        self.controls[step] = lr, guard
        self.before.get(step, lambda: None)()
        self.calls.append(("dispatch", step))
        return step

    def read(self, pending):
        self.calls.append(("read", pending))
        streak = 0 if self.refused is None else max(0, pending - self.refused + 1)
        loss = math.nan if streak else 5.0 - pending / 10
        norms = {"embed": 1.0, "layers/q": np.array([2.0, math.nan if streak else 3.0])}
        return Metrics(loss, loss, 4.0, not streak, streak, streak, norms)

    def news(self):
        return ()

    def start_profile(self, folder):
        self.calls.append(("trace", folder.name))

    def stop_profile(self):
        self.calls.append(("traced",))
        return []

    def score(self, split, limit, stop):
        self.calls.append(("score", limit))
        return None if stop() else Score(1.0, math.e, 1.5, 7)

    def evaluate_tasks(self, limit, stop, say):
        self.calls.append(("tasks", limit))
        return ()

    def sample(self, prompts, sampling, n, eos):
        self.calls.append(("sample", n))
        return [[65] for _ in prompts]

    def save(self, manifest):
        self.calls.append(("save", manifest.step))
        self.saved.append(manifest)

    def wait(self):
        self.calls.append(("wait",))


def manifest_of(step: int) -> Manifest:
    return Manifest(
        kind="train", step=step, sequences=step * BATCH, tokens=0,
        config={"model": dataclasses.asdict(MODEL), "run": {"batch": BATCH}}, tokenizer={},
        data={"fingerprint": "f", "cursor": step * BATCH},
    )  # fmt: skip


def make_loop(
    folder: Path, engine, reader=None, start: int = 0, console: Console | None = None, **changes
) -> Loop:
    end, steps = changes.pop("end", 10), changes.pop("steps", 10)
    settings = {"eval_every": 5, "save_every": 100, "sample_every": 5, "batch": BATCH} | changes
    folder.mkdir(exist_ok=True)
    return Loop(
        settings=TrainingSettings(**settings), engine=engine, batches=reader or batches(),
        manifest=manifest_of(start), checkpoints=folder / "checkpoints", steps=steps, end=end,
        prompts=[[66]], tokenizer=load_tokenizer("bytes"), log=RunLog(folder, start),
        console=console or make_console(quiet=True), interrupt=Interrupt(),
    )  # fmt: skip


def events(folder: Path) -> list[str]:
    return [row["what"] for row in read_log(folder, "event")]


def test_a_whole_run_in_order_with_metrics_one_step_late(tmp_path: Path):
    engine = FakeEngine()
    assert make_loop(tmp_path, engine, keep_steps=(3,), eval_windows=2).run() == EXIT_FINISHED
    first, late = [("score", 2), ("tasks", 200), ("sample", 16)], ("read", 2)
    assert engine.calls[:11] == [
        *first, ("dispatch", 0), ("dispatch", 1), ("read", 0), ("dispatch", 2), ("read", 1), late,
        ("save", 3), ("dispatch", 3),
    ]  # fmt: skip
    assert engine.calls[-7:] == [
        ("read", 8), ("read", 9), ("score", None), ("tasks", None), ("sample", 96), ("save", 10), ("wait",)
    ]  # fmt: skip
    assert [row["step"] for row in read_log(tmp_path, "train")] == list(range(10))
    assert [(m.step, m.sequences, m.tokens, m.data["cursor"]) for m in engine.saved] == [
        (3, 12, 96, 12), (10, 40, 320, 40)
    ]  # fmt: skip
    assert engine.saved[-1].health["good"] and events(tmp_path) == ["first update", "end"]
    scores = [
        {name: row[name] for name in row.keys() - {"kind", "time"}} for row in read_log(tmp_path, "eval")
    ]
    score = {"split": "valid", "nll": 1.0, "perplexity": math.e, "bits_per_byte": 1.5, "scored_tokens": 7}
    assert scores == [score | {"step": step, "tokens": step * BATCH * 8} for step in (0, 5, 10)]


def test_a_grown_model_is_evaluated_whole_before_its_first_update(tmp_path: Path):
    engine = FakeEngine()
    loop = make_loop(tmp_path, engine, start=3, end=5, eval_every=100, sample_every=100, eval_windows=2)
    grown = dataclasses.replace(loop.manifest, lineage=[{"operation": "grow", "step": 3}])
    dataclasses.replace(loop, manifest=grown, batches=itertools.islice(batches(), 3, None)).run()
    scores = [call for call in engine.calls if call[0] in ("score", "dispatch")]
    assert scores == [("score", None), ("dispatch", 3), ("dispatch", 4), ("score", None)]


def test_what_is_printed_of_a_run(tmp_path: Path, monkeypatch):
    """Every `log_every` updates one line. The time left is that of updates: 2 s each, the first 30 s, and
    evaluations of 100 s do not change it."""
    clock, engine = SimpleNamespace(now=0.0), FakeEngine()
    monkeypatch.setattr("core.progress.time", SimpleNamespace(monotonic=lambda: clock.now))
    monkeypatch.setattr("core.progress._Display._run", lambda display: None)
    read, score = engine.read, engine.score

    def slow_read(pending):
        clock.now += 2 if pending else 30
        return read(pending)

    def slow_score(*arguments):
        with Activity("evaluating valid", 1, "windows") as activity:
            clock.now += 100
            activity.advance()
        return score(*arguments)

    engine.read, engine.score = slow_read, slow_score
    console = Console(file=io.StringIO())
    make_loop(tmp_path, engine, console=console, log_every=3).run()
    said = [re.sub(r", lr.*tokens/s", "", line) for line in console.file.getvalue().splitlines()]
    assert [line for line in said if re.match("step [0-9]+/|evaluating", line)] == [
        "evaluating valid 1/1 windows: 0:01:40",
        "step 0/10: loss 5.0000", "step 3/10: loss 4.7000, 0:00:12 of updates left",
        "evaluating valid 1/1 windows: 0:01:40",
        "step 6/10: loss 4.4000, 0:00:06 of updates left", "step 9/10: loss 4.1000, 0:00:00 of updates left",
        "evaluating valid 1/1 windows: 0:01:40",
    ]  # fmt: skip


def test_the_rate_of_two_updates_that_are_made_as_they_are_dispatched(tmp_path: Path, monkeypatch):
    """The second takes 2 s; its metrics, read behind the end, would seem to take none."""
    clock, engine = SimpleNamespace(now=0.0), FakeEngine(lag=0)
    monkeypatch.setattr("core.progress.time", SimpleNamespace(monotonic=lambda: clock.now))
    monkeypatch.setattr("core.progress._Display._run", lambda display: None)
    dispatch = engine.dispatch

    def slow_dispatch(batch, step, *rest):
        clock.now += 2 if step else 30
        return dispatch(batch, step, *rest)

    engine.dispatch = slow_dispatch
    make_loop(tmp_path, engine, steps=2, end=2).run()
    tokens = BATCH * MODEL.context
    assert [row["tokens_per_second"] for row in read_log(tmp_path, "train")] == [
        round(tokens / 30),
        tokens / 2,
    ]


def test_a_part_of_a_run_says_of_how_many_steps(tmp_path: Path):
    assert make_loop(tmp_path, FakeEngine(), end=4).run() == EXIT_FINISHED
    assert events(tmp_path)[-1] == "stopped, as asked, of 10"


@pytest.mark.parametrize("stopped_at", [None, 3])
def test_a_profile_holds_its_updates_whole_and_ends_with_the_run(stopped_at: int | None, tmp_path: Path):
    engine = FakeEngine()
    loop = make_loop(tmp_path, engine, profile="2:5", eval_every=0, sample_every=0)
    if stopped_at:
        engine.before[stopped_at] = lambda: setattr(loop.interrupt, "requested", "SIGTERM")
    loop.run()
    begun, ended = engine.calls.index(("trace", "profile")), engine.calls.index(("traced",))
    last = stopped_at or 4
    assert engine.calls[begun - 1] == ("read", 1) and engine.calls[ended - 1 : ended] != [("dispatch", last)]
    made = [call[1] for call in engine.calls[begun:ended] if call[0] == "dispatch"]
    assert made == [2, 3, 4][: last - 1] and ("read", last) in engine.calls[begun:ended]
    (row,) = (row for row in read_log(tmp_path, "event") if row["what"] == "profiled")
    assert row["updates"] == [2, last + 1]


def test_a_streak_of_refused_updates_halts_with_leaves_to_blame(tmp_path: Path):
    engine = FakeEngine(refused=4)
    loop = make_loop(tmp_path, engine, guard=GuardConfig(halt_after=3))
    assert loop.run() == EXIT_HALTED
    assert [m.step for m in engine.saved] == [8] and not engine.saved[0].health["good"]
    assert ("read", 7) not in engine.calls  # it was under way behind the third, and changed nothing
    skips = read_log(tmp_path, "skip")
    assert [(row["step"], row["streak"], row["sequences"]) for row in skips] == [
        (4, 1, [16, 20]), (5, 2, [20, 24]), (6, 3, [24, 28])
    ]  # fmt: skip
    assert skips[0]["records"] == [16, 17, 18, 19]
    assert skips[0]["blame"] == ["layers/q[1] (nan)", "layers/q[0] (2)", "embed (1)"]
    (halt,) = (row for row in read_log(tmp_path, "event") if row["what"] == "halt")
    assert halt["why"].startswith("3 updates in a row were not applied, the last at step 6 with loss nan")


def test_one_that_is_asked_to_stop_saves_and_says_whether_a_step_was_made(tmp_path: Path):
    engine = FakeEngine()
    loop = make_loop(tmp_path / "a", engine)
    engine.before[3] = lambda: setattr(loop.interrupt, "requested", "SIGTERM")
    assert loop.run() == EXIT_SAVED
    assert [m.step for m in engine.saved] == [4] and events(tmp_path / "a")[-1] == "interrupted by SIGTERM"
    assert engine.calls[-3:] == [("read", 3), ("save", 4), ("wait",)]

    engine = FakeEngine()
    loop = make_loop(tmp_path / "b", engine, start=4)
    loop.interrupt.requested = "SIGINT"
    assert loop.run() == EXIT_KEPT
    assert engine.calls == [("wait",)]


@pytest.mark.parametrize("alone", [True, False])
def test_a_damaged_record_ends_the_run_and_one_alone_saves_first(alone: bool, tmp_path: Path):
    """Of several processes the others do not know of it, and saving is the work of all."""
    engine = FakeEngine(alone=alone)
    with pytest.raises(UserError, match="record 9 is damaged"):
        make_loop(tmp_path, engine, batches(broken_at=3)).run()
    assert [m.step for m in engine.saved] == ([3] if alone else [])
    assert len(read_log(tmp_path, "train")) == (3 if alone else 2)
    engine = FakeEngine(alone=alone)
    with pytest.raises(UserError, match="record 9 is damaged"):
        make_loop(tmp_path / "first", engine, batches(broken_at=0)).run()
    assert not engine.saved  # nothing was learned, and what is saved binds the next start


@pytest.mark.parametrize("every", [5, 4])
def test_what_was_measured_of_the_state_that_is_resumed_stays_in_the_log(tmp_path: Path, every: int):
    """Measured again where it is due at that step in the longer run, too; kept where it is not."""
    first, second = FakeEngine(), FakeEngine()
    for engine in (first, second):
        engine.evaluate_tasks = lambda limit, stop, say: [TaskScore("arc_easy", 3, [("acc", 0.5, "acc 0.5")])]
    make_loop(tmp_path, first, eval_every=5, eval_tasks="arc_easy").run()
    before = {kind: read_log(tmp_path, kind) for kind in ("eval", "task", "sample")}
    reader = itertools.islice(batches(), 10, None)
    changed = {"eval_every": every, "sample_every": every, "eval_tasks": "arc_easy"}
    make_loop(tmp_path, second, reader, start=10, end=11, steps=30, **changed).run()
    measures = second.calls[: second.calls.index(("dispatch", 10))]
    assert bool(measures) is (every == 5)
    for kind, rows in before.items():
        now = read_log(tmp_path, kind)
        assert [row["step"] for row in now] == [0, 5, 10, 11]
        assert now[:2] == rows[:2] and (every == 5 or now[:3] == rows)
    assert (tmp_path / "samples.txt").read_text().count("===== step 10 =====") == 1
    assert [row["step"] for row in read_log(tmp_path, "train")] == list(range(11))


def test_records_that_are_left_out_are_named(tmp_path: Path):
    assert make_loop(tmp_path, FakeEngine(), batches(bad=(5, 7))).run() == EXIT_FINISHED
    (row,) = (row for row in read_log(tmp_path, "event") if "records" in row)
    assert (row["step"], row["records"]) == (1, [5, 7])


def test_a_process_without_the_log_says_what_it_left_out(tmp_path: Path, capsys):
    """Of several processes each has rows of its own, of which the first, which has the log, knows nothing."""
    loop = make_loop(tmp_path, FakeEngine(alone=False), batches(bad=(5, 7)))
    loop.log.close()
    assert dataclasses.replace(loop, log=NoLog()).run() == EXIT_FINISHED
    assert capsys.readouterr().err.splitlines() == ["step 1: left out damaged records [5, 7]"]


def test_a_phase_of_the_mixture_is_said_and_its_first_updates_are_no_spikes(tmp_path: Path):
    engine = FakeEngine()
    loop = make_loop(tmp_path / "run", engine, end=30, steps=30, start=2)
    counts = ({"a": 1000, "b": 3000}, {"b": 4000})
    phases = [{"first": n * BATCH, "windows": windows} for n, windows in zip((0, 9), counts, strict=True)]
    loop.manifest.data["mixture"] = {"sources": {}, "phases": phases}
    loop = dataclasses.replace(
        loop, batches=itertools.islice(batches(), 2, None)
    )  # which looks at the phases
    assert loop.run() == EXIT_FINISHED
    said = [(row["step"], row["shares"]) for row in read_log(tmp_path / "run", "event") if "shares" in row]
    assert said == [(9, "b 100%")]
    lenient = [step for step, (_, guard) in engine.controls.items() if guard.sigma == 0]
    assert lenient == list(range(9, 9 + EARLY))
    assert all(manifest.data["mixture"]["phases"] == phases for manifest in engine.saved)


def test_several_stop_and_save_at_the_same_step(tmp_path: Path):
    """Only the second is asked to stop, and only the first finds that a save is late."""
    meeting, engines, codes = Meeting(), [FakeEngine(alone=False) for _ in range(2)], {}
    loops = [make_loop(tmp_path / str(rank), engine) for rank, engine in enumerate(engines)]
    for rank, engine in enumerate(engines):
        engine.exchange = lambda flags, rank=rank: tuple(
            map(any, zip(*meeting.all(rank, flags), strict=True))
        )
    engines[0].before[1] = lambda: setattr(loops[0]._agreement, "_last_save", -math.inf)
    engines[1].before[6] = lambda: setattr(loops[1].interrupt, "requested", "SIGTERM")
    threads = [
        threading.Thread(target=lambda rank=rank: codes.update({rank: loops[rank].run()})) for rank in (0, 1)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert codes == {0: EXIT_SAVED, 1: EXIT_SAVED}
    assert [[m.step for m in engine.saved] for engine in engines] == [[2, 7]] * 2
    assert [events(tmp_path / str(rank))[-1] for rank in (0, 1)] == [
        "interrupted by another process", "interrupted by SIGTERM"
    ]  # fmt: skip


def test_blame_falls_on_what_is_not_finite_and_then_on_the_largest():
    norms = {"a": np.array([1.0, 30.0]), "b": 20.0, "c": 0.5}
    assert blame_leaves(norms) == ["a[1] (30)", "b (20)", "a[0] (1)"]
    assert blame_leaves(norms | {"c": math.inf})[0] == "c (inf)"


def test_ranks_of_torch_hear_each_others_flags_and_a_save_answers_them():
    """A flag raised before a save and heard after it would otherwise save again at the next step."""
    from port_torch.training.engine import TorchEngine
    from port_torch.training.step import METRICS

    sent: list[Flags] = []

    def update(rows, parts, step, lr, flags):  # the other rank wants nothing
        sent.append(flags)
        return torch.tensor([0.0] * (len(METRICS) - len(flags)) + [float(flag) for flag in flags])

    ranks = SimpleNamespace(size=2, first=False, device=torch.device("cpu"))
    guard = SimpleNamespace(set_limits=lambda limits: None)
    train_step = SimpleNamespace(ranks=ranks, update=update, parameters={}, guard=guard)
    engine = TorchEngine(train_step, 1, 1, [], None, Path("unused"), Keep())
    batch = SimpleNamespace(rows=None)
    assert engine.agree(0, Flags(True, True)) == Flags()  # nobody else knows of them yet
    engine.read(engine.dispatch(batch, 0, 0.1, GuardConfig()))
    assert engine.agree(1, Flags(True, True)) == Flags(True, True)
    engine.save(manifest_of(1))
    engine.read(engine.dispatch(batch, 1, 0.1, GuardConfig()))
    assert engine.agree(2, Flags(True, False)) == Flags(True, False)
    assert sent == [Flags(True, True), Flags(True, False)]


# Both engines


def jax_engine(data, settings, checkpoints: Path):
    from core.checkpoint.checkpointer import Checkpointer
    from core.data.batches import train_batches
    from core.data.sequences import heldout_sets
    from core.generation import Generator
    from core.model import Compute
    from core.sharding import make_mesh
    from train_tpu.config import RunConfig
    from train_tpu.engine import JaxEngine
    from train_tpu.evaluate import Evaluator
    from train_tpu.step import StepConfig, compile_step, fresh_state

    mesh = make_mesh()
    compute = Compute(mesh=mesh)
    step = StepConfig(MODEL, settings.optim, settings.guard, compute, 0.0, 8192)
    config = RunConfig(**{f.name: getattr(settings, f.name) for f in dataclasses.fields(settings)}, mesh=None)
    config = dataclasses.replace(config, grad_accum_steps=1)
    engine = JaxEngine(
        config, mesh, fresh_state(step, mesh, 0), compile_step(step, BATCH, 1, mesh),
        Evaluator(MODEL, compute, heldout_sets(data), BATCH, 8192, mesh), None, Generator(MODEL, Compute()),
        Checkpointer(checkpoints, settings.keep),
    )  # fmt: skip
    return engine, train_batches(data, seed=0, batch=BATCH, vocab_size=258)


def torch_engine(data, settings, checkpoints: Path):
    from core.data.batches import train_batches
    from core.data.sequences import heldout_sets
    from port_torch.training.batches import pretraining_batches
    from port_torch.training.distributed import Distributed
    from port_torch.training.engine import TorchEngine
    from port_torch.training.pretraining import fresh_decoder
    from port_torch.training.settings import MirrorOptimizerConfig
    from port_torch.training.step import TrainStep

    optim = MirrorOptimizerConfig(lr=settings.optim.lr, warmup=0)
    ranks = Distributed(0, 1, torch.device("cpu"))
    train_step = TrainStep(fresh_decoder(MODEL, 0), optim, ranks, seed=0, guard=settings.guard)
    engine = TorchEngine(train_step, 1, BATCH, heldout_sets(data), None, checkpoints, settings.keep)
    return engine, pretraining_batches(train_batches(data, seed=0, batch=BATCH, vocab_size=258))


@pytest.mark.slow
def test_both_engines_log_the_same_of_a_run_that_diverges(cache: Path, text: Path, tmp_path: Path):
    """Rows of the same kinds, steps and fields with the same losses up to rounding until the parameters are
    not finite; the same checkpoints are kept, and the guard halts at the same step, in the same words."""
    from core.data.prepare import open_or_prepare

    data = open_or_prepare(str(text), "bytes", MODEL.context, cache / "data")
    optim = OptimizerConfig(optimizer="adamw", lr=1e30, warmup=0)
    changes = {"optim": optim, "guard": GuardConfig(halt_after=3), "eval_windows": 4, "save_every": 1,
               "keep_last": 1, "keep_every": 2, "keep_steps": (3,)}  # fmt: skip
    rows, steps, codes = [], [], []
    for make in (jax_engine, torch_engine):
        folder = tmp_path / make.__name__
        settings = make_loop(folder, FakeEngine(), **changes).settings
        engine, reader = make(data, settings, folder / "checkpoints")
        codes.append(make_loop(folder, engine, reader, **changes).run())
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        rows.append([(row["kind"], row["step"], *row) for row in lines])
        rows.append(
            [row.get("why") or row.get("loss") or row.get("nll") for row in lines if row["step"] != 1]
        )
        steps.append(list_steps(folder / "checkpoints"))
        skips = [row for row in lines if row["kind"] == "skip"]
        assert [row["streak"] for row in skips] == [1, 2, 3] and len(skips[0]["blame"]) == 3
        assert "(nan)" in skips[0]["blame"][0] and skips[0]["sequences"] == [4, 8]
    assert codes == [EXIT_HALTED] * 2 and steps[0] == steps[1]
    assert rows[0] == rows[2]
    for ours, theirs in zip(rows[1], rows[3], strict=True):
        assert ours == (pytest.approx(theirs, rel=1e-5) if isinstance(ours, float) else theirs)


def test_neither_jax_nor_torch_comes_with_what_all_runs_share():
    code = (
        "import importlib, pkgutil, sys, core.run, core.data\n"
        "for package in (core.run, core.data):\n"
        "    for module in pkgutil.iter_modules(package.__path__, f'{package.__name__}.'):\n"
        "        importlib.import_module(module.name)\n"
        "from core.data.batches import heldout_windows, train_batches\n"
        "from core.data.dataset import open_dataset\n"
        "data = open_dataset('tests/fixtures/7b5e0bc/data')\n"
        "next(train_batches(data, seed=0, batch=4, vocab_size=258)), heldout_windows(data, 'valid')\n"
        "print({'jax', 'torch', 'orbax', 'tensorflow_datasets'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
