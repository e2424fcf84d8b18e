"""Growing a state: every leaf against the oracle, function and gradients against the ungrown model."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from core.checkpoint.checkpointer import flatten
from core.errors import UserError
from core.loss import cross_entropy
from core.model import Compute, abstract_params, forward, head_table, logits
from core.run.schedule import OptimizerConfig
from stacking.plan import custom_plan, make_plan
from stacking.transform import grow
from tests.models import GPT, LLAMA, flat, random_params, random_tokens
from tests.stacking import oracle
from train_tpu.optimizer import make_optimizer
from train_tpu.step import Batch, Controls, GuardConfig, StepConfig, TrainState, init_state, train_step

STEP = StepConfig(
    LLAMA, OptimizerConfig(optimizer="adamw", clip=0.0), GuardConfig(window=4), Compute(), 0.0, 64
)
MODELS = {"mtlm1": LLAMA, "mtlm2": GPT}  # as the oracle has them
ALL = MODELS | {"ungated": dataclasses.replace(LLAMA, mlp="relu2")}


def deeper(config, plan):
    return dataclasses.replace(config, n_layers=plan.n_layers)


def random_state(config, optimizer: str) -> TrainState:
    """A state in which no leaf is trivial; it has just the leaves that the oracle lists."""
    step = dataclasses.replace(STEP, model=config, optim=OptimizerConfig(optimizer=optimizer))
    like, tree = flatten(jax.eval_shape(functools.partial(init_state, step), abstract_params(config)))
    model = "mtlm2" if not config.tied else "mtlm1" if config.mlp == "swiglu" else "ungated"
    listed = oracle.shapes(model, optimizer, config.n_layers, step.guard.window)
    assert {path: leaf.shape for path, leaf in like.items()} == listed
    rng = np.random.default_rng(1)
    noise = [jnp.asarray(rng.uniform(0.1, 100, leaf.shape), leaf.dtype) for leaf in like.values()]
    return tree.unflatten(noise)


def leaves(state) -> oracle.Leaves:
    """The leaves by their paths, as NumPy has them."""
    return {path: np.array(leaf) for path, leaf in flatten(state)[0].items()}


@pytest.mark.parametrize(
    ("optimizer", "reset"),
    [
        *(("muon", False), ("adamw", True)),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (("adamw", False), ("muon", True))),
    ],
)
@pytest.mark.parametrize("operator", oracle.OPERATORS)
@pytest.mark.parametrize("model", MODELS)
def test_every_leaf_is_the_oracles(model, operator, optimizer, reset):
    config = dataclasses.replace(MODELS[model], n_layers=4)
    plan = make_plan(operator, 4)
    state = random_state(config, optimizer)
    old = leaves(state)
    fresh = random_params(deeper(config, plan), seed=3)
    grown = grow(state, plan, reset_optimizer=reset, fresh=fresh)
    expected = oracle.grown(
        model, optimizer, old, *oracle.OPERATORS[operator], drawn=leaves({"params": fresh}), reset=reset
    )
    oracle.assert_equal(leaves(grown), expected)
    oracle.assert_equal(leaves(state), old)  # pure: what was grown is as it was
    # The same tree that a fresh start of the deeper model has.
    wanted = jax.eval_shape(make_optimizer(OptimizerConfig(optimizer=optimizer)).init, grown.params)
    assert jax.tree.structure(grown.opt_state) == jax.tree.structure(wanted)


@pytest.mark.parametrize(
    "model, layers, sources, how",
    [
        ("mtlm1", "2:identity,0,1:fresh,1,0:identity", "2 0 1 1 0", "icfci"),
        ("mtlm2", "1:fresh,1:identity", "1 1", "fi"),
        ("ungated", "0:identity,2,1,1:fresh", "0 2 1 1", "iccf"),
    ],
)
def test_any_plan_is_followed(model, layers, sources, how):
    plan = custom_plan(layers, 3)
    state = random_state(ALL[model], "muon")
    fresh = random_params(deeper(ALL[model], plan), seed=3)
    drawn = leaves({"params": fresh})
    expected = oracle.grown(model, "muon", leaves(state), sources, how, drawn=drawn)
    oracle.assert_equal(leaves(jax.jit(functools.partial(grow, plan=plan))(state, fresh=fresh)), expected)


def test_growing_twice_is_growing_once_and_works_under_jit():
    state = random_state(LLAMA, "muon")
    double, again, four = make_plan("stack", 3), make_plan("stack", 6), make_plan("stack", 3, 4)
    twice = grow(grow(state, double), again)
    once = jax.jit(functools.partial(grow, plan=four))(state)
    jax.tree.map(np.testing.assert_array_equal, twice, once)
    same = grow(state, make_plan("stack", 3, 1))
    jax.tree.map(np.testing.assert_array_equal, same, state)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_reset_optimizer_is_that_of_a_start(optimizer):
    grown = grow(random_state(LLAMA, optimizer), make_plan("interleave", 3), reset_optimizer=True)
    ends = leaves(grown.opt_state)
    for path, leaf in leaves(make_optimizer(OptimizerConfig(optimizer=optimizer)).init(grown.params)).items():
        if not path.endswith("ns_coeffs"):  # Muon's constants, which the random state changed
            np.testing.assert_array_equal(ends[path], leaf, err_msg=path)


@pytest.mark.parametrize(
    ("model", "dtype"),
    [
        ("mtlm1", "float32"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (("mtlm1", "bfloat16"), ("mtlm2", "float32"), ("mtlm2", "bfloat16"))
        ),
    ],
)
def test_identity_growth_keeps_logits_and_gradients_to_the_bit(model, dtype):
    plan = custom_plan("0,1:identity,1,2,0-2:identity", 3)
    copies = [layer for layer, how in enumerate(plan.how) if how == "copy"]
    config, compute = MODELS[model], Compute(dtype=dtype)
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
        np.testing.assert_array_equal(new[path][copies], gradient, err_msg=path)
        # In identity blocks only the zeroed projections learn at the first step.
        learns = np.any(np.delete(new[path], copies, axis=0) != 0)
        assert learns == (path.split("/")[-2] in ("o", "down")), path


@pytest.mark.slow
def test_one_update_after_identity_growth_is_that_of_ungrown_training():
    """Unclipped: the global norm would couple old and new leaves. Adam is elementwise, so to the bit."""
    config, plan = LLAMA, make_plan("identity", 3)
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


def test_what_there_is_no_rule_for_is_not_guessed():
    params = random_params(GPT)
    with pytest.raises(ValueError, match="growing has no rule for opt_state/third/layers/"):
        grow({"opt_state": {"third": params}}, make_plan("stack", GPT.n_layers))
    with pytest.raises(ValueError, match=r"draws layers anew, and no new layers/\S+ was given"):
        grow(params, make_plan("random", GPT.n_layers))
