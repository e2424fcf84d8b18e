"""Studies: what a file may say, in which order its runs are trained, and what is made of their results."""

import dataclasses
import itertools
import json
import math
import os
import re
import shlex
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.optimize
from matplotlib.figure import Figure

import core.run.data
from core.checkpoint.steps import list_steps, step_path
from core.console import make_console
from core.data.prepare import prepare
from core.errors import UserError
from core.run.folder import write_config
from core.run.log import CARRIED, END, HALT, read_log
from core.run.presets import TRAINING_DEFAULTS
from core.run.settings import flatten, given_value
from stacking.jobs import Job
from stacking.study import __main__ as command
from stacking.study import definition, experiment, fits, growth, growth_report, report, saturation, tuning
from stacking.study.config import StudyConfig
from stacking.study.definition import STUDIES, read_definition
from stacking.study.experiment import Clock, run_study
from stacking.study.growth import best_rates
from stacking.study.growth_report import Arm, Point, at_equal_flops, flops_to_reach, make_table
from stacking.study.results import open_results, read_results, thinned
from stacking.study.runs import Run
from tests.train_tpu.processes import losses, refusal_here, run, start

SETTINGS = """
preset = "mtlm1-tiny"
tokenizer = "bytes"
context = 32
d_model = 32
n_layers = 2
n_heads = 2
d_mlp = 64
batch = 4
optimizer = "adamw"
warmup = 4
window = 4
eval_every = 5
eval_windows = 4
"""
TUNING = 'name = "a"\nsteps = 12\nlr = [0.01, 0.02, 0.04, 0.08]\nseed = [0, 1]\n'
SATURATION = 'name = "a"\ntokens_per_parameter = [0.1, 0.2, 0.05, 0.4, 0.8]\n'
GROWTH = (
    'name = "a"\nsteps = 40\nn_layers = 4\ngrow_at = [0.25]\nops = ["stack", "random"]\n'
    'grow_schedule = "rewarm:3"\nseed = [0, 1]\nlr = [0.01, 0.02]\n'
)


def study_file(folder: Path, kind: str, runs: str, text: Path | str) -> Path:
    path = folder / f"{kind}.toml"
    path.write_text(f'kind = "{kind}"\n\n[settings]\ndata = "{text}"\n{SETTINGS}\n[[runs]]\n{runs}')
    return path


class FakeTraining:
    """Stands for `run_jobs`: every job is done at once, with a loss that is a function of its run."""

    def __init__(self, monkeypatch, loss: Callable[[Run], float], most: int = 10**9) -> None:
        self.loss, self.most, self.made, self.commands = loss, most, [], {}
        monkeypatch.setattr(experiment, "run_jobs", self)
        monkeypatch.setattr(experiment, "Runs", self._keep)
        self._runs = None

    def _keep(self, *arguments):
        self._runs = made = RUNS(*arguments)
        return made

    def __call__(self, jobs: list[Job], out: Path, *_) -> bool:
        by_name = {run.name: run for leaf in self._runs.leaves for run in leaf.ancestry}
        named = {job.name: job for job in jobs}
        self.commands |= {name: list(job.command) for name, job in named.items()}
        for job in named.values():
            if job.done():
                continue
            if len(self.made) == self.most:
                return False
            assert all(named[need].done() for need in job.needs), f"{job.name} before {job.needs}"
            name, _, end = job.name.rpartition("@")
            job.before()
            self._train(by_name[name], out / name, end)
            self.made.append(job.name)
            assert job.done(), job.name
            job.after(1.0)
            assert by_name[name].keep or not (out / name / "checkpoints").exists()  # which nothing needs
        return True

    def _train(self, run: Run, folder: Path, end: str) -> None:
        assert end != "grow" or not folder.exists(), "--out exists already"
        if not (folder / "config.json").exists():
            folder.mkdir(parents=True, exist_ok=True)
            text = experiment.open_texts([run], None, folder)[experiment.text_key(run.settings)]
            settings = flatten(run.settings.config) | {"steps": run.steps}
            record = {"run": settings, "tokenizer": {}, "model": dataclasses.asdict(run.model)}
            write_config(folder, record | {"data": {"fingerprint": text.fingerprint}})
        saved = folder / "checkpoints"
        if end == "grow":
            step_path(saved, run.at).mkdir(parents=True)
            return
        assert all(step <= int(end) for step in list_steps(saved)), "already beyond --stop-at"
        assert run.source is None or list_steps(saved), "would begin with random parameters"
        loss, step = self.loss(run), int(end)
        figures = {"bits_per_byte": loss, "tokens": 1, "tokens_per_second": 100.0}
        rows = [
            {"step": step - 1, "kind": "train", "loss": loss, "nll": loss, **figures},
            {"step": step, "kind": "eval", "split": "valid", "nll": loss, **figures},
        ]
        if math.isinf(loss):
            rows = [{"step": run.at + 1, "kind": "event", "what": HALT}]
        else:
            step_path(folder / "checkpoints", step).mkdir(parents=True)
            rows += [] if run.keep else [{"step": step, "kind": "event", "what": END}]
        with (folder / "metrics.jsonl").open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)


RUNS = experiment.Runs


@pytest.fixture
def text_of_a_study(cache, text, monkeypatch) -> Path:
    monkeypatch.setattr(core.run.data, "CACHE", cache / "data")
    return text


def parabola(run: Run) -> float:
    lr, seed = run.settings.config.optim.lr, run.settings.config.seed
    return 3 + 0.1 * (math.log2(lr) - math.log2(0.03)) ** 2 + 0.01 * seed


def test_tuning_finds_the_minimum_and_continues_in_its_results(text_of_a_study, tmp_path, monkeypatch):
    study = study_file(tmp_path, "tuning", TUNING, text_of_a_study)
    config = StudyConfig(str(study), out=tmp_path / "out")
    first = FakeTraining(monkeypatch, parabola, most=3)
    with monkeypatch.context() as patch:
        patch.setattr(report, "draw", lambda *_: None)
        run_study(config, make_console())
    # The first axis changes slowest, in the order of the file.
    assert first.made == [f"a/lr-{lr}/seed-{seed}@12" for lr, seed in ((0.01, 0), (0.01, 1), (0.02, 0))]
    # On another machine, where the runs are not and the text lies elsewhere: the file of results is enough.
    results = tmp_path / "results.json"
    moved = tmp_path / "moved.jsonl"
    moved.write_bytes(text_of_a_study.read_bytes())
    (tmp_path / "out/results.json").rename(results)
    second = FakeTraining(monkeypatch, parabola)
    elsewhere = StudyConfig(str(study), out=tmp_path / "other", results=results, data=(str(moved),))
    run_study(elsewhere, make_console())
    assert len(second.made) == 5 and not set(first.made) & set(second.made)
    table = results.with_suffix(".md").read_text()
    # 0.03 is the minimum of the parabola; seeds lie 0.005 from their mean.
    assert "| 0.01 0.02 0.04 0.08 | 0.04 | 3.0222 ± 0.0050 (2 seeds) | 3.00e-02, to a factor of 1.0" in table
    assert results.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert not list((tmp_path / "other").glob("a/*/*/checkpoints"))
    assert results.stat().st_size < 20_000
    # Another text is another study.
    moved.write_text(moved.read_text() * 2)
    with pytest.raises(UserError, match=r"a/lr-0.01/seed-0 trained on .*, which is another text than"):
        run_study(elsewhere, make_console())


def test_a_rate_that_the_guard_halts_counts_as_tried(text_of_a_study, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "draw", lambda *_: None)
    study = study_file(tmp_path, "tuning", TUNING.replace("[0, 1]", "0"), text_of_a_study)
    config = StudyConfig(str(study), out=tmp_path / "out")
    FakeTraining(monkeypatch, lambda run: math.inf if run.settings.config.optim.lr > 0.07 else parabola(run))
    run_study(config, make_console())
    runs = read_results(tmp_path / "out/results.json").runs
    assert [entry["halted"] for entry in runs.values()] == [False, False, False, True]
    assert "| a/lr-0.08 | 0.08 | 0 | halted |" in (tmp_path / "out/results.md").read_text()
    again = FakeTraining(monkeypatch, parabola)
    run_study(config, make_console())
    assert again.made == []
    # Not even without its entry: its folder says what became of it.
    results = read_results(tmp_path / "out/results.json")
    kept = {name: entry for name, entry in results.runs.items() if not entry["halted"]}
    results.path.write_text(json.dumps(results.record | {"runs": kept}))
    run_study(config, make_console())
    assert again.made == [] and read_results(results.path).runs["a/lr-0.08"]["halted"]
    for other in ("a/lr-0.04", "a/lr-0.16"):
        with pytest.raises(UserError, match=f"--again {other}: the guard halted no .* halted: a/lr-0.08$"):
            run_study(dataclasses.replace(config, again=(other,)), make_console())
    nothing = FakeTraining(monkeypatch, parabola, most=0)  # a budget that allows nothing loses nothing
    run_study(dataclasses.replace(config, again=("a/lr-0.08",)), make_console())
    assert nothing.made == [] and "a/lr-0.08" not in read_results(results.path).runs
    again = FakeTraining(monkeypatch, parabola)
    run_study(config, make_console())
    assert again.made == ["a/lr-0.08@12"] and not read_results(results.path).runs["a/lr-0.08"]["halted"]


def run_fake(monkeypatch, folder: Path, runs: str, text: Path) -> StudyConfig:
    """A study of tuning in `folder`, trained without pictures."""
    monkeypatch.setattr(report, "draw", lambda *_: None)
    config = StudyConfig(str(study_file(folder, "tuning", runs, text)), out=folder / "out")
    FakeTraining(monkeypatch, parabola)
    run_study(config, make_console())
    return config


