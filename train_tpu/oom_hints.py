"""Which setting would make a step fit, without compiling it again.

What the backward pass keeps is known before compilation: tracing gives the shapes. It is compared with
what the current settings would keep, so that what the compiler makes of either need not be known.
"""

import contextlib
import dataclasses
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from core.documents import number_documents
from core.errors import UserError
from core.model import abstract_params, forward
from train_tpu.step import StepConfig


def kept_bytes(config: StepConfig, rows: int) -> int:
    """Bytes that the backward pass of `rows` sequences on one device keeps from the forward pass."""
    compute = dataclasses.replace(config.compute, mesh=None)
    params = abstract_params(config.model)
    tokens = jax.ShapeDtypeStruct((rows, config.model.context), jnp.int32)

    def backward(params, tokens):
        documents = number_documents(tokens, config.documents)
        return jax.vjp(
            lambda params: forward(config.model, params, tokens, compute, documents=documents), params
        )[1]

    leaves = jax.tree.leaves(jax.eval_shape(backward, params, tokens))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)


def candidates(config: StepConfig, grad_accum_steps: int, rows: int) -> Iterator[tuple[str, StepConfig, int]]:
    """Settings that need less memory, those that cost least first: flags, config, grad_accum_steps."""
    order = ("none", "dots", "full")
    for remat in order[order.index(config.compute.remat) :]:
        step = dataclasses.replace(config, compute=dataclasses.replace(config.compute, remat=remat))
        flag = "" if remat == config.compute.remat else f"--remat {remat} "
        for parts in _parts(grad_accum_steps, rows):
            if flag or parts != grad_accum_steps:
                yield (
                    (flag + (f"--grad-accum-steps {parts}" if parts != grad_accum_steps else "")).strip(),
                    step,
                    parts,
                )


def _parts(grad_accum_steps: int, rows: int) -> list[int]:
    """Numbers of micro-batches that leave whole rows per device; `rows` are those of a step on one."""
    return [n for n in range(grad_accum_steps, rows + 1) if rows % n == 0 and n % grad_accum_steps == 0]


def advice(config: StepConfig, rows: int, grad_accum_steps: int, missing: float) -> str:
    """What to change so that `missing` fewer bytes per device are needed, by estimate.

    rows: sequences of a step on one device.
    """
    now = kept_bytes(config, rows // grad_accum_steps)
    # Accumulation needs room for the sum of the gradients.
    gradients = 4 * config.model.n_params
    fitting = []
    for flags, step, parts in candidates(config, grad_accum_steps, rows):
        extra = gradients if parts > 1 and grad_accum_steps == 1 else 0
        saved = now - kept_bytes(step, rows // parts) - extra
        if saved >= missing:
            fitting.append((parts, saved, flags))
    if not fitting:
        return (
            "by estimate neither --remat full nor --grad-accum-steps would do: take a smaller --batch or "
            "more chips"
        )
    _, saved, flags = min(fitting, key=lambda entry: entry[0])
    return f"{flags} would save about {saved / 2**30:.1f} GiB (an estimate from the shapes, not compiled)"


@contextlib.contextmanager
def out_of_memory_explained(batch: int, grad_accum_steps: int) -> Iterator[None]:
    """Turns JAX's out-of-memory error, from compiling or running the step, into advice.

    Raises:
        UserError: a device is out of memory.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise UserError(
            f"out of memory at batch {batch}, --grad-accum-steps {grad_accum_steps}: try --grad-accum-steps "
            f"{2 * grad_accum_steps} (half the activations), then --remat full; when resuming, add "
            "--allow-change grad_accum_steps remat"
        ) from error
