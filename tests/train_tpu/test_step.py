"""The training step: accumulation, guard, clipping, donation, and that it is compiled once."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import train_tpu.step
from core.config import ModelConfig
from core.errors import UserError
from core.model import Compute
from core.run.schedule import OptimizerConfig
from core.sharding import make_mesh
from tests.compilations import listen
from tests.models import flat, random_params, whole_logits
from tests.several_devices import run_on_devices
from train_tpu.oom_hints import out_of_memory_explained
from train_tpu.step import Batch, Controls, GuardConfig, StepConfig, compile_step, fresh_state, init_state

MODEL = ModelConfig(vocab_size=61, context=16, d_model=32, n_layers=2, n_heads=2, d_mlp=48)
ROWS = 8
# Adam's first update is lr * g / (|g| + eps). With an eps far above the gradients' rounding it is smooth;
# with 1e-8 the sign of a rounding error (the gradient of a bias of k is 0) would decide a whole update.
OPTIM = OptimizerConfig(optimizer="adamw", eps=1e-3, clip=0.0)
CONFIG = StepConfig(
    model=MODEL, optim=OPTIM, guard=GuardConfig(window=4), compute=Compute(), z_loss=0.0, loss_chunk=32
)


def controls(lr=0.01, sigma=0.0, halt_after=3, seed=0) -> Controls:
    return Controls(jnp.float32(lr), jnp.float32(sigma), jnp.int32(halt_after), jnp.uint32(seed))


def batch(first: int = 0, grad_accum_steps: int = 1, ignored: Any = False, seed: int = 0) -> Batch:
    """A batch of random rows, a function of the number of its first sequence, in `grad_accum_steps` parts."""
    rows = [np.random.default_rng((seed, first + i)).integers(0, 61, 17) for i in range(ROWS)]
    shape = (grad_accum_steps, ROWS // grad_accum_steps)
    return Batch(
        jnp.asarray(np.reshape(rows, (*shape, 17)), jnp.uint16),
        jnp.asarray(np.broadcast_to(ignored, ROWS).reshape(shape)),
        jnp.asarray(np.arange(first, first + ROWS).reshape(shape), jnp.uint32),
    )


@pytest.fixture(scope="module")
def compiled():
    """Compiled steps, each once for all tests of this file."""
    made = {}

    def get(config: StepConfig = CONFIG, grad_accum_steps: int = 1):
        key = (config, grad_accum_steps)
        if key not in made:
            made[key] = compile_step(config, ROWS, grad_accum_steps, make_mesh(devices=jax.devices()[:1]))
        return made[key]

    return get


init = jax.jit(init_state, static_argnums=0)


def start(config: StepConfig = CONFIG, **changed):
    """A state from random parameters, which the donating step may consume."""
    return init(config, random_params(config.model, std=0.1) | changed)


def copied(state):
    return jax.tree.map(np.array, state)


def assert_same(one, other):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(a, b)


# --- the loss and the gradient ---


def test_loss_is_the_mean_over_counted_targets(compiled):
    ignored = np.arange(ROWS) % 3 == 1
    data, state = batch(ignored=ignored), start()
    params = jax.tree.map(jnp.array, state.params)
    _, metrics = compiled()(state, data, controls())
    tokens = data.tokens[0].astype(jnp.int32)
    scores = whole_logits(MODEL, params, tokens[:, :-1])
    nll = -jnp.take_along_axis(jax.nn.log_softmax(scores), tokens[:, 1:, None], -1)[..., 0]
    assert float(metrics.loss) == pytest.approx(float(nll[~ignored].mean()), rel=1e-6)
    assert float(metrics.nll) == float(metrics.loss)  # no z-loss here


def test_z_loss_is_reported_apart(compiled):
    plain = compiled()(start(), batch(), controls())[1]
    with_z = compiled(dataclasses.replace(CONFIG, z_loss=0.01))(start(), batch(), controls())[1]
    assert float(with_z.nll) == pytest.approx(float(plain.nll), rel=1e-6)
    # The squared log-normaliser of nearly even scores over 61 tokens is about log(61)^2 = 17.
    assert 0.1 < float(with_z.loss - with_z.nll) < 0.3


@pytest.mark.parametrize("dropout", [pytest.param(0.0, marks=pytest.mark.slow), 0.2])
def test_accumulation_equals_the_big_batch(compiled, dropout):
    config = dataclasses.replace(CONFIG, model=dataclasses.replace(MODEL, dropout=dropout))
    ignored = np.arange(ROWS) == 2  # the parts count different numbers of targets
    results = []
    for grad_accum_steps in (1, 4):
        state = start(config)
        for step in range(2):
            data = batch(step * ROWS, grad_accum_steps, ignored)
            state, metrics = compiled(config, grad_accum_steps)(state, data, controls())
        results.append((copied(state), copied(metrics)))
    (state, metrics), (other_state, other) = results
    # Sums over the batch in another order: a few roundings of 6e-8 of the loss; the updates pass the
    # gradient's error on divided by eps = 1e-3, times lr = 0.01: 1e-7 of gradients of 0.1 become 1e-7.
    assert other.loss == pytest.approx(metrics.loss, rel=1e-6)
    assert other.grad_norm == pytest.approx(metrics.grad_norm, rel=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6), other_state.params, state.params
    )


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_eight_devices_equal_one(optimizer):
    run_on_devices(8, Path(__file__).with_name("step_on_devices.py"), optimizer)


@pytest.mark.slow
def test_the_curve_of_muon_in_bfloat16(monkeypatch):
    """Its mean loss is nearer to that in float32 from the same parameters than those of other parameters are
    to each other; a longer run is in docs/LOG.md."""
    config = dataclasses.replace(CONFIG, optim=OptimizerConfig())
    update = train_tpu.step.apply_gradients

    def curve(step, seed: int) -> np.ndarray:
        state, losses = jax.tree.map(jnp.array, init_state(config, random_params(MODEL, seed, std=0.1))), []
        for number in range(100):
            rng = np.random.default_rng(number)
            tokens = rng.integers(0, 3, (ROWS, 17))
            for place in range(1, 17):  # each token follows from the one before, but for log 3
                tokens[:, place] = (3 * tokens[:, place - 1] + tokens[:, place]) % 61
            data = batch(number * ROWS)._replace(tokens=jnp.asarray(tokens[None], jnp.uint16))
            state, metrics = step(state, data, controls(lr=0.01))
            losses.append(float(metrics.nll))
        return np.array(losses)

    curves = {}
    for dtype in ("float32", "bfloat16"):
        monkeypatch.setattr(train_tpu.step, "apply_gradients",
                            lambda *args, to=dtype: update(*args[:7], to, *args[8:]))  # fmt: skip
        step = compile_step(config, ROWS, 1, make_mesh(devices=jax.devices()[:1]))
        curves[dtype] = np.array([curve(step, seed).reshape(5, 20).mean(1) for seed in range(3)])
    wide = curves["float32"]
    assert (wide[:, -1] < wide[:, 0] - 1).all()  # it learns
    apart = np.abs(curves["bfloat16"] - wide).max(0)
    assert (apart > 0).all()  # the types differ
    assert (apart < np.ptp(wide, axis=0)).all()


def test_dropout_is_drawn_from_seed_and_index(compiled):
    config = dataclasses.replace(CONFIG, model=dataclasses.replace(MODEL, dropout=0.2))

    def loss(first=0, seed=0, same_text=True):
        data = batch()._replace(index=batch(first).index)
        return float(compiled(config)(start(config), data, controls(seed=seed))[1].loss)

    assert loss() == loss()
    assert len({loss(), loss(first=8), loss(seed=1), loss(first=1)}) == 4


# --- clipping, norms, learning rate ---


def test_norms(compiled):
    state, metrics = compiled()(start(), batch(), controls())
    # Before any step the first moment is 0; after it, it is 0.1 of the gradient.
    gradient = {k: v / (1 - OPTIM.beta1) for k, v in flat(state.opt_state[0].mu).items()}
    assert set(metrics.leaf_norms) == set(gradient)
    for name, norm in metrics.leaf_norms.items():
        axes = tuple(range(1, gradient[name].ndim)) if name.startswith("layers/") else None
        np.testing.assert_allclose(norm, np.sqrt((gradient[name] ** 2).sum(axes)), rtol=1e-5)
        assert np.shape(norm) == ((MODEL.n_layers,) if name.startswith("layers/") else ())
    whole = np.sqrt(sum((np.asarray(n, np.float64) ** 2).sum() for n in metrics.leaf_norms.values()))
    assert float(metrics.grad_norm) == pytest.approx(whole, rel=1e-6)


@pytest.mark.parametrize("limit", [0.05, pytest.param(100.0, marks=pytest.mark.slow)])
def test_clipping_equals_optax(compiled, limit):
    free, metrics = compiled()(start(), batch(), controls())
    assert 0.1 < float(metrics.grad_norm) < 50  # one limit is below it, one above
    gradient = jax.tree.map(lambda m: m / (1 - OPTIM.beta1), copied(free.opt_state[0].mu))
    clipper = optax.clip_by_global_norm(limit)
    expected = jax.jit(clipper.update)(gradient, clipper.init(gradient))[0]
    config = dataclasses.replace(CONFIG, optim=dataclasses.replace(OPTIM, clip=limit))
    clipped, other = compiled(config)(start(config), batch(), controls())
    assert float(other.grad_norm) == pytest.approx(float(metrics.grad_norm), rel=1e-6)  # before clipping
    for mu, g in zip(
        jax.tree.leaves(copied(clipped.opt_state[0].mu)), jax.tree.leaves(expected), strict=True
    ):
        np.testing.assert_allclose(mu / (1 - OPTIM.beta1), g, rtol=1e-5, atol=1e-8)


def test_the_learning_rate_scales_the_update(compiled):
    before = copied(start().params)

    def change(lr):
        after = compiled()(start(), batch(), controls(lr=lr))[0].params
        return np.concatenate(
            [np.ravel(a) for a in jax.tree.leaves(jax.tree.map(jnp.subtract, after, before))]
        )

    # A parameter of about 1 is rounded by 6e-8, beside updates of about 0.01.
    np.testing.assert_allclose(change(0.02), 2 * change(0.01), rtol=0, atol=4e-7)
    assert (change(0.0) == 0).all()


# --- the guard ---


def poisoned(what: str):
    """States and batches whose loss or gradient is not finite, each in another way."""
    params = random_params(MODEL, std=0.1)
    if what == "nothing counts: 0 / 0":
        return start(), batch(ignored=True)
    if what == "a parameter is NaN":
        return start(norm={"scale": params["norm"]["scale"].at[3].set(jnp.nan)}), batch()
    if what == "the scores overflow":
        return start(norm={"scale": params["norm"]["scale"] * 1e38}), batch()
    raise AssertionError(what)


@pytest.mark.parametrize("what", ["nothing counts: 0 / 0", "a parameter is NaN", "the scores overflow"])
def test_what_is_not_finite_is_not_applied(compiled, what):
    state, data = poisoned(what)
    before = copied(state)
    state, metrics = compiled()(state, data, controls())
    assert not metrics.applied and not np.isfinite(metrics.loss)
    assert_same(state.params, before.params)
    assert_same(state.opt_state, before.opt_state)
    assert_same(state.guard, before.guard._replace(streak=1, skipped=1))


def test_a_finite_loss_with_an_infinite_gradient_is_not_applied(compiled):
    model = dataclasses.replace(MODEL, positions="learned", mlp="gelu", biases=True, tied=False)
    config = dataclasses.replace(CONFIG, model=model)
    # Embeddings and biases of 0 give hidden states of 0, and so even scores: the loss is log 61. Their
    # gradient is the head's 1e18 times 1 / sqrt(eps) = 1e3: finite, but its square is not.
    params = jax.tree.map(jnp.zeros_like, random_params(model))
    params["norm"]["scale"] += 1
    params["head"]["kernel"] += 1e18 * jnp.sign(random_params(model)["head"]["kernel"])
    state = start(config, **params)
    before = copied(state)
    state, metrics = compiled(config)(state, batch(), controls())
    assert float(metrics.loss) == pytest.approx(np.log(61), rel=1e-5)
    assert not np.isfinite(metrics.grad_norm) and not metrics.applied
    assert_same((state.params, state.opt_state), (before.params, before.opt_state))


def test_good_steps_after_a_skip_go_on_as_if_it_had_not_been(compiled):
    step = compiled()
    with_skip, without = start(), start()
    for i in range(4):
        if i == 2:
            with_skip, metrics = step(with_skip, batch(ignored=True), controls())
            assert not metrics.applied
        with_skip, one = step(with_skip, batch(i * ROWS), controls())
        without, other = step(without, batch(i * ROWS), controls())
        assert one.applied and other.applied and one.streak == 0
    assert_same(with_skip.params, without.params)
    assert_same(with_skip.opt_state, without.opt_state)
    assert_same(with_skip.guard, without.guard._replace(skipped=np.int32(1)))


def filled(losses=(2.0, 2.2, 1.8, 2.0), norms=(1.0, 1.1, 0.9, 1.0), accepted=4, streak=0):
    """A state whose window holds these values."""
    state = start()
    return state._replace(
        guard=state.guard._replace(
            losses=jnp.float32(losses),
            norms=jnp.float32(norms),
            accepted=jnp.int32(accepted),
            streak=jnp.int32(streak),
        )
    )


def test_spikes(compiled):
    """The batch's own loss and norm are what they are; windows around them make them spikes or not."""
    metrics = compiled()(start(), batch(), controls())[1]
    loss, norm = float(metrics.loss), float(metrics.grad_norm)
    spread = np.array([-1, 1, -1, 1])  # mean 0, deviation 1

    def applied(loss_above=0.0, norm_above=0.0, sigma=3.0, accepted=4, streak=0) -> bool:
        """With a loss and a norm so many deviations (of 0.01) above the window's mean."""
        state = filled(
            loss + 0.01 * (spread - loss_above), norm + 0.01 * (spread - norm_above), accepted, streak
        )
        before = copied(state)
        state, metrics = compiled()(state, batch(), controls(sigma=sigma))
        if not metrics.applied:
            assert_same(state, before._replace(guard=before.guard._replace(streak=streak + 1, skipped=1)))
        return bool(metrics.applied)

    assert applied()
    assert applied(loss_above=2.9) and not applied(loss_above=3.1)
    assert applied(norm_above=2.9) and not applied(norm_above=3.1)
    assert applied(loss_above=-100, norm_above=-100)  # downward is welcome
    assert applied(loss_above=100, norm_above=100, sigma=0.0)  # turned off
    assert applied(loss_above=100, norm_above=100, accepted=3)  # the window is not full
    assert not applied(loss_above=100, accepted=5)
    # After skipped updates a norm may be twice as many deviations above, a loss may not.
    assert applied(norm_above=5.9, streak=1) and not applied(norm_above=6.1, streak=1)
    assert applied(norm_above=11.9, streak=2) and not applied(norm_above=12.1, streak=2)
    assert not applied(loss_above=3.1, streak=2)


