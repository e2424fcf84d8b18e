"""The chunked loss against the plain formula in float64, on one device and on eight."""

import functools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from core.loss import IGNORE, cross_entropy
from tests.kernels import REFERENCE
from tests.several_devices import run_on_devices

B, S, D, V = 4, 15, 24, 101
CHUNKS = [1, 7, 20, 59, 60, 8192]  # of 60 rows: those that divide, those that do not, and more than all


def example(seed: int = 0, ignored: float = 0.2, vocab: int = V):
    """Hidden states, a table and targets, a fifth of them ignored."""
    rng = np.random.default_rng(seed)
    hidden = rng.standard_normal((B, S, D)).astype(np.float32)
    table = rng.standard_normal((vocab, D)).astype(np.float32)
    targets = rng.integers(0, vocab, (B, S)).astype(np.int32)
    targets[rng.random((B, S)) < ignored] = IGNORE
    return jnp.asarray(hidden), jnp.asarray(table), jnp.asarray(targets)


def plain(hidden, table, targets, z_loss=0.0, scale=1.0, dtype=torch.float64):
    """(total, nll, d_hidden, d_table) of `scale` * total, by torch's autograd on the whole logits."""
    h, t = (torch.tensor(np.asarray(x, np.float64), dtype=dtype, requires_grad=True) for x in (hidden, table))
    target = torch.tensor(np.asarray(targets), dtype=torch.long)
    logits = (h @ t.T).double()
    lse = logits.logsumexp(-1)
    counted = target != IGNORE
    nll = torch.where(counted, lse - logits.gather(-1, target.clamp(min=0)[..., None])[..., 0], 0.0)
    total = (nll + torch.where(counted, z_loss * lse**2, 0.0)).sum()
    (scale * total).backward()
    values = (total, nll.sum(), h.grad, t.grad)
    return [v.detach().double().numpy() for v in values]


def chunked(hidden, table, targets, z_loss=0.0, scale=1.0, chunk=20, mesh=None, kernels=None):
    """The same of the function under test."""

    @jax.jit
    def run(hidden, table, targets):
        def loss(hidden, table):
            options = {"z_loss": z_loss, "chunk": chunk, "mesh": mesh, "kernels": kernels}
            sums = cross_entropy(hidden, table, targets, **options)
            return scale * sums.total, sums

        gradients, sums = jax.grad(loss, (0, 1), has_aux=True)(hidden, table)
        return *sums, *gradients

    return run(hidden, table, targets)


def relative(found, truth) -> float:
    return np.linalg.norm(np.asarray(found, np.float64) - truth) / max(np.linalg.norm(truth), 1e-30)


@pytest.mark.parametrize("chunk", CHUNKS)
def test_equals_the_plain_formula(chunk):
    inputs = example()
    for found, truth in zip(chunked(*inputs, chunk=chunk), plain(*inputs), strict=True):
        # Sums of 24 products, 101 exponentials and 60 rows: each a few roundings of 6e-8.
        assert relative(found, truth) < 1e-6


@pytest.mark.parametrize(
    "chunk, kernels, vocab",
    [(7, None, V), (60, None, V), (7, REFERENCE, V), (7, REFERENCE, V + 3)],
    ids=["7", "60", "kernels", "inside the product"],
)
def test_z_loss_and_an_outer_factor(chunk, kernels, vocab):
    inputs = example(vocab=vocab)
    found = chunked(*inputs, z_loss=0.1, scale=-0.37, chunk=chunk, kernels=kernels)
    truth = plain(*inputs, z_loss=0.1, scale=-0.37)
    assert truth[0] > 1.2 * truth[1]  # the z-loss is a real part of it
    for one, other in zip(found, truth, strict=True):
        assert relative(one, other) < 1e-6


def test_value_alone_is_the_same():
    inputs = example()
    sums = jax.jit(functools.partial(cross_entropy, z_loss=0.1, chunk=7))(*inputs)
    truth = plain(*inputs, z_loss=0.1)
    assert relative(sums.total, truth[0]) < 1e-6 and relative(sums.nll, truth[1]) < 1e-6


def test_kernels_make_gradients_and_no_evaluation():
    made: list[tuple[int, ...]] = []

    def softmax_loss(logits, targets, z_loss):
        made.append(logits.shape)
        return REFERENCE.softmax_loss(logits, targets, z_loss)

    inputs, kernels = example(), REFERENCE._replace(softmax_loss=softmax_loss)
    found = cross_entropy(*inputs, chunk=20, kernels=kernels)
    assert relative(found.total, plain(*inputs)[0]) < 1e-6 and not made
    chunked(*inputs, chunk=20, kernels=kernels)
    assert set(made) == {(20, V)}


