"""Muon: momentum, orthogonalised matrix by matrix (Jordan et al. 2024, Liu et al. 2025).

The layers' matrices of one shape are one batch, so that a step has few and large products. On several devices
each computes the matrices that are dealt to it, and no product is computed twice.

Shapes: L layers, N matrices of one shape, M their smaller and K their larger side.
"""

import itertools
from collections import defaultdict
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float
from optax.contrib import MuonState, scale_by_muon

from core.leaves import get_leaf, path_names
from core.sharding import is_parallel, map_dealt, split_axes

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Jordan's: the steepest slope at 0 for singular values that end between 0.7 and 1.2."""
ITERATIONS = 5
EPS = 1e-8
RMS = 0.2
"""Of an update: about Adam's, so that one learning rate serves both (Liu et al. 2025, Moonlight)."""


def muon(momentum: float, dtype: str, mesh: Mesh | None) -> optax.GradientTransformation:
    """Gradients of stacked matrices [L, in, out] to updates of an RMS of 0.2, whatever their shape.

    Nesterov's momentum, both averages corrected for starting at 0 (Dozat 2016), is float32. It is
    orthogonalised in the type that the step computes in: bfloat16 on a GPU or a TPU, where float32 took a
    fifth of a step and gave no better curve (docs/LOG.md); float32 under --dtype float32 and on a CPU, which
    does not multiply bfloat16.

    The state is optax's, as checkpoints have it since the first; its coefficients are constants, not read.
    """

    def update(gradients: Any, state: MuonState, params: Any = None) -> tuple[Any, MuonState]:
        count = optax.safe_increment(state.count)
        mu = optax.tree.update_moment(gradients, state.mu, momentum, 1)
        ahead = jax.tree.map(
            lambda m, g: momentum * m + (1 - momentum) * g,
            optax.tree.bias_correction(mu, momentum, optax.safe_increment(count)),
            optax.tree.bias_correction(gradients, momentum, count),
        )
        return _orthogonalize(ahead, dtype, mesh), MuonState(count, mu, state.ns_coeffs)

    return optax.GradientTransformation(scale_by_muon(COEFFICIENTS).init, update)


def _orthogonalize(tree: Any, dtype: str, mesh: Mesh | None) -> Any:
    """Every matrix of the leaves [L, in, out] for itself; RMS 0.2, float32."""
    leaves, structure = jax.tree_util.tree_flatten_with_path(tree)
    alike = defaultdict(list)  # numbers of leaves whose matrices have one shape and lie alike
    turned = [_is_tall(path, x) for path, x in leaves]
    for i, (path, x) in enumerate(leaves):
        shape, spec = x.shape[1:], (None,) * 2
        if is_parallel(mesh):
            spec = (tuple(split_axes(path_names(path), x.shape, mesh.shape)) or (None,) * 3)[1:]
        order = -1 if turned[i] else 1
        alike[shape[::order], spec[::order]].append(i)
    done: list[Any] = [None] * len(leaves)
    for (shape, spec), numbers in alike.items():
        parts = [leaves[i][1].astype(dtype) for i in numbers]
        parts = [x.mT if turned[i] else x for i, x in zip(numbers, parts, strict=True)]
        stack = map_dealt(newton_schulz, jnp.concatenate(parts), P(None, *spec), mesh)
        ends = list(itertools.accumulate(len(x) for x in parts))[:-1]
        for i, x in zip(numbers, jnp.split(stack, ends), strict=True):
            scaled = x.astype(jnp.float32) * (RMS * max(shape) ** 0.5)
            done[i] = scaled.mT if turned[i] else scaled
    return jax.tree_util.tree_unflatten(structure, done)


def _is_tall(path: tuple, x: Float[Array, "L A B"]) -> bool:
    """Whether a leaf's matrices are turned: its smaller side comes first, and of equal ones the width."""
    n_in, n_out = x.shape[1:]
    return n_in > n_out or (n_in == n_out and get_leaf(path_names(path)).axes[1] != "width")


def newton_schulz(x: Float[Array, "N M K"]) -> Float[Array, "N M K"]:
    """Matrices with the singular vectors of x and singular values of about 1, by five products of
    a polynomial p(x x^T) with x.

    Everything is kept in the type of x, sums of products and norms are float32. What is added to a product is
    added to the polynomial, M x M, where it costs the least: a x + (...) x would read and write all of x once
    more.
    """
    a, b, c = COEFFICIENTS
    wide = x.astype(jnp.float32)
    norm = jnp.sqrt(jnp.sum(jnp.square(wide), axis=(1, 2), keepdims=True))
    x = (wide / (norm + EPS)).astype(x.dtype)
    identity = jnp.eye(x.shape[1], dtype=jnp.float32)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        square = (gram @ gram).astype(jnp.float32)
        polynomial = a * identity + b * gram.astype(jnp.float32) + c * square
        x = polynomial.astype(x.dtype) @ x
    return x