def test_a_value_that_becomes_a_list_trains_no_run_again(text_of_a_study, tmp_path, monkeypatch):
    """Seeds and lengths added, the default seed spelled out, a block renamed, a text moved: the same runs."""
    out, block = tmp_path / "out", 'name = "a"\nsteps = 12\nlr = [0.01, 0.02, 0.04]\n'
    config = run_fake(monkeypatch, tmp_path, block, text_of_a_study)
    old = json.loads((out / "results.json").read_text())["runs"]
    moved = tmp_path / "moved.jsonl"
    moved.write_bytes(text_of_a_study.read_bytes())
    steps = block.replace('"a"', '"b"').replace("= 12", "= [12, 24]") + "seed = [0, 1]\n"
    for changed, data, made in (
        (block + "seed = 0\n", text_of_a_study, 0),
        (block + "seed = [0, 1]\n", text_of_a_study, 3),
        (steps, moved, 6),
        # Two blocks ask for the same runs.
        (f"{steps}\n[[runs]]\n" + steps.replace('"b"', '"c"').replace("[12, 24]", "12"), moved, 0),
    ):
        study_file(tmp_path, "tuning", changed, data)
        again = FakeTraining(monkeypatch, parabola)
        run_study(config, make_console())
        assert len(again.made) == made, again.made
        page = (out / "results.md").read_text()
    results = read_results(out / "results.json").runs
    assert len(results) == 12 and results["b/steps-12/lr-0.01/seed-0"]["labels"] == {"block": "b"}
    # The seeds lie 0.005 from their mean.
    row = "| 0.01 0.02 0.04 | 0.04 | 3.0222 ± 0.0050 (2 seeds) |"
    assert page.count(row) == 2 and "12 runs; trained on" in page
    # A file that has copies already.
    record = json.loads((out / "results.json").read_text())
    record["runs"] |= old
    (out / "results.json").write_text(json.dumps(record))
    run_study(dataclasses.replace(config, report=True), make_console())
    page = (out / "results.md").read_text()
    assert page.count(row) == 2 and "12 runs; trained on" in page
    # The name of one that was another run is refused still.
    study_file(tmp_path, "tuning", f"{steps}weight_decay = 0.2\n", moved)
    said = r"has b/steps-12/lr-0.01/seed-0 with weight_decay 0.1, and the study"
    with pytest.raises(UserError, match=said):
        run_study(config, make_console())


@pytest.mark.parametrize("has_it", [True, False])
def test_a_preset_that_changes_does_not_mix_runs(text_of_a_study, tmp_path, monkeypatch, has_it):
    """What a study leaves to its preset tells runs apart, also in results that do not have it yet."""
    monkeypatch.setattr(definition, "_open", definition._open.__wrapped__)  # it keeps what a preset gave
    block = 'name = "a"\nsteps = 12\nlr = [0.01, 0.02]\n'
    config = run_fake(monkeypatch, tmp_path, block, text_of_a_study)
    results, page = (tmp_path / "out" / name for name in ("results.json", "results.md"))
    record = json.loads(results.read_text())
    for entry in () if has_it else record["runs"].values():
        del entry["decay"], entry["weight_decay"]
    results.write_text(json.dumps(record))
    monkeypatch.setitem(TRAINING_DEFAULTS["mtlm1-tiny"], "decay", 0.4)
    with pytest.raises(UserError, match=r"with decay 0.2, and .* 0.4: write decay = 0.2 into the study"):
        run_study(config, make_console())
    study_file(tmp_path, "tuning", block.replace("0.02", "0.04") + "decay = 0.2\n", text_of_a_study)
    run_study(config, make_console())
    assert "| 12 | 0.001536M | 0.01 0.02 0.04 |" in page.read_text()
    study_file(tmp_path, "tuning", block.replace("[0.01, 0.02]", "[0.08]"), text_of_a_study)
    run_study(config, make_console())
    assert "| decay 0.4 | 12 | 0.001536M | 0.08 |" in page.read_text()
    assert "| decay 0.2 | 12 | 0.001536M | 0.01 0.02 0.04 |" in page.read_text()


def law(run: Run) -> float:
    tokens = run.steps * run.settings.batch_tokens
    distinct = 96 * 32
    worth = min(tokens, distinct) + distinct * 5 * (1 - math.exp(-max(0, tokens / distinct - 1) / 5))
    return 2.5 + 1.5 * (worth / (run.settings.batch_tokens * 11)) ** -0.4


def test_saturation_trains_the_shortest_first_and_fits_the_law(text_of_a_study, tmp_path, monkeypatch):
    study = study_file(tmp_path, "saturation", SATURATION, text_of_a_study)
    training = FakeTraining(monkeypatch, law)
    run_study(StudyConfig(str(study), out=tmp_path / "out"), make_console())
    # Lengths of 0.05 to 0.8 tokens per parameter, of 28,896; decays of a fifth branch off one trunk.
    lengths = [round(x * 28_896 / 128) for x in (0.05, 0.1, 0.2, 0.4, 0.8)]
    starts = [n - round(0.2 * n) for n in lengths]
    expected = [
        (f"a/trunk@{s}", f"a/decayed-{x}@{n}")
        for s, x, n in zip(starts, (0.05, 0.1, 0.2, 0.4, 0.8), lengths, strict=True)
    ]
    assert training.made == [name for pair in expected for name in pair]
    results = read_results(tmp_path / "out/results.json")
    (entry,) = [entry for name, entry in results.runs.items() if name == "a/decayed-0.8"]
    assert entry["distinct_tokens"] == 96 * 32 and entry["tokens"] == lengths[-1] * 128
    # What was trained, and no more: the trunk is shared.
    assert entry["flops"] == lengths[-1] * 128 * entry["model"]["flops_per_token"]
    page = (tmp_path / "out/results.md").read_text()
    assert "loss = 2.5 ± " in page and "one standard error" in page and "only as many runs" not in page
    # Through as many points as it has parameters a law passes anyhow.
    entries = saturation.models(results)["28,896 parameters"][:4]
    said = saturation._describe("28,896 parameters", saturation.fit(entries, "valid"), entries, "valid")
    assert "There are only as many runs as the law has parameters" in said
    assert "±" not in said and "one standard error" not in said


def test_a_law_that_does_not_hold_for_the_shortest_run_says_so(text_of_a_study, tmp_path, monkeypatch):
    """The shortest lies 0.3 higher: the fit misses, and without that run it is the law of the others."""
    study = study_file(tmp_path, "saturation", SATURATION, text_of_a_study)
    FakeTraining(monkeypatch, lambda run: law(run) + 0.3 * (run.steps == round(0.05 * 28_896 / 128)))
    run_study(StudyConfig(str(study), out=tmp_path / "out"), make_console())
    page = (tmp_path / "out/results.md").read_text()
    said = r"misses these runs by ([\d.]+) nats .* shortest, ([\d.]+) is extrapolated, and ([\d.]+)"
    found = re.search(said, page)
    assert found
    assert "more passes, which these runs do not determine" in page  # of all five
    missed, far, passes = map(float, found.groups())
    assert 0.001 < missed < 0.3 / 5**0.5  # least squares does better than missing that one run alone
    assert far == pytest.approx(2.5 + 1.5 * (350 * 28_896 / (128 * 11)) ** -0.4, abs=1e-3)
    assert passes == pytest.approx(5, rel=0.01)


def test_losses_that_do_not_level_off_determine_no_law(text_of_a_study, tmp_path, monkeypatch):
    """Every doubling is worth as much as the one before: not a floor far below zero with a small error."""
    study = study_file(tmp_path, "saturation", SATURATION, text_of_a_study)
    FakeTraining(monkeypatch, lambda run: 4 - 0.3 * math.log2(run.steps))
    run_study(StudyConfig(str(study), out=tmp_path / "out"), make_console())
    page = (tmp_path / "out/results.md").read_text()
    assert "28,896 parameters: 5 runs determine no law" in page and "Extrapolated" not in page
    # Nor do those that are left without the shortest, which alone bends the curve.
    bent = np.array([3.0, 2.2, 1.7, 1.2, 0.7])
    entries = [
        {
            "tokens": 1e6 * 2**i,
            "distinct_tokens": 1e8,
            "losses": {"valid": loss},
            "model": {"parameters": 28_896},
        }
        for i, loss in enumerate(bent)
    ]
    said = saturation._describe("a", saturation.fit(entries, "valid"), entries, "valid")
    assert said.endswith("without the shortest, the others determine none.")


def test_a_study_of_saturation_names_what_the_guard_halted(text_of_a_study, tmp_path, monkeypatch, capsys):
    """One seed's decayed run, and with another's trunk all that would branch off it."""
    monkeypatch.setattr(report, "draw", lambda *_: None)
    study = study_file(tmp_path, "saturation", f"{SATURATION}seed = [0, 1]\n", text_of_a_study)
    config = StudyConfig(str(study), out=tmp_path / "out")

    def diverges(run: Run) -> float:
        halts = run.name in ("a/seed-0/decayed-0.4", "a/seed-1/trunk")
        return math.inf if halts else law(run)

    FakeTraining(monkeypatch, diverges)
    run_study(config, make_console())
    results = read_results(tmp_path / "out/results.json")
    start = results.runs["a/seed-0/decayed-0.4"]["at"]
    lines = [line for line in saturation.table(results, "valid").splitlines() if "halted" in line]
    words = "tokens per parameter, was halted by the guard"
    assert sorted(lines) == [
        f"a/seed-0, seed 0, 0.4 {words} at step {start + 1}.",
        *(f"a/seed-1, seed 1, {x} {words} with its trunk at step 1." for x in (0.05, 0.1, 0.2, 0.4, 0.8)),
    ]
    capsys.readouterr()
    run_study(dataclasses.replace(config, dry_run=True), make_console())
    said = capsys.readouterr()
    listed = (said.out + said.err).splitlines()[1:]
    assert sum(line.endswith("steps, halted by the guard") for line in listed) == 6
    assert sum(line.endswith("steps, done") for line in listed) == 4
    # One that ended its own decay is trained again alone; of a trunk, all that branches off it.
    again = FakeTraining(monkeypatch, law)
    run_study(dataclasses.replace(config, again=("a/seed-0/decayed-0.4",)), make_console())
    end = round(0.4 * 28_896 / 128)
    assert again.made == [f"a/seed-0/trunk@{start}", f"a/seed-0/decayed-0.4@{end}"]  # weights were removed
    again.made.clear()
    run_study(dataclasses.replace(config, again=("a/seed-1/decayed-0.1",)), make_console())
    assert len(again.made) == 2 * 5 and all("seed-1" in name for name in again.made)
    assert not any(entry["halted"] for entry in read_results(results.path).runs.values())
    # Results of before do not say where.
    for entry in results.runs.values():
        entry.pop("halted_at", None)
    assert f"0.8 {words}.\n" in saturation.table(results, "valid")
    # Where nothing came to a loss, there is no table.
    kept = {name: entry for name, entry in results.runs.items() if "seed-1" in name}
    results.record["runs"] = kept
    assert "no run with a loss yet (the guard halted a/seed-1/trunk, a/seed-1/decayed-0.05, " in (
        report.write_report(results)
    )