def test_the_window_holds_the_newest_accepted_steps(compiled):
    state, seen = start(), []
    for i in range(6):
        state, metrics = compiled()(state, batch(i * ROWS), controls())
        seen.append((float(metrics.loss), float(metrics.grad_norm)))
        state, _ = compiled()(state, batch(ignored=True), controls())  # leaves no trace in it
    order = [4, 5, 2, 3]  # step i stands at i modulo 4
    np.testing.assert_array_equal(state.guard.losses, np.float32([seen[i][0] for i in order]))
    np.testing.assert_array_equal(state.guard.norms, np.float32([seen[i][1] for i in order]))
    assert int(state.guard.accepted) == 6 and int(state.guard.skipped) == 6


def test_after_too_many_skips_nothing_is_applied_any_more(compiled):
    state = start()
    before = copied(state)
    for i in range(3):
        state, metrics = compiled()(state, batch(ignored=True), controls(halt_after=3))
        assert int(metrics.streak) == int(metrics.skipped) == i + 1
    for i in range(2):  # good batches now
        state, metrics = compiled()(state, batch(), controls(halt_after=3))
        assert np.isfinite(metrics.loss) and not metrics.applied and int(metrics.streak) == 4 + i
    assert_same((state.params, state.opt_state), (before.params, before.opt_state))
    state, metrics = compiled()(state, batch(), controls(halt_after=100))  # a higher limit goes on
    assert metrics.applied


