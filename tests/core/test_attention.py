"""Attention: the reference against numpy in float64, the fast kernels against the reference."""

import functools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.experimental.pallas import tpu as pltpu

from core.attention import causal_attention, choose, masked_attention
from core.errors import UserError
from tests.several_devices import run_on_devices


def example(b=2, s=24, h=3, k=8, seed=0, kv_heads=None):
    """Queries, keys, values and a cotangent, float32."""
    rng = np.random.default_rng(seed)
    heads = (h, kv_heads or h, kv_heads or h, h)
    return [jnp.asarray(rng.standard_normal((b, s, n, k)), jnp.float32) for n in heads]


def documents_of(b, s, most):
    """Numbers [b, s] that rise along a row, of up to `most` documents; None: a row is one."""
    if most is None:
        return None
    return jnp.asarray(np.sort(np.random.default_rng(most).integers(most, size=(b, s)), axis=1), jnp.int32)


def truth(q, k, v, cotangent, documents=None):
    """Values and gradients by the definition, float64."""
    s, shared = q.shape[1], q.shape[2] // k.shape[2]
    q, k, v = inputs = [torch.tensor(np.asarray(x, np.float64), requires_grad=True) for x in (q, k, v)]
    k, v = (torch.stack([x] * shared, dim=3).flatten(2, 3) for x in (k, v))
    scores = torch.einsum("bihd,bjhd->bhij", q, k) / q.shape[-1] ** 0.5
    hidden = torch.ones(1, s, s).triu(1).bool()
    if documents is not None:
        numbers = torch.tensor(np.asarray(documents))
        hidden = hidden | (numbers[:, :, None] != numbers[:, None])
    weights = scores.masked_fill(hidden[:, None], float("-inf")).softmax(-1)
    y = torch.einsum("bhij,bjhd->bihd", weights, v)
    y.backward(torch.tensor(np.asarray(cotangent, np.float64)))
    return [x.detach().numpy() for x in (y, *(x.grad for x in inputs))]


def bits_of_delta(q, k, v, cotangent, documents) -> list[float]:
    """How far from exact ones results are by what JAX's Triton kernel alone does: it multiplies output and
    cotangent in bfloat16, and adds the products up in no more than that. Where few keys are seen, little is
    left of a weight's gradient once that sum is taken off."""
    exact = truth(q, k, v, cotangent, documents)
    delta = jnp.asarray(exact[0], jnp.bfloat16) * cotangent
    while delta.shape[-1] > 1:
        delta = delta[..., ::2] + delta[..., 1::2]
    q, k, v, cotangent = (np.asarray(x, np.float64) for x in (q, k, v, cotangent))
    moved = np.asarray(delta, np.float64)[..., 0] - (exact[0] * cotangent).sum(-1)
    scale = q.shape[-1] ** -0.5
    scores = np.einsum("bihd,bjhd->bhij", q, k) * scale
    numbers = np.asarray(documents)
    visible = np.tri(q.shape[1], dtype=bool) & (numbers[:, :, None] == numbers[:, None])
    weights = np.exp(np.where(visible[:, None], scores, -np.inf))
    weights *= -scale * moved.swapaxes(1, 2)[..., None] / weights.sum(-1, keepdims=True)
    to_q, to_k = np.einsum("bhij,bjhd->bihd", weights, k), np.einsum("bhij,bihd->bjhd", weights, q)
    return [
        0.0,
        *(np.linalg.norm(x) / np.linalg.norm(y) for x, y in zip((to_q, to_k), exact[1:3], strict=True)),
        0.0,
    ]


def values_and_gradients(implementation, q, k, v, cotangent, documents=None):
    @jax.jit
    def run(q, k, v, documents):
        attend = functools.partial(causal_attention, implementation=implementation, documents=documents)
        y, pull = jax.vjp(attend, q, k, v)
        return y, *pull(cotangent.astype(y.dtype))

    return run(q, k, v, documents)


def relative(found, exact) -> float:
    return np.linalg.norm(np.asarray(found, np.float64) - exact) / np.linalg.norm(exact)


@pytest.mark.parametrize(("kv_heads", "most"), [(6, None), (2, None), (1, None), (2, 5)])
def test_reference(kv_heads, most):
    inputs = (*example(h=6, kv_heads=kv_heads), documents_of(2, 24, most))
    for found, exact in zip(values_and_gradients("xla", *inputs), truth(*inputs), strict=True):
        # Sums of 8 products and up to 24 weights: a few roundings of 6e-8.
        assert relative(found, exact) < 1e-6


