"""How a schedule goes on behind a growth, and which policies are refused."""

import dataclasses

import pytest

from core.checkpoint.manifest import Manifest
from core.config import preset
from core.errors import UserError
from core.run.schedule import OptimizerConfig, learning_rate
from stacking.growth import training_flops
from stacking.schedule import (
    Schedule,
    continue_schedule,
    describe_schedule,
    parse_schedule,
    require_safe,
)
from tests.stacking import oracle
from train_tpu.config import RunConfig

WSD = RunConfig(steps=100, optim=OptimizerConfig(lr=1.0, warmup=10, decay=0.2))


def rates(run: RunConfig) -> list[float]:
    return [learning_rate(run.optim, step, run.steps) for step in range(run.steps)]


@pytest.mark.parametrize("warmup, shape", [(0, "linear"), (10, "linear"), (10, "1-sqrt")])
@pytest.mark.parametrize(
    "schedule, at, steps",
    [
        (Schedule("keep"), 50, 100),
        (Schedule("keep"), 80, 200),
        (Schedule("rewarm", 20), 50, 100),
        (Schedule("rewarm", 5), 80, 200),
        (Schedule("restart"), 50, 100),
        (Schedule("restart"), 100, 160),
        (Schedule("restart"), 2, 100),  # before a re-warming that was planned, which is off with it
    ],
)
def test_every_schedule_is_the_oracles(schedule, at, steps, warmup, shape):
    """From where the run is grown on; before that the rate was the run's own."""
    before = dataclasses.replace(
        WSD,
        optim=dataclasses.replace(WSD.optim, warmup=warmup, decay_shape=shape, rewarm=5, rewarm_at=3),
    )
    grown = continue_schedule(before, at, schedule, steps, "runs/x")
    decay = round(0.2 * (steps - at * (schedule.kind == "restart")))
    expected = oracle.rates(
        steps, warmup, decay, shape=shape, schedule=schedule.kind, at=at, rewarm=schedule.rewarm
    )
    found = [learning_rate(grown.optim, step, steps) for step in range(at, steps)]
    assert found == pytest.approx(expected[at:], rel=1e-12)


@pytest.mark.parametrize(
    "run, step, kind, steps, message",
    [
        (WSD, 100, "keep", None, "has ended .step 100 of 100.*--keep-steps.*--schedule restart"),
        (WSD, 100, "rewarm", 200, "for 100 steps; with 200 .* would jump at step 100 from 0.05 to 1 of its"),
        (WSD, 90, "keep", 110, "with 110 its learning rate would jump at step 90 from 0.55 to 0.909 of its"),
        (WSD, 90, "keep", 95, "with 95 its learning rate would jump at step 90 from 0.55 to 0.263 of its"),
        (WSD, 90, "rewarm", None, "in its final decay .step 90 of 100.*re-warming.*--schedule keep"),
        (WSD, 100, "restart", None, "no steps to run: give more --steps"),
        (
            dataclasses.replace(WSD, optim=dataclasses.replace(WSD.optim, schedule="cosine")),
            50, "rewarm", 200, "would jump at step 50 from 0.6.* to 0.8",
        ),
    ],
)  # fmt: skip
def test_a_schedule_that_would_jump_or_has_ended_is_refused(run, step, kind, steps, message):
    with pytest.raises(UserError, match=message):
        continue_schedule(run, step, Schedule(kind, 5 * (kind == "rewarm")), steps, "runs/x")


def test_what_a_refusal_advises_is_accepted():
    """Of growing in the decay, or with another number of steps."""
    restarted = continue_schedule(WSD, 90, Schedule("restart"), 200, "runs/x")
    assert restarted.optim.schedule_start == 90 and rates(restarted)[90] == pytest.approx(1 / 10)
    assert continue_schedule(WSD, 90, Schedule("keep"), None, "runs/x") == WSD
    assert continue_schedule(WSD, 80, Schedule("rewarm", 5), None, "runs/x").optim.rewarm_at == 80
    with pytest.raises(UserError, match="give at most rewarm:20"):
        parse_schedule("rewarm:30", 20)
    assert parse_schedule("rewarm:20", 20) == Schedule("rewarm", 20)


def test_a_schedule_in_words():
    assert describe_schedule(WSD) == "wsd of 100 steps, decays in the last 20%"
    root = dataclasses.replace(WSD, optim=dataclasses.replace(WSD.optim, decay_shape="1-sqrt"))
    assert describe_schedule(root) == "wsd of 100 steps, decays in the last 20% as 1-sqrt"
    warm = continue_schedule(WSD, 50, Schedule("rewarm", 20), 1000, "runs/x")
    assert (
        describe_schedule(warm) == "wsd of 1,000 steps, decays in the last 20%, re-warms from step 50 to 70"
    )
    cosine = dataclasses.replace(WSD, optim=dataclasses.replace(WSD.optim, schedule="cosine"))
    restarted = continue_schedule(cosine, 60, Schedule("restart"), None, "runs/x")
    assert describe_schedule(restarted) == "cosine of 40 steps, begun at step 60"


def test_the_default_rewarming_fits_what_is_left():
    assert parse_schedule("rewarm", 10_000) == Schedule("rewarm", 200)
    assert parse_schedule("rewarm", 100) == Schedule("rewarm", 25)
    assert parse_schedule("rewarm:7", 100) == Schedule("rewarm", 7)
    assert parse_schedule("keep", 100) == Schedule("keep")


@pytest.mark.parametrize(
    "text, message",
    [
        ("rewarm:101", "only 100 steps are left"),
        ("rewarm:0", "does not re-warm"),
        ("rewarm:x", "'rewarm:x' is not known"),
        ("keep:5", "'keep:5' is not known"),
        ("cosine", "'cosine' is not known"),
    ],
)
def test_unknown_schedules_are_refused(text, message):
    with pytest.raises(UserError, match=message):
        parse_schedule(text, 100)


def test_a_reset_optimizer_needs_a_rate_that_starts_low():
    for schedule, warmup in ((Schedule("keep"), 100), (Schedule("restart"), 0)):
        require_safe("copy", schedule, warmup, force=False)
        require_safe("reset", schedule, warmup, force=True)
        with pytest.raises(UserError, match=r"full-size updates.*--force"):
            require_safe("reset", schedule, warmup, force=False)
    require_safe("reset", Schedule("rewarm", 5), 0, force=False)
    require_safe("reset", Schedule("restart"), 1, force=False)


def test_a_run_counts_its_own_training_alone():
    """One that took the parameters of a grown run begins its counters, and its FLOPs, at 0."""
    small, large = preset("mtlm1-tiny"), preset("mtlm1-88m")
    grown = {"operation": "grow", "step": 50, "tokens": 1000, "flops": 7}
    empty = {"kind": "train", "step": 9, "sequences": 9, "config": {}, "tokenizer": {}}
    resumed = Manifest(**empty, tokens=1300, lineage=[grown])
    assert resumed.last_growth == grown and not resumed.took_parameters
    assert training_flops(resumed, large) == 7 + 300 * large.flops_per_token()
    taken = [grown, {"operation": "init_from", "path": "a", "step": 60, "tokens": 1300}]
    new = Manifest(**empty, tokens=20, lineage=taken)
    assert new.last_growth is None and new.took_parameters
    assert training_flops(new, small) == 20 * small.flops_per_token()
    again = Manifest(**empty, tokens=40, lineage=[*taken, grown | {"tokens": 20, "flops": 9}])
    assert training_flops(again, large) == 9 + 20 * large.flops_per_token()
