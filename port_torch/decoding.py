"""How the commands that generate with PyTorch compute, said before PyTorch is imported."""

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True)
class Decoding:
    """What makes the tokens."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: the GPU if there is one."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto: bfloat16 on GPU, float32 on CPU."""
    backend: Literal["auto", "cuda", "torch"] = "auto"
    """Decoding implementation. auto: the CUDA kernels where they apply (bfloat16 on a GPU), else PyTorch."""
    tokenizer: str | None = None
    """mistral, bytes or a path to a tokenizer.json. Default: the folder's own."""