def test_a_trunk_goes_back_to_where_it_is_to_branch(text_of_a_study, tmp_path):
    """What branches off further on waits for that: checkpoints there are removed and made again. A trunk that
    its guard halted has only halted what comes after."""
    study = study_file(
        tmp_path, "saturation", 'name = "a"\ntokens_per_parameter = [0.15, 0.2]\n', text_of_a_study
    )
    definition = read_definition(str(study), None)
    leaves = experiment.open_runs(definition, open_results(tmp_path / "results.json", definition))
    runs = RUNS(tmp_path, leaves, lambda _: False, lambda *_: None, lambda *_: None)
    trunk, folder = leaves[0].source, tmp_path / "a/trunk"
    for step in (18, 30, 36):
        step_path(folder / "checkpoints", step).mkdir(parents=True)
    (folder / "config.json").touch()
    jobs = {job.name: job for job in runs.jobs()}
    assert not jobs["a/trunk@27"].done() and not jobs["a/trunk@36"].done()
    # Each costs what it trains itself: the second decay from step 36 to 45.
    costs = [jobs[f"a/{name}"].cost for name in ("trunk@27", "trunk@36", "decayed-0.2@45")]
    assert costs == [updates * trunk.settings.flops_per_step for updates in (27, 9, 9)]
    assert jobs["a/decayed-0.2@45"].needs == ("a/trunk@36",) and jobs["a/trunk@36"].needs == ("a/trunk@27",)
    jobs["a/trunk@27"].before()
    assert list_steps(folder / "checkpoints") == [18]
    for step in (27, 36):
        step_path(folder / "checkpoints", step).mkdir()
    assert jobs["a/trunk@27"].done() and jobs["a/trunk@36"].done()
    (folder / "metrics.jsonl").write_text(json.dumps({"step": 40, "kind": "event", "what": HALT}) + "\n")
    assert runs.has_halted(trunk, 44) and not runs.has_halted(trunk, 39)
    (tmp_path / leaves[1].name).mkdir()  # of which the weights have been removed
    shutil.rmtree(folder / "checkpoints")
    assert runs.has_halted(dataclasses.replace(leaves[1], at=44), 45) and not runs.has_halted(leaves[1], 45)
    assert jobs["a/trunk@36"].outcome() == jobs["a/decayed-0.2@45"].outcome() == "done"
    (folder / "metrics.jsonl").write_text(json.dumps({"step": 30, "kind": "event", "what": HALT}) + "\n")
    said = "halted by the guard at step 30"
    assert jobs["a/trunk@36"].outcome() == said
    assert jobs["a/decayed-0.2@45"].outcome() == f"not trained, since a/trunk was {said}"


@pytest.mark.parametrize("more", ["0.15", "0.05, 0.15", "0.8", "0.05, 0.15, 0.3, 0.8"])
def test_a_study_of_saturation_gets_more_lengths(text_of_a_study, tmp_path, monkeypatch, more):
    """Also such as branch off where the trunk has been already, or went no further."""
    monkeypatch.setattr(report, "draw", lambda *_: None)
    lengths = 'name = "a"\ntokens_per_parameter = [0.1, 0.2, 0.4'
    study = study_file(tmp_path, "saturation", f"{lengths}]\n", text_of_a_study)
    config = StudyConfig(str(study), out=tmp_path / "out")
    first = FakeTraining(monkeypatch, law, most=4)
    run_study(config, make_console())
    assert first.made[-1] == "a/decayed-0.2@45"
    study_file(tmp_path, "saturation", f"{lengths}, {more}]\n", text_of_a_study)
    second = FakeTraining(monkeypatch, law)
    run_study(config, make_console())
    # It goes back no further than it has to.
    ends = [int(name.rpartition("@")[2]) for name in second.made if "trunk" in name]
    assert ends == sorted(ends) and min(ends) == {"0.8": 72, "0.15": 27}.get(more, 9)
    assert len(read_results(tmp_path / "out/results.json").losses("a/decayed-0.4")) == 1
    assert len(second.made) == 2 * (1 + more.count(",") + 1)
    # A trunk with other --steps would be refused.
    steps = [given_value(one.commands["a/trunk@72"], "--steps") for one in (second, first)]
    assert steps[0] == steps[1]


def test_a_rate_added_to_a_study_of_saturation_trains_no_run_again(text_of_a_study, tmp_path, monkeypatch):
    """Its decays and their trunk are renamed. The same settings on another text are another run."""
    monkeypatch.setattr(report, "draw", lambda *_: None)
    out, lengths = tmp_path / "out", "tokens_per_parameter = [0.1, 0.2, 0.4, 0.8]\n"
    block = f'name = "a"\n{lengths}lr = 0.01\n'
    config = StudyConfig(str(study_file(tmp_path, "saturation", block, text_of_a_study)), out=out)
    FakeTraining(monkeypatch, law)
    run_study(config, make_console())
    before = (out / "results.md").read_text()
    two = f"{block.replace('0.01', '[0.01, 0.02]')}seed = [0]\n"
    study_file(tmp_path, "saturation", two, text_of_a_study)
    again = FakeTraining(monkeypatch, law)
    run_study(config, make_console())
    assert len(again.made) == 8 and all(name.startswith("a/lr-0.02/seed-0/") for name in again.made)
    results = read_results(out / "results.json").runs
    assert len(results) == 10 and results["a/lr-0.01/seed-0/decayed-0.8"]["from"] == "a/lr-0.01/seed-0/trunk"
    page = (out / "results.md").read_text()
    said = next(line for line in before.splitlines() if "loss = " in line).split(" runs: ")[1]
    assert f"lr 0.01, 4 runs: {said}" in page and f"lr 0.02, 4 runs: {said}" in page
    other = tmp_path / "other.jsonl"
    other.write_text(text_of_a_study.read_text() * 2)
    second = block.replace('"a"', '"b"') + f'data = "{other}"\n'
    study_file(tmp_path, "saturation", f"{two}\n[[runs]]\n{second}", text_of_a_study)
    more = FakeTraining(monkeypatch, law)
    run_study(config, make_console())
    assert len(more.made) == 8 and all(name.startswith("b/") for name in more.made)


def test_a_run_in_the_folder_of_another_is_refused(text_of_a_study, tmp_path, monkeypatch):
    """Its results are not in the file that is given now, and it has ended: only its folder tells."""
    monkeypatch.setattr(report, "draw", lambda *_: None)
    changes = {"lr 0.01": "lr = 0.02", "batch 4": "lr = 0.01\nbatch = 8", "model": "lr = 0.01\nn_layers = 3"}
    for (old, new), kind in itertools.product(changes.items(), ("tuning", "saturation")):
        out = tmp_path / kind / old
        given = "steps = 12" if kind == "tuning" else "tokens_per_parameter = [0.1]"
        study = study_file(tmp_path, kind, f'name = "a"\n{given}\nlr = 0.01\n', text_of_a_study)
        FakeTraining(monkeypatch, parabola)
        run_study(StudyConfig(str(study), out=out), make_console())
        study_file(
            tmp_path, kind, f'name = "a"\n{given}\n{new}\n'.replace("batch = 4\n", ""), text_of_a_study
        )
        content = study.read_text()
        if "batch = 8" in new:
            study.write_text(content.replace("batch = 4\n", "", 1))
        other = StudyConfig(str(study), out=out, results=tmp_path / f"{kind}-{old}.json")
        with pytest.raises(UserError, match=f"holds a run with {old}.*and the study asks for"):
            run_study(other, make_console())


def test_the_folder_of_a_run_of_other_steps_is_refused(text_of_a_study, tmp_path, monkeypatch):
    run_fake(monkeypatch, tmp_path, 'name = "a"\nlr = 0.01\nsteps = 12\n', text_of_a_study)
    study = study_file(tmp_path, "tuning", 'name = "a"\nlr = 0.01\nsteps = 13\n', text_of_a_study)
    other = StudyConfig(str(study), out=tmp_path / "out", results=tmp_path / "other.json")
    with pytest.raises(UserError, match="holds a run with steps 12, and the study asks for 13"):
        run_study(other, make_console())


def test_the_folder_of_a_run_from_before_decays_had_shapes_is_not_one_of_another_shape(
    text_of_a_study, tmp_path, monkeypatch
):
    monkeypatch.setattr(report, "draw", lambda *_: None)
    FakeTraining(monkeypatch, parabola)
    study = study_file(tmp_path, "tuning", 'name = "a"\nsteps = 12\nlr = 0.01\n', text_of_a_study)
    run_study(StudyConfig(str(study), out=tmp_path / "out"), make_console())
    config = tmp_path / "out" / "a" / "config.json"
    record = json.loads(config.read_text())
    assert record["run"].pop("decay_shape") == "linear" and record.pop("sha256")
    config.write_text(json.dumps(record))
    again = StudyConfig(str(study), out=tmp_path / "out", results=tmp_path / "new.json")
    run_study(again, make_console())
    study.write_text(study.read_text().replace("lr = 0.01\n", 'lr = 0.01\ndecay_shape = "1-sqrt"\n'))
    other = StudyConfig(str(study), out=tmp_path / "out", results=tmp_path / "other.json")
    with pytest.raises(UserError, match="holds a run with decay_shape linear, and the study asks for 1-sqrt"):
        run_study(other, make_console())


