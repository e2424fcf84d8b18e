"""Growing a state: every leaf against NumPy's indexing, function and gradients against the ungrown model."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from core.errors import UserError
from core.keys import Purpose, make_key
from core.loss import cross_entropy
from core.model import Compute, forward, head_table, init_params, logits
from core.run.schedule import OptimizerConfig
from stacking.plan import make_plan
from stacking.transform import grow
from tests.models import BOTH, GPT, LLAMA, flat, random_params, random_tokens
from tests.several_devices import ROOT, run_on_devices
from tests.stacking.test_plan import OPERATORS, plans
from train_tpu.optimizer import make_optimizer
from train_tpu.step import Batch, Controls, GuardConfig, StepConfig, TrainState, init_state, train_step

STEP = StepConfig(
    LLAMA, OptimizerConfig(optimizer="adamw", clip=0.0), GuardConfig(window=4), Compute(), 0.0, 64
)


def deeper(config, plan):
    return dataclasses.replace(config, n_layers=plan.n_layers)


def random_state(config, optimizer: str) -> TrainState:
    """A state in which no moment or counter is trivial."""
    step = dataclasses.replace(STEP, model=config, optim=OptimizerConfig(optimizer=optimizer))
    state = init_state(step, random_params(config))
    rng = np.random.default_rng(1)

    def noise(leaf):
        if jnp.issubdtype(leaf.dtype, jnp.integer):
            return leaf + 17
        return jnp.asarray(rng.uniform(0.1, 1, leaf.shape), leaf.dtype)

    return TrainState(state.params, jax.tree.map(noise, state.opt_state), jax.tree.map(noise, state.guard))


def expected_leaf(path: str, old: np.ndarray, plan, fresh: dict) -> np.ndarray:
    """A grown leaf, by the rules of the module's docstring, one layer after the other."""
    names = path.split("/")
    if names[0] == "guard":
        return old if plan.is_noop or names[-1] == "skipped" else np.zeros_like(old)
    if "layers" not in names:
        return old
    at = names.index("layers")
    role, parameter = names[at - 1], "/".join(names[at:])
    rows = []
    for source, how in zip(plan.sources, plan.how, strict=True):
        row = old[source]
        if how == "fresh" and role == "params":
            row = fresh[parameter][len(rows)]
        if role == "mu" and how == "fresh":
            row = np.zeros_like(row)
        if role != "nu" and how == "identity" and names[-2] in ("o", "down"):
            row = np.zeros_like(row)
        rows.append(row)
    return np.stack(rows)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("kind", BOTH)
def test_every_leaf_is_its_sources(kind, operator, optimizer):
    config = dataclasses.replace(BOTH[kind], n_layers=4)
    plan = make_plan(operator, 4)
    state = random_state(config, optimizer)
    before = jax.tree.map(np.array, state)
    fresh = init_params(deeper(config, plan), make_key(3, Purpose.GROW))
    grown = grow(state, plan, fresh=fresh)
    old, new, drawn = flat(state), flat(grown), flat(fresh)
    assert old.keys() == new.keys()
    for path, leaf in old.items():
        expected = expected_leaf(path, leaf, plan, drawn)
        assert new[path].dtype == leaf.dtype
        assert new[path].tobytes() == expected.tobytes(), path
    # Pure: what was grown is as it was.
    jax.tree.map(np.testing.assert_array_equal, before, jax.tree.map(np.array, state))
    # The same tree that a fresh start of the deeper model has.
    optim = OptimizerConfig(optimizer=optimizer)
    wanted = jax.eval_shape(make_optimizer(optim).init, grown.params)
    assert jax.tree.structure(grown.opt_state) == jax.tree.structure(wanted)
    for leaf, like in zip(jax.tree.leaves(grown.opt_state), jax.tree.leaves(wanted), strict=True):
        assert (leaf.shape, leaf.dtype) == (like.shape, like.dtype)


