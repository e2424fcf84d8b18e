"""Whether a learning rate jumps where a run is resumed, and that what a refusal advises is accepted."""

import dataclasses
import re
import shlex
from pathlib import Path

import pytest

from core.errors import UserError
from core.run.schedule import (
    OptimizerConfig,
    check_room,
    fewest_steps,
    in_decay,
    jump,
    learning_rate,
    require_continuous,
    why_not_constant,
)

WSD = OptimizerConfig(lr=2.0, warmup=10, decay=0.2)
COSINE = dataclasses.replace(WSD, schedule="cosine")


def change(optim: OptimizerConfig, **fields) -> OptimizerConfig:
    return dataclasses.replace(optim, **fields)


@pytest.mark.parametrize(
    "optim",
    [
        WSD,
        COSINE,
        change(WSD, decay=0.0),
        change(WSD, decay=1.0),
        change(WSD, decay_shape="1-sqrt"),
        change(WSD, schedule_start=30),
        change(WSD, rewarm=20, rewarm_at=50),
        change(WSD, warmup=90),  # reaches into the decay
        change(WSD, warmup=0),
    ],
)
def test_constant_is_where_the_rates_before_and_after_are_the_peak(optim):
    for step in range(1 + optim.schedule_start, 101):
        around = {learning_rate(optim, at, 100) for at in (step - 1, step)}
        constant = around == {optim.lr} and optim.schedule == "wsd"
        assert (why_not_constant(optim, step, 100) is None) == constant, step


@pytest.mark.parametrize(
    ("old", "old_steps", "new", "steps", "step"),
    [
        (WSD, 100, WSD, 100, 90),  # in the decay, unchanged
        (WSD, 100, WSD, 100, 100),
        (WSD, 100, WSD, 200, 80),  # the decay has not begun
        (WSD, 100, change(WSD, decay_shape="1-sqrt"), 100, 80),
        (WSD, 100, WSD, 50, 5),  # nor here
        (WSD, 100, change(WSD, lr=0.1), 100, 90),  # another peak, by name
        (WSD, 100, change(WSD, schedule_start=100), 200, 100),  # a restart, by name
        (WSD, 100, change(WSD, rewarm=20, rewarm_at=50), 100, 50),
        (COSINE, 1000, COSINE, 1010, 500),
        (change(WSD, decay=0.0), 100, change(WSD, decay=0.0), 200, 100),  # never decayed
        (change(WSD, final_lr=1.0), 100, change(WSD, final_lr=1.0), 200, 100),
        (WSD, 100, change(WSD, warmup=50), 100, 60),
        (change(COSINE, warmup=10), 12, change(COSINE, warmup=10), 14, 12),  # as the last update had it
        (WSD, 100, WSD, 7, 0),  # nothing was trained
    ],
)
def test_no_jump(old, old_steps, new, steps, step):
    assert jump(old, old_steps, new, steps, step) is None


@pytest.mark.parametrize(
    ("old", "old_steps", "new", "steps", "step", "before", "after"),
    [
        (WSD, 100, WSD, 200, 100, 1 / 20, 1.0),  # more steps after the end
        (WSD, 100, WSD, 200, 90, 11 / 20, 1.0),  # in the decay
        (WSD, 100, change(WSD, decay_shape="1-sqrt"), 100, 90, 11 / 20, 1 - 0.5**0.5),
        (WSD, 100, WSD, 95, 90, 11 / 20, 5 / 19),
        (WSD, 200, WSD, 100, 90, 1.0, 0.5),  # a decay entered in its middle
        (COSINE, 100, COSINE, 200, 100, None, None),
        (WSD, 100, change(WSD, warmup=0), 100, 4, 0.4, 1.0),
        (WSD, 100, change(WSD, schedule="cosine"), 100, 55, 1.0, 0.5),
        (WSD, 100, change(WSD, rewarm=20, rewarm_at=100), 200, 100, 0.05, 1.0),  # behind it lies a jump
    ],
)
def test_a_jump(old, old_steps, new, steps, step, before, after):
    found = jump(old, old_steps, new, steps, step)
    assert found is not None and found.step == step
    if before is not None:
        assert (found.before, found.after) == pytest.approx((before, after))


