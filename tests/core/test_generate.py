"""Generation: the cache against the whole forward pass, sampling against numpy, nothing compiled twice."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from core.errors import UserError
from core.generation import Generator, Knobs, sample
from core.model import Compute, empty_cache, forward_cached, logits
from core.sampling import Sampling
from tests.compilations import listen
from tests.models import BOTH, random_params, random_tokens, whole_logits
from tests.p_values import chi_square

SMALL = {
    kind: dataclasses.replace(config, context=40, d_model=32, n_heads=2, d_mlp=48)
    for kind, config in BOTH.items()
}
LENGTHS = (1, 5, 16, 21)  # the longest passes the smallest padding, 16


@pytest.fixture(scope="module", params=[pytest.param("llama", marks=pytest.mark.slow), "gpt"])
def case(request):
    """(config, params, generator, prompts of several lengths) of both kinds of model."""
    config = SMALL[request.param]
    tokens = np.asarray(random_tokens(config, len(LENGTHS), 40))
    prompts = [row[:n].tolist() for row, n in zip(tokens, LENGTHS, strict=True)]
    return config, random_params(config), Generator(config, Compute()), prompts


def greedy_by_hand(config, params, prompt, n):
    """The likeliest token again and again, each by a forward pass over everything so far."""
    text = list(prompt)
    for _ in range(n):
        padded = np.zeros((1, config.context), np.int32)
        padded[0, : len(text)] = text
        text.append(int(whole_logits(config, params, jnp.asarray(padded))[0, len(text) - 1].argmax()))
    return text[len(prompt) :]


@pytest.mark.parametrize("kind", SMALL)
def test_cached_logits_equal_the_whole_pass(kind):
    """Prompts of several lengths are prefilled with padding; then each goes on from its own end."""
    config = SMALL[kind]
    params, tokens = random_params(config), random_tokens(config, len(LENGTHS), 40)
    truth = whole_logits(config, params, tokens)

    @jax.jit
    def step(params, tokens, positions, cache):
        hidden, cache = forward_cached(config, params, tokens, positions, cache)
        return logits(config, params, hidden), cache

    lengths, width = np.array(LENGTHS), 24
    positions = jnp.tile(jnp.arange(width), (len(LENGTHS), 1))
    padded = jnp.where(positions < lengths[:, None], tokens[:, :width], 0)
    scores, cache = step(params, padded, positions, empty_cache(config, len(LENGTHS), 40, "float32"))
    for row, n in enumerate(LENGTHS):
        # The same sums with masked terms between them: a few roundings of 6e-8 of scores of about 5.
        np.testing.assert_allclose(scores[row, :n], truth[row, :n], rtol=0, atol=2e-5)
    for i in range(15):  # beyond the padding for some rows, within it for others
        at = jnp.asarray(lengths + i)[:, None]
        scores, cache = step(params, jnp.take_along_axis(tokens, at, 1), at, cache)
        wanted = jnp.take_along_axis(truth, at[..., None], 1)
        np.testing.assert_allclose(scores, wanted, rtol=0, atol=2e-5)


def test_greedy_is_the_likeliest_token_of_the_whole_pass(case):
    config, params, generator, prompts = case
    texts = generator.complete(params, prompts, Sampling(temperature=0), max_new_tokens=15)
    for prompt, text in zip(prompts, texts, strict=True):
        assert text == greedy_by_hand(config, params, prompt, 15)


@pytest.mark.parametrize("kind", SMALL)
def test_a_prompt_read_in_pieces(kind, monkeypatch: pytest.MonkeyPatch):
    """Of a length that divides neither prompts nor context, so that the last piece reaches beyond both."""
    monkeypatch.setattr("core.generation.PREFILL", 7)
    config, params = SMALL[kind], random_params(SMALL[kind])
    tokens = np.asarray(random_tokens(config, 3, config.context - 2))
    prompts = [row[:n].tolist() for row, n in zip(tokens, (config.context - 2, 15, 3), strict=True)]
    texts = Generator(config, Compute()).complete(params, prompts, Sampling(temperature=0), max_new_tokens=2)
    for prompt, text in zip(prompts, texts, strict=True):
        assert text == greedy_by_hand(config, params, prompt, 2)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_does_not_depend_on_the_others(case, temperature):
    _, params, generator, prompts = case
    sampling = Sampling(temperature=temperature)
    together = generator.complete(params, prompts, sampling, max_new_tokens=12)
    for others in (prompts[1:2], prompts[3:4] * 3):  # another width of the padding, other texts
        batch = [prompts[0], *others]
        assert generator.complete(params, batch, sampling, max_new_tokens=12)[0] == together[0]


def test_seeds_and_rows_differ_and_repeat(case):
    _, params, generator, prompts = case

    def make(seed):
        same = [prompts[1]] * 4
        return generator.complete(params, same, Sampling(temperature=1.0, seed=seed), max_new_tokens=12)

    assert make(0) == make(0) != make(1)
    assert len({tuple(text) for text in make(0)}) == 4


def test_a_row_ends_at_the_context(case):
    config, params, generator, prompts = case
    texts = generator.complete(params, prompts, Sampling(temperature=0), max_new_tokens=1000)
    assert [len(text) for text in texts] == [config.context - n for n in LENGTHS]
    # What a row makes does not change when its neighbours have ended.
    assert texts[0] == greedy_by_hand(config, params, prompts[0], config.context - 1)


def test_a_row_ends_at_eos(case):
    _, params, generator, prompts = case
    greedy = Sampling(temperature=0)
    free = generator.complete(params, prompts, greedy, max_new_tokens=15)
    eos = free[1][6]
    steps = list(generator.stream(params, prompts, greedy, 15, eos))
    for row, text in enumerate(free):
        end = text.index(eos) if eos in text else 15
        made = [column[row] for column in steps]
        assert made == text[:end] + [None] * (len(steps) - end)
    assert len(steps) == max([text.index(eos) + 1 if eos in text else 15 for text in free])


@pytest.mark.parametrize("prompts", [[[]], [[1], []], [[1] * 40], [[1], [1] * 41]])
def test_prompts_that_cannot_be(case, prompts):
    _, params, generator, _ = case
    with pytest.raises(UserError):
        generator.complete(params, prompts, Sampling(), 5)


def test_nothing_is_compiled_from_call_to_call(case):
    _, params, generator, prompts = case
    generator.complete(params, prompts, Sampling(), 4)
    compilations = listen()
    for sampling in (Sampling(0.0), Sampling(1.0, 5), Sampling(0.5, 0, 0.9), Sampling(seed=7)):
        generator.complete(params, [p[::-1] for p in prompts], sampling, 9, eos=3)
    assert not compilations
    generator.complete(params, prompts[:1], Sampling(), 2)
    assert compilations  # another batch is another shape


# --- sampling ---


def distribution(scores, temperature, top_k, top_p):
    """What numpy says the probabilities are, in float64, from the definitions."""
    p = np.exp(scores.astype(np.float64) / temperature)
    p /= p.sum()
    order = np.argsort(-p)
    if top_k:
        p[order[top_k:]] = 0
        p /= p.sum()
    n = 1 + np.searchsorted(np.cumsum(p[order]), top_p) if top_p < 1 else len(p)
    p[order[n:]] = 0
    return p / p.sum()


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(1.0, 0, 1.0), (0.7, 0, 1.0), (2.0, 5, 1.0), (1.0, 0, 0.8), (1.5, 6, 0.7), (1.0, 1, 1.0), (1.0, 0, 1e-6),
     (1.0, 50, 1.0)],
)  # fmt: skip
def test_draws_have_the_distribution(temperature, top_k, top_p):
    scores = np.random.default_rng(1).standard_normal(12).astype(np.float32)
    n = 20_000
    knobs = Knobs(jnp.float32(temperature), jnp.int32(top_k), jnp.float32(top_p), jnp.uint32(3))
    draws = jax.jit(sample)(jnp.tile(jnp.asarray(scores), (n, 1)), jnp.zeros(n, jnp.int32), knobs)
    counts = np.bincount(draws, minlength=12)
    p = distribution(scores, temperature, top_k, top_p)
    np.testing.assert_array_equal(counts > 0, p > 0)  # every kept token is drawn 20 times or more
    kept = p > 0
    if kept.sum() > 1:
        # One in a million of right samplers would fail this; the seed is fixed.
        assert chi_square(counts[kept], n * p[kept]) > 1e-6


def test_positions_draw_anew():
    knobs = Knobs(jnp.float32(1), jnp.int32(0), jnp.float32(1), jnp.uint32(0))
    drawing = jax.jit(sample)
    draws = [int(drawing(jnp.zeros((1, 1000)), jnp.array([i]), knobs)[0]) for i in range(8)]
    assert len(set(draws)) > 6


def test_temperature_0_is_greedy_whatever_else():
    scores = jnp.asarray(np.random.default_rng(0).standard_normal((5, 12)), jnp.float32)
    for top_k, top_p in [(0, 1.0), (3, 0.5), (1, 0.01)]:
        knobs = Knobs(jnp.float32(0), jnp.int32(top_k), jnp.float32(top_p), jnp.uint32(0))
        np.testing.assert_array_equal(jax.jit(sample)(scores, jnp.arange(5), knobs), scores.argmax(-1))


@pytest.mark.parametrize(
    "bad",
    [
        {"temperature": -1.0},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_p": float("nan")},
        {"seed": -1},
    ],
)
def test_bad_settings(bad):
    with pytest.raises(UserError):
        Sampling(**bad)
