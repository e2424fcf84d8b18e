"""CUDA kernels for norms, rotary embedding, loss and optimizer, in PyTorch and in JAX, and for decoding.

Optional: without a GPU or a compiler the formulas run in plain PyTorch or XLA. docs/KERNELS.md explains.
"""

from core.extras import require_extra

require_extra("torch", ("kernels_cuda.bench",))