RUN = {"steps": 350, "optimizer": "muon"} | dataclasses.asdict(change(WSD, warmup=50))


def advised(message: str, new: dict) -> dict:
    """The settings of a start that takes the flags that a refusal names."""
    option = r"--\S+ \S+"
    (flags,) = re.findall(
        rf"(?:give|with) ({option}(?: {option})*?)(?: or more with)? --allow-change", message
    )
    words = shlex.split(flags)
    given = {name[2:].replace("-", "_"): value for name, value in zip(words[::2], words[1::2], strict=True)}
    return new | {name: type(RUN[name])(value) for name, value in given.items()}


@pytest.mark.parametrize(
    ("changes", "step", "says"),
    [
        ({"steps": 700}, 350, "with --steps 700 .* at step 350 from 0.0143 to 1 of its peak"),
        ({"steps": 700}, 300, "from 0.729 to 1 of its peak"),
        ({"steps": 200}, 175, "give --steps 21[67] or more"),
        (
            {"schedule": "cosine"},
            200,
            "a new schedule here with --schedule cosine --schedule-start 200",
        ),
        ({"steps": 700, "warmup": 0}, 350, "--warmup 35"),
        ({"steps": 700, "schedule_start": 300}, 350, "--schedule-start 350"),
        ({"decay": 0.9}, 200, "--decay 0.9 --schedule-start 200"),
    ],
)
def test_what_a_refusal_advises_is_accepted(changes, step, says):
    new = RUN | changes
    with pytest.raises(UserError, match=says) as refusal:
        require_continuous(RUN, new, step, Path("runs/a"))
    taken = advised(str(refusal.value), new)
    assert taken != new
    require_continuous(RUN, taken, step, Path("runs/a"))
    require_continuous(RUN, RUN, step, Path("runs/a"))  # the other way: the run as it is
    if taken["schedule_start"] == step:
        optim = OptimizerConfig(**{k: v for k, v in taken.items() if k != "steps"})
        assert learning_rate(optim, step, taken["steps"]) < 0.05 * optim.lr  # it warms up


def test_an_older_record_is_read_with_its_defaults():
    old = {"steps": 100, "lr": 2.0, "warmup": 10, "a setting of later": 1}
    require_continuous(old, old | {"rewarm": 0}, 90, Path("a"))
    with pytest.raises(UserError, match="would jump"):
        require_continuous(old, old | {"steps": 200}, 90, Path("a"))


def test_where_the_decay_begins():
    assert [step for step in range(100) if in_decay(WSD, step, 100)] == list(range(81, 100))
    restarted = change(WSD, schedule_start=100)
    assert [step for step in range(200) if in_decay(restarted, step, 200)] == list(range(181, 200))
    # Schedules that fall from the warmup on have no stable phase that a decay could end.
    assert not any(in_decay(optim, 60, 100) for optim in (COSINE, change(WSD, decay=1.0)))
    assert fewest_steps(WSD, 100, WSD, 50) == 62  # all but the last fifth


@pytest.mark.parametrize(
    ("optim", "steps", "says"),
    [
        (WSD, 100, None),
        (WSD, 12, None),  # 10 of warmup and 2 of decay
        (COSINE, 11, None),
        (change(WSD, warmup=50), 40, "--warmup 50 is not shorter than the 40 steps.*ends at 0.8 of its peak"),
        (change(WSD, warmup=50), 55, "reaches into the decay, the last 11 of 55 steps"),
        (change(COSINE, warmup=50), 50, "not shorter than the 50 steps"),
        (change(WSD, warmup=50, schedule_start=100), 140, "not shorter than the 40 steps"),
    ],
)
def test_a_warmup_that_leaves_no_room_is_told(optim, steps, says):
    said = check_room(optim, steps)
    assert said is None if says is None else re.search(says, said)
