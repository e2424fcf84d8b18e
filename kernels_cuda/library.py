"""PyTorch's CUDA implementations of the ops: `load` makes them run and says which file they are of.

Without one they run in plain PyTorch.
"""

import sys
from typing import Literal

import torch

import kernels_cuda.ops  # noqa: F401  declares them
from core.errors import UserError
from kernels_cuda import registry
from kernels_cuda.compiler import TORCH
from kernels_cuda.files import Source, find_file

Backend = Literal["auto", "cuda", "torch"]

_loaded: Source | None = None  # what `load` found, once a process


def find(compile_missing: bool = True) -> Source:
    """The file to use here: the built one, else one compiled for this GPU and kept, else none.

    Args:
        compile_missing: whether to compile (half a minute, once) where a compiler is; else it is only said.
    """
    if not torch.cuda.is_available():
        why = "PyTorch is built without CUDA" if torch.version.cuda is None else "no NVIDIA GPU was found"
        return Source(None, f"plain PyTorch, because {why}")
    if torch.__version__ < torch.torch_version.TorchVersion("2.10"):
        return Source(None, f"plain PyTorch, because PyTorch {torch.__version__} is older than 2.10")
    return find_file(TORCH, torch.cuda.get_device_capability(), "plain PyTorch", compile_missing)


def load(backend: Backend = "auto") -> Source:
    """Makes `torch.ops.mtlm` run on CUDA kernels where it can; says on stderr, once, what will run.

    Args:
        backend: "cuda" must get them; "torch" leaves them; "auto" takes them where they are.

    Raises:
        UserError: "cuda", and none are available.
    """
    global _loaded
    if backend == "torch":
        return Source(None, "plain PyTorch, as requested")
    first = _loaded is None
    if first:
        found = find()
        if found.file is not None:
            try:
                registry.load_kernels(found.file)
            except OSError as error:
                cause = error.__cause__ or error
                found = Source(None, f"plain PyTorch, because {found.file} does not load: {cause}")
        _loaded = found
    if backend == "cuda" and _loaded.file is None:
        raise UserError(
            f"cannot use the CUDA kernels: {_loaded.reason.removeprefix('plain PyTorch, because ')} "
            "(details: `python -m kernels_cuda.doctor`)"
        )
    if first:
        print(f"kernels: {_loaded.reason}", file=sys.stderr)
    return _loaded