def test_a_study_of_saturation_with_two_rates_and_texts_with_other_heldout_sets(tmp_path):
    """A law for each rate; a set that a text lacks is left blank, and one to compare on is not."""
    runs = {}
    for lr, few, length in itertools.product((1e-3, 2e-3), (False, True), (1, 2, 4)):
        loss = 2 + lr + 1 / length
        runs[f"{lr}-{few}-{length}"] = {
            "labels": {"block": "a", "seed": 0, saturation.LENGTHS: length}, "halted": False,
            "settings": {"lr": lr}, "from": f"a/lr-{lr:g}/trunk", "model": {"parameters": 1000},
            "tokens": 1000.0 * length, "distinct_tokens": 9000.0, "flops": 1.0,
            "losses": {"valid": loss} if few else {"valid": loss, "books": loss},
        }  # fmt: skip
    results = SimpleNamespace(runs=runs, path=tmp_path / "a.json", record={"heldout": "books"})
    page = saturation.table(results, "valid")
    assert "| a/lr-0.001 | 0 | 1 | 1,000 | 0.11 | 1 | 3.0010 |  | 3.0010 |" in page
    assert "1,000 parameters, lr 0.001, 6 runs: loss = 2.001" in page
    assert "1,000 parameters, lr 0.002, 6 runs: loss = 2.002" in page
    with pytest.raises(UserError, match=r"has 0.001-True-1 without a loss on books"):
        report.write_report(results)


def test_a_run_that_fails_does_not_hold_back_the_report(text_of_a_study, tmp_path, monkeypatch):
    study = study_file(tmp_path, "tuning", TUNING, text_of_a_study)
    training = FakeTraining(monkeypatch, parabola, most=3)

    def fail(*arguments: object) -> bool:
        training(*arguments)
        raise UserError("1 job failed")

    monkeypatch.setattr(experiment, "run_jobs", fail)
    with pytest.raises(UserError, match="1 job failed"):
        run_study(StudyConfig(str(study), out=tmp_path / "out"), make_console())
    assert "3 runs; trained on" in (tmp_path / "out/results.md").read_text()


def test_the_law_is_found_again():
    """Two texts of different sizes, without noise: every parameter, to what the narrowing grid resolves."""
    tokens = np.array([1e6, 3e6, 1e7, 3e7, 1e8] * 2)
    distinct = np.array([1.3e8] * 5 + [3e6] * 5)
    given = fits.Law(2.5, 1.5, 0.4, 5.0, 1e6)
    found = fits.fit_law(tokens, distinct, given.loss(tokens, distinct))
    assert found.unit == 1e6
    np.testing.assert_allclose(
        [found.floor, found.scale, found.power, found.passes], [2.5, 1.5, 0.4, 5.0], rtol=1e-3
    )
    # With noise, the errors are those of repeated draws, to a third: there are 100, and errors are linear.
    rng, far = np.random.default_rng(0), (np.array([1e9]), np.array([1e9]))
    noisy = [
        fits.fit_law(tokens, distinct, given.loss(tokens, distinct) + 0.005 * rng.normal(size=10))
        for _ in range(100)
    ]
    for values, errors in (
        ([one.floor for one in noisy], [one.errors[0] for one in noisy]),
        ([float(one.loss(*far)[0]) for one in noisy], [one.error(1e9, 1e9) for one in noisy]),
    ):
        assert math.sqrt(np.mean(np.square(errors))) == pytest.approx(np.std(values), rel=0.35)
    falling = 1 / tokens
    assert fits.fit_law(tokens[:3], distinct[:3], falling[:3])  # nothing repeated: three parameters
    assert fits.fit_law(tokens[5:8], distinct[5:8], falling[5:8]) is None
    # Two lengths on two texts, or three seeds of one length, are no three lengths; rising losses no law.
    assert fits.fit_law(tokens[[0, 1, 5, 6]], distinct[[0, 1, 5, 6]], falling[[0, 1, 5, 6]]) is None
    # Nor do two texts of which neither is repeated tell anything of repetition: 1, 10 and 30M tokens.
    same = [0, 5, 2, 8]
    assert fits.fit_law(tokens[same], distinct[same], falling[same]) is None
    assert fits.fit_law(tokens[same], distinct[same] + [0, 0, -9e7, 0], falling[same]) is None
    assert fits.fit_law(tokens[[*same, 9]], distinct[[*same, 9]], falling[[*same, 9]]) is not None
    assert fits.fit_law(tokens[[0, 0, 0]], distinct[[0, 0, 0]], np.array([3.0, 3.1, 3.2])) is None
    assert fits.fit_law(tokens[:3], distinct[:3], tokens[:3]) is None
    # Nor is there a floor to be seen where every doubling is worth as much as the one before, or more.
    for straight in (9 - 0.4 * np.log(tokens), 9 - 0.02 * np.log(tokens) ** 2):
        assert fits.fit_law(tokens[:5], distinct[:5], straight[:5]) is None


def test_counts_of_tokens_have_digits_at_every_size():
    counts = (14_052_236_800, 130_614_272, 999_424, 14_336)
    assert [saturation._count(n) for n in counts] == ["14.1B", "130.6M", "999,424", "14,336"]


def test_the_best_rate_is_that_of_a_parabola():
    points = [(2.0**x, 1 + 0.25 * (x + 6.3) ** 2, 0) for x in (-8, -7, -6, -5)]
    fit = fits.fit_optimum(points)
    assert fit.rate == pytest.approx(2**-6.3) and fit.loss == pytest.approx(1) and fit.error < 1e-6
    assert fits.fit_optimum(points[:3]).error is None
    assert fits.fit_optimum(points[:2]) is None
    # A rate far off lies on no parabola: it is left out.
    assert fits.fit_optimum([*points, (2.0**-3, 99.0, 0)]).rate == pytest.approx(2**-6.3)
    assert not fits.fit_optimum([(1, 1.0, 0), (2, 2.0, 0), (4, 2.5, 0)]).is_minimum
    # The error is that of repeated draws.
    rng = np.random.default_rng(0)
    drawn = [fits.fit_optimum([(r, y + 0.01 * rng.normal(), 0) for r, y, _ in points]) for _ in range(300)]
    spread = np.std([math.log2(one.rate) for one in drawn])
    rms = math.sqrt(np.mean([one.error**2 for one in drawn]))
    assert rms == pytest.approx(
        spread, rel=0.25
    )  # the spread of 300 is known to 4%, with one spare point each


def test_a_seed_that_lies_lower_does_not_move_the_best_rate():
    """Seed 0 has every rate, seed 1, which lies higher by more than the rates differ, those in the middle."""
    points = [(2.0**x, 1 + 0.01 * (x + 6.3) ** 2, 0) for x in (-8, -7, -6, -5)]
    points += [(rate, loss + 0.05, 1) for rate, loss, _ in points[1:3]]
    fit = fits.fit_optimum(points)
    assert fit.rate == pytest.approx(2**-6.3) and fit.error < 1e-6
    assert fit.loss == pytest.approx(1.025)  # the mean of both seeds' minima
    # One rate of each seed ties nothing together.
    assert fits.fit_optimum([(2.0**x, 1 + x**2, x) for x in (-1, 0, 1)]) is None


def test_a_minimum_is_bracketed_by_rates_that_came_to_a_loss():
    def inside(losses: dict[float, float]) -> bool:
        return fits.fit_optimum([(rate, loss, 0) for rate, loss in losses.items()]).is_inside(losses)

    assert inside({1: 1.2, 2: 1.0, 4: 1.1})
    falling = {1: 1.2, 2: 1.02, 4: 1.0}
    fit = fits.fit_optimum([(rate, loss, 0) for rate, loss in falling.items()])
    assert 2 < fit.rate < 4 and not inside(falling)  # nothing shows that it rises again
    assert not inside({1: 1.2, 2: 1.0, 4: 0.9})
    rising = {1: 1.0, 2: 1.02, 4: 1.2}
    fit = fits.fit_optimum([(rate, loss, 0) for rate, loss in rising.items()])
    assert 1 < fit.rate < 2 and not inside(rising)


def entry_of(lr: float, loss: float, **given) -> dict:
    """A run's results, as far as tuning's report reads them."""
    n = {"width": 64, "layers": 2, "batch": 4, "steps": 100, **given}
    settings = {name: value for name, value in n.items() if name not in ("width", "layers", "halted")}
    return {
        "name": f"{lr}", "settings": settings | {"d_model": n["width"], "n_layers": n["layers"]},
        "steps": n["steps"], "fingerprint": "", "lr": lr, "seed": 0, "batch": n["batch"], "skipped": 0,
        "tokens_per_second": None, "optimizer": "muon", "halted": n.get("halted", False),
        "model": {"context": 8, "width": n["width"], "layers": n["layers"]}, "losses": {"valid": loss},
    }  # fmt: skip


def grid(best: float, **given) -> list[dict]:
    """Three rates with their minimum at `best`, the middle one."""
    return [entry_of(best * 2**x, 3 + x**2, **given) for x in (-1, 0, 1)]


