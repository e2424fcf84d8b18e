"""Watched updates: what is measured is right, changes nothing of the run, and shows what was planted."""

import dataclasses
import itertools
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from core.config import ModelConfig
from core.documents import DocumentMark, number_documents
from core.model import Compute, Params
from core.run.guard import GuardConfig
from core.run.log import WATCHED
from core.run.schedule import OptimizerConfig
from core.run.watching import query_positions, read_watched, row_names
from core.sharding import MeshShape, make_mesh
from port_torch.model import Decoder, load
from port_torch.training.watch import Watch
from tests.models import GROUPED, LLAMA, random_params
from tests.port_torch.folders import SMALL, tensors_of, write_folder
from tests.port_torch.small_training import call
from tests.several_devices import run_on_devices
from tests.train_tpu.processes import TINY, losses, refusal_here, run_here, without
from tests.train_tpu.test_replay import plant
from train_tpu import inspect
from train_tpu.step import Batch, Controls, StepConfig, TrainState, compile_step, init_state
from train_tpu.watch import look, record_of

ROWS, LENGTH = 4, 24
SHORT = {"n_layers": 2, "context": LENGTH}
OPTIM = OptimizerConfig(optimizer="adamw", lr=0.01, warmup=0)


def step_config(model: ModelConfig, **compute) -> StepConfig:
    mesh = make_mesh(MeshShape())
    return StepConfig(model, OPTIM, GuardConfig(), Compute(mesh=mesh, **compute), 0.0, 64, watches=True)


MARK = DocumentMark(7, twice=False)


def batch(parts: int, seed: int = 0) -> Batch:
    shape = (parts, ROWS // parts)
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 97, (*shape, LENGTH + 1)).astype(np.uint16)
    tokens[rng.random(tokens.shape) < 0.1] = MARK.token
    return Batch(
        jnp.asarray(tokens), jnp.zeros(shape, bool), jnp.arange(ROWS, dtype=jnp.uint32).reshape(shape)
    )


def controls(watch: bool | None) -> Controls:
    values = (jnp.float32(0.01), jnp.float32(8), jnp.int32(3), jnp.uint32(0))
    return Controls(*values, None if watch is None else jnp.bool_(watch))


def start(config: StepConfig, params: Params) -> TrainState:
    return init_state(config, jax.tree.map(jnp.copy, params))


def mirror(folder: Path, model: ModelConfig, params: Params) -> Decoder:
    return load(write_folder(folder, model, tensors_of(model, params)))


