"""What the step is compiled to on the devices it runs on: micro-batches, dtype, attention, CUDA kernels,
unrolling, chunks, options of the compiler.

A setting that is given wins; the defaults of the others are here, with their reasons. Those for a TPU were
chosen by estimates of memory traffic (docs/LOG.md) that no TPU has confirmed.
"""

from typing import NamedTuple

import jax
from jax.sharding import Mesh

from core.attention import Choice, choose
from core.config import ModelConfig, compute_dtype
from core.errors import UserError
from core.loss import head_axes
from core.model import Compute
from core.ops import IN_PRODUCTS, Kernels, norms_run_on
from core.sharding import splits_weights
from train_tpu.config import JaxSettings, KernelsOption
from train_tpu.step import StepConfig

LOSS_CHUNK = 8192
# With kernels a logit has half the bytes and its gradient none of its own. For 16384 rows, the product that
# makes the gradient of 768 hidden states is 384 tiles of 128 x 256, 2.9 rounds of 132 multiprocessors; for
# 8192 rows 1.5 rounds, which take as long as 2.
KERNELS_LOSS_CHUNK = 16384
TPU_LOSS_CHUNK = 256
TPU_TOKENS = 8192
TPU_ON_CHIP = 112 * 2**20  # what arrays may take of a v5e's 128 MiB of vector memory; the rest is XLA's


def split_batch(config: JaxSettings, model: ModelConfig, mesh: Mesh) -> int:
    """Into how many micro-batches a batch is split: --grad-accum-steps, or what suits the devices.

    On a TPU, parts of at most `TPU_TOKENS` tokens per chip: the compiler then keeps a layer's activations in
    vector memory. Whether the batch falls into equal parts is `core.sharding.check_mesh`'s affair.
    """
    rows, rest = divmod(config.batch, mesh.shape["data"] * mesh.shape["fsdp"])
    if config.grad_accum_steps is not None:
        return config.grad_accum_steps
    if rest or mesh.devices.flat[0].platform != "tpu":
        return 1
    divisors = [n for n in range(1, rows + 1) if rows % n == 0]
    return next((n for n in divisors if rows // n * model.context <= TPU_TOKENS), rows)


class KernelsChoice(NamedTuple):
    """The CUDA kernels to use, None without, and in words why."""

    kernels: Kernels | None
    why: str

    def describe(self, model: ModelConfig, mesh: Mesh) -> str:
        """One line: what computes norms, rotation, SwiGLU or GELU, loss and AdamW, and why."""
        if self.kernels is None:
            return f"xla: {self.why}"
        rotation = "rotation of q and k" if model.positions == "rope" else "packing of q, k and v"
        in_product = self.kernels.product_types and model.head_size in self.kernels.product_head_sizes
        if in_product and not model.qk_norm and not splits_weights(mesh):
            rotation += " in their product (in bfloat16, without LoRA)"
        ours, xla = [rotation, "AdamW"], []
        if norms_run_on(self.kernels, model.d_model):
            ours.append("norms")
        else:
            widths = ", ".join(map(str, self.kernels.widths))
            xla.append(f"norms, since their width {model.d_model} is none of {widths}")
        if head_axes((model.vocab_size, model.d_model), mesh)[0] is None:
            ours.append("loss")
        else:
            xla.append("loss, since tensor divides the vocabulary")
        if (name := IN_PRODUCTS.get((model.mlp, model.biases))) is not None:
            if splits_weights(mesh):
                xla.append(f"{name}, since the mesh divides weights")
            elif not self.kernels.product_types:
                xla.append(f"{name}, which needs architecture 9.0")
            else:
                ours.append(f"{name} (in bfloat16, without LoRA)")
        return f"cuda: {', '.join(ours)}{''.join(f'; by XLA {part}' for part in xla)} ({self.why})"


def choose_kernels(requested: KernelsOption, device: jax.Device) -> KernelsChoice:
    """The CUDA kernels for a device. Without a built file they are compiled, where nvcc is (half a minute).

    Raises:
        UserError: "cuda" was requested and cannot be had.
    """
    if requested == "xla":
        return KernelsChoice(None, "as requested")
    if device.platform == "gpu":
        from kernels_cuda import xla

        found = KernelsChoice(*xla.load(device))
    else:
        found = KernelsChoice(None, f"there are no kernels for a {device.platform.upper()}")
    if requested == "cuda" and found.kernels is None:
        raise UserError(
            f"--kernels cuda cannot be used: {found.why}; --kernels auto trains without them, and `python -m "
            "kernels_cuda.doctor` says more"
        )
    return found


def compiler_options(platform: str) -> dict[str, bool]:
    """What makes XLA's matrix products on a GPU, said here since its own defaults change between releases.

    cuBLASLt, without products by Triton. On an H200 that is 2% faster in mtlm1-200m and 3% in mtlm2-40m with
    the kernels, 1% slower in mtlm2-40m without them.
    """
    if platform != "gpu":
        return {}
    return {"xla_gpu_enable_cublaslt": True, "xla_gpu_enable_triton_gemm": False}


def choose_step(
    config: JaxSettings, model: ModelConfig, mesh: Mesh, kernels: Kernels | None = None
) -> tuple[StepConfig, Choice]:
    """All that is compiled into the step on the devices of `mesh`, and why that attention."""
    platform = mesh.devices.flat[0].platform
    dtype = compute_dtype(config.dtype, platform)
    attention = choose(
        config.attention,
        platform=platform,
        dtype=dtype,
        head_dim=model.head_size,
        context=model.context,
        deterministic=config.deterministic,
    )
    tpu = platform == "tpu"
    # Unrolled layers ran 1.3 times as fast on an H200 (docs/LOG.md); a TPU's compiler takes minutes for them.
    unroll = (1 if tpu else model.n_layers) if config.unroll is None else config.unroll
    # On a TPU: a third of the memory (docs/LOG.md). Whether it is faster has not been measured.
    remat = config.remat or ("dots" if tpu else "none")
    compute = Compute(dtype, attention.name, unroll, remat, mesh, kernels)
    chunk = config.loss_chunk
    if chunk is None:
        chunk = tpu_loss_chunk(model) if tpu else LOSS_CHUNK if kernels is None else KERNELS_LOSS_CHUNK
    options = tuple(compiler_options(platform).items())
    watches = config.watch_every > 0
    step = StepConfig(model, config.optim, config.guard, compute, config.z_loss, chunk, options, watches)
    return step, attention


def tpu_loss_chunk(model: ModelConfig) -> int:
    """Rows whose logits a TPU holds at once.

    Few, if their logits (float32), the head (bfloat16) and its gradient (float32) all fit into the chip's
    vector memory: the compiler then keeps them there through the loop over the chunks. If not, every chunk
    reads and writes the gradient of the head in HBM, and chunks should be large.
    """
    on_chip = model.vocab_size * (model.d_model * (2 + 4) + TPU_LOSS_CHUNK * 4)
    return TPU_LOSS_CHUNK if on_chip <= TPU_ON_CHIP else LOSS_CHUNK
