"""What is compiled after the first update is named with what had changed, and --no-recompile ends the run."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from core.checkpoint.steps import list_steps
from core.data.batches import Batch
from core.run.log import read_log
from tests.train_tpu.processes import TINY, refusal_here, run_here
from train_tpu import engine
from train_tpu.recompilation import Compilations, differences
from train_tpu.setup import Pretraining


def test_a_second_compilation_is_heard_with_the_argument_that_changed(caplog):
    @jax.jit
    def total(tree, scale):
        return tree["a"].sum() * scale

    three, four, one = np.ones(3, np.float32), np.ones(4, np.float32), np.float32(1)
    total({"a": three}, one)
    with Compilations() as heard:
        total({"a": four}, one)
        assert not heard.take()  # it has not begun
        heard.begin()
        total({"a": three}, one)
        assert not heard.take()  # as before
        heard.in_update = True
        total({"a": np.ones(5, np.float32)}, one)
        (found,) = heard.take()
        assert (found.function, found.in_update) == ("total", True)
        assert re.fullmatch(r"tree\['a'\], now f32\[5\] and before f32\[[34]\]", found.changed)
    total({"a": np.ones(6, np.float32)}, one)
    assert not heard.take() and not jax.config.jax_explain_cache_misses
    assert not caplog.records  # JAX's own words would come between the lines of a run


def test_differences_are_named_by_path():
    expected = {"batch": {"tokens": jax.ShapeDtypeStruct((2, 9), jnp.uint16)}, "lr": jnp.float32(1)}
    assert differences(expected, expected) == []
    given = {"batch": {"tokens": np.ones((2, 8), np.uint16), "more": np.ones(1)}, "lr": jnp.int32(1)}
    assert differences(expected, given) == [
        "['batch']['tokens'] is uint16[2,8], before uint16[2,9]", "['lr'] is int32[], before float32[]",
        "['batch']['more'] is float64[1], before absent",
    ]  # fmt: skip


@pytest.fixture
def shorter_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """From sequence 20 on, as of a reader that was changed in the middle of a run."""
    opened = Pretraining.open_batches

    class Reader:
        def __init__(self, inner):
            self._inner = inner

        def __iter__(self):
            return self

        def __next__(self):
            batch: Batch = next(self._inner)
            return dataclasses.replace(batch, tokens=batch.tokens[:, :-8]) if batch.first >= 20 else batch

        def close(self):
            self._inner.close()

    monkeypatch.setattr(Pretraining, "open_batches", lambda setup, start: Reader(opened(setup, start)))


@pytest.mark.slow
def test_a_shape_that_changes_while_the_run_is_on_is_reported(shorter_rows, cache, text, caplog):
    with jax.log_compiles():
        said, _ = run_here(*TINY, "--data", text, "--out", cache / "recompiled", compile_anew=True)
    compiled = re.findall(r"Finished XLA compilation of jit\((\w+)\)", caplog.text)
    # A small program that nothing needs would delay every start: each is compiled again.
    assert set(compiled) <= {"make", "train_step", "_sums", "_prefill", "_decode"}
    (row,) = [row for row in read_log(cache / "recompiled", "event") if "train_step" in row.get("why", "")]
    assert row["why"].endswith(" s: ['batch'].tokens is uint16[1,4,25], before uint16[1,4,33]")
    assert f"step {row['step']}: {row['why']}" in said
    assert len(read_log(cache / "recompiled", "train")) == 12


@pytest.mark.slow
def test_no_recompile_ends_the_run_with_its_state_kept(shorter_rows, cache, text):
    folder = cache / "not-recompiled"
    said = refusal_here(*TINY, "--data", text, "--out", folder, "--no-recompile", compile_anew=True)
    assert "train_step compiled again (['batch'].tokens is uint16[1,4,25], before uint16[1,4,33])" in said
    assert "leave out --no-recompile" in said
    assert list_steps(folder / "checkpoints")[-1] == 5


@pytest.mark.slow
def test_what_an_update_compiles_next_to_the_step_is_named(monkeypatch, cache, text):
    """An operation of another shape at every update, as of a program's own statistics."""
    place = engine.place_batch

    def placing(batch, *more):
        (jnp.arange(batch.first // 4 + 40) * 2).sum()
        return place(batch, *more)

    monkeypatch.setattr(engine, "place_batch", placing)
    said = refusal_here(*TINY, "--data", text, "--out", cache / "next-to", "--no-recompile")
    assert "an update needs" in said and "compiled again" in said


@pytest.mark.slow
def test_an_ordinary_run_compiles_nothing_in_its_updates(cache, text):
    run_here(*TINY, "--data", text, "--out", cache / "compiled-once", "--no-recompile", compile_anew=True)
    assert len(read_log(cache / "compiled-once", "train")) == 12
