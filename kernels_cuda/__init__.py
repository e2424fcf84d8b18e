"""CUDA kernels for the PyTorch mirror: norms, rotary embedding, output head and loss, optimizer.

Optional: without a GPU or a compiler the same functions run in plain PyTorch. docs/KERNELS.md explains.
"""

from core.extras import require_extra

require_extra("torch")
