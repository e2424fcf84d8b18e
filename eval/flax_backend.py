"""Scoring with the Flax model: all devices, one compiled function per width."""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from core.config import ModelConfig
from core.generation import Generator
from core.model import Compute, Params, forward, logits
from core.sampling import Sampling
from core.sharding import BATCH_AXES, make_mesh, replicated
from eval.batching import BUDGET, CPU_BUDGET, Batch, Scores, chunks

CHUNK, CPU_CHUNK = 2048, 256  # positions whose logits are held at once per device
# A width is computed for a second or two: XLA's search for the fastest matrix product would take longer.
GPU_OPTIONS = {"xla_gpu_enable_triton_gemm": False, "xla_gpu_autotune_level": 0}


class FlaxBackend:
    """A model of core.model on all devices; rows and places are split over them."""

    compiled = True

    def __init__(self, config: ModelConfig, params: Params, dtype: str):
        """dtype: of activations. float32 means float32 products, too, where the hardware has shorter ones."""
        self.context = config.context
        self.mesh = make_mesh()
        self.n_devices = self.mesh.size
        platform = self.mesh.devices.flat[0].platform
        on_cpu = platform == "cpu"
        options = GPU_OPTIONS if platform == "gpu" else None
        self.budget = self.n_devices * (CPU_BUDGET if on_cpu else BUDGET)
        self._chunk = self.n_devices * (CPU_CHUNK if on_cpu else CHUNK)
        # The reference attention: most rows are far shorter than what the fast ones are made for.
        compute = Compute(dtype=dtype, mesh=self.mesh)
        self._precision = "highest" if dtype == "float32" else None
        self.params = jax.device_put(params, replicated(self.mesh))
        whole, rows = replicated(self.mesh), NamedSharding(self.mesh, P(BATCH_AXES))
        self._rows = rows
        self._hidden = jax.jit(
            functools.partial(_hidden, config, compute), out_shardings=whole, compiler_options=options
        )
        self._scores = jax.jit(
            functools.partial(_scores, config), out_shardings=whole, compiler_options=options
        )
        self._generator = Generator(config, Compute(dtype=dtype))

    def describe(self) -> str:
        """What computes, for the user."""
        device = self.mesh.devices.flat[0]
        return f"JAX on {self.n_devices} x {device.device_kind}, XLA attention"

    def start(self, batch: Batch) -> Any:
        """See `eval.batching.Backend`."""
        with jax.default_matmul_precision(self._precision):
            hidden = self._hidden(self.params, jax.device_put(batch.tokens, self._rows))
            parts = []
            for part in chunks(len(batch.place), self._chunk):
                place, target = batch.place[part], batch.target[part]
                fill = (0, self._chunk - len(place))
                arrays = jax.device_put((np.pad(place, fill), np.pad(target, fill)), self._rows)
                parts.append((self._scores(self.params, hidden, *arrays), len(place)))
        return parts

    def finish(self, started: Any) -> Scores:
        """See `eval.batching.Backend`."""
        parts = [(jax.device_get(scores), n) for scores, n in started]
        columns = zip(*([np.asarray(array)[:n] for array in scores] for scores, n in parts), strict=True)
        return Scores(*map(np.concatenate, columns))

    def stream(
        self, prompts: list[list[int]], sampling: Sampling, max_new_tokens: int, eos: int | None
    ) -> Iterator[list[int | None]]:
        """See `eval.batching.Backend`."""
        with jax.default_matmul_precision(self._precision):
            yield from self._generator.stream(self.params, prompts, sampling, max_new_tokens, eos)


def _hidden(
    config: ModelConfig, compute: Compute, params: Params, tokens: Int[Array, "B S"]
) -> Float[Array, "BS D"]:
    hidden = forward(config, params, tokens, compute)
    return hidden.reshape(-1, hidden.shape[-1])


def _scores(
    config: ModelConfig,
    params: Params,
    hidden: Float[Array, "BS D"],
    place: Int[Array, " N"],
    target: Int[Array, " N"],
) -> tuple[Float[Array, " N"], Bool[Array, " N"]]:
    scores = logits(config, params, hidden[place])
    picked = jnp.take_along_axis(scores, target[:, None], axis=-1)[:, 0]
    return picked - jax.nn.logsumexp(scores, axis=-1), scores.argmax(axis=-1) == target
