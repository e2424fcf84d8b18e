"""Run by test_transform on eight simulated devices: a grown leaf lies as its source did, and is the same."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from core.sharding import make_mesh
from stacking.plan import make_plan
from stacking.transform import grow
from tests.checks import require
from tests.models import LLAMA, random_params

mesh = make_mesh()
require(mesh.size == 8, mesh)
plain = random_params(LLAMA)
# d_model 48 and d_mlp 80 divide by 8: matrices are split over their last axis, all else is on every device.
spec = jax.tree.map(lambda leaf: P(*[None] * (leaf.ndim - 1), "data") if leaf.ndim == 3 else P(), plain)
shardings = jax.tree.map(lambda s: NamedSharding(mesh, s), spec, is_leaf=lambda s: isinstance(s, P))
split = jax.device_put(plain, shardings)
for operator in ("stack", "identity"):
    plan = make_plan(operator, 3)
    expected = grow(plain, plan)
    for grown in (grow(split, plan), jax.jit(functools.partial(grow, plan=plan))(split)):
        jax.tree.map(np.testing.assert_array_equal, grown, expected)
        for leaf, sharding in zip(jax.tree.leaves(grown), jax.tree.leaves(shardings), strict=True):
            require(leaf.sharding.is_equivalent_to(sharding, leaf.ndim), leaf.shape, leaf.sharding)
            require(jnp.issubdtype(leaf.dtype, jnp.floating), leaf.dtype)
