"""The peak rate of a run that is given none."""

import dataclasses
import json
from pathlib import Path

import pytest

from core.config import PRESETS, preset
from core.run.rates import has_rule, peak_rate, preset_rate, with_rate
from stacking.study.fits import fit_optimum
from train_tpu.config import defaults

RESULTS = Path(__file__).parents[3] / "docs/results/tuning.json"
M40 = preset("mtlm2-40m")


def rate(batch: int = 128, steps: int = 1991, optimizer: str = "muon", **model) -> float:
    """Of the 40M, changed so."""
    return peak_rate("mtlm2-40m", optimizer, dataclasses.replace(M40, **model), batch, steps)


def best_rate(**settings) -> float:
    """The minimum of the runs of docs/results/tuning.json with these settings and no others but the rate."""
    common = {"decay": 0.2, "preset": "mtlm2-40m", "eval_every": 100, "eval_windows": 128}
    runs = json.loads(RESULTS.read_text())["runs"].values()
    points = [
        (run["lr"], run["losses"]["wikipedia-2015"], run["seed"])
        for run in runs
        if {name: v for name, v in run["settings"].items() if name != "lr"} == common | settings
        and abs(run["tokens"] - 65e6) < 1e6
    ]
    return fit_optimum(points).rate


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_at_its_own_size_and_length_has_its_own_rate(name):
    own, given = preset(name), defaults(name)
    steps = {"mtlm2-40m": 1991}.get(name, 1992)
    assert given.optim.lr is None
    config, rows = with_rate(given, own, steps)
    assert config.optim.lr == preset_rate(name, "muon") and rows == []
    assert dataclasses.replace(config, optim=given.optim) == given


def test_the_powers_are_those_of_the_measured_minima():
    """Of width and batch; 10%: what a minimum's place is uncertain by."""
    at_128 = best_rate(batch=128, warmup=100)
    narrow = best_rate(batch=128, warmup=100, d_model=192, n_heads=3, d_mlp=512)
    at_64 = best_rate(batch=64, warmup=200)
    steps = 496  # 65M tokens
    assert rate(steps=steps, d_model=192) / rate(steps=steps) == pytest.approx(narrow / at_128, rel=0.1)
    assert rate(64, 2 * steps) / rate(steps=steps) == pytest.approx(at_64 / at_128, rel=0.1)
    # The preset's own rate, with twice the decay of these runs, lies above what they would give it. A quarter
    # too high costs 0.002 nats, by their parabolas.
    for found, best in (
        (rate(steps=496), at_128),
        (rate(steps=496, d_model=192), narrow),
        (rate(64, 992), at_64),
    ):
        assert best < found < 1.26 * best


def test_longer_runs_have_lower_rates():
    """Halved from 65M to 261M tokens: the power of 4 is -0.46."""
    assert rate(steps=496) / rate() == pytest.approx(4**0.46, rel=0.01)
    assert rate(steps=996) == float(f"{5.6e-3 * 2**0.46:.3g}")


def test_beyond_what_was_measured_the_rate_is_that_of_its_edge():
    assert rate(steps=100_000) == rate() and rate(steps=10) == rate(steps=480)
    assert rate(1024, 249) == rate() and rate(d_model=96) == rate(d_model=192)
    assert rate(32, 4 * 1991) == rate(64, 2 * 1991) < rate()


def test_it_is_muons_and_of_tuned_presets_alone():
    assert rate(steps=100, optimizer="adamw") == rate(optimizer="adamw") == 1.5e-3
    tuned = {name for name in PRESETS if has_rule(name, "muon")}
    assert tuned == {"mtlm1-88m", "mtlm1-200m", "mtlm2-40m"}
    assert peak_rate("mtlm1-tiny", "muon", preset("mtlm1-tiny"), 64, 7) == 1e-2


def test_what_is_given_stays_and_what_is_not_is_told():
    config = defaults("mtlm2-40m")
    given = dataclasses.replace(config, optim=dataclasses.replace(config.optim, lr=7e-4))
    assert with_rate(given, M40, 100) == (given, [])
    assert with_rate(config, M40, None) == (config, [])  # it depends on the length
    assert with_rate(defaults("mtlm2-tiny"), preset("mtlm2-tiny"), None)[0].optim.lr == 1e-2
    found, rows = with_rate(config, dataclasses.replace(M40, d_model=192), 496)
    how = "by the rule for width 192, 128 x 1024 per update, 65,011,712 tokens"
    assert rows == [("learning rate", f"{found.optim.lr:g}: the preset's 0.0056, {how}")]
    _, ((_, said),) = with_rate(config, dataclasses.replace(M40, d_model=48), 100_000)
    assert said.endswith("; beyond what was measured in width and length, so as at its edge")