def test_a_watched_update_is_the_update_and_what_it_shows_is_the_mirrors(tmp_path):
    """Bit for bit the update that is not watched (and the runs below are those of a step that watches none);
    and the figures of the other engine, which measures by other code, next to its update. Grouped heads,
    normed queries, several documents, micro-batches, recomputation."""
    model = dataclasses.replace(GROUPED, **SHORT)
    config = dataclasses.replace(step_config(model, remat="dots"), documents=MARK)
    params = random_params(model)
    step = compile_step(config, ROWS, 2, config.compute.mesh)
    runs = [jax.device_get(step(start(config, params), batch(2), controls(flag))) for flag in (False, True)]
    (unseen_state, unseen), (state, found) = runs
    pairs = ((unseen_state, unseen._replace(seen=None)), (state, found._replace(seen=None)))
    for one, other in zip(*map(jax.tree.leaves, pairs), strict=True):
        np.testing.assert_array_equal(one, other)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(unseen.seen))
    record = record_of(found.seen, found.leaf_norms, ROWS // 2, LENGTH, model.d_model)

    decoder, after = (
        mirror(tmp_path / "before", model, params),
        mirror(tmp_path / "after", model, state.params),
    )
    watch = Watch(decoder, dict(decoder.named_parameters()), 1)
    tokens = np.asarray(batch(2).tokens)[0, :, :-1].astype(np.int64)
    watch.before(torch.tensor(tokens), torch.tensor(number_documents(tokens, MARK)))
    decoder.load_state_dict(after.state_dict())
    seen = watch.after(torch.empty(0)).tolist()
    theirs = watch.record(seen, [0.0] * len(list(decoder.parameters())))
    for name, values in theirs.items():
        if name != "gradient":
            # Rounded to 4 digits, half a unit of which is 5e-4 of a value; sums in float32 are good to 1e-6.
            np.testing.assert_allclose(record[name], values, rtol=1.1e-3, atol=1e-12, err_msg=name)
    squares = [np.asarray(found.leaf_norms[f"layers/{m}/kernel"]) ** 2 for m in MATRICES]
    np.testing.assert_allclose(record["gradient"][1:-1], np.sqrt(sum(squares)), rtol=1e-3)
    assert record["lowest_entropy"] != record["entropy"] and min(record["update"]) > 0


MATRICES = [f"attn/{m}" for m in "qkvo"] + [f"mlp/{m}" for m in ("gate", "up", "down")]


def test_activations_and_attention_are_those_of_transformers(tmp_path):
    model = dataclasses.replace(SMALL["llama"], **SHORT)
    params = random_params(model)
    tokens = np.random.default_rng(0).integers(0, model.vocab_size, (ROWS, LENGTH)).astype(np.int32)
    seen = jax.jit(lambda params: look(model, Compute(), params, params, jnp.asarray(tokens)))(params)
    record = record_of(jax.device_get(seen), jax.device_get(seen.weights), ROWS, LENGTH, model.d_model)
    folder = write_folder(tmp_path / "llama", model, tensors_of(model, params))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    with torch.no_grad():
        out = theirs(torch.tensor(tokens).long(), output_attentions=True, output_hidden_states=True)
        last: list[torch.Tensor] = []  # their last hidden state is normed: what goes into the norm is ours
        theirs.model.norm.register_forward_hook(lambda _, given, __: last.append(given[0]))
        theirs(torch.tensor(tokens).long())
    stream = [*out.hidden_states[:-1], *last, out.hidden_states[-1]]
    rms = [float(x.double().square().mean().sqrt()) for x in stream]
    largest = [float(x.abs().max()) for x in stream]
    added = [
        float((after - before).double().square().mean().sqrt())
        for before, after in itertools.pairwise(stream[:3])
    ]
    entropies = [-(w * torch.log(w.clamp(min=1e-30))).sum(-1) for w in (x.double() for x in out.attentions)]
    of_heads = [e[:, :, query_positions(LENGTH)].mean((0, 2)) for e in entropies]
    expected = {
        "rms": rms, "largest": largest, "added": added, "entropy": [float(x.mean()) for x in of_heads],
        "lowest_entropy": [float(x.min()) for x in of_heads], "update": [0.0] * 4, "not_finite": [0.0] * 4,
    }  # fmt: skip
    for name, values in expected.items():  # rounded to 4 digits: half a unit is at most 5e-4 of a value
        np.testing.assert_allclose(record[name], values, rtol=6e-4, err_msg=name)


def test_an_infinity_in_a_weight_is_seen_where_it_is():
    model = dataclasses.replace(LLAMA, **SHORT)
    params = random_params(model)
    params["layers"]["attn"]["q"]["kernel"] = params["layers"]["attn"]["q"]["kernel"].at[1, 3, 5].set(jnp.inf)
    tokens = jnp.zeros((ROWS, LENGTH), jnp.int32)
    seen = jax.device_get(jax.jit(lambda params: look(model, Compute(), params, params, tokens))(params))
    record = record_of(
        seen, {name: np.ones_like(norm) for name, norm in seen.weights.items()}, ROWS, LENGTH, 48
    )
    assert [row for row, norm in zip(row_names(2), record["weight"], strict=True) if norm == "inf"] == [
        "layers/1"
    ]
    assert record["not_finite"][:2] == [0.0, 0.0] and record["not_finite"][2] > 0


RUN = (*without(TINY, "--dropout"), "--watch-every", "4")


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["train_tpu.run", "port_torch.train"])
def test_a_run_that_is_watched_has_the_losses_of_one_that_is_not(engine, cache, text):
    """With dropout and micro-batches, to the bit; and one that was stopped logs what it would have logged."""
    given = (*TINY, "--data", text, "--grad-accum-steps", "2")
    once = ("--no-recompile",) if engine == "train_tpu.run" else ()
    folders = [cache / f"{name}-{engine}" for name in ("unwatched", "watched", "stopped")]
    run_here(*given, "--out", folders[0], module=engine)
    watched = (*given, *once, "--watch-every", "4")
    run_here(*watched, "--out", folders[1], module=engine, compile_anew=True)
    run_here(*watched, "--out", folders[2], "--stop-at", "9", module=engine)
    run_here("--out", folders[2], "--from-step", "6", module=engine)
    assert losses(folders[0]) == losses(folders[1]) == losses(folders[2])
    assert not (folders[0] / WATCHED).exists()
    assert read_watched(folders[1]).steps.tolist() == [0, 4, 8]
    assert (folders[1] / WATCHED).read_text() == (folders[2] / WATCHED).read_text()


