"""The decoder against transformers, against the formulas in float64, and against itself run otherwise."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from core.config import ModelConfig
from core.model import Compute, Params, drop, forward, init_params, logits
from tests.kernels import REFERENCE
from tests.models import BOTH, GPT, GROUPED, LLAMA, flat, random_params, random_tokens
from tests.reference import logits64

torch.set_num_threads(1)  # small products: threads only wait for each other
Leaves = dict[str, np.ndarray]
SLOW_LLAMA = pytest.mark.parametrize("kind", ["gpt", pytest.param("llama", marks=pytest.mark.slow)])
LENGTHS = pytest.mark.parametrize(
    "length", [64, *(pytest.param(length, marks=pytest.mark.slow) for length in (1, 7, 96))]
)

FLOAT32_RUN = Compute()


def ours(config: ModelConfig, params: Params, tokens, compute=FLOAT32_RUN, dropout_keys=None):
    """Logits, loss and gradients: mean cross-entropy of each token's successor, written the plain way."""

    @jax.jit
    def run(params, tokens):
        def loss(params):
            scores = logits(config, params, forward(config, params, tokens, compute, dropout_keys))
            nll = -jnp.take_along_axis(jax.nn.log_softmax(scores), jnp.roll(tokens, -1, 1)[..., None], -1)
            return nll.mean(), scores

        return jax.value_and_grad(loss, has_aux=True)(params)

    (loss, scores), gradients = run(params, tokens)
    return np.asarray(scores), float(loss), flat(gradients)


def torch_loss(scores: torch.Tensor, tokens: np.ndarray) -> torch.Tensor:
    targets = torch.tensor(np.roll(tokens, -1, 1), dtype=torch.long)
    return torch.nn.functional.cross_entropy(scores.reshape(-1, scores.shape[-1]), targets.reshape(-1))


def reference(config: ModelConfig, params: Params, tokens) -> tuple[np.ndarray, Leaves]:
    """Logits and gradients in float64, by the formulas."""
    tokens = np.asarray(tokens)
    p = {k: torch.tensor(v, dtype=torch.float64, requires_grad=True) for k, v in flat(params).items()}
    scores = logits64(config, p, tokens)
    torch_loss(scores, tokens).backward()
    return scores.detach().numpy(), {k: v.grad.numpy() for k, v in p.items()}


