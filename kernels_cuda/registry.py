"""How a file of ops/ declares its ops, `torch.ops.mtlm.NAME`, and when their CUDA implementations are used.

Every op has a plain PyTorch implementation for any device and float type. The CUDA one replaces it for
tensors on a GPU once `library.load` has loaded the built file.
"""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor

from kernels_cuda.compiler import has_hopper

LIBRARY = torch.library.Library("mtlm", "DEF")
KERNEL_TYPES = (torch.bfloat16, torch.float32)
HOPPER = (9, 0)  # the one architecture that runs csrc/hopper.cuh

reference = SimpleNamespace()
"""The plain PyTorch implementation of every op, by name: what the kernels are compared with."""

_cuda: dict[str, Callable] = {}  # the ops whose CUDA implementation begins in Python
_kernels_loaded = False
_hopper: frozenset[int] = frozenset()  # numbers of the GPUs that have Hopper's own instructions


def declare(schema: str, *, fake: Callable | None = None, cuda: Callable | None = None) -> Callable:
    """Decorates an op's plain PyTorch implementation and makes the op known to PyTorch.

    Args:
        schema: "name(arguments) -> results", in PyTorch's notation.
        fake: the results without their values, for torch.compile. Not needed if the op only writes into its
            arguments.
        cuda: allocates the results and calls a kernel. Without it the built file implements the op under its
            own name, or the plain implementation runs on a GPU too.
    """
    name = schema.partition("(")[0]

    def register(plain: Callable) -> Callable:
        LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        # For every device and type; an implementation for CUDA takes precedence.
        LIBRARY.impl(name, plain, "CompositeExplicitAutograd")
        torch.library.register_fake(f"mtlm::{name}", fake or _no_results, lib=LIBRARY)
        setattr(reference, name, plain)
        if cuda is not None:
            _cuda[name] = cuda
        return plain

    return register


def declare_kernel(schema: str) -> None:
    """Makes known what the built file has for an op that returns new tensors: it writes into given ones.

    Memory is allocated in Python because PyTorch's stable ABI turns every error into a RuntimeError, and code
    that splits a batch when memory runs out must see torch.OutOfMemoryError.
    """
    LIBRARY.define(schema)


def _no_results(*arguments) -> None:
    """The fake of an op that only writes into its arguments."""


def load_kernels(file: Path) -> None:
    """Loads a built file; from now on the ops run on it.

    Raises:
        OSError: it does not load.
    """
    global _kernels_loaded, _hopper
    torch.ops.load_library(file)
    for name, function in _cuda.items():
        LIBRARY.impl(name, function, "CUDA")
    _kernels_loaded = True
    gpus = range(torch.cuda.device_count() if has_hopper(file) else 0)
    _hopper = frozenset(i for i in gpus if torch.cuda.get_device_capability(i) == HOPPER)


def kernels_loaded() -> bool:
    """Whether `torch.ops.mtlm` has its CUDA implementations in this process."""
    return _kernels_loaded


def on_kernels(*tensors: Tensor) -> bool:
    """Whether the CUDA kernels take these tensors and the type that autocast makes of the first."""
    return (
        kernels_loaded()
        and all(t.is_cuda and t.dtype in KERNEL_TYPES for t in tensors)
        and compute_type(tensors[0]) in KERNEL_TYPES
    )


def on_hopper(x: Tensor) -> bool:
    """Whether Hopper's own instructions are where this tensor is, and the kernels that have them loaded."""
    return x.device.index in _hopper  # asked once, when they are: torch.compile cannot ask


def products_run_on(x: Tensor, *parameters: Tensor, widths: tuple[int, ...]) -> bool:
    """Whether the products with epilogues take these: bfloat16 on Hopper, widths in steps of 16 bytes."""
    aligned = all(width % 8 == 0 for width in widths)
    return on_hopper(x) and on_kernels(x, *parameters) and compute_type(x) == torch.bfloat16 and aligned


def compute_type(x: Tensor) -> torch.dtype:
    """The type that a matrix product with x would have."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def wide_type(dtype: torch.dtype) -> torch.dtype:
    """The type of statistics and sums: at least float32."""
    return torch.promote_types(dtype, torch.float32)


def contiguous_rows(t: Tensor) -> Tensor:
    """The tensor itself if the elements of its last dimension are neighbours, else a copy."""
    return t if t.shape[-1] <= 1 or t.stride(-1) == 1 else t.contiguous()