@pytest.mark.slow
def test_a_mesh_shows_what_one_device_shows():
    assert run_on_devices(4, Path(__file__).with_name("watch_on_devices.py")).count("as one device") == 4


@pytest.mark.slow
def test_both_engines_log_the_same_of_the_same_run(cache, text):
    lines = []
    for engine in ("train_tpu.run", "port_torch.train"):
        run_here(*RUN, "--data", text, "--out", cache / f"same-{engine}", module=engine)
        lines.append([json.loads(line) for line in (cache / f"same-{engine}" / WATCHED).open()])
    for ours, theirs in zip(*lines, strict=True):
        for name, values in theirs.items():
            if name != "kind":
                # 4 digits, and of later updates what 8 updates of AdamW make of the order of sums.
                np.testing.assert_allclose(ours[name], values, rtol=5e-3, atol=1e-9, err_msg=name)


@pytest.mark.slow
def test_a_learning_rate_a_hundred_times_too_large_is_named(cache, text, monkeypatch, capsys):
    good, bad = cache / "rate", cache / "rate-100"
    given = (*without(without(RUN, "--lr"), "--steps"), "--steps", "40", "--data", text)
    run_here(*given, "--lr", "0.003", "--out", good)
    run_here(*given, "--lr", "0.3", "--sigma", "0", "--out", bad)
    assert call(monkeypatch, inspect, good) == 0
    assert "exploding update" not in capsys.readouterr().out
    assert call(monkeypatch, inspect, bad) == 0
    # Of which layers, and at which update, depends on how a machine rounds.
    assert re.search(r"exploding update: embed to \S+: update \d+ changed", capsys.readouterr().out)
    assert (bad / "watch.png").stat().st_size > 10_000


@pytest.mark.slow
def test_an_infinity_in_a_run_is_named(cache, text, monkeypatch, capsys):
    folder = cache / "with-an-infinity"
    run_here(*RUN, "--data", text, "--out", folder)
    plant(folder, "attn/q/kernel", 1, np.inf)
    run_here("--out", folder, "--from-step", "9", "--watch-every", "2")
    assert call(monkeypatch, inspect, folder) == 0
    said = capsys.readouterr().out
    assert "not finite: layers/1: the weights, first seen at update 10, in layers/1 (rule" in said
    assert "not finite: layers/1: the residual stream after it, first seen at update 10, in layers/1" in said


def test_inspect_refuses_what_it_cannot_draw(tmp_path):
    def refused(*arguments) -> str:
        return refusal_here(*arguments, module="train_tpu.inspect")

    assert "is not the folder of a run" in refused(tmp_path / "none")
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text(
        json.dumps({"run": {}, "model": {}, "tokenizer": {}, "data": {"fingerprint": "0"}})
    )
    assert "has no watched updates: train with --watch-every" in refused(run)
    (run / WATCHED).write_text('{"step": 0}\n')
    assert "is damaged (line 1 cannot be read)" in refused(run)
    assert "give the name of a .png in a folder that exists" in refused(
        run, "--out", tmp_path / "no" / "a.png"
    )
