"""How many updates a run has that says so in epochs, in steps, or not at all."""

import dataclasses
from pathlib import Path

import pytest

from core.data.dataset import Dataset, Split
from core.errors import UserError
from core.run.presets import Trained, count_steps
from train_tpu.config import defaults


def steps(windows: int, preset: str = "mtlm1-tiny", **given) -> int:
    split = Split("train", 1, 1, windows * 128 + 1, windows)
    data = Dataset(Path(), 128, {}, "", {"train": split}, {}, [], True)
    return count_steps(dataclasses.replace(defaults(preset), **given), data, Trained())


def test_epochs_are_whole_batches_over_all_of_them():
    assert steps(1000, epochs=1.0, batch=64) == 15  # 15.6 batches
    assert steps(1000, epochs=2.5, batch=64) == 39  # 39.06
    assert steps(1000, epochs=0.064, batch=64) == 1
    assert steps(1000, "mtlm2-40m") == 2 * 1000 // 128
    assert steps(1000, steps=7, batch=2000) == 7 and steps(1000) == 350


def test_less_than_a_batch_is_refused_with_its_numbers():
    with pytest.raises(UserError, match="1000 windows of 128 tokens, fewer than one batch of 64"):
        steps(1000, epochs=0.063, batch=64)