def transformers_llama(config: ModelConfig, params: Params, tokens) -> tuple[np.ndarray, Leaves]:
    """Logits and gradients of transformers' own model, float32, with the same weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size, hidden_size=config.d_model, intermediate_size=config.d_mlp,
            num_hidden_layers=config.n_layers, num_attention_heads=config.n_heads,
            max_position_embeddings=config.context, rms_norm_eps=config.norm_eps,
            tie_word_embeddings=config.tied, attn_implementation="eager",
        )
    )  # fmt: skip
    names = {
        "attn_norm/scale": "input_layernorm", "mlp_norm/scale": "post_attention_layernorm",
        **{f"attn/{m}/kernel": f"self_attn.{m}_proj" for m in "qkvo"},
        **{f"mlp/{m}/kernel": f"mlp.{m}_proj" for m in ("gate", "up", "down")},
    }  # fmt: skip
    theirs = dict(model.named_parameters())
    leaves = flat(params)

    def pairs(name):  # our leaf's parts, each with their parameter
        if not name.startswith("layers/"):
            return [((), theirs["model.embed_tokens.weight" if "embed" in name else "model.norm.weight"])]
        short = names[name.removeprefix("layers/")]
        return [((i,), theirs[f"model.layers.{i}.{short}.weight"]) for i in range(config.n_layers)]

    def laid_out(name, array):  # their Linear keeps [out, in]
        return array.T if name.endswith("kernel") else array

    assert sum(t.numel() for t in theirs.values()) == config.n_params
    with torch.no_grad():
        for name, leaf in leaves.items():
            for index, parameter in pairs(name):
                parameter.copy_(torch.tensor(laid_out(name, leaf[index])))
    scores = model(torch.tensor(np.asarray(tokens), dtype=torch.long)).logits
    torch_loss(scores, np.asarray(tokens)).backward()
    gradients = {
        name: np.stack([laid_out(name, t.grad.numpy()) for _, t in pairs(name)]).reshape(leaf.shape)
        for name, leaf in leaves.items()
    }
    return scores.detach().numpy(), gradients


def errors(scores, gradients: Leaves, true_scores, true_gradients: Leaves) -> dict[str, float]:
    """Relative errors of logits and of every leaf's gradient.

    A leaf that has next to no gradient (q and k of a single token, biases of k: softmax does not see
    them) is a sum of terms that cancel, and what is left is their rounding. It is measured against a
    hundredth of the whole gradient: `FLOAT32` of that is 1e-7 of the whole, two roundings of it.
    """
    whole = np.sqrt(sum((g**2).sum() for g in true_gradients.values()))
    found = {"logits": np.abs(scores - true_scores).max() / np.abs(true_scores).max()}
    assert gradients.keys() == true_gradients.keys()
    for name, truth in true_gradients.items():
        scale = max(np.linalg.norm(truth), 1e-2 * whole)
        found[name] = np.linalg.norm(gradients[name] - truth) / scale
    return found


# Float32 rounds by 6e-8; a value passes about 10 roundings a layer and sums of up to 100 terms, and the
# weights are ten times those of an init, so that softmax and norms amplify: 1e-5 is some 150 roundings.
# A wrong formula (erf for tanh in GELU, eps 1e-5 for 1e-6, another rotary layout) is beyond 1e-4.
FLOAT32 = 1e-5


@LENGTHS
def test_llama_equals_transformers(length):
    params, tokens = random_params(LLAMA), random_tokens(LLAMA, 2, length)
    scores, _, gradients = ours(LLAMA, params, tokens)
    truth = reference(LLAMA, params, tokens)
    their_scores, their_gradients = transformers_llama(LLAMA, params, tokens)
    theirs, mine = errors(their_scores, their_gradients, *truth), errors(scores, gradients, *truth)
    for name, error in errors(scores, gradients, their_scores, their_gradients).items():
        assert error < FLOAT32, (name, error)
        # Against float64 we err like them, up to the order of summation.
        assert mine[name] < max(4 * theirs[name], 1e-6), (name, mine[name], theirs[name])


@pytest.mark.parametrize(
    ("config", "length"),
    [(GPT, 64), (GROUPED, 64), *(pytest.param(GPT, n, marks=pytest.mark.slow) for n in (1, 96))],
    ids=["gpt-64", "grouped-64", "gpt-1", "gpt-96"],
)
def test_others_equal_the_formulas(config, length):
    params, tokens = random_params(config), random_tokens(config, 2, length)
    scores, _, gradients = ours(config, params, tokens)
    for name, error in errors(scores, gradients, *reference(config, params, tokens)).items():
        assert error < FLOAT32, (name, error)


NO_PRODUCTS = REFERENCE._replace(product_types=())


@pytest.mark.parametrize(
    ("config", "remat", "kernels"),
    [
        (LLAMA, "none", REFERENCE),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                (GPT, "none", REFERENCE),
                (GROUPED, "dots", REFERENCE),
                (LLAMA, "none", NO_PRODUCTS),
                (GPT, "none", NO_PRODUCTS),
                (dataclasses.replace(LLAMA, n_kv_heads=2, qkv_biases=True), "none", REFERENCE),
            )
        ),
    ],
    ids=["llama", "gpt", "grouped-dots", "llama-no-products", "gpt-no-products", "grouped-biases"],
)
def test_kernels_are_where_the_formulas_are(config, remat, kernels):
    params, tokens = random_params(config), random_tokens(config, 2, 64)
    scores, _, gradients = ours(config, params, tokens, Compute(remat=remat, kernels=kernels))
    for name, error in errors(scores, gradients, *reference(config, params, tokens)).items():
        assert error < FLOAT32, (name, error)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param({"positions": "rope", "n_heads": 1, "rope_theta": 100.0}, marks=pytest.mark.slow),
        pytest.param({"mlp": "swiglu", "n_layers": 1, "norm_eps": 0.1}, marks=pytest.mark.slow),
        {"tied": True, "biases": False, "mlp": "relu2"},
    ],
)
def test_every_part_can_be_exchanged(change):
    config = dataclasses.replace(GPT, **change)
    params, tokens = random_params(config), random_tokens(config, 2, 13)
    scores, _, gradients = ours(config, params, tokens)
    for name, error in errors(scores, gradients, *reference(config, params, tokens)).items():
        assert error < FLOAT32, (name, error)


@pytest.mark.slow
@pytest.mark.parametrize("kind", BOTH)
def test_unrolling_and_rematerialisation_change_nothing(kind):
    config = dataclasses.replace(BOTH[kind], d_model=32, d_mlp=48, dropout=0.1)
    params, tokens = random_params(config), random_tokens(config, 2, 16)
    keys = jax.random.split(jax.random.key(1), 2)
    run = functools.partial(ours, config, params, tokens, dropout_keys=keys)
    scores, loss, gradients = run()
    for unroll, remat in [(2, "dots"), (3, "full")]:  # of 3 layers
        other_scores, other_loss, other = run(compute=Compute(unroll=unroll, remat=remat))
        # The same products, but XLA fuses what lies between them differently and sums in another order;
        # the other dropout masks of a wrong key would be an error of order 1.
        assert other_loss == pytest.approx(loss, rel=2e-6)
        found = errors(other_scores, other, scores, gradients)
        assert max(found.values()) < FLOAT32, (unroll, remat, found)


@pytest.mark.slow
def test_rematerialisation_survives_a_full_unroll():
    """Common-subexpression elimination would undo it silently: the work must be done again for real."""
    config = dataclasses.replace(LLAMA, n_layers=2)
    params, tokens = random_params(config), random_tokens(config, 2, 64)

    def flops(remat):
        def loss(params):
            return forward(config, params, tokens, Compute(unroll=2, remat=remat)).sum()

        return jax.jit(jax.grad(loss)).lower(params).compile().cost_analysis()["flops"]

    # A forward pass is a third of the work. The last product of a layer need not be done again.
    assert 1.2 < flops("full") / flops("none") < 4 / 3
    assert flops("none") * 1.02 < flops("dots") < flops("full")


@pytest.mark.parametrize("kind", BOTH)
def test_no_token_sees_the_future(kind):
    config = BOTH[kind]
    params, tokens = random_params(config), random_tokens(config, 2, 24)
    run = jax.jit(lambda t: logits(config, params, forward(config, params, t)))
    before = np.asarray(run(tokens))
    for t in (0, 11, 23):
        after = np.asarray(run(tokens.at[:, t].set((tokens[:, t] + 1) % config.vocab_size)))
        np.testing.assert_array_equal(after[:, :t], before[:, :t])
        assert (after[:, t:] != before[:, t:]).any(axis=(0, 2)).all()  # and every later one sees it


@functools.partial(jax.jit, static_argnums=0)
def drawn(config: ModelConfig, seed: int) -> Params:
    return init_params(config, jax.random.key(seed))


@pytest.mark.parametrize(("kind", "scaled"), [("gpt", False), ("llama", True)])
def test_init(kind, scaled):
    config = dataclasses.replace(
        BOTH[kind], d_model=64, d_mlp=128, n_layers=8, vocab_size=500, scaled_residual_init=scaled
    )
    for name, leaf in flat(drawn(config, 3)).items():
        assert leaf.dtype == np.float32
        if name.endswith(("scale", "bias")):
            assert (leaf == (1 if name.endswith("scale") else 0)).all(), name
            continue
        residual = scaled and name in ("layers/attn/o/kernel", "layers/mlp/down/kernel")
        std = 0.02 / 4 if residual else 0.02  # sqrt(2 * 8 layers) = 4
        # Of n draws, the deviation errs by 1 / sqrt(2 n), the mean by std / sqrt(n); five of these each,
        # for the whole leaf and for every layer by itself.
        for part in [leaf, *leaf] if name.startswith("layers/") else [leaf]:
            assert abs(part.std() / std - 1) < 5 / (2 * part.size) ** 0.5, name
            assert abs(part.mean()) < 5 * std / part.size**0.5, name
        if name.startswith("layers/"):  # layers differ from one another
            assert len({layer.tobytes() for layer in leaf}) == config.n_layers


def test_init_is_a_function_of_the_key():
    one, same, other = (flat(drawn(LLAMA, k)) for k in (0, 0, 1))
    for name in one:
        np.testing.assert_array_equal(one[name], same[name])
        assert name.endswith("scale") or (one[name] != other[name]).any()


def test_dropout_keeps_the_mean_and_the_rate():
    x = jnp.ones((4, 256, 64))
    y = np.asarray(drop(x, 0.25, jax.random.split(jax.random.key(0), 4), 0))
    assert set(np.unique(y)) == {np.float32(0), np.float32(1 / 0.75)}
    # A kept element is 4/3 with probability 3/4: standard deviation sqrt(1/3) each, 65,536 of them.
    assert abs(y.mean() - 1) < 5 * (1 / 3 / y.size) ** 0.5


def test_dropout_masks_differ_by_sequence_and_site():
    x, keys = jnp.ones((3, 32, 16)), jax.random.split(jax.random.key(0), 3)
    masks = [np.asarray(drop(x, 0.5, keys, site)) for site in (0, 1)]
    rows = [row.tobytes() for mask in masks for row in mask]
    assert len(set(rows)) == len(rows)


@SLOW_LLAMA
def test_dropout_does_not_depend_on_batching(kind):
    config = dataclasses.replace(BOTH[kind], dropout=0.3)
    params, tokens = random_params(config), random_tokens(config, 4, 16)
    keys = jax.random.split(jax.random.key(5), 4)
    run = jax.jit(lambda tokens, keys: forward(config, params, tokens, dropout_keys=keys))
    together, plain = run(tokens, keys), run(tokens, None)
    for row in range(4):
        part = slice(row, row + 1)
        alone = run(tokens[part], keys[part])
        # The same masks exactly; products of another shape may be summed in another order.
        np.testing.assert_allclose(alone[0], together[row], rtol=0, atol=1e-4)
        assert np.abs(together[row] - plain[row]).max() > 0.1


def test_every_layer_has_masks_of_its_own():
    """Layer i adds 10^i wherever its dropout keeps it: the digits of the result are the masks."""
    config = dataclasses.replace(GPT, dropout=0.5, n_layers=3, d_model=16, n_heads=1, d_mlp=8)
    params = jax.tree.map(jnp.zeros_like, random_params(config))
    params["layers"]["attn"]["o"]["bias"] = jnp.tile(10.0 ** jnp.arange(3)[:, None], (1, 16))
    params["norm"]["scale"] = jnp.ones(16)
    config = dataclasses.replace(config, norm_eps=1e12)  # makes the final norm a mere factor
    keys = jax.random.split(jax.random.key(0), 1)
    run = jax.jit(functools.partial(forward, config))
    hidden = run(params, random_tokens(config, 1, 64), dropout_keys=keys)
    digits = np.rint(np.asarray(hidden) * 1e6 / 2).astype(int)
    kept = [(digits // 10**i) % 10 for i in range(3)]
    assert set(np.unique(kept)) == {0, 1}
    for i in range(3):
        for j in range(i):
            # Independent masks agree in half of 1,024 elements, give or take 16.
            assert abs((kept[i] == kept[j]).mean() - 0.5) < 5 * 0.5 / 1024**0.5


def test_no_keys_no_dropout():
    config = dataclasses.replace(LLAMA, dropout=0.5)
    params, tokens = random_params(config), random_tokens(config, 2, 8)
    run = jax.jit(forward, static_argnums=0)
    np.testing.assert_array_equal(run(config, params, tokens), run(LLAMA, params, tokens))


@SLOW_LLAMA
def test_bfloat16_is_near_float32(kind):
    config = BOTH[kind]
    params, tokens = random_params(config), random_tokens(config, 2, 64)
    scores, loss, gradients = ours(config, params, tokens)
    half_scores, half_loss, half_gradients = ours(config, params, tokens, Compute(dtype="bfloat16"))
    assert half_scores.dtype == np.float32
    assert all(g.dtype == np.float32 for g in half_gradients.values())
    # bfloat16 rounds by up to 2^-9. About 12 roundings a layer and direction add up like a random walk:
    # sqrt(12 * 3) * 2^-9 = 0.012, times about 3 for what softmax and norms amplify with these weights.
    error = np.linalg.norm(half_scores - scores) / np.linalg.norm(scores)
    assert 2**-9 / 4 < error < 0.035  # below, it would not be bfloat16 at all
    assert half_loss == pytest.approx(loss, rel=0.035)
    whole = np.sqrt(sum((g**2).sum() for g in gradients.values()))
    difference = np.sqrt(sum(((half_gradients[k] - g) ** 2).sum() for k, g in gradients.items()))
    assert difference < 2 * 0.035 * whole  # forward and backward


def test_the_gradient_of_an_embedding_is_summed_in_float32():
    """One token 4,096 times. Summed in bfloat16 the sum would stand still at 256 contributions."""
    config = dataclasses.replace(LLAMA, n_layers=1, d_model=16, n_heads=1, d_mlp=16)
    params, tokens = random_params(config), jnp.full((64, 64), 5, jnp.int32)
    weight = jnp.asarray(np.random.default_rng(0).standard_normal(config.d_model), jnp.float32)

    def row(dtype):
        def loss(params):
            return (forward(config, params, tokens, Compute(dtype=dtype)).astype(jnp.float32) @ weight).sum()

        return np.asarray(jax.jit(jax.grad(loss))(params)["embed"]["table"])[5]

    exact, half = row("float32"), row("bfloat16")
    # Every position gives the same contribution, so its bfloat16 error does not average out.
    assert np.linalg.norm(half - exact) < 0.07 * np.linalg.norm(exact)