def test_reference_keeps_its_softmax_in_float32():
    """With scores beyond 100, whose bfloat16 rounding of 0.25 would change every weight by a quarter."""
    q, k, v, cotangent = (x.astype(jnp.bfloat16) for x in example(s=64))
    q = q * 20
    y = values_and_gradients("xla", q, k, v, cotangent)[0]
    # Weights and values are rounded to bfloat16, by up to 2^-9 each, and so is the result.
    assert relative(y, truth(q, k, v, cotangent)[0]) < 3 * 2**-9


def test_masked_attention_sees_what_is_visible():
    q, k, v, _ = example()
    whole = jax.jit(causal_attention, static_argnums=3)(q, k, v, "xla")
    positions = jnp.array([[3, 9], [0, 23]])
    part = jnp.take_along_axis(q, positions[..., None, None], axis=1)
    visible = jnp.arange(24) <= positions[..., None]
    # What is not visible may hold anything, but a number: it is multiplied by zero.
    k, v = (x.at[0, 10:].set(1e9) for x in (k, v))
    found = jax.jit(masked_attention)(part, k, v, visible)
    np.testing.assert_allclose(
        found, jnp.take_along_axis(whole, positions[..., None, None], axis=1), rtol=0, atol=1e-6
    )


# --- the choice ---

SHAPE = {"dtype": "bfloat16", "head_dim": 64, "context": 1024}


@pytest.mark.parametrize(
    ("platform", "name", "change", "why"),
    [
        ("cpu", "xla", {}, "no faster one for a CPU"),
        ("gpu", "cudnn", {}, "fastest on a GPU"),
        ("gpu", "triton", {"deterministic": True}, "fastest on a GPU whose gradients do not vary"),
        ("gpu", "xla", {"deterministic": True, "context": 1000}, "triton cannot.*multiple of 128, not 1000"),
        ("gpu", "xla", {"deterministic": True, "head_dim": 8}, "triton cannot.*16 to 128, not 8"),
        ("tpu", "splash", {}, "fastest on a TPU"),
        ("tpu", "splash", {"dtype": "float32", "head_dim": 32, "context": 128}, "fastest"),
        ("gpu", "xla", {"dtype": "float32"}, "cudnn cannot be used.*bfloat16, not in float32"),
        ("gpu", "xla", {"head_dim": 12}, "multiple of 8.*not 12"),
        ("gpu", "xla", {"head_dim": 256}, "up to 128, not 256"),
        ("tpu", "xla", {"context": 1000}, "multiple of 128, not 1000"),
    ],
)
def test_choice_by_itself(platform, name, change, why):
    choice = choose("auto", platform=platform, **(SHAPE | change))
    assert choice.name == name
    assert re.search(why, choice.why), choice.why


@pytest.mark.parametrize("missing", ["jax.experimental.pallas.gone", "jax.experimental.gone.attention"])
def test_a_jax_without_the_triton_kernel_has_the_others(missing, monkeypatch: pytest.MonkeyPatch):
    """Whether it lacks the module alone or the whole package that it was in."""
    monkeypatch.setattr("core.attention.TRITON_MODULE", missing)
    assert choose("auto", platform="gpu", **SHAPE).name == "cudnn"
    with pytest.raises(UserError, match=rf"'triton' cannot be used: this JAX .* has no {missing} any more"):
        choose("triton", platform="gpu", **SHAPE)


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
def test_what_is_asked_for_is_used(platform):
    assert choose("xla", platform=platform, **SHAPE).name == "xla"
    fast = {"gpu": "cudnn", "tpu": "splash"}
    for name in fast.values():
        if fast.get(platform) == name:
            assert choose(name, platform=platform, **SHAPE).name == name
        else:
            with pytest.raises(UserError, match=f"{name}.*this is a {platform.upper()}"):
                choose(name, platform=platform, **SHAPE)


@pytest.mark.parametrize(
    ("name", "platform", "change", "why"),
    [
        ("cudnn", "gpu", {"dtype": "float32"}, "float32"),
        ("cudnn", "gpu", {"head_dim": 20}, "not 20"),
        ("cudnn", "gpu", {"context": 129}, "even context, not 129"),
        ("cudnn", "gpu", {"deterministic": True}, "vary in the last bits"),
        ("triton", "gpu", {"dtype": "float32"}, "float32"),
        ("triton", "cpu", {}, "this is a CPU"),
        ("splash", "tpu", {"context": 64}, "not 64"),
    ],
)
def test_what_is_asked_for_and_cannot_run_is_refused(name, platform, change, why):
    with pytest.raises(UserError, match=why) as caught:
        choose(name, platform=platform, **(SHAPE | change))
    assert "\n" not in str(caught.value)


# --- the kernels ---


