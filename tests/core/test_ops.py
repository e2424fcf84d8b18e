"""What is around the kernels in JAX, against the same in PyTorch, in float64."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import kernels_cuda.ops  # noqa: F401  declares the references
from core.ops import qkv_product
from kernels_cuda.registry import reference
from tests.kernels import REFERENCE

HEADS, SIZE = (3, 1, 1), 8


def drawn(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def to_jax(t: torch.Tensor) -> jax.Array:
    return jnp.asarray(t.detach().numpy(), jnp.float32)


@pytest.mark.parametrize("biased, rotates, of_all", [*itertools.product((False, True), repeat=3)])
def test_the_product_of_q_k_and_v_and_its_gradients(biased: bool, rotates: bool, of_all: bool):
    b, s, d, width = 2, 5, 16, sum(HEADS) * SIZE
    leaves = [drawn(0, b, s, d), drawn(1, width, d), *([drawn(2, width)] if biased else [])]
    leaves = [t.requires_grad_() for t in leaves]
    x, weight, bias = leaves if biased else (*leaves, None)
    angle = drawn(3, 1 if of_all else b, s, SIZE // 2) * rotates
    cos, sin = angle.cos(), angle.sin()
    parts = reference.qkv_product(x, weight, bias, cos, sin, HEADS).split(HEADS, dim=2)
    cotangents = [drawn(4 + i, b, s, n, SIZE) for i, n in enumerate(HEADS)]
    expected = [*parts, *torch.autograd.grad(parts, leaves, cotangents)]

    def packed(x: jax.Array, weight: jax.Array, *bias: jax.Array):
        rotation = (to_jax(cos)[:, :, None], to_jax(sin)[:, :, None]) if rotates else None
        return qkv_product(HEADS, REFERENCE, None, x, weight.T, bias[0] if bias else None, rotation)

    found, back = jax.vjp(packed, *map(to_jax, leaves))
    for mine, true in zip([*found, *back(tuple(map(to_jax, cotangents)))], expected, strict=True):
        truth = true.detach().numpy()
        assert mine.shape == truth.shape
        # Sums of up to 24 terms in float32, 2^-24 for each: 2e-6 of the largest value.
        np.testing.assert_allclose(mine, truth, rtol=0, atol=2e-6 * np.abs(truth).max())
