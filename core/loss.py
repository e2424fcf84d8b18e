"""Cross-entropy of the output head without the logits of a whole batch.

The plain formula stores float32 logits [B S, V]: 8 GiB for 64 x 1024 tokens and 32,000 ids, more than
everything else together. Here the rows go through head and softmax in chunks, and a chunk's gradients
are formed while its logits are available, so that the backward pass only scales what is there: three
matrix products in all, one chunk's logits in memory.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from core.data.examples import IGNORE
from core.ops import Kernels, products_run_on
from core.sharding import BATCH_AXES, is_parallel, split_axes


class LossSums(NamedTuple):
    """Sums over the targets that are not IGNORE, in nats."""

    total: Float[Array, ""]
    """What is minimised: cross-entropy + z_loss * lse^2. The gradient is that of this sum alone."""
    nll: Float[Array, ""]
    """The cross-entropy part, to report."""


def cross_entropy(
    hidden: Float[Array, "B S D"],
    table: Float[Array, "V D"],
    targets: Int[Array, "B S"],
    *,
    z_loss: float = 0.0,
    chunk: int = 8192,
    mesh: Mesh | None = None,
    kernels: Kernels | None = None,
) -> LossSums:
    """Sum of -log softmax(hidden table^T)[target] over all targets but `IGNORE`.

    Args:
        hidden: final hidden states; their type is that of the matrix products.
        table: the head, one row per id. Logits, softmax and the table's gradient are float32.
        z_loss: weight of the squared log-normaliser (Chowdhery et al. 2022, PaLM, uses 1e-4).
        chunk: the most rows whose logits are held at once per device; chunks are of equal size.
        mesh: if of several devices, each works on its own rows, and along `tensor` on its own part of
            the vocabulary where that can be divided; the table's gradient is summed over them once.
        kernels: where gradients are made and every device has the whole vocabulary, the softmax runs on
            them. Logits then have the type of `hidden`, and their gradient replaces them; on a Hopper GPU
            they are never stored. Without gradients, as in an evaluation, they are float32 all the same.
    """
    return LossSums(*_sums(hidden, table, targets, z_loss, chunk, mesh, kernels))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5, 6))
def _sums(hidden, table, targets, z_loss, chunk, mesh, kernels):
    return _over_devices(False, hidden, table, targets, z_loss, chunk, mesh, kernels)


def _sums_forward(hidden, table, targets, z_loss, chunk, mesh, kernels):
    total, nll, d_hidden, d_table = _over_devices(True, hidden, table, targets, z_loss, chunk, mesh, kernels)
    # Only the table's type is kept from the inputs, as an empty array: the gradients are ready.
    return (total, nll), (d_hidden, d_table, table[:0])


def _sums_backward(z_loss, chunk, mesh, kernels, residuals, cotangents):
    d_hidden, d_table, like = residuals
    scale, _ = cotangents  # of `total`; `nll` is for reports and passes no gradient
    return (d_hidden * scale).astype(d_hidden.dtype), (d_table * scale).astype(like.dtype), None


_sums.defvjp(_sums_forward, _sums_backward)


def head_axes(table_shape: tuple[int, ...], mesh: Mesh | None) -> tuple[str | None, str | None]:
    """The axes of the mesh that vocabulary and width of a head [V, D] are split over; None: not split."""
    axes = split_axes(("embed", "table"), table_shape, mesh.shape) if is_parallel(mesh) else P()
    return (axes[0], axes[1]) if axes else (None, None)


def _over_devices(with_gradients, hidden, table, targets, z_loss, chunk, mesh, kernels):
    vocabulary, width = head_axes(table.shape, mesh)
    kernels = kernels if with_gradients and vocabulary is None else None
    local = functools.partial(
        _chunked, with_gradients=with_gradients, z_loss=z_loss, chunk=chunk, kernels=kernels
    )
    table = table.astype(hidden.dtype)  # before the devices exchange it
    if not is_parallel(mesh):
        return local(hidden, table, targets)

    def summed(hidden, table, targets):
        total, nll, *gradients = local(hidden, table, targets, vocabulary=vocabulary)
        total, nll = jax.lax.psum((total, nll), BATCH_AXES)
        if not with_gradients:
            return total, nll
        d_hidden, d_table = gradients
        if width is None:
            return total, nll, d_hidden, jax.lax.psum(d_table, BATCH_AXES)
        d_table = jax.lax.psum_scatter(d_table, width, scatter_dimension=1, tiled=True)
        return total, nll, d_hidden, jax.lax.psum(d_table, "data")

    rows = P(BATCH_AXES)
    inputs = (rows, P(vocabulary), rows)
    outputs = (P(), P(), rows, P(vocabulary, width)) if with_gradients else (P(), P())
    shard = jax.shard_map(summed, mesh=mesh, in_specs=inputs, out_specs=outputs, check_vma=False)
    return shard(hidden, table, targets)


@jax.named_scope("loss")
def _chunked(hidden, weights, targets, *, with_gradients, z_loss, chunk, kernels, vocabulary=None):
    """The sums, and with gradients also d total / d hidden and d total / d table, of one device's rows.

    vocabulary: the axis of the mesh that the table's rows are split over; what is computed of them is then
    put together, but for the table's gradient.
    """
    shape = hidden.shape
    n = shape[0] * shape[1]
    chunk = -(-n // -(-n // chunk))
    padding = -n % chunk
    hidden = jnp.pad(hidden.reshape(n, -1), ((0, padding), (0, 0))).reshape(-1, chunk, shape[-1])
    targets = jnp.pad(targets.reshape(n), (0, padding), constant_values=IGNORE).reshape(-1, chunk)
    zero = jnp.zeros((), jnp.float32)
    size = weights.shape[0]
    in_product = products_run_on(kernels, hidden, size)
    first = 0 if vocabulary is None else size * jax.lax.axis_index(vocabulary)

    def one(carry, rows):
        total, nll, d_table = carry
        h, target = rows
        if in_product:
            exps, scale, total_rows, nll_rows = kernels.loss_product(h, weights, target, z_loss)
            scale = scale[:, None]
            d_h = (jnp.dot(exps, weights, preferred_element_type=jnp.float32) * scale).astype(h.dtype)
            scaled = (h * scale).astype(h.dtype)
            d_table += jnp.dot(exps.T, scaled, preferred_element_type=jnp.float32)
            return (total + total_rows.sum(), nll + nll_rows.sum(), d_table), d_h
        if kernels is not None:
            d_logits, total_rows, nll_rows = kernels.softmax_loss(jnp.dot(h, weights.T), target, z_loss)
            d_h = jnp.dot(d_logits, weights)
            d_table += jnp.dot(d_logits.T, h, preferred_element_type=jnp.float32)
            return (total + total_rows.sum(), nll + nll_rows.sum(), d_table), d_h
        logits = jnp.dot(h, weights.T, preferred_element_type=jnp.float32)
        valid = target != IGNORE
        lse = jax.nn.logsumexp(logits, axis=-1)
        # A target beyond the last row is filled with NaN.
        picked = jnp.take_along_axis(logits, jnp.maximum(target - first, 0)[:, None], axis=-1)[:, 0]
        if vocabulary is not None:
            lse = jax.nn.logsumexp(jax.lax.all_gather(lse, vocabulary), axis=0)
            is_last = first == size * (jax.lax.axis_size(vocabulary) - 1)
            is_ours = (target >= first) & ((target < first + size) | is_last)
            picked = jax.lax.psum(jnp.where(is_ours, picked, 0), vocabulary)
        nll_rows = jnp.where(valid, lse - picked, 0)
        nll += nll_rows.sum()
        total += (nll_rows + jnp.where(valid, z_loss * lse**2, 0)).sum()
        if not with_gradients:
            return (total, nll, d_table), None
        is_target = (target - first)[:, None] == jnp.arange(size)  # nowhere, for what does not count
        softmax_weight = jnp.where(valid, 1 + 2 * z_loss * lse, 0)[:, None]
        d_logits = (softmax_weight * jnp.exp(logits - lse[:, None]) - is_target).astype(h.dtype)
        d_h = jnp.dot(d_logits, weights, preferred_element_type=jnp.float32)
        if vocabulary is not None:
            d_h = jax.lax.psum(d_h, vocabulary)
        d_table += jnp.dot(d_logits.T, h, preferred_element_type=jnp.float32)
        return (total, nll, d_table), d_h.astype(h.dtype)

    d_table = jnp.zeros(weights.shape, jnp.float32) if with_gradients else None
    (total, nll, d_table), d_hidden = jax.lax.scan(one, (zero, zero, d_table), (hidden, targets))
    if not with_gradients:
        return total, nll
    return total, nll, d_hidden.reshape(n + padding, -1)[:n].reshape(shape), d_table