@settings(max_examples=60, deadline=None)
@given(plans(n_source=3))
def test_any_plan_is_indexing(plan):
    tree = {
        "layers": {"attn": {"o": {"kernel": jnp.arange(24.0).reshape(3, 2, 4) + 1}}},
        "embed": jnp.arange(5.0),
    }
    fresh = {"layers": {"attn": {"o": {"kernel": -jnp.ones((plan.n_layers, 2, 4))}}}}
    grown = flat({"params": grow(tree, plan, fresh=fresh)})
    for path, leaf in flat({"params": tree}).items():
        np.testing.assert_array_equal(
            grown[path], expected_leaf(path, leaf, plan, {k: np.asarray(v) for k, v in flat(fresh).items()})
        )


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_growing_twice_is_growing_once_and_works_under_jit(optimizer):
    state = random_state(LLAMA, optimizer)
    double, again, four = make_plan("stack", 3), make_plan("stack", 6), make_plan("stack", 3, 4)
    twice = grow(grow(state, double), again)
    once = jax.jit(functools.partial(grow, plan=four))(state)
    jax.tree.map(np.testing.assert_array_equal, twice, once)
    same = grow(state, make_plan("stack", 3, 1))
    jax.tree.map(np.testing.assert_array_equal, same, state)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_reset_optimizer_is_that_of_a_start(optimizer):
    plan = make_plan("interleave", 3)
    grown = grow(random_state(LLAMA, optimizer), plan, reset_optimizer=True)
    fresh = make_optimizer(OptimizerConfig(optimizer=optimizer)).init(grown.params)
    starts, ends = flat(fresh), flat(grown.opt_state)
    for path, leaf in starts.items():
        if not path.endswith("ns_coeffs"):  # Muon's constants, which the random state changed
            np.testing.assert_array_equal(ends[path], leaf, err_msg=path)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("plan", [make_plan("identity", 3), make_plan("identity", 3, 4)], ids=["2", "4"])
@pytest.mark.parametrize("kind", BOTH)
def test_identity_growth_keeps_logits_and_gradients_to_the_bit(kind, plan, dtype):
    config, compute = BOTH[kind], Compute(dtype=dtype)
    params = random_params(config)
    tokens = random_tokens(config, 2, 33)

    @functools.partial(jax.jit, static_argnums=0)
    def run(config, params):
        def loss(params):
            hidden = forward(config, params, tokens[:, :-1], compute)
            return cross_entropy(hidden, head_table(config, params), tokens[:, 1:]).total, hidden

        (_, hidden), gradients = jax.value_and_grad(loss, has_aux=True)(params)
        return logits(config, params, hidden), gradients

    grown = grow(params, plan)
    before, old = run(config, params)
    after, new = run(deeper(config, plan), grown)
    assert np.asarray(before).tobytes() == np.asarray(after).tobytes()
    old, new = flat(old), flat(new)
    for path, gradient in old.items():
        if not path.startswith("layers/"):
            np.testing.assert_array_equal(new[path], gradient, err_msg=path)
            continue
        np.testing.assert_array_equal(new[path][:3], gradient, err_msg=path)
        # In identity blocks only the zeroed projections learn at the first step.
        learns = np.any(new[path][3:] != 0)
        assert learns == (path.split("/")[-2] in ("o", "down")), path


@pytest.mark.parametrize("config", [LLAMA, GPT], ids=["llama", "gpt"])
def test_one_update_behind_identity_growth_is_that_of_ungrown_training(config):
    """Unclipped: the global norm would couple old and new leaves. Adam is elementwise, so to the bit."""
    plan = make_plan("identity", 3)
    tokens = np.asarray(random_tokens(config, 1, 4, 33), np.uint16)
    batch = Batch(tokens, np.zeros((1, 4), bool), np.arange(4, dtype=np.uint32)[None])
    controls = Controls(np.float32(1e-3), np.float32(8), np.int32(10), np.uint32(0))

    def update(config, state):
        step = dataclasses.replace(STEP, model=config)
        return jax.jit(functools.partial(train_step, step))(state, batch, controls)[0]

    # An empty guard window on both sides: growing empties it.
    guard = init_state(dataclasses.replace(STEP, model=config), {}).guard
    state = random_state(config, "adamw")._replace(guard=guard)
    plain, grown = update(config, state), update(deeper(config, plan), grow(state, plan))
    assert np.any(np.asarray(plain.params["norm"]["scale"]) != np.asarray(state.params["norm"]["scale"]))
    for part in ("params", "opt_state"):
        old, new = flat(getattr(plain, part)), flat(getattr(grown, part))
        for path, leaf in old.items():
            kept = new[path][:3] if "layers" in path else new[path]
            np.testing.assert_array_equal(kept, leaf, err_msg=path)


def test_a_plan_for_another_depth_is_refused():
    with pytest.raises(UserError, match=r"layers/attn/k/bias has the shape \[3, 48\].*plan is for 4 layers"):
        grow(random_params(GPT), make_plan("stack", 4))


def test_shardings_are_kept_on_eight_devices():
    run_on_devices(8, ROOT / "tests/stacking/grow_on_devices.py")