@pytest.mark.slow
@pytest.mark.parametrize(
    ("length", "heads", "kv_heads", "most"), [(128, 2, 2, None), (384, 2, 2, 60), (128, 4, 2, 5)]
)
def test_splash_interpreted(length, heads, kv_heads, most):
    """The TPU kernel, interpreted: its mask, scale and layout are right, forward and backward."""
    inputs = (*example(b=1, s=length, h=heads, k=64, kv_heads=kv_heads), documents_of(1, length, most))
    with pltpu.force_tpu_interpret_mode():
        found = values_and_gradients("splash", *inputs)
    for one, exact in zip(found, truth(*inputs), strict=True):
        # Float32, its online softmax rescales once a block: a few roundings more than the reference.
        assert relative(one, exact) < 3e-6


@pytest.mark.parametrize("most", [pytest.param(None, marks=pytest.mark.slow), 5])
def test_triton_interpreted(most, monkeypatch: pytest.MonkeyPatch):
    """JAX's kernel, interpreted: its mask, scale and heads are right, forward and backward."""
    from jax.experimental.pallas.ops.gpu import attention as kernel

    monkeypatch.setattr(kernel, "mha", functools.partial(kernel.mha, interpret=True))
    inputs = (*example(b=1, s=256, h=2, k=16, kv_heads=1), documents_of(1, 256, most))
    for one, exact in zip(values_and_gradients("triton", *inputs), truth(*inputs), strict=True):
        assert relative(one, exact) < 3e-6  # as splash


@pytest.mark.tpu_compiler
@pytest.mark.parametrize(
    "heads, kv_heads, mesh, documents",  # of 64, as the presets have them, and of 32, as the tiny ones
    [
        *((4, 4, "data=8", "one"), (8, 8, "data=8", "one"), (4, 4, "fsdp=4,tensor=2", "one")),
        # Heads shared; not divided by tensor.
        *((4, 2, "data=8", "several"), (4, 1, "fsdp=4,tensor=2", "several")),
        # Packed rows, on which all weights are trained or adapters.
        *((4, 4, "data=8", "rows"), (4, 4, "fsdp=4,tensor=2", "adapters")),
    ],
)
def test_the_training_step_compiles_for_a_tpu(heads, kv_heads, mesh, documents):
    script = Path(__file__).with_name("compile_for_tpu.py")
    arguments = (str(heads), str(kv_heads), mesh, documents)
    printed = run_on_devices(1, script, *arguments, TPU_SKIP_MDS_QUERY="1")
    assert "compiled for 8 x TPU v5 lite" in printed


GPU_SHAPES = [
    *(("cudnn", *shape) for shape in ((1024, 64, 6), (256, 32, 6), (1000, 64, 6), (130, 128, 6), (16, 8, 6))),
    *(("cudnn", *shape) for shape in ((1024, 64, 2), (256, 128, 1))),
    *(("triton", *shape) for shape in ((1024, 64, 6), (256, 32, 6), (384, 128, 2), (128, 48, 3))),
]
WITH_DOCUMENTS = [
    *(("cudnn", *shape) for shape in ((1024, 64, 6, 1000), (1024, 64, 2, 5), (130, 128, 6, 20))),
    *(("triton", *shape) for shape in ((1024, 64, 6, 1000), (384, 128, 2, 5))),
]


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("implementation", "length", "head_dim", "kv_heads", "most"),
    [*((*shape, None) for shape in GPU_SHAPES), *WITH_DOCUMENTS],
)
def test_on_a_gpu(implementation, length, head_dim, kv_heads, most):
    inputs = example(b=4, s=length, h=6, k=head_dim, kv_heads=kv_heads)
    q, k, v, cotangent = (x.astype(jnp.bfloat16) for x in inputs)
    documents = documents_of(4, length, most)
    exact = truth(q, k, v, cotangent, documents)
    reference = values_and_gradients("xla", q, k, v, cotangent, documents)
    found = values_and_gradients(implementation, q, k, v, cotangent, documents)
    own = [0.0] * 4
    if implementation == "triton" and most is not None and kv_heads == 6:
        own = bits_of_delta(q, k, v, cotangent, documents)
    for one, other, right, more in zip(found, reference, exact, own, strict=True):
        assert one.dtype == jnp.bfloat16
        # The reference rounds its weights to bfloat16 and back to a result; so may the kernel.
        assert relative(one, right) < 2 * relative(other, right) + 2**-9 + more
    if implementation == "triton":
        for _ in range(5):
            again = values_and_gradients(implementation, q, k, v, cotangent, documents)
            assert all(np.array_equal(one, other) for one, other in zip(found, again, strict=True))
