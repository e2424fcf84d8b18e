"""Studies: what a file may say, in which order its runs are trained, and what is made of their results."""

import itertools
import json
import math
import os
import shlex
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from matplotlib.figure import Figure

import core.run.data
from core.checkpoint.steps import list_steps, step_path
from core.console import make_console
from core.errors import UserError
from core.run.folder import write_config
from core.run.log import END, HALT, read_log
from stacking.jobs import Job
from stacking.study import __main__ as command
from stacking.study import experiment, fits, report, saturation, tuning
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
        self.loss, self.most, self.made = loss, most, []
        monkeypatch.setattr(experiment, "run_jobs", self)
        monkeypatch.setattr(experiment, "Runs", self._keep)
        self._runs = None

    def _keep(self, *arguments):
        self._runs = made = RUNS(*arguments)
        return made

    def __call__(self, jobs: list[Job], out: Path, *_) -> bool:
        by_name = {run.name: run for leaf in self._runs.leaves for run in leaf.ancestry}
        for job in {job.name: job for job in jobs}.values():
            if job.done():
                continue
            if len(self.made) == self.most:
                return False
            assert set(job.needs) <= set(self.made), f"{job.name} before {job.needs}"
            name, _, end = job.name.rpartition("@")
            job.before()
            self._train(by_name[name], out / name, end)
            self.made.append(job.name)
            assert job.done(), job.name
            job.after(1.0)
        return True

    def _train(self, run: Run, folder: Path, end: str) -> None:
        if not (folder / "config.json").exists():
            folder.mkdir(parents=True, exist_ok=True)
            write_config(folder, {"run": {}, "tokenizer": {}, "data": {"fingerprint": ""}, "model": {}})
        if end == "grow":
            return
        loss, step = self.loss(run), int(end)
        figures = {"bits_per_byte": loss, "tokens": 1, "tokens_per_second": 100.0}
        rows = [
            {"step": step - 1, "kind": "train", "loss": loss, "nll": loss, **figures},
            {"step": step, "kind": "eval", "split": "valid", "nll": loss, **figures},
        ]
        if math.isinf(loss):
            rows = [{"step": 1, "kind": "event", "what": HALT}]
        elif run.keep:
            step_path(folder / "checkpoints", step).mkdir(parents=True)
        else:
            rows.append({"step": step, "kind": "event", "what": END})
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
    entries = saturation.sizes(results)[28_896][:4]
    said = saturation._describe(28_896, saturation.fit(entries, "valid"), entries)
    assert "There are only as many runs as the law has parameters" in said
    assert "±" not in said and "one standard error" not in said


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
    assert (
        fits.fit_law(tokens[:3], distinct[:3], tokens[:3]) is not None
    )  # nothing repeated: three parameters
    assert fits.fit_law(tokens[5:8], distinct[5:8], tokens[5:8]) is None


def test_the_best_rate_is_that_of_a_parabola():
    points = [(2.0**x, 1 + (x + 6.3) ** 2) for x in (-8, -7, -6, -5)]
    fit = fits.fit_optimum(points)
    assert fit.rate == pytest.approx(2**-6.3) and fit.loss == pytest.approx(1) and fit.error < 1e-6
    assert fits.fit_optimum(points[:3]).error is None
    assert fits.fit_optimum(points[:2]) is None
    # A rate far off lies on no parabola: it is left out.
    assert fits.fit_optimum([*points, (2.0**-3, 99.0)]).rate == pytest.approx(2**-6.3)
    assert not fits.fit_optimum([(1, 1.0), (2, 2.0), (4, 2.5)]).is_minimum
    # The error is that of repeated draws.
    rng = np.random.default_rng(0)
    drawn = [fits.fit_optimum([(r, y + 0.05 * rng.normal()) for r, y in points]) for _ in range(300)]
    spread = np.std([math.log2(one.rate) for one in drawn])
    rms = math.sqrt(np.mean([one.error**2 for one in drawn]))
    assert rms == pytest.approx(
        spread, rel=0.25
    )  # the spread of 300 is known to 4%, with one spare point each


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
    assert fits.fit_powers(points[:3]) is None and fits.fit_powers([]) is None
    same = [({"width": 192 * n, "tokens": n}, 1.0) for n in (1, 2, 3, 4)]  # width and tokens move together
    assert fits.fit_powers(same) is None


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


def test_flops_are_read_off_between_decayed_runs_only():
    points = [(1e3, 4.0), (1e4, 3.0), (1e5, 2.5)]
    assert flops_to_reach(points, 3.5) == (pytest.approx(10**3.5), "=")
    assert flops_to_reach(points[::-1], 2.5) == (pytest.approx(1e5), "=")
    assert flops_to_reach(points, 4.2) == (1e3, "<")
    assert flops_to_reach(points, 2.4) == (1e5, ">")


def test_curves_are_thinned_to_means():
    assert thinned([(i, float(i)) for i in range(80)])[:2] == [[1, 0.5], [3, 2.5]]
    assert thinned([(0, 1.0)]) == [[0, 1.0]] and thinned([]) == []


def test_the_clock_tells_the_start_from_the_updates(text_of_a_study, tmp_path):
    definition = read_definition(str(study_file(tmp_path, "tuning", TUNING, text_of_a_study)), None)
    one = experiment.open_runs(definition, open_results(tmp_path / "results.json", definition))[0]
    clock = Clock(None)
    assert clock.seconds(one, 1e9) is None
    rows = [{"step": 0, "kind": "event", "what": "first update"}]
    rows += [
        {"step": i, "kind": "train", "loss": 1.0, "nll": 1.0, "tokens": 1, "tokens_per_second": 64}
        for i in range(10)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    clock.measure(one, 25.0, tmp_path)
    # Ten updates of 128 tokens at 64 tokens/s take 20 s, so the start took 5; twice as many take 45.
    assert clock.seconds(one, 20 * one.settings.flops_per_step) == pytest.approx(45)


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
    assert "within the warmup of 4" in refused("saturation", SATURATION.replace("0.05", "0.01"))
    assert "schedule must be wsd" in refused("saturation", SATURATION + 'schedule = "cosine"\n')
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
    assert "holds a study of tuning, not of growth" in refused("growth", GROWTH)
    (tmp_path / "out/results.json").write_text("{")
    assert "results.json is damaged" in refused("tuning", TUNING)


def test_the_first_command_can_be_typed(text_of_a_study, tmp_path, monkeypatch, capsys):
    """Names with blanks are quoted; a file from an editor that writes a BOM is read."""
    path = study_file(tmp_path, "tuning", TUNING.replace('"a"', '"a b"'), text_of_a_study)
    path.write_text(path.read_text(), encoding="utf-8-sig")
    monkeypatch.setattr("sys.argv", ["study", str(path), "--dry-run", "--out", str(tmp_path / "o")])
    assert command.main() == 0
    typed = shlex.split(capsys.readouterr().out.splitlines()[-1])
    assert Path(typed[-1]).parts[:-1] == (*tmp_path.parts, "o", "a b", "lr-0.01")


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