def test_a_table_that_is_used_twice():
    """Tied embeddings: the table's gradient is that of the look-up plus that of the head."""
    _, table, targets = example()
    tokens = jnp.roll(jnp.where(targets == IGNORE, 0, targets), 1, axis=1)
    loss = lambda t: cross_entropy(jnp.tanh(t[tokens]), t, targets, chunk=7).total  # noqa: E731
    gradient = jax.jit(jax.grad(loss))(table)
    t = torch.tensor(np.asarray(table, np.float64), requires_grad=True)
    logits = torch.tanh(t[torch.tensor(np.asarray(tokens), dtype=torch.long)]) @ t.T
    torch.nn.functional.cross_entropy(
        logits.reshape(-1, V), torch.tensor(np.asarray(targets).reshape(-1), dtype=torch.long),
        ignore_index=IGNORE, reduction="sum",
    ).backward()  # fmt: skip
    assert relative(gradient, t.grad.numpy()) < 1e-6


def test_large_logits():
    """Scores in the thousands: the exponentials of the plain formula without its maximum overflow."""
    hidden, table, targets = example()
    found, truth = chunked(hidden * 300, table, targets), plain(hidden * 300, table, targets)
    for one, other in zip(found, truth, strict=True):
        # A logit of 5,000 carries an absolute error of 5,000 * 6e-8 = 3e-4, which exp passes on.
        assert relative(one, other) < 3e-4


def test_bfloat16_hidden_states():
    hidden, table, targets = example()
    hidden, table = hidden.astype(jnp.bfloat16), table.astype(jnp.bfloat16).astype(jnp.float32)
    truth = plain(hidden, table, targets)
    found = chunked(hidden, table, targets)
    assert [x.dtype for x in found] == [jnp.float32, jnp.float32, jnp.bfloat16, jnp.float32]
    naive = plain(hidden, table, targets, dtype=torch.bfloat16)  # logits and their gradient in bfloat16
    for one, other, exact in zip(found, naive, truth, strict=True):
        assert relative(one, exact) <= 2 * relative(other, exact) + 1e-6
    # Logits are sums in float32 of exact products: the values are float32's.
    assert relative(found[0], truth[0]) < 1e-6


def test_products_of_bfloat16_are_summed_in_float32():
    """By what is asked for: on a CPU XLA keeps more precision than that, so the values say nothing."""
    hidden, table, targets = example()
    total = lambda h, t: cross_entropy(h, t, targets).total  # noqa: E731
    text = str(jax.make_jaxpr(jax.grad(total, (0, 1)))(hidden.astype(jnp.bfloat16), table))
    kinds = re.findall(r"(\w+)\[[0-9,]+\] = dot_general\[.*?preferred_element_type=(\w+)", text, re.DOTALL)
    assert kinds == [("f32", "float32")] * 3


@pytest.mark.parametrize(("n", "sizes"), [
    (9216, (2, 4608)), (9217, (2, 4609)), (16384, (2, 8192)), (8192, (1, 8192)), (100, (1, 100)),
])  # fmt: skip
def test_rows_are_in_equal_chunks(n, sizes):
    """Nothing is padded up to a whole chunk; evaluating makes one product a chunk, training three."""
    shapes = [jax.ShapeDtypeStruct(shape, kind) for shape, kind in
              (((1, n, D), jnp.float32), ((V, D), jnp.float32), ((1, n), jnp.int32))]  # fmt: skip
    total = lambda *inputs: cross_entropy(*inputs).total  # noqa: E731
    for function, n_products in ((total, 1), (jax.grad(total, (0, 1)), 3)):
        text = str(jax.make_jaxpr(function)(*shapes))
        assert text.count("dot_general[") == n_products
        assert f"f32[{sizes[0]},{sizes[1]},{D}]" in text


def test_all_ignored():
    hidden, table, _ = example()
    found = chunked(hidden, table, jnp.full((B, S), IGNORE), z_loss=0.1)
    for value in found:
        assert (np.asarray(value) == 0).all()


def test_a_target_outside_of_the_vocabulary_is_not_clamped():
    hidden, table, targets = example()
    for wrong in (V, V + 1000):
        assert np.isnan(cross_entropy(hidden, table, targets.at[1, 2].set(wrong)).nll)


def test_no_logits_of_a_whole_batch_are_held():
    inputs = example()

    def shapes(loss) -> set[str]:
        text = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(*inputs).compile().as_text()
        return set(re.findall(r"\b[a-z]+[0-9]+\[[0-9,]+\]", text))

    whole = {f"{t}[{s}]" for t in ("f32", "bf16") for s in (f"60,{V}", f"{V},60", f"4,15,{V}", f"{V},4,15")}
    ours = shapes(lambda h, t, y: cross_entropy(h, t, y, chunk=12).total)
    assert not ours & whole and ours & {f"f32[12,{V}]", f"f32[{V},12]"}

    def naive(hidden, table, targets):
        log_probability = jax.nn.log_softmax(hidden @ table.T)
        return -jnp.take_along_axis(log_probability, jnp.maximum(targets, 0)[..., None], -1).sum()

    assert shapes(naive) & whole  # the search does find them where they are


@pytest.mark.slow
def test_eight_devices_equal_one():
    run_on_devices(8, Path(__file__).with_name("loss_on_devices.py"))