@pytest.mark.parametrize("bad", [{"window": 1}, {"sigma": -1.0}, {"sigma": float("nan")}, {"halt_after": 0}])
def test_bad_guard_settings(bad):
    with pytest.raises(UserError):
        GuardConfig(**bad)


# --- compiled once, donated ---


def test_nothing_is_compiled_again(compiled):
    step, state = compiled(), start()
    inputs = [
        (batch(8, ignored=np.arange(ROWS) < skipped), controls(lr, sigma, halt_after, seed))
        for lr, sigma, halt_after, seed, skipped in [(0.1, 0, 3, 0, 0), (0.01, 8, 9, 1, 3), (0, 1, 1, 2, 8)]
    ]
    compilations = listen()
    for data, control in inputs * 2:
        state, _ = step(state, data, control)
    jax.block_until_ready(state)
    assert not compilations


def test_other_shapes_are_refused(compiled):
    data = batch()
    short = Batch(data.tokens[:, :, :-1], data.ignored, data.index)
    with pytest.raises(TypeError):
        compiled()(start(), short, controls())


def test_the_state_is_donated(compiled):
    state = start()
    compiled()(state, batch(), controls())
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves((state.params, state.opt_state)))


def test_fresh_state_is_a_function_of_the_seed():
    mesh = make_mesh(devices=jax.devices()[:1])
    one, same, other = (copied(fresh_state(CONFIG, mesh, seed)) for seed in (0, 0, 1))
    assert_same(one, same)
    assert (one.params["embed"]["table"] != other.params["embed"]["table"]).any()
    assert all((leaf == 0).all() for leaf in jax.tree.leaves((one.opt_state, one.guard)))


def test_out_of_memory_is_told_with_a_way_out():
    full = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9GiB")
    advice = r"try --grad-accum-steps 4 .*, then --remat full; .* --allow-change grad_accum_steps remat"
    with pytest.raises(UserError, match=advice), out_of_memory_explained(32, 2):
        raise full
    with pytest.raises(jax.errors.JaxRuntimeError), out_of_memory_explained(32, 2):
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")