def test_the_rule_says_what_it_is_of_or_why_there_is_none():
    def rule(*grids: list[dict]) -> str:
        return tuning._rules(tuning.groups(SimpleNamespace(entries=[*itertools.chain(*grids)])), "valid")[0]

    widths = [grid(0.01 * 2**-n, width=64 * 2**n) for n in range(3)]  # rate ~ 1 / width
    assert rule(*widths[:2]) == "muon, 2 bracketed minima: no rule yet, powers of width take 3."
    said = rule(*widths)
    assert said == "muon, 3 bracketed minima: best rate = 0.005 (width / 128)^(-1.00 ± 0.00)."
    # A decay of its own moves the best rate: it is another rule's.
    assert "3 bracketed minima (1 of runs with other settings left out)" in rule(
        *widths, grid(0.08, width=512, decay=0.5)
    )
    # Batches have the same warmup where it is as many sequences.
    batches = [grid(0.01 * 2**n, batch=4 * 2**n, warmup=80 // 2**n) for n in range(3)]
    assert rule(*batches) == "muon, 3 bracketed minima: no rule yet, powers of batch and tokens take 4."
    # A rate that the guard halted brackets nothing.
    halted = [entry_of(0.01, 3.2), entry_of(0.02, 3.02), entry_of(0.04, 3.0), entry_of(0.08, 9, halted=True)]
    assert rule(halted).startswith("muon, 0 bracketed minima")
    page = tuning.table(SimpleNamespace(entries=halted), "valid")
    assert "| 0.04 | 3.0000 | 3.08e-02, but the best tried is at an edge |" in page


@pytest.mark.parametrize(
    "rates", [[2e-3, 2.8e-3, 4e-3, 8e-3, 16e-3, 32e-3, 64e-3], [0.01, 0.02], [0.01, 0.011], [1e-5, 1e-3, 0.1]]
)
def test_the_axis_of_rates_has_round_numbers_and_the_legend_takes_no_width(tmp_path, monkeypatch, rates):
    """Twenty lines with long names, which is what the study in stacking/studies has."""
    entries = [
        {
            "settings": {"preset": "mtlm2-40m", "d_model": 64 * n, "weight_decay": 0.1}, "steps": 100,
            "fingerprint": "", "lr": rate, "seed": 0, "batch": 4, "model": {"context": 8}, "halted": False,
            "losses": {"valid": 3 + n + abs(math.log2(rate / 0.01))},
        }
        for n in range(20) for rate in rates
    ]  # fmt: skip
    figures = []
    monkeypatch.setattr(report, "write_picture", lambda figure, *_, **__: figures.append(figure))
    report.draw(tuning, SimpleNamespace(entries=entries), "valid", tmp_path / "a.png")
    (figure,) = figures
    (axes,) = figure.axes
    figure.draw_without_rendering()
    labels = [label for label in axes.get_xticklabels() if label.get_text()]
    assert 3 <= len(labels) <= 12 and not len(axes.get_xticks(minor=True))
    for label, tick in zip(labels, axes.get_xticks(), strict=True):
        assert float(label.get_text()) == tick and len(f"{tick:e}".rstrip("0").split("e")[0].rstrip("0")) <= 4
    boxes = [label.get_window_extent() for label in labels]
    assert all(left.x1 < right.x0 for left, right in itertools.pairwise(boxes))
    assert axes.get_position().width > 0.8
    legend, inches = figure.legends[0].get_window_extent(), figure.dpi * figure.get_size_inches()
    assert len(figure.legends[0].get_texts()) == 20
    assert legend.x0 >= 0 and legend.y0 >= 0 and legend.x1 <= inches[0]
    assert legend.y1 <= axes.get_tightbbox().y0 and axes.get_window_extent().height > 4 * figure.dpi


def test_a_study_that_has_only_begun_has_a_picture(tmp_path, recwarn):
    """Of one rate there is a point, where no line can be drawn; of halted runs there is nothing."""
    entry = {
        "settings": {}, "steps": 100, "fingerprint": "", "lr": 0.01, "seed": 0, "batch": 4,
        "model": {"context": 8}, "halted": False, "losses": {"valid": 3.0},
    }  # fmt: skip
    for name, entries, n_lines in (("one", [entry], 2), ("none", [entry | {"halted": True}], 0)):
        axes = Figure().subplots()
        tuning.plot(SimpleNamespace(entries=entries), "valid", axes)
        assert len(axes.lines) == n_lines  # the mean, and the seeds
        report.draw(tuning, SimpleNamespace(entries=entries), "valid", tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert not recwarn.list


def test_an_interrupted_study_says_how_it_continues(text_of_a_study, tmp_path, monkeypatch, capsys):
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(experiment, "run_jobs", interrupt)
    study = study_file(tmp_path, "tuning", TUNING, text_of_a_study)
    monkeypatch.setattr("sys.argv", ["study", str(study), "--out", str(tmp_path / "out")])
    assert command.main() == 130
    assert "the same command resumes the rest" in capsys.readouterr().err


def test_powers_are_fitted_where_they_are_determined():
    points = [
        ({"width": w, "tokens": t}, 0.1 * w**-0.5 * t**-0.25)
        for w, t in ((192, 1), (384, 1), (192, 4), (768, 9))
    ]
    fitted = fits.fit_powers(points)
    assert fitted["width"] == (pytest.approx(-0.5), pytest.approx(0, abs=1e-6))
    assert fitted["tokens"][0] == pytest.approx(-0.25)
    assert fits.fit_powers(points[:3]) == "powers of width and tokens take 4"
    assert fits.fit_powers([]) == "they must differ in size or length"
    # With noise, the errors are those that SciPy has.
    noisy = [
        (at, value * math.exp(noise)) for (at, value), noise in zip(points, (0.1, -0.2, 0, 0.1), strict=True)
    ]
    noisy.append(({"width": 192, "tokens": 9}, 0.02))
    x = np.log([(at["width"], at["tokens"]) for at, _ in noisy]).T
    y = np.log([value for _, value in noisy])
    powers, covariance = scipy.optimize.curve_fit(lambda x, a, b, c: a + b * x[0] + c * x[1], x, y)
    found = fits.fit_powers(noisy)
    assert [found["width"][0], found["tokens"][0]] == pytest.approx(powers[1:], rel=1e-5)
    errors = np.sqrt(np.diag(covariance))[1:]
    assert [found["width"][1], found["tokens"][1]] == pytest.approx(errors, rel=1e-5)
    same = [({"width": 192 * n, "layers": n % 2 + 1, "tokens": n}, 1.0) for n in (1, 2, 3, 4, 5)]
    assert fits.fit_powers(same) == "width and tokens differ together"


def growth_loss(run: Run) -> float:
    best = {"scratch": 0.01, "small": 0.02, "stack": 0.02, "random": 0.01}[run.labels["arm"]]
    return 3 + (run.labels["lr"] != best) + 1e9 / run.flops(run.steps) + 0.1 * run.labels["seed"]


def test_growth_tunes_every_arm_and_then_decays_it_where_the_others_are(
    text_of_a_study, tmp_path, monkeypatch
):
    study = study_file(tmp_path, "growth", GROWTH, text_of_a_study)
    training = FakeTraining(monkeypatch, growth_loss)
    run_study(StudyConfig(str(study), out=tmp_path / "out"), make_console())
    results = read_results(tmp_path / "out/results.json")
    decayed = {}
    for entry in results.runs.values():
        labels = entry["labels"]
        if not labels.get("trunk"):
            decayed.setdefault((labels["arm"], labels["seed"], labels["lr"]), []).append(entry)
    # Tuned on seed 0 at equal tokens; the second seed at the best rate alone.
    assert {key for key in decayed if key[1] == 1} == {
        ("scratch", 1, 0.01), ("small", 1, 0.02), ("stack", 1, 0.02), ("random", 1, 0.01),
    }  # fmt: skip
    assert [entry["steps"] for entry in decayed["stack", 0, 0.01]] == [40]
    # The main way of growing and its rivals have ended before the control begins.
    ended = [entry["labels"] for name, entry in results.runs.items() if "/decayed-" in name]
    order = [labels["arm"] == "random" for labels in ended]
    assert order == sorted(order) and 0 < sum(order) < len(order)
    # FLOPs: those of the small model count, and rivals are decayed where the grown arm is, to half an update.
    per_step = {
        name: decayed[name, 1, lr][0]["model"]["flops_per_token"] * 128
        for name, lr in (("scratch", 0.01), ("small", 0.02))
    }
    grown = next(entry for entry in decayed["stack", 1, 0.02] if entry["steps"] == 40)
    assert grown["flops"] == 10 * per_step["small"] + 30 * per_step["scratch"]
    for name, lr in (("scratch", 0.01), ("small", 0.02)):
        nearest = min(abs(entry["flops"] - grown["flops"]) for entry in decayed[name, 1, lr])
        assert nearest <= per_step[name] / 2
    table = (tmp_path / "out/results.md").read_text()
    assert "stack at 10 was best at the edge of its rates, 0.02: its best may lie above" in table
    assert "| scratch | 0.01 |" in table and "| small | 0.02 |" in table and "| stack at 10 | 0.02 |" in table
    assert len([line for line in table.splitlines() if line.startswith("| stack at 10 |")]) == 2
    assert len(training.made) == len(set(training.made))


ONE_SEED = GROWTH.replace("[0, 1]", "0").replace("[0.01, 0.02]", "[0.01, 0.02, 0.04]")


def test_what_a_best_rate_may_need_outlives_a_budget(text_of_a_study, tmp_path, monkeypatch):
    """Stopped after each job in turn, a study trains what it does at once: the best rate is not the first,
    and until it is known no trunk may go."""
    study = study_file(tmp_path, "growth", ONE_SEED, text_of_a_study)
    with monkeypatch.context() as patch:
        patch.setattr(experiment, "report", lambda *_: None)
        whole = FakeTraining(patch, growth_loss)
        run_study(StudyConfig(str(study), out=tmp_path / "whole"), make_console())
        made: list[str] = []
        while len(made) < len(whole.made):
            one = FakeTraining(patch, growth_loss, most=1)
            run_study(StudyConfig(str(study), out=tmp_path / "parts"), make_console())
            assert one.made, made
            made += one.made
    assert sorted(made) == sorted(whole.made) and len(set(made)) == len(made)
    assert not list((tmp_path / "parts").rglob("checkpoints"))


def test_a_grown_run_that_lost_its_weights_is_grown_again(text_of_a_study, tmp_path, monkeypatch):
    """It is not trained from random parameters: its folder is still there, and says nothing of its origin."""
    study = study_file(tmp_path, "growth", ONE_SEED, text_of_a_study)
    config = StudyConfig(str(study), out=tmp_path / "out")
    FakeTraining(monkeypatch, growth_loss)
    run_study(config, make_console())
    path, lost = tmp_path / "out/results.json", "seed-0/lr-0.02/stack-at-10/decayed-44"
    record = json.loads(path.read_text())
    del record["runs"][lost]
    path.write_text(json.dumps(record))
    shutil.rmtree(tmp_path / "out" / lost)
    again = FakeTraining(monkeypatch, growth_loss)
    run_study(config, make_console())
    trunk = lost.replace("decayed-44", "trunk")
    assert again.made == ["seed-0/lr-0.02/small/trunk@10", f"{trunk}@grow", f"{trunk}@35", f"{lost}@44"]


def test_what_comes_later_is_not_what_there_is(text_of_a_study, tmp_path, monkeypatch):
    """A study at one rate, all of it trained, is then given three."""
    monkeypatch.setattr(experiment, "report", lambda *_: None)
    one = ONE_SEED.replace("[0.01, 0.02, 0.04]", "0.01")
    config = StudyConfig(str(study_file(tmp_path, "growth", one, text_of_a_study)), out=tmp_path / "out")
    FakeTraining(monkeypatch, growth_loss)
    run_study(config, make_console())
    definition = read_definition(str(study_file(tmp_path, "growth", ONE_SEED, text_of_a_study)), None)
    results = read_results(tmp_path / "out/results.json")
    later = growth.later(definition, results)
    assert later and all(run.labels["arm"] == "random" and run.labels["lr"] != 0.01 for run in later)


def test_an_arm_without_a_finite_loss_at_any_rate_has_no_best():
    runs = [
        Run(f"{arm}-{lr:g}", None, 40, {"arm": arm, "grown_at": 0, "lr": lr})
        for arm in ("scratch", "small") for lr in (0.01, 0.02)
    ]  # fmt: skip
    losses = {"scratch-0.01": 3.0, "scratch-0.02": math.inf, "small-0.01": math.nan, "small-0.02": math.inf}
    results = SimpleNamespace(losses=lambda name: {"valid": losses[name]})
    assert best_rates(results, runs[:2], "valid") == {("scratch", 0): 0.01}
    with pytest.raises(UserError, match="small came to a finite loss at none of its rates"):
        best_rates(results, runs, "valid")


def arm(op: str, seed: int, ends: list[tuple[int, float, float]], grown_at: int = 0) -> Arm:
    decayed = tuple(Point(*end) for end in ends)
    equal = next(point for point in decayed if point.steps == 100)
    return Arm(op, grown_at, seed, 1e-3, decayed, equal, 1000, 30, 1)


ARMS = [
    arm("scratch", 0, [(80, 80.0, 3.2), (100, 100.0, 3.0)]),
    arm("scratch", 1, [(80, 80.0, 3.4), (100, 100.0, 3.2)]),
    arm("small", 0, [(100, 50.0, 3.6), (160, 80.0, 3.15)]),
    arm("stack", 0, [(80, 60.0, 3.2), (100, 80.0, 3.1), (120, 100.0, 2.9)], 40),
    arm("stack", 1, [(80, 60.0, 3.4), (100, 80.0, 3.3), (120, 100.0, 3.1)], 40),
    arm("random", 0, [(80, 60.0, 3.3), (100, 80.0, 3.2), (120, 100.0, 3.1)], 40),
    arm("random", 1, [(80, 60.0, 3.5), (100, 80.0, 3.4)], 40),
]


def test_the_table_of_growth_pairs_seeds_and_says_what_is_missing():
    rows = {line.split(" | ")[0].strip("| "): line for line in make_table(ARMS).splitlines()}
    assert "3.1000 ± 0.1000" in rows["scratch"] and "1.000" in rows["scratch"]
    # Both seeds lie 0.1 above their own scratch at equal tokens and 0.1 below at equal FLOPs; scratch's loss
    # is half-way between, at the geometric mean of 80 and 100: 10.6 % fewer FLOPs.
    for words in ("+0.1000 ± 0.0000", "0.800", "-0.1000 ± 0.0000", "-10.6 ± 0.0 %"):
        assert words in rows["stack at 40"], rows["stack at 40"]
    assert "+0.1000 (1 of 2 seeds)" in rows["random at 40"]
    assert "> +0.0 % (1 of 2 seeds)" in rows["random at 40"]
    # At the grown arm's 80 FLOPs, scratch has 3.2 and 3.4, the small model 3.15 in its one seed.
    row = at_equal_flops(ARMS)[1]
    assert row == "| stack at 40 | 0.800 | 3.2000 ± 0.1000 | -0.1000 ± 0.0000 | -0.0500 (1 of 2 seeds) |"


def test_a_study_of_growth_that_is_not_finished_says_nothing_it_does_not_know(tmp_path):
    """The small model is decayed at fewer FLOPs than scratch's so far, and one arm was tuned at one rate."""
    unfinished = [ARMS[0], arm("small", 0, [(100, 50.0, 3.6), (130, 65.0, 3.2)]), ARMS[3]]
    rows = {line.split(" | ")[0].strip("| "): line for line in make_table(unfinished).splitlines()}
    assert rows["small"].endswith("| 3.6000 | +0.6000 | 0.500 |  |  |  |")
    found = {}
    for op, rates in (("scratch", (1e-3,)), ("stack", (1e-3, 2e-3, 4e-3))):
        for lr in rates:
            found[f"{op}-{lr}"] = {
                "labels": {"arm": op, "grown_at": 40 * (op == "stack"), "seed": 0, "lr": lr,
                           "equal_tokens": True},
                "halted": False, "steps": 100, "flops": 100.0, "losses": {"valid": 3 + abs(lr - 2e-3)},
                "batch": 1, "model": {"parameters": 1, "flops_per_token": 3, "context": 1},
            }  # fmt: skip
    page = growth_report.table(SimpleNamespace(runs=found, path=tmp_path), "valid")
    assert "scratch has no loss at 0.002, 0.004, where others do." in page
    assert "stack at 40 has no loss" not in page
    # Lines go through the means of seeds that have been decayed at the same lengths.
    axes = Figure().subplots()
    seeds = [arm("scratch", 0, [(80, 80.0, 3.2), (100, 100.0, 3.0)]),
             arm("scratch", 1, [(100, 100.0, 3.2), (120, 120.0, 3.1)])]  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(growth_report, "read_arms", lambda *_: (seeds, []))
        growth_report.plot(None, "valid", axes)
    assert axes.lines[0].get_ydata().tolist() == [3.2, 3.0]
    assert axes.lines[0].get_label() == "scratch (1 of 2 seeds finished)"


def test_flops_are_read_off_between_decayed_runs_only():
    points = [(1e3, 4.0), (1e4, 3.0), (1e5, 2.5)]
    assert flops_to_reach(points, 3.5) == (pytest.approx(10**3.5), "=")
    assert flops_to_reach(points[::-1], 2.5) == (pytest.approx(1e5), "=")
    assert flops_to_reach(points, 4.2) == (1e3, "<")
    assert flops_to_reach(points, 2.4) == (1e5, ">")


def test_curves_are_thinned_to_means():
    assert thinned([(i, float(i)) for i in range(80)])[:2] == [[1, 0.5], [3, 2.5]]
    assert thinned([(0, 1.0)]) == [[0, 1.0]] and thinned([]) == []


def log_of_updates(folder: Path, first: int, n: int, rate: float, before: list[dict] | None = None) -> Path:
    """A run folder with the log of a process that made `n` updates at `rate` tokens per second."""
    folder.mkdir(exist_ok=True)
    figures = {"kind": "train", "loss": 1.0, "nll": 1.0, "tokens": 1, "tokens_per_second": rate}
    rows = [*(before or []), {"step": first, "kind": "event", "what": "first update"}]
    rows += [{"step": first + i, **figures} for i in range(n)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_the_clock_tells_the_start_from_the_updates(text_of_a_study, tmp_path):
    study = study_file(tmp_path, "tuning", TUNING, text_of_a_study)
    study.write_text(study.read_text() + '[[runs]]\nname = "b"\nsteps = 12\nn_layers = 3\n')
    definition = read_definition(str(study), None)
    runs = experiment.open_runs(definition, open_results(tmp_path / "results.json", definition))
    one, other = runs[0], runs[-1]
    clock = Clock(None)
    assert clock.seconds(one, 1e9) is None
    # Ten updates of 128 tokens at 64 tokens/s take 20 s, so the start took 5; twice as many take 45.
    clock.measure(one, 25.0, log_of_updates(tmp_path / "a", 0, 10, 64))
    assert clock.seconds(one, 20 * one.settings.flops_per_step) == pytest.approx(45)
    # The next one starts faster, since nothing is to be compiled; another kind of run is, again.
    clock.measure(one, 21.0, log_of_updates(tmp_path / "a", 0, 10, 64))
    assert clock.seconds(one, 20 * one.settings.flops_per_step) == pytest.approx(41)
    assert clock.seconds(other, 20 * one.settings.flops_per_step) == pytest.approx(45)
    clock.measure(other, 29.0, log_of_updates(tmp_path / "b", 0, 10, 64))
    assert clock.seconds(other, 20 * other.settings.flops_per_step) == pytest.approx(49)
    assert clock.seconds(one, 20 * one.settings.flops_per_step) == pytest.approx(41)
    # What a model was grown from, and a process before on another machine, ran at other speeds.
    figures = {"kind": "train", "loss": 1.0, "nll": 1.0, "tokens": 1, "tokens_per_second": 6400}
    grown = [{CARRIED: 50, "step": i, **figures} for i in range(50)]
    before = [{"step": 50 + i, **figures} for i in range(50)]
    clock.measure(one, 25.0, log_of_updates(tmp_path / "a", 100, 10, 64, [*grown, *before]))
    assert clock.seconds(one, 20 * one.settings.flops_per_step) == pytest.approx(45)


def test_one_wrong_guess_does_not_change_what_is_expected_of_others(text_of_a_study, tmp_path):
    """Of four kinds, which the study expects to reach 1e6 FLOP/s alone and so half of that as one of two, two
    reach that and one three times as much: the fourth is expected to reach it."""
    blocks = [f'name = "{n}"\nsteps = 12\nn_layers = {n}\nflops_per_second = 1e6\n' for n in (2, 3, 4, 5)]
    study = study_file(tmp_path, "tuning", "[[runs]]\n".join(blocks), text_of_a_study)
    definition = read_definition(str(study), None)
    runs = experiment.open_runs(definition, open_results(tmp_path / "results.json", definition))
    clock = Clock(2)
    assert clock.seconds(runs[3], 1e6) == pytest.approx(2 + experiment.START)
    for one, times in zip(runs[:3], (1, 3, 1), strict=True):
        rate = times * 5e5 / one.model.flops_per_token()
        updates = 10 * one.settings.batch_tokens / rate
        clock.measure(one, updates + 7, log_of_updates(tmp_path / one.name, 0, 10, rate))
    assert clock.seconds(runs[3], 1e6) == pytest.approx(2 + 7)


def test_of_an_interrupted_run_only_the_rest_is_expected(text_of_a_study, tmp_path):
    definition = read_definition(str(study_file(tmp_path, "tuning", TUNING, text_of_a_study)), None)
    (one, *_) = experiment.open_runs(definition, open_results(tmp_path / "results.json", definition))
    runs = RUNS(tmp_path, [one], lambda _: False, lambda *_: None, lambda _, flops: flops)
    (job,) = runs.jobs()
    assert job.seconds() == one.flops(12)
    for step in (6, 9):
        step_path(tmp_path / one.name / "checkpoints", step).mkdir(parents=True)
    assert job.seconds() == one.flops(12) - one.flops(9)


def test_a_mixture_is_one_value(text_of_a_study, tmp_path, monkeypatch, capsys):
    """Two mixtures are an axis; results know their text wherever it lies, and no other."""
    monkeypatch.setattr(report, "draw", lambda *_: None)
    books = tmp_path / "books.txt"
    books.write_text("".join(f"{n} pages. " for n in range(3000)))
    mixed = f"""data = [["wiki={text_of_a_study}", "books={books}"]]
weights = [["wiki=1", "books=3"], ["wiki=3", "books=1"]]
phases = [["0.5", "books=1"]]
"""
    study = study_file(tmp_path, "tuning", f'name = "a"\ntokens = 2e3\n{mixed}', text_of_a_study)
    arguments = ["study", str(study), "--out", str(tmp_path / "out")]
    monkeypatch.setattr("sys.argv", [*arguments, "--dry-run"])
    command.main()
    said = capsys.readouterr().out
    names = ["a/weights-wiki=1+books=3", "a/weights-wiki=3+books=1"]
    assert all(f"  {name}: 16 steps" in said for name in names)
    typed = shlex.split(said.splitlines()[-1])
    for flag, values in (
        ("--data", [f"wiki={text_of_a_study}", f"books={books}"]),
        ("--weights", ["wiki=1", "books=3"]),
        ("--phases", ["0.5", "books=1"]),
    ):
        at = typed.index(flag) + 1
        assert typed[at : at + len(values)] == values

    training = FakeTraining(monkeypatch, parabola)
    monkeypatch.setattr("sys.argv", arguments)
    command.main()
    assert training.made == [f"{name}@16" for name in names]
    results = read_results(tmp_path / "out/results.json")
    assert list(results.runs) == names
    assert results.runs[names[0]]["settings"]["weights"] == ["wiki=1", "books=3"]
    moved = books.rename(tmp_path / "moved.txt")
    monkeypatch.setattr("sys.argv", [*arguments, "--data", f"wiki={text_of_a_study}", f"books={moved}"])
    study.write_text(study.read_text().replace(mixed.splitlines()[0], ""))
    command.main()
    assert "0 of 2 runs to do" in capsys.readouterr().out and len(training.made) == 2
    books.write_text("another text " * 3000)
    other = f"books={books}"
    assert f"another text than wiki={text_of_a_study} {other}: give that text" in refusal_here(
        study, "--out", tmp_path / "out", "--data", f"wiki={text_of_a_study}", other, module=command.__name__
    )


def test_what_a_study_refuses(text_of_a_study, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "draw", lambda *_: None)
    text = text_of_a_study

    def refused(kind: str, runs: str, *options: str) -> str:
        path = study_file(tmp_path, kind, runs, text)
        return refusal_here(path, "--out", tmp_path / "out", *options, module=command.__name__)

    (tmp_path / "utf16.toml").write_bytes('kind = "tuning"'.encode("utf-16"))
    assert "utf16.toml is not UTF-8 text but UTF-16" in refusal_here(
        tmp_path / "utf16.toml", module=command.__name__
    )
    assert "there is no study tunning: give a .toml file, or one of growth" in refusal_here(
        "tunning", module=command.__name__
    )
    assert "kind is 'sweep', not one of tuning" in refused("sweep", TUNING)
    assert "there is no setting learning_rate: it takes" in refused("tuning", TUNING + "learning_rate = 1\n")
    assert "there is no setting stesp: did you mean steps?" in refused(
        "tuning", TUNING.replace("steps", "stesp")
    )
    assert "runs a: out is set by the study" in refused("tuning", TUNING + 'out = "x"\n')
    assert "runs a: --lr is -1.0; it must be positive" in refused("tuning", TUNING.replace("0.01", "-1.0"))
    assert "'sgd' is not one of" in refused("tuning", TUNING + 'optimizer = "sgd"\n')
    assert "runs a has a/lr-0.01/seed-0 twice" in refused("tuning", TUNING.replace("0.02", "0.01"))
    assert "has 2 [[runs]] of the name a" in refused("tuning", f"{TUNING}\n[[runs]]\n{TUNING}")
    assert "runs a need steps or tokens" in refused("tuning", 'name = "a"\n')
    assert "give steps or tokens, not both" in refused("tuning", TUNING + "tokens = 100\n")
    assert "is not TOML" in refused("tuning", "name = \n")
    assert "a name without a slash" in refused("tuning", 'name = "a/b"\nsteps = 3\n')
    assert "need tokens_per_parameter, a list" in refused("saturation", 'name = "a"\n')
    one = SATURATION.replace("0.4", '"one"')
    assert "error: a.tokens_per_parameter is 'one'; it must be positive" in refused("saturation", one)
    assert "within the warmup of 4" in refused("saturation", SATURATION.replace("0.05", "0.01"))
    assert "schedule must be wsd" in refused("saturation", SATURATION + 'schedule = "cosine"\n')
    tuned = 'preset = "mtlm2-40m"\noptimizer = "muon"\n'
    assert "runs a: give lr" in refused("saturation", SATURATION + tuned)
    assert "cannot be reached by growing by a factor of 3" in refused("growth", GROWTH + "factor = 3\n")
    assert "not settled before step 33" in refused("growth", GROWTH.replace("0.25", "0.75"))
    assert "another decay than scratch" in refused("growth", GROWTH.replace("rewarm:3", "restart"))
    assert "only lr and seed may be lists, not batch" in refused("growth", GROWTH + "batch = [4, 8]\n")
    assert "'stak' is no way of growing: stack" in refused("growth", GROWTH.replace('"stack"', '"stak"'))
    flat = refused("tuning", f'{TUNING}weights = ["w=1", "b=2"]\n')
    assert "weights is a list" in flat and 'list within a list: weights = [["w=1", "b=2"]]' in flat
    assert "data is a list" in refused("tuning", f'{TUNING}data = ["w={text}", "b={text}"]\n')
    mixed = f'data = [["w={text}", "b={text}"]]\n'
    assert "data names 2 sources: give their shares, as in --weights b=1 w=1" in refused(
        "tuning", TUNING + mixed
    )
    mixed += 'weights = [["w=1", "b=1"]]\n'
    assert "runs a: the law counts the passes over a text" in refused("saturation", SATURATION + mixed)
    phases = f'{mixed}phases = [["0.5", "b=1"]]\n'
    assert "arms are decayed at several: leave phases out" in refused("growth", GROWTH + phases)
    study_file(tmp_path, "books", TUNING, text)
    books = (tmp_path / "books.toml").read_text().replace('"books"', '"tuning"\nheldout = "books"')
    (tmp_path / "books.toml").write_text(books)
    assert "holds out valid, and the study compares losses on books" in refusal_here(
        tmp_path / "books.toml", "--out", tmp_path / "out", module=command.__name__
    )
    assert "is a folder: name a file" in refused("tuning", TUNING, "--results", tmp_path)
    table = refused("tuning", TUNING, "--results", tmp_path / "mine.md")
    assert "the report of results is written next to them, with .md and .png; name a .json file" in table
    (tmp_path / "file").touch()
    assert "file is a file: name another folder" in refused(
        "tuning", TUNING, "--results", tmp_path / "file/mine.json"
    )
    assert "--data needs a value" in refused("tuning", TUNING, "--data")
    assert "a name without a slash, not '..'" in refused("tuning", TUNING.replace('"a"', '".."'))
    assert "--minutes is 0.0; it must be positive" in refused("tuning", TUNING, "--minutes", "0")
    assert "--gpus 7: the GPUs here are" in refused("tuning", TUNING, "--gpus", "7")
    assert "holds no results yet" in refused("tuning", TUNING, "--report")
    assert not (tmp_path / "out").exists()

    FakeTraining(monkeypatch, parabola, most=1)
    study = study_file(tmp_path, "tuning", TUNING, text)
    run_study(StudyConfig(str(study), out=tmp_path / "out"), make_console())
    assert "has a/lr-0.01/seed-0 with steps 12, and the study asks for 13" in refused(
        "tuning", TUNING.replace("12", "13")
    )
    assert "has a/lr-0.01/seed-0 with window 4, and the study asks for 8" in refused(
        "tuning", TUNING + "window = 8\n"
    )
    assert "has a/lr-0.01/seed-0 without sigma, and the study asks for 3.0: rename" in refused(
        "tuning", TUNING + "sigma = 3.0\n"
    )
    without = tmp_path / "tuning.toml"
    study_file(tmp_path, "tuning", TUNING, text)
    without.write_text(without.read_text().replace("window = 4\n", ""))
    said = refusal_here(without, "--out", tmp_path / "out", module=command.__name__)
    assert "has a/lr-0.01/seed-0 with window 4, and the study leaves it out: rename" in said
    assert "holds a study of tuning, not of growth" in refused("growth", GROWTH)
    (tmp_path / "out/results.json").write_text("{")
    assert "results.json is damaged" in refused("tuning", TUNING)


def test_another_study_does_not_write_the_same_file_or_folder(text_of_a_study, tmp_path, monkeypatch):
    """Each would write what it knows, so that of two the runs of one were lost. Reading is allowed meanwhile,
    and of what is refused nothing stays."""
    monkeypatch.setattr(report, "draw", lambda *_: None)
    study = study_file(tmp_path, "tuning", TUNING, text_of_a_study)
    results = tmp_path / "kept/R.json"
    config = StudyConfig(str(study), out=tmp_path / "one", results=results)
    training = FakeTraining(monkeypatch, parabola)

    def train_and_try_others(*arguments) -> bool:
        whole = training(*arguments)
        with monkeypatch.context() as patch:
            patch.setattr(experiment, "pursue", lambda *_: pytest.fail("something slow came first"))
            for other, said in (
                ({"out": tmp_path / "two"}, f"another study adds to {results}: "),
                ({"results": tmp_path / "other/S.json"}, f"another process is training into {config.out}: "),
                ({}, f"another process is training into {config.out}: "),
            ):
                with pytest.raises(UserError, match=f"^{said}"):
                    run_study(dataclasses.replace(config, **other), make_console())
        for reading in ("dry_run", "report"):
            run_study(dataclasses.replace(config, **{reading: True}), make_console())
        assert {path.name for path in tmp_path.iterdir()} == {"kept", "one", study.name}
        return whole

    monkeypatch.setattr(experiment, "run_jobs", train_and_try_others)
    run_study(config, make_console())
    assert len(training.made) == len(read_results(results).runs) == 8
    assert {path.name for path in results.parent.iterdir()} == {"R.json", "R.md"}


def test_the_first_command_can_be_typed(text_of_a_study, tmp_path, monkeypatch, capsys):
    """Names with blanks are quoted; a file from an editor that writes a BOM is read."""
    path = study_file(tmp_path, "tuning", TUNING.replace('"a"', '"a b"'), text_of_a_study)
    path.write_text(path.read_text(), encoding="utf-8-sig")
    monkeypatch.setattr("sys.argv", ["study", str(path), "--dry-run", "--out", str(tmp_path / "o")])
    assert command.main() == 0
    typed = shlex.split(capsys.readouterr().out.splitlines()[-1])
    assert Path(typed[-1]).parts[:-1] == (*tmp_path.parts, "o", "a b", "lr-0.01")


def test_a_dry_run_says_what_a_start_would_be_refused_for(text_of_a_study, tmp_path, monkeypatch, capsys):
    """After the cost, which it was asked for; and it prepares no text."""
    study = study_file(tmp_path, "tuning", TUNING, text_of_a_study)
    config = StudyConfig(str(study), out=tmp_path / "out", dry_run=True)

    def note(**changed: object) -> str:
        run_study(dataclasses.replace(config, **changed), make_console())
        said = capsys.readouterr().out.splitlines()
        assert said[0].startswith("tuning (tuning): 8 of 8 runs to do")
        (first,) = (line for line in said if line.startswith("first command: "))
        return " ".join(said[said.index(first) + 1 :])

    def refused(**changed: object) -> str:
        with pytest.raises(UserError) as error:
            run_study(dataclasses.replace(config, dry_run=False, **changed), make_console())
        return f"note: without --dry-run this would be refused now: {error.value}"

    gone = str(tmp_path / "gone")
    assert note() == ""
    assert note(data=(gone,)) == refused(data=(gone,)) and gone in note(data=(gone,))
    with monkeypatch.context() as patch:
        patch.setattr("core.data.prepare.prepare", lambda *_: pytest.fail("prepared"))
        (tmp_path / "other.txt").write_text("a few words")
        assert note(data=(str(tmp_path / "other.txt"),)) == ""
    prepared = tmp_path / "prepared"
    prepare([str(text_of_a_study)], prepared, "bytes", 32, valid_fraction=0.0)
    capsys.readouterr()
    assert note(data=(str(prepared),)) == refused(data=(str(prepared),))
    assert "holds out nothing, and the study compares losses" in note(data=(str(prepared),))


def test_what_no_budget_of_these_flops_can_train_is_named(text_of_a_study, tmp_path, capsys):
    """Each of the eight runs costs its 12 steps of 128 tokens."""
    study = study_file(tmp_path, "tuning", TUNING, text_of_a_study)
    (one, *_) = tuning.runs(read_definition(str(study), None), None)
    cost = 12 * 128 * one.model.flops_per_token()
    for budget, named in ((0.99 * cost, True), (1.01 * cost, False)):
        config = StudyConfig(str(study), out=tmp_path / "out", flops=budget, dry_run=True)
        run_study(config, make_console())
        assert ("8 of 8 processes cost more FLOPs than all of it" in capsys.readouterr().out) == named


def test_what_no_call_of_these_minutes_can_train_is_named(text_of_a_study, tmp_path, capsys):
    """A run of 8.5e8 FLOPs takes 170 s and 30 to start at 1e7 FLOP/s shared by two, alone 115 s."""
    study = study_file(tmp_path, "tuning", TUNING + "flops_per_second = 1e7\n", text_of_a_study)
    study.write_text(study.read_text().replace("steps = 12", "steps = 36"))
    for jobs, minutes, long in ((2, 3.0, True), (1, 3.0, False), (2, 4.0, False)):
        config = StudyConfig(str(study), out=tmp_path / "out", jobs=jobs, minutes=minutes, dry_run=True)
        run_study(config, make_console())
        said = capsys.readouterr().out
        words = "8 of 8 processes are expected to take longer than all of it and are not started"
        assert (words in said) == long and ("or fewer --jobs" in said) == long
    # Each of the two processes fits into it, and both do not: 0.6 and 0.4 of 128 s, and twice 30.
    runs = f"{SATURATION}flops_per_second = 1.66e7\ndecay = 0.4\n".replace(
        "[0.1, 0.2, 0.05, 0.4, 0.8]", "[0.4]"
    )
    study = study_file(tmp_path, "saturation", runs, text_of_a_study)
    for minutes, long in ((2.5, True), (3.5, False)):
        config = StudyConfig(str(study), out=tmp_path / "out", minutes=minutes, dry_run=True)
        run_study(config, make_console())
        said = capsys.readouterr().out
        words = (
            "1 of 1 runs take longer than it with the trunks that they come from, such as a/decayed-0.4 (3.1"
        )
        assert (words in said) == long and "longer than all of it" not in said


@pytest.mark.slow
def test_our_studies_can_be_read(capsys, monkeypatch):
    """Each says what it costs, without its data."""
    for path in sorted(STUDIES.glob("*.toml")):
        monkeypatch.setattr("sys.argv", ["study", path.stem, "--dry-run"])
        assert command.main() == 0
    said = capsys.readouterr().out
    assert said.count("minutes of one GPU") >= 4


@pytest.mark.slow
def test_a_whole_study_killed_on_the_way_and_resumed(cache, text, tmp_path):
    """Decays off a trunk, with a budget; what comes out is what uninterrupted runs of those lengths give."""
    runs = 'name = "a"\ntokens_per_parameter = [0.05, 0.1]\n'
    study, out = study_file(tmp_path, "saturation", runs, text), tmp_path / "study"
    spent, _ = run(cache, study, "--out", out, "--flops", "1e6", module="stacking.study")
    assert "the budget is spent" in spent and not list(out.glob("a/*"))
    first = start(cache, study, "--out", out, module="stacking.study")
    while not list(out.glob("a/trunk/metrics.jsonl")):
        assert first.poll() is None
        time.sleep(0.2)
    os.kill(first.pid, signal.SIGTERM)
    first.communicate(timeout=120)
    assert first.returncode == 130
    printed, _ = run(cache, study, "--out", out, "--keep-weights", module="stacking.study", timeout=1200)
    assert (out / "results.md").read_text().strip() in printed

    alone = tmp_path / "alone"
    flags = [f for line in SETTINGS.split("\n") if line for f in _flag(line)]
    run(cache, *flags, "--data", text, "--steps", "23", "--prompts", "--out", alone)
    start_step = list_steps(out / "a/trunk/checkpoints")[-1]
    assert losses(out / "a/trunk") == losses(alone)[:start_step]
    assert losses(out / "a/decayed-0.1") == losses(alone)[start_step:]
    end = {row["split"]: row["nll"] for row in read_log(alone, "eval") if row["step"] == 23}
    assert read_results(out / "results.json").runs["a/decayed-0.1"]["losses"] == end
    again, _ = run(cache, study, "--out", out, module="stacking.study")
    assert "0 of 2 runs to do" in again
    with pytest.raises(UserError, match="holds no results"):
        read_results(tmp_path / "none.json")


def _flag(line: str) -> tuple[str, str]:
    name, value = line.split(" = ")
    return f"--{name.replace('_', '-')}", value.strip('"')


@pytest.mark.slow
def test_a_whole_study_of_growth(cache, text, tmp_path):
    """Without the guard, which would end some of it: the text is that small."""
    runs = (
        ("sigma = 0\n" + GROWTH)
        .replace("[0, 1]", "0")
        .replace('["stack", "random"]', '"stack"')
        .replace("[0.01, 0.02]", "0.01")
    )
    study, out = study_file(tmp_path, "growth", runs, text), tmp_path / "study"
    printed, _ = run(cache, study, "--out", out, "--jobs", "2", module="stacking.study", timeout=1200)
    assert "| stack at 10 | 0.01 |" in printed
    results = read_results(out / "results.json")
    grown = next(e for n, e in results.runs.items() if n.endswith("stack-at-10/decayed-40"))
    assert grown["model"]["layers"] == 4 and not grown["halted"]
    assert not list(out.glob("seed-0/*/*/*/checkpoints"))
