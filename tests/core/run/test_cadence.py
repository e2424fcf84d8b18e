"""When runs evaluate, sample and save, and that several processes do so together and once."""

import dataclasses

import pytest

from core.run.cadence import NO_FLAGS, Agreement, Cadence, Due, choose_cadence, find_due


@dataclasses.dataclass
class Settings:
    eval_every: int | None = None
    sample_every: int | None = None
    save_every: int | None = None


@pytest.mark.parametrize(
    "settings, cadence",
    [
        (Settings(), Cadence(3, 3, 3)),
        (Settings(eval_every=7, save_every=2), Cadence(7, 7, 2)),
        (Settings(eval_every=0), Cadence(0, 3, 3)),
        (Settings(sample_every=0), Cadence(3, 0, 3)),
    ],
)
def test_what_is_not_given_is_a_tenth_of_the_run_and_0_is_given(settings: Settings, cadence: Cadence):
    assert choose_cadence(settings, 30) == cadence


def test_0_turns_samples_off_and_all_evaluations_but_the_last():
    off = Cadence(0, 0, 10)
    assert find_due(off, 0, last=False, late=False) == Due(False, False, False)
    assert find_due(off, 10, last=False, late=False) == Due(False, False, True)
    assert find_due(off, 30, last=True, late=False) == Due(True, False, True)
    assert find_due(Cadence(5, 7, 10), 0, last=False, late=True) == Due(True, True, False)


def test_a_short_run_does_everything_before_each_update():
    cadence = choose_cadence(Settings(), 5)
    assert cadence == Cadence(1, 1, 1)
    for step in range(1, 5):
        assert find_due(cadence, step, last=False, late=False) == Due(True, True, True)


def saves(n_processes: int, agree_every: int, steps: int) -> list[list[int]]:
    """Steps before which each of some processes saves, a second a step, the clock of each a bit ahead."""
    now = 0.0
    made: list[list[int]] = [[] for _ in range(n_processes)]
    agreements = [
        Agreement(1.0, lambda: False, clock=lambda ahead=ahead: now + ahead / 10)
        for ahead in range(n_processes)
    ]
    for step in range(steps):
        now += 1.0
        if step % agree_every == 0:
            heard = [any(flags) for flags in zip(*(a.flags() for a in agreements), strict=True)]
            for agreement in agreements:
                agreement.hear(*heard)
        for agreement, saved in zip(agreements, made, strict=True):
            if find_due(Cadence(0, 0, 10**9), step, last=False, late=agreement.late).save:
                saved.append(step)
                agreement.saved()
    return made


def test_a_late_save_is_made_once_by_one_and_by_several_processes():
    assert saves(1, 1, 200) == [[60, 121, 182]]
    assert saves(3, 10, 200) == [[60, 130]] * 3


def test_one_that_is_asked_to_stop_stops_all():
    asked, other = Agreement(10, lambda: True), Agreement(10, lambda: False)
    flags = list(zip(asked.flags(), other.flags(), strict=True))
    for agreement in (asked, other):
        agreement.hear(*map(any, flags))
        assert agreement.stop
        agreement.saved()
        assert agreement.stop and not agreement.late


def test_a_command_that_reaches_one_process_is_taken_by_all_and_once():
    told, other = Agreement(10, lambda: False, lambda: True), Agreement(10, lambda: False)
    assert (told.flags().steer, other.flags()) == (True, NO_FLAGS) and not any(NO_FLAGS)
    for agreement in (told, other):
        agreement.hear(stop=False, late=False, steer=True)
        assert agreement.steer
        agreement.hear(stop=False, late=False, steer=False)
        assert not (agreement.steer or agreement.stop or agreement.late)
