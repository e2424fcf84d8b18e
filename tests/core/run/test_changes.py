"""What a resume changes of a run's settings: told apart from what stays the same run, and taken back."""

import dataclasses

import pytest

from core.config import preset
from core.run.changes import Change, describe, difference, taken_back
from core.run.folder import run_record
from core.run.steering import Record
from train_tpu.config import RunConfig

TOKENIZER = {"name": "bytes", "vocab_size": 257}


def record(steps: int = 120, fingerprint: str = "f" * 64, mixture: dict | None = None, **changes) -> dict:
    data = {"fingerprint": fingerprint} | ({"mixture": mixture} if mixture else {})
    config = dataclasses.replace(RunConfig(), dtype="float32", grad_accum_steps=1, **changes)
    return run_record(config, preset(config.preset), steps, TOKENIZER, data)


def changed(old: dict, new: dict, steering: tuple[Record, ...] = ()) -> dict:
    return difference(old, new, RunConfig(), steering, 20)


@pytest.mark.parametrize(
    "changes", [{"save_every": 5}, {"stop_at": 9}, {"mesh": "data=2"}, {"data": "moved"}, {"kernels": "xla"}]
)
def test_what_leaves_the_losses_alone_is_no_change(changes):
    assert changed(record(), record(**changes)) == {}


def test_a_setting_that_an_older_record_lacks_had_its_default():
    old = record()
    del old["run"]["document_mask"]
    assert changed(old, record()) == {}
    assert changed(old, record(document_mask=True)) == {"run": {"document_mask": [False, True]}}


def test_a_length_that_the_run_was_steered_to_is_no_change_of_its_start():
    assert changed(record(), record(steps=140)) == {"run": {"steps": [120, 140]}}
    assert changed(record(), record(steps=140), (Record(step=25, command="steps=140"),)) == {}
    before = (Record(step=15, command="steps=140"),)  # which the checkpoint's own record has
    assert changed(record(), record(steps=140), before) == {"run": {"steps": [120, 140]}}


def test_changes_taken_back_give_the_record_before_them():
    mixture = {"sources": {"a": "1", "b": "2"}, "phases": [{"first": 0, "windows": {"a": 3, "b": 4}}]}
    first = record()
    second = record(fingerprint="e" * 64, mixture=mixture, data=("a=A", "b=B"), weights=("a=1", "b=1"))
    third = record(200, "e" * 64, mixture, data=("a=A", "b=B"), weights=("a=1", "b=1"), batch=7)
    changes = [Change(5, changed(first, second), 5), Change(9, changed(second, third), 9)]
    assert taken_back(third, changes[1:]) == second
    assert taken_back(third, changes)["data"] == first["data"]
    assert taken_back(third, changes) == first
    assert (
        describe(changes[0].difference) == "--data a=A b=B (builtin before), --weights a=1 b=1 (none before)"
    )
    assert describe(changes[1].difference, {"steps"}) == "--batch 7 (32 before)"


def test_other_content_at_the_same_place_is_named_by_its_fingerprint():
    found = changed(record(), record(fingerprint="e" * 64))
    assert describe(found) == f"--data {'e' * 12} ({'f' * 12} before)"


@pytest.mark.parametrize(
    ("first", "last", "certain", "possible"),
    [(3, 4, True, True), (4, 5, False, False), (2, 3, False, False)],
)
def test_a_change_lies_between_updates_before_and_after_it(first, last, certain, possible):
    change = Change(4, {}, 4)
    assert change.lies_between(first, last) == certain and change.may_lie_between(first, last) == possible


@pytest.mark.parametrize(
    ("first", "last", "certain", "possible"),
    [
        (3, 6, True, True),
        (3, 5, False, True),
        (4, 6, False, True),
        (6, 9, False, False),
        (1, 3, False, False),
    ],
)
def test_a_change_at_one_of_several_starts(first, last, certain, possible):
    change = Change(4, {}, 6)
    assert change.lies_between(first, last) == certain and change.may_lie_between(first, last) == possible
