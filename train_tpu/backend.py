"""What the step is compiled to on the devices it runs on: micro-batches, dtype, attention, unrolling, chunks.

A setting that is given wins; the defaults of the others are here, with their reasons. Those for a TPU were
chosen by estimates of memory traffic (docs/LOG.md) that no TPU has confirmed.
"""

from jax.sharding import Mesh

from core.attention import Choice, choose
from core.config import ModelConfig
from core.model import Compute, compute_dtype
from train_tpu.config import RunConfig
from train_tpu.step import StepConfig

LOSS_CHUNK = 8192
TPU_LOSS_CHUNK = 256
TPU_TOKENS = 8192
TPU_ON_CHIP = 112 * 2**20  # what arrays may take of a v5e's 128 MiB of vector memory; the rest is XLA's


def split_batch(config: RunConfig, model: ModelConfig, mesh: Mesh) -> int:
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


def choose_step(config: RunConfig, model: ModelConfig, mesh: Mesh) -> tuple[StepConfig, Choice]:
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
    compute = Compute(dtype, attention.name, unroll, remat, mesh)
    chunk = config.loss_chunk
    if chunk is None:
        chunk = tpu_loss_chunk(model) if tpu else LOSS_CHUNK
    return StepConfig(model, config.optim, config.guard, compute, config.z_loss, chunk), attention


def tpu_loss_chunk(model: ModelConfig) -> int:
    """Rows whose logits a TPU holds at once.

    Few, if their logits (float32), the head (bfloat16) and its gradient (float32) all fit into the chip's
    vector memory: the compiler then keeps them there through the loop over the chunks. If not, every chunk
    reads and writes the gradient of the head in HBM, and chunks should be large.
    """
    on_chip = model.vocab_size * (model.d_model * (2 + 4) + TPU_LOSS_CHUNK * 4)
    return TPU_LOSS_CHUNK if on_chip <= TPU_ON_CHIP else LOSS_CHUNK
